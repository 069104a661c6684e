"""Two sets of records side by side: what of B measures the same as something of A, and how the two differ.

What has the same task, protocol and images is paired: encoders of the same kind (method, architecture, recipe), or, where A and
B have no kind in common and one of them has a single kind, that one with each of the other. The rest is named. A cell that
was measured twice is compared twice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mte_bench.dense.resampling import interval_of
from mte_bench.errors import UserError
from mte_bench.naming import data_title
from mte_bench.records import Data
from reports.classes import AnyClasses, class_changes
from reports.collect import Collection, Entry, Measure, Row, collect, data_tables, images_key
from reports.compare import Comparison, Value, compare_any, summarise
from reports.markdown import link_text
from reports.predictions import Predictions

Cell = tuple[Data, Measure, Row]


class MetricChange(NamedTuple):
    """A metric of a dense task, means over seeds in percent, and the paired interval of ``b - a`` over images."""

    name: str
    a: float
    b: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Pair:
    """One row of A and one of B under the same protocol on the same images."""

    data: Data
    measure: Measure
    a: Row
    b: Row
    values: tuple[Value, Value]
    change: Comparison
    """B minus A."""
    classes: AnyClasses | None
    """None where there are no predictions of the same images."""
    metrics: tuple[MetricChange, ...] = ()
    """Of dense records every metric that both have, ``change`` among them."""

    @property
    def images(self) -> int:
        """How many images both were measured on."""
        return self.values[0].images


@dataclass(frozen=True)
class Pairs:
    """All pairs, and what could not be paired."""

    found: tuple[Pair, ...]
    alone: dict[str, list[str]]
    """Of ``A`` and of ``B``: what the other has nothing for."""
    unusable: tuple[str, ...]


def pair(a: Sequence[str | Path], b: Sequence[str | Path], metric: str | None = None) -> Pairs:
    """Compare everything below ``a`` with everything below ``b`` by the tasks' headlines, or by ``metric`` where it was measured.

    Raises ``UserError`` if one holds no usable record, or nothing of one measures the same as something of the other.
    """
    both = collect(a), collect(b)
    unusable = list(both[0].unusable + both[1].unusable)
    predictions = Predictions(unusable)
    ours, theirs = (_cells(collection) for collection in both)
    found: list[Pair] = []
    alone: dict[str, list[str]] = {"A": [], "B": []}
    for place in dict.fromkeys([*ours, *theirs]):
        here, there = ours.get(place, []), theirs.get(place, [])
        matched = [pair for x, y in _matches(here, there) if (pair := _pair(x, y, metric, predictions)) is not None]
        found += matched
        for name, cells, side in (("A", here, "a"), ("B", there, "b")):
            paired = {id(getattr(pair, side)) for pair in matched}
            alone[name] += [_called(cell) for cell in cells if id(cell[2]) not in paired]
    if not found:
        listed = "; ".join(f"{name} has {_some(cells)}" for name, cells in alone.items())
        by = f" by the metric '{metric}'" if metric else ""
        raise UserError(f"A and B: nothing was measured under the same protocol on the same images{by}: {listed}")
    lines = dict.fromkeys(f"{link_text(item.path, Path())}: {item.reason}" for item in unusable)
    return Pairs(tuple(found), alone, tuple(lines))


def _cells(collection: Collection) -> dict[tuple[object, ...], list[Cell]]:
    """Every row under every measure, by what must be equal for two to be compared."""
    result: dict[tuple[object, ...], list[Cell]] = {}
    for table in data_tables(collection):
        for measure, row in product(table.measures, table.rows):
            if measure in row.cells:
                place = (*images_key(table.record.data), measure.task, measure.protocol)
                result.setdefault(place, []).append((table.record.data, measure, row))
    return result


def _matches(here: list[Cell], there: list[Cell]) -> list[tuple[Cell, Cell]]:
    kinds = [{cell[2].key for cell in cells} for cells in (here, there)]
    common = kinds[0] & kinds[1]
    everything = not common and min(map(len, kinds)) == 1
    return [(a, b) for a, b in product(here, there) if everything or (a[2].key == b[2].key and a[2].key in common)]


def _pair(a: Cell, b: Cell, metric: str | None, predictions: Predictions) -> Pair | None:
    """None if one has no finite value of the metric."""
    data, measure, row = a
    other = b[2]
    metric = metric or measure.metric
    cells = row.cells[measure], other.cells[b[1]]
    before, after = (summarise(cell, metric, predictions) for cell in cells)
    change = compare_any(cells[1], cells[0], metric, predictions)
    if before is None or after is None or change is None:
        return None
    measure = measure._replace(metric=metric)
    common = [seed.seed for seed in change.seeds if seed.seed in cells[0] and seed.seed in cells[1]]
    ours, theirs = (
        [cell[seed] for seed in common or [seed for seed, _ in value.seeds]]
        for cell, value in zip(cells, (before, after), strict=True)
    )
    classes = class_changes(ours, theirs, metric, predictions)
    return Pair(data, measure, row, other, (before, after), change, classes, _metric_changes(ours, theirs, predictions))


def _metric_changes(a: list[Entry], b: list[Entry], predictions: Predictions) -> tuple[MetricChange, ...]:
    """Empty for records that are not dense, or of other images."""
    found = []
    for name in a[0].record.metrics:
        if (drawn := predictions.resampled([*a, *b], name)) is not None:
            before, after = (float(np.mean([entry.record.metrics[name].value for entry in side])) for side in (a, b))
            ends = interval_of(drawn[len(a) :].mean(axis=0) - drawn[: len(a)].mean(axis=0), after - before)
            found.append(MetricChange(name, before, after, ends))
    return tuple(found)


def _called(cell: Cell) -> str:
    data, measure, row = cell
    subset = f" ({data.subset})" if data.subset else ""
    return f"{row.name}: {measure.name} by {measure.protocol} on {data_title(data.source)}{subset} {data.fingerprint[:8]}"


def _some(names: Iterable[str], most: int = 3) -> str:
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def as_values(pairs: Pairs) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return {
        "pairs": [_pair_values(pair) for pair in pairs.found],
        "only_in_a": pairs.alone["A"],
        "only_in_b": pairs.alone["B"],
        "unusable": list(pairs.unusable),
    }


def _pair_values(pair: Pair) -> dict[str, Any]:
    change = pair.change
    return {
        "task": pair.measure.task,
        "metric": pair.measure.metric,
        "protocol": pair.measure.protocol,
        "data": pair.data.model_dump(mode="json", include={"source", "split", "subset", "fingerprint"}),
        "images": pair.images,
        "a": _side(pair.a, pair.values[0]),
        "b": _side(pair.b, pair.values[1]),
        "b_minus_a": {
            "difference": change.difference,
            "ci95": change.interval,
            "mcnemar_p": change.p_value,
            "spread_over_seeds": change.spread,
            "seeds": [
                {"seed": s.seed, "a": s.plain, "b": s.value, "ci95": s.interval, "mcnemar_p": s.p_value} for s in change.seeds
            ],
        },
        "classes": pair.classes and [change.values() for change in pair.classes.every],
        "metrics": {
            change.name: {"a": change.a, "b": change.b, "difference": change.b - change.a, "ci95": change.interval}
            for change in pair.metrics
        },
    }


def _side(row: Row, value: Value) -> dict[str, Any]:
    return {
        "encoder": row.title,
        "architecture": row.architecture,
        "repeat": row.repeat,
        "value": value.value,
        "ci95": value.interval,
        "spread_over_seeds": value.spread,
        "seeds": [{"seed": seed, "value": number} for seed, number in value.seeds],
    }
