"""The paper's tables of one method under different settings of MTE, where records have two rows of one or more.

Which settings make which row stands in ``paper.yaml``; all other settings of the rows of one table are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mte_bench.files import hash_of
from mte_bench.naming import method_key
from reports.collect import Collection, Row, partner
from reports.markdown import Table, plain_text
from reports.paper import paper, printed_in
from reports.tables import Cell, Section, value_table


@dataclass(frozen=True)
class Ablation:
    """One such table of ours."""

    table: str
    """The paper's, such as ``tab13``."""
    title: str
    head: str
    """Of the column that tells the rows apart."""
    part: Section
    """The rows that are one of the paper's, in its order, and the columns that have a value."""
    labels: tuple[str, ...]

    @property
    def number(self) -> int:
        """Of the paper's table."""
        return int(self.table.removeprefix("tab"))

    @property
    def row(self) -> Row:
        """One with MTE: its method without MTE, architecture and epochs are those of all."""
        return next(row for row, _ in self.part.cells if row.kind == 2)

    def as_table(self) -> Table:
        """The values of each row behind its label."""
        return value_table(self.part, (plain_text(self.head),), [(plain_text(label),) for label in self.labels], "l")


def ablations(part: Section, collection: Collection) -> list[Ablation]:
    """Every table that ``part`` has two rows with MTE of, in the paper's order."""
    found = []
    for known in paper()["ablations"]:
        for lines in _alike(known, part).values():
            if len({place for place, row, _ in lines if row.kind == 2}) > 1:
                found.append(_ablation(known, sorted(lines, key=lambda line: line[0]), part, collection))
    return found


_Line = tuple[int, Row, tuple[Cell, ...]]
"""The place of a row in the table, the row and its cells."""


def _alike(known: Mapping[str, Any], part: Section) -> dict[object, list[_Line]]:
    """The rows that are one of the table's, by what must be equal; those without MTE are in each group of their recipe."""
    groups: dict[object, list[_Line]] = {}
    plain: list[_Line] = []
    for row, cells in part.cells:
        place = _place(known, row)
        if place is None:
            continue
        if row.kind == 1:
            plain.append((place, row, cells))
        else:
            others = {key: value for key, value in row.recipe["mte"].items() if key not in known["settings"]}
            groups.setdefault((partner(row), hash_of(others)), []).append((place, row, cells))
    for lines in groups.values():
        lines += [line for line in plain if partner(line[1]) == partner(lines[0][1])]
    return groups


def _place(known: Mapping[str, Any], row: Row) -> int | None:
    """Which row of the table ``row`` is; None if it is none or its recipe is not known."""
    supervised = method_key(row.subject.method or "") == "supervised"
    if not row.recipe or row.subject.parts or row.kind == 0 or known.get("supervised", supervised) != supervised:
        return None
    for place, line in enumerate(known["rows"]):
        tokens, settings = line["mte"], row.recipe.get("mte")
        if tokens is None or settings is None:
            if tokens is settings:
                return place
        elif all(settings.get(key) == value for key, value in tokens.items()):
            return place
    return None


def _ablation(known: Mapping[str, Any], lines: list[_Line], part: Section, collection: Collection) -> Ablation:
    kept = [index for index in range(len(part.columns)) if any(cells[index].value for _, _, cells in lines)]
    rows = []
    for place, row, cells in lines:
        printed_row = known["rows"][place]["row"]
        chosen = (cells[index] for index in kept)
        rows.append((row, tuple(_beside_paper(known, printed_row, cell, collection) for cell in chosen)))
    columns = tuple(part.columns[index] for index in kept)
    labels = tuple(known["rows"][place]["label"] + row.repetition for place, row, _ in lines)
    return Ablation(known["table"], known["title"], known["head"], Section(part.data, columns, tuple(rows)), labels)


def _beside_paper(known: Mapping[str, Any], row: int, cell: Cell, collection: Collection) -> Cell:
    if cell.entry is None:
        return replace(cell, paper=None)
    record = cell.entry.record
    return replace(cell, paper=printed_in(known, row, record, cell.column.metric, collection.pretraining(record.subject)))
