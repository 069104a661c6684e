"""What stands in the cells of the accuracy tables: computed here, written in markdown or as plain values.

``–`` is a value that is missing, an empty cell one that cannot be: a plain encoder has no difference to a plain one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mte_bench.naming import data_title, peculiarity
from reports.collect import Collection, DataTable, Entry, Measure, Row
from reports.compare import Comparison, Value, compare, summarise
from reports.markdown import MISSING, Table, code, interval, number, plain_text, plus_minus, probability
from reports.paper import printed
from reports.predictions import Predictions
from reports.topics import FURTHER


@dataclass(frozen=True)
class Cell:
    """What is known of a row in one column."""

    column: Measure
    entry: Entry | None
    """The first of its seeds."""
    value: Value | None
    paper: float | None
    comparison: Comparison | None


@dataclass(frozen=True)
class Section:
    """One set of images: its rows and the cells of each, one for each column."""

    data: DataTable
    columns: tuple[Measure, ...]
    cells: tuple[tuple[Row, tuple[Cell, ...]], ...]

    @property
    def is_top1(self) -> bool:
        """Whether every column is the share of images whose class is said."""
        return all(column.metric.startswith("top1") for column in self.columns)

    @property
    def unit(self) -> str:
        """What the columns hold."""
        return "Top-1 in percent" if self.is_top1 else "In percent"


def section(table: DataTable, collection: Collection, predictions: Predictions) -> Section:
    """Compute every cell of ``table``: of each measure its headline, and what else of it has a column."""
    columns = [(measure, column) for measure in table.measures for column in _columns(measure, table)]
    rows = (
        (row, tuple(_cell(row, measure, column, table, collection, predictions) for measure, column in columns))
        for row in table.rows
    )
    return Section(table, tuple(column for _, column in columns), tuple(rows))


def _columns(measure: Measure, table: DataTable) -> list[Measure]:
    records = [entry.record for row in table.rows for entry in row.cells.get(measure, {}).values()]
    further = [
        measure.further(metric, name)
        for metric, name in FURTHER.get(measure.task, {}).items()
        if any(metric in record.metrics for record in records)
    ]
    return [measure, *further]


def _cell(
    row: Row, measure: Measure, column: Measure, table: DataTable, collection: Collection, predictions: Predictions
) -> Cell:
    found = row.cells.get(measure, {})
    first = next(iter(found.values()), None)
    baseline = table.baseline(row)
    return Cell(
        column,
        first,
        summarise(found, column.metric, predictions),
        None if first is None else printed(first.record, column.metric, collection.pretraining(first.record.subject)),
        None if baseline is None else compare(found, baseline.cells.get(measure, {}), column.metric, predictions),
    )


def accuracy_table(part: Section) -> Table:
    """Table 5's shape: the paper's value and ours, its interval over images, its spread over seeds, and what MTE changes."""
    names = [
        (method, plain_text(row.architecture), row.epochs)
        for (row, _), method in zip(part.cells, row_titles(part.data), strict=True)
    ]
    return value_table(part, ("Method", "Architecture", "Epochs"), names, "llr")


def value_table(part: Section, heads: Sequence[str], names: Sequence[Sequence[str]], align: str) -> Table:
    """The rows of ``part`` behind their ``names``; the paper's column and that of differences only where a row has one."""
    columns, written = list(heads), [list(name) for name in names]
    with_mte = any(row.kind == 2 for row, _ in part.cells)
    for index, column in enumerate(part.columns):
        found = [(row, cells[index]) for row, cells in part.cells]
        empty = [column.of_mte_alone and row.kind != 2 for row, _ in found]
        blocks = {"ours [95 %]": ["" if none else _value(cell.value) for (_, cell), none in zip(found, empty, strict=True)]}
        if any(cell.paper is not None for _, cell in found):
            blocks = {"paper": [number(cell.paper) for _, cell in found]} | blocks
        blocks["n, over seeds"] = ["" if none else _over_seeds(cell.value) for (_, cell), none in zip(found, empty, strict=True)]
        if with_mte and not column.of_mte_alone:
            blocks["+MTE − plain"] = [_difference(row, cell) for row, cell in found]
        columns += [f"{plain_text(column.title)}\n{what}" for what in blocks]
        for line, values in zip(written, zip(*blocks.values(), strict=True), strict=True):
            line += values
    return Table(tuple(columns), tuple(map(tuple, written)), align + "r" * (len(columns) - len(align)))


def seed_table(part: Section) -> Table | None:
    """Every pair of one seed with and without MTE; None where no difference is of several seeds."""
    if not any(cell.comparison and len(cell.comparison.seeds) > 1 for _, cells in part.cells for cell in cells):
        return None
    methods = row_titles(part.data)
    rows = []
    for index, column in enumerate(part.columns):
        for (row, cells), method in zip(part.cells, methods, strict=True):
            comparison = cells[index].comparison
            for seed in comparison.seeds if comparison else ():
                rows.append(
                    (
                        plain_text(column.title),
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


def row_titles(table: DataTable) -> list[str]:
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
    known = peculiarity(row.recipe, [other.recipe for other in alike])
    if known:
        return plain_text(known)
    subject = row.subject
    return f"{plain_text(subject.recipe or subject.family)} {code((subject.recipe_hash or subject.sha256)[:6])}"


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
    return {
        "topic": part.data.topic.title,
        "data": data.model_dump(mode="json", include={"source", "subset", "images", "classes", "fingerprint"}),
        "cells": rows,
    }


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
        "task": cell.column.task,
        "metric": cell.column.metric,
        "protocol": cell.column.protocol,
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
