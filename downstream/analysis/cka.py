"""How alike two tokens see the same images: linear CKA between all pairs of tokens, exact and by minibatches.

Linear CKA (Kornblith et al., 2019, arXiv 1905.00414) compares what two sets of features say about which images are
alike. It is 1 for features that differ by a rotation and a scale. The exact value over n images is biased upwards:
independent features of width c give about c / (n + c), not 0. The minibatch estimator (Nguyen, Raghu and Kornblith,
2021, arXiv 2010.15327) averages the unbiased HSIC of Song et al. (2012) and has no such floor. Both are reported,
with the largest difference between them.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from mte_bench.errors import UserError
from mte_bench.plotting import picture

Array = np.ndarray

PRINTED = 16  # up to so many tokens, the value is printed in each cell


def linear_cka(features: Sequence[Array]) -> Array:
    """Linear CKA of every pair of t feature sets, each (n, c_t) over the same n images, as a (t, t) matrix in [0, 1].

    With centred X and Y: ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), in float64. Each set is multiplied once with all sets
    stacked, so that no more than c_t times the sum of the widths is held.
    """
    centred = [_centre(x) for x in features]
    stacked = np.concatenate(centred, axis=1)  # n, sum of the widths
    starts = np.cumsum([0, *(x.shape[1] for x in centred)])[:-1]
    cross = np.empty((len(centred), len(centred)))
    for index, x in enumerate(centred):
        product = x.T @ stacked[:, starts[index] :]
        squares = np.einsum("ij,ij->j", product, product)
        cross[index, index:] = cross[index:, index] = np.add.reduceat(squares, starts[index:] - starts[index])
    return _normalise(cross)


def minibatch_cka(features: Sequence[Array], batch: int = 256, passes: int = 10, seed: int = 0) -> Array:
    """The minibatch estimate of linear CKA of every pair of t feature sets (n, c_t), as a (t, t) matrix.

    Each pass shuffles the images and cuts them into whole batches (one batch of all n, once, where n is smaller);
    the unbiased HSIC is averaged over batches and passes before numerator is divided by denominator. Values may be
    a little below 0 for unrelated tokens. Raises ``UserError`` where there are too few images for an estimate.
    """
    centred = [_centre(x) for x in features]  # HSIC_1 does not change, rounding does
    n = len(centred[0])
    if n < 4:
        raise UserError(f"CKA of {n} images: the unbiased estimator needs 4 at least; raise --count or use more images")
    generator = np.random.default_rng(seed)
    batch, passes = (n, 1) if n <= batch else (batch, passes)
    total = np.zeros((len(centred), len(centred)))
    for _ in range(passes):
        order = generator.permutation(n)
        for chosen in order[: n - n % batch].reshape(-1, batch):
            total += unbiased_hsic([x[chosen] for x in centred])
    if (np.diag(total) <= 0).any():
        raise UserError(f"CKA of {n} images: too few for the unbiased estimator; raise --count or use more images")
    return _normalise(total)


def unbiased_hsic(features: Sequence[Array]) -> Array:
    """HSIC_1 with linear kernels of every pair of t feature sets (n, c_t), n >= 4, as a (t, t) matrix.

    With K and L whose diagonals are set to 0: (tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1) / (n(n-3)).
    Source: Song et al. (2012), equation 5.
    """
    kernels = np.stack([x @ x.T for x in features])  # t, n, n
    count, n, _ = kernels.shape
    kernels[:, range(n), range(n)] = 0
    flat, rows = kernels.reshape(count, n * n), kernels.sum(axis=2)
    sums = rows.sum(axis=1)
    return (flat @ flat.T + np.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def mean_between(matrix: Array, rows: Sequence[int], columns: Sequence[int] | None = None) -> float:
    """The mean of ``matrix`` over ``rows`` x ``columns``; without ``columns``, over the pairs of different ``rows``."""
    if columns is not None:
        return float(matrix[np.ix_(rows, columns)].mean())
    inner = matrix[np.ix_(rows, rows)]
    return float(inner[~np.eye(len(rows), dtype=bool)].mean())


def refuse_constant(features: Sequence[Array], names: Sequence[str]) -> None:
    """Raise ``UserError`` for a token that is the same for every image, to float32's rounding: its CKA is undefined."""
    for name, x in zip(names, features, strict=True):
        if np.linalg.norm(_centre(x)) <= 1e-6 * np.linalg.norm(x.astype(np.float64)):
            raise UserError(f"token '{name}': the same for every image, so its CKA is undefined; the encoder has collapsed")


def draw_cka(path: str | Path, matrix: Array, names: Sequence[str], title: str) -> None:
    """Write the heat map of a (t, t) CKA matrix; white lines part the kinds of tokens (names alike but for their number)."""
    count = len(names)
    cell = 0.52 if count <= PRINTED else max(0.2, 8 / count)
    side = max(2.6, cell * count)
    with picture(path, side + 2.4, side + 1.5) as figure:
        axes = figure.add_subplot()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
        axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
        axes.tick_params(length=0)
        axes.set_title(title, loc="left", fontsize=10)
        for border in _borders(names):
            axes.axhline(border, color="white", linewidth=2)
            axes.axvline(border, color="white", linewidth=2)
        if count <= PRINTED:
            for row in range(count):
                for column in range(count):
                    value = matrix[row, column]
                    colour = "black" if value > 0.6 else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.8)


def _borders(names: Sequence[str]) -> list[float]:
    sizes = [len(list(group)) for _, group in groupby(names, key=lambda name: re.sub(r"[\s_]*\d+$", "", name))]
    return [float(edge) - 0.5 for edge in np.cumsum(sizes)[:-1]]


def _centre(x: Array) -> Array:
    x = x.astype(np.float64)
    return x - x.mean(axis=0)


def _normalise(hsic: Array) -> Array:
    scale = np.sqrt(np.diag(hsic))
    return hsic / np.outer(scale, scale)
