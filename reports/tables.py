"""What stands in the cells of the accuracy tables: computed here, written in markdown or as plain values.

``–`` is a value that is missing, an empty cell one that cannot be: a plain encoder has no difference to a plain one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reports.collect import Collection, DataTable, Measure, Row
from reports.compare import Comparison, Value, compare, summarise
from reports.markdown import MISSING, Table, code, interval, number, plain_text, plus_minus, probability
from reports.naming import data_title
from reports.paper import printed
from reports.predictions import Predictions

MOST_DIFFERING = 4  # settings that tell rows apart by name; more are a recipe of their own


@dataclass(frozen=True)
class Cell:
    """What is known of a row in one column."""

    measure: Measure
    value: Value | None
    paper: float | None
    comparison: Comparison | None


@dataclass(frozen=True)
class Section:
    """One set of images: its rows and the cells of each."""

    data: DataTable
    cells: tuple[tuple[Row, tuple[Cell, ...]], ...]

    @property
    def is_top1(self) -> bool:
        """Whether every column is the share of images whose class is said."""
        return all(measure.metric.startswith("top1") for measure in self.data.measures)

    @property
    def unit(self) -> str:
        """What the columns hold."""
        return "Top-1 in percent" if self.is_top1 else "In percent"


def section(table: DataTable, collection: Collection, predictions: Predictions) -> Section:
    """Compute every cell of ``table``."""
    rows = ((row, [_cell(row, measure, table, collection, predictions) for measure in table.measures]) for row in table.rows)
    return Section(table, tuple((row, tuple(cells)) for row, cells in rows))


def _cell(row: Row, measure: Measure, table: DataTable, collection: Collection, predictions: Predictions) -> Cell:
    found = row.cells.get(measure, {})
    first = next(iter(found.values()), None)
    baseline = table.baseline(row)
    return Cell(
        measure,
        summarise(found, measure.metric, predictions),
        None if first is None else printed(first.record, collection.recipe(first.record.subject)),
        None if baseline is None else compare(found, baseline.cells.get(measure, {}), measure.metric, predictions),
    )


def accuracy_table(part: Section) -> Table:
    """Table 5's shape: the paper's value and ours, its interval over images, its spread over seeds, and what MTE changes."""
    columns = ["Method", "Architecture", "Epochs"]
    for measure in part.data.measures:
        title = plain_text(measure.title)
        columns += [f"{title}\n{what}" for what in ("paper", "ours [95 %]", "n, over seeds", "+MTE − plain")]
    rows = []
    for (row, cells), method in zip(part.cells, _methods(part.data), strict=True):
        line = [method, plain_text(row.architecture), row.epochs]
        for cell in cells:
            line += [number(cell.paper), _value(cell.value), _over_seeds(cell.value), _difference(row, cell)]
        rows.append(tuple(line))
    return Table(tuple(columns), tuple(rows), "ll" + "r" * (len(columns) - 2))


def seed_table(part: Section) -> Table | None:
    """Every pair of one seed with and without MTE; None where no difference is of several seeds."""
    if not any(cell.comparison and len(cell.comparison.seeds) > 1 for _, cells in part.cells for cell in cells):
        return None
    methods = _methods(part.data)
    rows = []
    for index, measure in enumerate(part.data.measures):
        for (row, cells), method in zip(part.cells, methods, strict=True):
            comparison = cells[index].comparison
            for seed in comparison.seeds if comparison else ():
                rows.append(
                    (
                        plain_text(measure.title),
                        f"{method}\n{plain_text(row.architecture)}",
                        MISSING if seed.seed is None else str(seed.seed),
                        f"{seed.plain:.2f}",
                        f"{seed.value:.2f}",
                        f"{plus_minus(seed.difference, 2)} {interval(seed.interval, signed=True)}",
                        probability(seed.p_value),
                    )
                )
    columns = ("Task", "Method", "Seed", "plain", "+MTE", "difference [95 %]", "McNemar p")
    return Table(columns, tuple(rows), "llrrrrr")


def _methods(table: DataTable) -> list[str]:
    """Each row's title; what its recipe sets otherwise, and the repeat, only where the title alone is not enough."""
    alike: dict[tuple[object, ...], list[Row]] = {}
    for row in table.rows:
        alike.setdefault(_label(row), []).append(row)
    several_sources = len({data_title(row.subject.pretrain_data) for row in table.rows if row.subject.pretrain_data}) > 1
    return [_method(row, alike[_label(row)], several_sources) for row in table.rows]


