"""How sure a number is: intervals over images, and tests of two encoders on the same images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
CELLS = 256  # distinct values up to which the bootstrap of other than 0/1 values draws each value's count exactly
EXACT_PAIRS = 25  # with fewer discordant pairs McNemar's test is the exact one, otherwise its mid-p version


class PairedDifference(NamedTuple):
    """Mean of ``a - b`` over the same images and its 95 % interval, in the unit of the values."""

    difference: float
    low: float
    high: float


def bootstrap_ci(values: ArrayLike, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the mean of ``values`` (``n``, one per image), in their unit.

    Where all values are 0 or 1 the resampled mean is binomial: the interval then consists of its exact quantiles, what
    infinitely many draws would give, and ``seed`` and ``draws`` have no effect. Otherwise ``draws`` resamples are
    drawn as counts of the distinct values; beyond 256 of those, of 256 cells of equal width between the smallest
    and the largest, what a cell contributes to the sum being normal with the mean and variance of its members.
    Raises ``ValueError`` for no values or non-finite ones.
    """
    x = np.asarray(values, dtype=np.float64).ravel()
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError("bootstrap_ci needs at least one value, and finite ones")
    tail = (1 - LEVEL) / 2
    if ((x == 0) | (x == 1)).all():
        n = x.size
        cumulative = np.cumsum(_binomial(n, float(x.mean())))
        low, high = np.searchsorted(cumulative, (tail, 1 - tail)) / n
        return float(low), float(high)
    means, variances, sizes = _cells(x)
    counts = np.random.default_rng(seed).multinomial(x.size, sizes / x.size, size=draws)
    sums = counts @ means
    if variances.any():
        noise = np.random.default_rng((seed, 1)).standard_normal(draws)
        sums += noise * np.sqrt(counts @ variances)
    low, high = np.quantile(sums / x.size, (tail, 1 - tail))
    return float(low), float(high)


def paired_bootstrap(a: ArrayLike, b: ArrayLike, seed: int = 0, draws: int = 10_000) -> PairedDifference:
    """Mean of ``a - b`` (each ``n``, the same images in the same order) with its 95 % percentile-bootstrap interval.

    Images are resampled, so both encoders always see the same ones. Raises ``ValueError`` for different lengths.
    """
    difference = _pairs(a, b)
    return PairedDifference(float(difference.mean()), *bootstrap_ci(difference, seed, draws))


def mcnemar(a_correct: ArrayLike, b_correct: ArrayLike) -> float:
    """Two-sided p-value of McNemar's test that a and b (each ``n`` of true/false or 1/0) are right equally often.

    Only the images count on which one is right and the other wrong. With fewer than 25 of them the test is the exact
    binomial one; otherwise its mid-p version, which keeps the level without the exact test's loss of power
    (Fagerland, Lydersen and Laake, 2013). 1.0 where there is none. Raises ``ValueError`` for different lengths.
    """
    difference = _pairs(a_correct, b_correct)
    a_only, b_only = int((difference > 0).sum()), int((difference < 0).sum())
    pairs = a_only + b_only
    if pairs == 0:
        return 1.0
    probabilities = _binomial(pairs, 0.5)
    fewer = min(a_only, b_only)
    exact = 2 * float(probabilities[: fewer + 1].sum())
    return min(1.0, exact if pairs < EXACT_PAIRS else exact - float(probabilities[fewer]))


def _pairs(a: ArrayLike, b: ArrayLike) -> Floats:
    x, y = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if x.size != y.size:
        raise ValueError(f"paired values must be of the same images: {x.size} and {y.size} values")
    return x - y


def _binomial(n: int, p: float) -> Floats:
    """Probabilities of 0 to ``n`` successes, from the ratios of neighbours so that no factorial overflows."""
    result = np.zeros(n + 1)
    if p in (0.0, 1.0):
        result[round(p * n)] = 1.0
        return result
    k = np.arange(n)
    logarithms = np.concatenate([[0.0], np.cumsum(np.log(n - k) - np.log(k + 1) + np.log(p) - np.log1p(-p))])
    result[:] = np.exp(logarithms - logarithms.max())
    return result / result.sum()


def _cells(x: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Mean, variance and number of the values in each cell; a cell is one value where there are few distinct ones."""
    distinct, cell = np.unique(x, return_inverse=True)
    if distinct.size > CELLS:
        cell = np.minimum(((x - x.min()) / np.ptp(x) * CELLS).astype(np.int64), CELLS - 1)
        cell = np.unique(cell, return_inverse=True)[1]
    sizes = np.bincount(cell)
    means = np.bincount(cell, x) / sizes
    variances = np.zeros_like(means) if distinct.size <= CELLS else np.bincount(cell, (x - means[cell]) ** 2) / sizes
    return means, variances, sizes
