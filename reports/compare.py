"""Two kinds of encoder on the same images: the mean over seeds of who is right on which image, and what chance makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mte_bench.records import PREDICTIONS_NAME, Metric
from mte_bench.statistics import bootstrap_ci, mcnemar, paired_bootstrap
from reports.collect import SEED, Entry, Unusable

Counts = NDArray[np.int64]
"""Of images: how many encoders are right. Whole numbers, so that no rounding enters a bootstrap."""


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
    """One seed with and without MTE, in percent and percentage points."""

    seed: SEED
    plain: float
    value: float
    interval: tuple[float, float] | None
    p_value: float | None
    """McNemar's test on this seed's images."""

    @property
    def difference(self) -> float:
        """``value - plain``."""
        return self.value - self.plain


@dataclass(frozen=True)
class Comparison:
    """A cell minus its baseline over the seeds that both have, in percentage points."""

    difference: float
    interval: tuple[float, float] | None
    """95 % over images of the mean over seeds; None where predictions are missing, so that no images can be paired."""
    seeds: tuple[SeedDifference, ...]

    @property
    def p_value(self) -> float | None:
        """McNemar's test; None for several seeds, whose predictions on one image are not independent."""
        return self.seeds[0].p_value if len(self.seeds) == 1 else None


class Right(NamedTuple):
    """Who is right on which image."""

    names: Any
    """A pyarrow array of ``n`` image names."""
    right: Counts
    """1 where the prediction is the label, else 0."""

    def by_name(self) -> "Right":
        """The same in the order of the names."""
        import pyarrow.compute as pc

        order = pc.sort_indices(self.names)
        return Right(self.names.take(order), self.right[order.to_numpy()])


class Predictions:
    """Who was right on which image, read once from each file beside a record.

    What is wrong with a file goes to ``unusable``; a record that names no file, or whose file is not there, just has none.
    """

    def __init__(self, unusable: list[Unusable]):
        self.unusable = unusable
        self.known: dict[tuple[Path, str], Right | None] = {}

    def stacked(self, entries: list[Entry], metric: str) -> Counts | None:
        """``entries n``: each entry on the same images; None if one has no predictions or other images."""
        found = [right for entry in entries if (right := self.of(entry, metric)) is not None]
        if len(found) < len(entries):
            return None
        if not _same_images(found):
            found = [right.by_name() for right in found]
        return np.stack([item.right for item in found]) if _same_images(found) else None

    def of(self, entry: Entry, metric: str) -> Right | None:
        """The predictions of an entry; None if there is no usable file."""
        path = entry.folder / (entry.record.predictions or PREDICTIONS_NAME)
        if (path, metric) not in self.known:
            try:
                self.known[path, metric] = _read(path, metric, entry.record.metrics[metric]) if path.is_file() else None
            except ValueError as error:
                self.unusable.append(Unusable(path, str(error).splitlines()[0]))
                self.known[path, metric] = None
        return self.known[path, metric]


def _read(path: Path, metric: str, stated: Metric) -> Right:
    """The predictions in a file; raises ``ValueError`` if they cannot be read or are not those of the ``stated`` value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["name", "label", f"prediction:{metric}"]
    try:
        table = pq.read_table(path, columns=columns).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    if table.column_names != columns:
        raise ValueError(f"lacks one of the columns {', '.join(columns)}")
    right = (table["label"].to_numpy() == table[columns[2]].to_numpy()).astype(np.int64)
    if len(right) != stated.n or abs(100 * right.mean() - stated.value) > 0.01:
        found = f"{100 * right.mean():.2f} % of {len(right)} images"
        raise ValueError(f"gives {found}, its record says {stated.value:.2f} % of {stated.n}")
    return Right(table["name"], right)


def _same_images(found: Sequence[Right]) -> bool:
    return all(item.names.equals(found[0].names) for item in found)


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
    right = predictions.stacked(list(measured.values()), metric)
    interval = None if right is None else _points(bootstrap_ci(right.sum(axis=0)), len(right))
    return Value(float(np.mean([value for _, value in seeds])), interval, seeds, first.n)


def compare(cell: Mapping[SEED, Entry], plain: Mapping[SEED, Entry], metric: str, predictions: Predictions) -> Comparison | None:
    """``cell - plain`` over the seeds that both have; None if they have none in common."""
    ours, baseline = _finite(cell, metric), _finite(plain, metric)
    common = [seed for seed in ours if seed in baseline]
    if not common:
        return None
    seeds = tuple(_one_seed(seed, ours[seed], baseline[seed], metric, predictions) for seed in common)
    both = [*(ours[seed] for seed in common), *(baseline[seed] for seed in common)]
    right = predictions.stacked(both, metric)
    interval = None
    if right is not None:
        tested = paired_bootstrap(right[: len(common)].sum(axis=0), right[len(common) :].sum(axis=0))
        interval = _points(tested[1:], len(common))
    return Comparison(float(np.mean([seed.difference for seed in seeds])), interval, seeds)


def _one_seed(seed: SEED, entry: Entry, plain: Entry, metric: str, predictions: Predictions) -> SeedDifference:
    right = predictions.stacked([entry, plain], metric)
    interval, p_value = None, None
    if right is not None:
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
