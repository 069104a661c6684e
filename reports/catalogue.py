"""What this package offers to ``mte-bench list``: the rows of the paper's tables."""

from typing import Any


def paper() -> list[dict[str, Any]]:
    """Every row of every table that the paper prints, called ``tab5.0``, ``tab5.1``, ...; merged cells are filled in."""
    from reports.paper import paper

    return [
        {"name": f"{name}.{index}", **_filled(row)}
        for name, table in paper()["tables"].items()
        for index, row in enumerate(table["rows"] or [])
    ]


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with inherited cells in their places and without the notes on how it is printed."""
    values = {key: row.get(f"{key}_inherited", value) if value is None else value for key, value in row.items()}
    return {key: value for key, value in values.items() if not key.endswith("_inherited") and key != "printed_dash"}