def _method(row: Row, alike: list[Row], several_sources: bool) -> str:
    subject, text = row.subject, plain_text(row.title)
    if len({(other.subject.recipe_hash, "" if other.subject.seed is not None else other.subject.sha256) for other in alike}) > 1:
        text += f"\n{_peculiarity(row, alike)}"
    if several_sources and subject.pretrain_data:
        text += f"\n(pre-trained on {plain_text(data_title(subject.pretrain_data))})"
    return text + (f"\n(repeat {row.repeat + 1})" if row.repeat else "")


def _peculiarity(row: Row, alike: list[Row]) -> str:
    """The settings in which the recipes of ``alike`` differ; if they are not known or many, the recipe's name and hash."""
    recipes = [_flat(other.recipe) for other in alike]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe if key != "description"))
    differing = [key for key in keys if any(other.get(key, "–") != recipes[0].get(key, "–") for other in recipes)]
    if not all(recipes) or not 0 < len(differing) <= MOST_DIFFERING:
        subject = row.subject
        return f"{plain_text(subject.recipe or subject.family)} {code((subject.recipe_hash or subject.sha256)[:6])}"
    own = _flat(row.recipe)
    return plain_text(", ".join(f"{key.rpartition('.')[2]} {_setting(own.get(key, '–'))}" for key in differing))


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """``{"mte": {"pooled": 6}}`` as ``{"mte.pooled": 6}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{start}{key}.") if isinstance(value, Mapping) else {f"{start}{key}": value}
    return flat


def _label(row: Row) -> tuple[object, ...]:
    return (row.title, row.architecture, row.subject.image_size, row.subject.epochs, row.subject.pretrain_data, row.repeat)


def _value(value: Value | None) -> str:
    return MISSING if value is None else f"**{value.value:.1f}**\n{interval(value.interval)}"


def _over_seeds(value: Value | None) -> str:
    if value is None:
        return MISSING
    seeds = "1 seed" if value.spread is None else f"{len(value.seeds)} seeds\n{value.value:.1f} ± {value.spread:.2f}"
    return f"{value.images:,}\n{seeds}"


def _difference(row: Row, cell: Cell) -> str:
    comparison, value = cell.comparison, cell.value
    if row.kind != 2:
        return ""
    if comparison is None or value is None:
        return MISSING
    text = f"**{plus_minus(comparison.difference)}**\n{interval(comparison.interval, signed=True)}"
    if len(comparison.seeds) < len(value.seeds):
        text += f"\n{len(comparison.seeds)} of {len(value.seeds)} seeds"
    return text if comparison.p_value is None else f"{text}\np {probability(comparison.p_value)}"


def cell_summary(part: Section) -> dict[str, Any]:
    """A section as plain values, for ``report.json``."""
    data = part.data.record.data
    rows = [_row_summary(row, cell) for row, cells in part.cells for cell in cells]
    return {"data": data.model_dump(mode="json", include={"source", "subset", "images", "classes", "fingerprint"}), "cells": rows}


def _row_summary(row: Row, cell: Cell) -> dict[str, Any]:
    subject, value, comparison = row.subject, cell.value, cell.comparison
    return {
        "method": row.title,
        "mte": subject.mte,
        "architecture": row.architecture,
        "epochs": subject.epochs,
        "recipe": subject.recipe,
        "recipe_hash": subject.recipe_hash,
        "repeat": row.repeat,
        "task": cell.measure.task,
        "metric": cell.measure.metric,
        "protocol": cell.measure.protocol,
        "paper": cell.paper,
        "value": value and value.value,
        "ci95": value and value.interval,
        "images": value and value.images,
        "seeds": [] if value is None else [{"seed": seed, "value": number} for seed, number in value.seeds],
        "spread_over_seeds": value and value.spread,
        "minus_plain": comparison
        and {
            "difference": comparison.difference,
            "ci95": comparison.interval,
            "mcnemar_p": comparison.p_value,
            "seeds": [
                {"seed": s.seed, "plain": s.plain, "value": s.value, "ci95": s.interval, "mcnemar_p": s.p_value}
                for s in comparison.seeds
            ],
        },
    }
