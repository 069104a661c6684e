"""Intervals and tests against closed forms, against scipy, and against the plain resampling that they stand for."""

import time

import numpy as np
import pytest
from scipy import stats

from mte_bench.statistics import bootstrap_ci, mcnemar, paired_bootstrap


def plain_bootstrap(values, draws=4000, seed=1):
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.quantile(np.asarray(values)[chosen].mean(axis=1), (0.025, 0.975))


@pytest.mark.parametrize(("n", "right"), [(1, 1), (7, 3), (100, 100), (100, 0), (3925, 3000), (50_000, 36_123)])
def test_interval_of_an_accuracy_is_the_exact_binomial_one(n, right):
    values = np.arange(n) < right
    expected = stats.binom.ppf((0.025, 0.975), n, right / n) / n
    assert bootstrap_ci(values) == pytest.approx(tuple(expected), abs=1e-12)


def test_interval_of_an_accuracy_is_what_plain_resampling_gives():
    values = np.random.default_rng(0).random(400) < 0.7
    assert bootstrap_ci(values) == pytest.approx(tuple(plain_bootstrap(values)), abs=0.006)


@pytest.mark.parametrize("n", [40, 200, 3000])
def test_interval_of_other_values_is_what_plain_resampling_gives(n):
    values = np.random.default_rng(n).lognormal(0, 1.5, n)  # skew: a normal interval would be off
    low, high = plain_bootstrap(values)
    assert bootstrap_ci(values) == pytest.approx((low, high), abs=0.04 * (high - low))


def test_one_extreme_value_among_many_keeps_its_poisson_counts():
    values = np.random.default_rng(0).normal(0, 1e-3, 2000)
    values[7] = 2000.0  # drawn 0 to 3 times: the interval is that of a Poisson count of mean 1
    assert bootstrap_ci(values) == pytest.approx((0, 3), abs=1e-2)


def test_values_that_an_extreme_one_squeezes_into_one_cell_still_vary():
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, 1_000_000)
    values[7] = 256.0  # the others share one of the cells between 0 and 256
    sums = values[:7].sum() + values[8:].sum() + 256 * rng.poisson(1, 200_000) + np.sqrt(1e6 / 12) * rng.normal(size=200_000)
    low, high = np.quantile(sums / 1e6, (0.025, 0.975))
    assert bootstrap_ci(values) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_interval_covers_the_mean_in_95_of_100_samples():
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        low, high = bootstrap_ci(rng.exponential(1.0, 300), draws=500)
        covered.append(low <= 1.0 <= high)
    assert 0.90 < np.mean(covered) < 0.985


@pytest.mark.parametrize("kind", ["zero-one", "difference", "continuous"])
def test_ten_thousand_draws_over_fifty_thousand_images_take_well_under_a_second(kind):
    rng = np.random.default_rng(0)
    values = {
        "zero-one": rng.random(50_000) < 0.7,
        "difference": rng.integers(-1, 2, 50_000),
        "continuous": rng.normal(size=50_000),
    }[kind]
    start = time.process_time()
    bootstrap_ci(values)
    assert time.process_time() - start < 0.8


def test_the_seed_decides_the_draws():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_ci(values, seed=1) == bootstrap_ci(values, seed=1) != bootstrap_ci(values, seed=2)


def test_paired_interval_is_narrower_than_that_of_unpaired_images():
    rng = np.random.default_rng(0)
    easy = rng.random(2000) < 0.7
    a, b = easy.astype(float), easy & (rng.random(2000) < 0.97)  # b fails on a few more
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    # Standard error of a mean of differences, in closed form.
    assert (high - low) / (2 * 1.96) == pytest.approx(np.std(a - b) / np.sqrt(2000), rel=0.03)
    assert high - low < 0.5 * np.diff(bootstrap_ci(a))[0]


def discordant(a_only, b_only, both=10):
    a = np.r_[np.ones(a_only), np.zeros(b_only), np.ones(both)]
    b = np.r_[np.zeros(a_only), np.ones(b_only), np.ones(both)]
    return a, b


@pytest.mark.parametrize(("a_only", "b_only"), [(1, 0), (5, 5), (3, 9), (20, 4), (0, 24)])
def test_mcnemar_of_few_pairs_is_the_exact_binomial_test(a_only, b_only):
    expected = stats.binomtest(a_only, a_only + b_only, 0.5).pvalue
    assert mcnemar(*discordant(a_only, b_only)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("a_only", "b_only"), [(15, 10), (30, 30), (200, 150), (5000, 5200)])
def test_mcnemar_of_many_pairs_is_the_mid_p_test(a_only, b_only):
    fewer, pairs = min(a_only, b_only), a_only + b_only
    below, at = stats.binom.cdf(fewer - 1, pairs, 0.5), stats.binom.pmf(fewer, pairs, 0.5)
    expected = min(1.0, 2 * (below + at / 2))
    assert mcnemar(*discordant(a_only, b_only)) == pytest.approx(expected, rel=1e-9)
    chi2 = stats.chi2.sf((a_only - b_only) ** 2 / pairs, 1)  # the large-sample form
    assert mcnemar(*discordant(a_only, b_only)) == pytest.approx(chi2, abs=0.02)


def test_mcnemar_of_no_discordant_pair_and_its_symmetry():
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    a, b = discordant(40, 22)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_values_that_cannot_be_paired_or_averaged_are_refused():
    with pytest.raises(ValueError, match="same images"):
        paired_bootstrap([1, 0], [1])
    with pytest.raises(ValueError, match="same images"):
        mcnemar([1, 0], [1])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_ci([])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_ci([0.5, float("nan")])
