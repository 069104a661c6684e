"""Two kinds of encoder on the same images: the mean over seeds of who is right on which image, and what chance makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm

import numpy as np

from mte_bench.dense.resampling import interval_of, percent_interval
from mte_bench.statistics import bootstrap_ci, mcnemar, paired_bootstrap
from reports.collect import SEED, Entry
from reports.predictions import Predictions


@dataclass(frozen=True)
class Value:
    """A cell over its seeds, in percent."""

    value: float
    """The mean over seeds."""
    interval: tuple[float, float] | None
    """95 % over images; None where it is not known (several seeds of which one has no predictions)."""
    seeds: tuple[tuple[SEED, float], ...]
    """Each seed and its value."""
    images: int

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for one seed."""
        values = [value for _, value in self.seeds]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class SeedDifference:
    """One seed under a cell and under what it is compared with, in percent and percentage points."""

    seed: SEED
    plain: float
    value: float
    interval: tuple[float, float] | None
    p_value: float | None
    """McNemar's test on this seed's images; None for what is no share of right images."""

    @property
    def difference(self) -> float:
        """``value - plain``."""
        return self.value - self.plain


@dataclass(frozen=True)
class Comparison:
    """A cell minus its baseline, in percentage points."""

    difference: float
    interval: tuple[float, float] | None
    """95 % over images of the mean over seeds; None where predictions are missing, so that no images can be paired."""
    seeds: tuple[SeedDifference, ...]
    """Each seed that both have, or the two single encoders; empty where means over different seeds are compared."""

    @property
    def spread(self) -> float | None:
        """The standard deviation of the differences over seeds (n - 1); None for less than two."""
        return float(np.std([seed.difference for seed in self.seeds], ddof=1)) if len(self.seeds) > 1 else None

    @property
    def p_value(self) -> float | None:
        """McNemar's test; None for several seeds, whose predictions on one image are not independent."""
        return self.seeds[0].p_value if len(self.seeds) == 1 else None


def summarise(cell: Mapping[SEED, Entry], metric: str, predictions: Predictions) -> Value | None:
    """The value of a cell with its interval over images and its seeds; None if it has no finite value."""
    measured = _finite(cell, metric)
    if not measured:
        return None
    metrics = {seed: entry.record.metrics[metric] for seed, entry in measured.items()}
    seeds = tuple((seed, metric.value) for seed, metric in metrics.items())
    first = next(iter(metrics.values()))
    if len(seeds) == 1:
        known = first.ci95 is not None and np.isfinite(first.ci95).all()
        return Value(first.value, first.ci95 if known else None, seeds, first.n)
    entries = list(measured.values())
    mean = float(np.mean([value for _, value in seeds]))
    if (drawn := predictions.resampled(entries, metric)) is not None:
        interval = percent_interval(drawn.mean(axis=0), mean)
    else:
        right = predictions.stacked(entries, metric)
        interval = None if right is None else _points(bootstrap_ci(right.sum(axis=0)), len(right))
    return Value(mean, interval, seeds, first.n)


def compare(cell: Mapping[SEED, Entry], plain: Mapping[SEED, Entry], metric: str, predictions: Predictions) -> Comparison | None:
    """``cell - plain`` over the seeds that both have; None if they have none in common."""
    ours, baseline = _finite(cell, metric), _finite(plain, metric)
    common = [seed for seed in ours if seed in baseline]
    if not common:
        return None
    seeds = tuple(_one_seed(seed, ours[seed], baseline[seed], metric, predictions) for seed in common)
    if len(seeds) == 1:
        interval = seeds[0].interval
    else:
        interval = _interval([ours[seed] for seed in common], [baseline[seed] for seed in common], metric, predictions)
    return Comparison(float(np.mean([seed.difference for seed in seeds])), interval, seeds)


def compare_any(
    cell: Mapping[SEED, Entry], other: Mapping[SEED, Entry], metric: str, predictions: Predictions
) -> Comparison | None:
    """``cell - other`` seed by seed, or of their means where they have no seed in common; None if one has no finite value."""
    ours, theirs = (list(_finite(found, metric).values()) for found in (cell, other))
    if (common := compare(cell, other, metric, predictions)) is not None or not ours or not theirs:
        return common
    if len(ours) == len(theirs) == 1:
        pair = _one_seed(None, ours[0], theirs[0], metric, predictions)
        return Comparison(pair.difference, pair.interval, (pair,))
    means = (float(np.mean([entry.record.metrics[metric].value for entry in entries])) for entries in (ours, theirs))
    return Comparison(next(means) - next(means), _interval(ours, theirs, metric, predictions), ())


def _interval(
    ours: Sequence[Entry], theirs: Sequence[Entry], metric: str, predictions: Predictions
) -> tuple[float, float] | None:
    """The paired interval of the difference of two means over encoders; None if images cannot be paired."""
    if (drawn := predictions.resampled([*ours, *theirs], metric)) is not None:
        mean, other = (np.mean([entry.record.metrics[metric].value for entry in entries]) for entries in (ours, theirs))
        return interval_of(drawn[: len(ours)].mean(axis=0) - drawn[len(ours) :].mean(axis=0), float(mean - other))
    right = predictions.stacked([*ours, *theirs], metric)
    if right is None:
        return None
    common = lcm(len(ours), len(theirs))
    sums = (
        right[: len(ours)].sum(axis=0) * (common // len(ours)),
        right[len(ours) :].sum(axis=0) * (common // len(theirs)),
    )
    return _points(paired_bootstrap(*sums)[1:], common)


def _one_seed(seed: SEED, entry: Entry, plain: Entry, metric: str, predictions: Predictions) -> SeedDifference:
    right = predictions.stacked([entry, plain], metric)
    p_value = None
    if right is None:
        interval = _interval([entry], [plain], metric, predictions)
    else:
        interval, p_value = _points(paired_bootstrap(*right)[1:], 1), mcnemar(*right)
    before, after = (item.record.metrics[metric].value for item in (plain, entry))
    return SeedDifference(seed, before, after, interval, p_value)


def _points(ends: tuple[float, float], seeds: int) -> tuple[float, float]:
    """Ends of an interval of sums over ``seeds``, as percent of their mean."""
    return 100 * ends[0] / seeds, 100 * ends[1] / seeds


def _finite(cell: Mapping[SEED, Entry], metric: str) -> dict[SEED, Entry]:
    """The cell's measurements in the order of their seeds, without those that lack the metric or have no finite value."""
    order = sorted(cell, key=lambda seed: (seed is not None, seed or 0))
    return {seed: cell[seed] for seed in order if metric in cell[seed].record.metrics and _is_finite(cell[seed], metric)}


def _is_finite(entry: Entry, metric: str) -> bool:
    return bool(np.isfinite(entry.record.metrics[metric].value))
