"""What stands in the cells of the accuracy tables: computed here, written in markdown or as plain values.

``–`` is a value that is missing, an empty cell one that cannot be: a plain encoder has no difference to a plain one.
"""

from dataclasses import dataclass
from typing import Any

from reports.collect import Collection, DataTable, Measure, Row
from reports.compare import Comparison, Predictions, Value, compare, summarise
from reports.markdown import MISSING, Table, interval, number, plain_text, plus_minus
from reports.naming import data_title
from reports.paper import printed


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
        columns += [f"{measure.title}\n{what}" for what in ("paper", "ours [95 %]", "over seeds", "+MTE − plain")]
    rows = []
    for row, cells in part.cells:
        line = [_method(row, part.data), row.architecture, row.epochs]
        for cell in cells:
            line += [number(cell.paper), _value(cell.value), _over_seeds(cell.value), _difference(row, cell)]
        rows.append(tuple(line))
    return Table(tuple(columns), tuple(rows), "ll" + "r" * (len(columns) - 2))


def seed_table(part: Section) -> Table | None:
    """Every pair of one seed with and without MTE; None where no difference is of several seeds."""
    if not any(cell.comparison and len(cell.comparison.seeds) > 1 for _, cells in part.cells for cell in cells):
        return None
    rows = []
    for index, measure in enumerate(part.data.measures):
        for row, cells in part.cells:
            comparison = cells[index].comparison
            for seed in comparison.seeds if comparison else ():
                rows.append(
                    (
                        measure.title,
                        f"{_method(row, part.data)}\n{row.architecture}",
                        MISSING if seed.seed is None else str(seed.seed),
                        f"{seed.plain:.2f}",
                        f"{seed.value:.2f}",
                        f"{plus_minus(seed.difference, 2)} {interval(seed.interval, signed=True)}",
                        _p(seed.p_value),
                    )
                )
    columns = ("Task", "Method", "Seed", "plain", "+MTE", "difference [95 %]", "McNemar p")
    return Table(columns, tuple(rows), "llrrrrr")


def _method(row: Row, table: DataTable) -> str:
    """The row's title, with the recipe's name or hash and the repeat only where the title alone is not enough."""
    same = [other for other in table.rows if _label(other) == _label(row)]
    text = plain_text(row.title)
    if len({(other.subject.recipe_hash, other.subject.sha256 if other.subject.seed is None else "") for other in same}) > 1:
        name = plain_text(row.subject.recipe or row.subject.family)
        text += f"\n{name} `{(row.subject.recipe_hash or row.subject.sha256)[:6]}`"
    pretrained_on = {data_title(other.subject.pretrain_data) for other in table.rows if other.subject.pretrain_data}
    if len(pretrained_on) > 1 and row.subject.pretrain_data:
        text += f"\n(pre-trained on {plain_text(data_title(row.subject.pretrain_data))})"
    return text + (f"\n(repeat {row.repeat + 1})" if row.repeat else "")


def _label(row: Row) -> tuple[object, ...]:
    return (row.title, row.architecture, row.subject.image_size, row.subject.epochs, row.subject.pretrain_data, row.repeat)


def _value(value: Value | None) -> str:
    return MISSING if value is None else f"**{value.value:.1f}**\n{interval(value.interval)}"


def _over_seeds(value: Value | None) -> str:
    if value is None:
        return MISSING
    return "1 seed" if value.spread is None else f"{len(value.seeds)} seeds\n{value.value:.1f} ± {value.spread:.2f}"


def _difference(row: Row, cell: Cell) -> str:
    comparison, value = cell.comparison, cell.value
    if row.kind != 2:
        return ""
    if comparison is None or value is None:
        return MISSING
    text = f"**{plus_minus(comparison.difference)}**\n{interval(comparison.interval, signed=True)}"
    if len(comparison.seeds) < len(value.seeds):
        text += f"\n{len(comparison.seeds)} of {len(value.seeds)} seeds"
    return text if comparison.p_value is None else f"{text}\np {_p(comparison.p_value)}"


def _p(value: float | None) -> str:
    return MISSING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


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
