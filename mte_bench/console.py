"""What people see: results on stdout, progress and remarks on stderr (plain lines when it is no terminal)."""

import json
import sys
from collections.abc import Sequence
from typing import Any


def log(message: str) -> None:
    """One remark on stderr."""
    print(message, file=sys.stderr, flush=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A short table on stdout: numbers right-aligned, None as an en dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("–" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    # In a pipe or a file every row stays one line and nothing is cut.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def show_json(value: Any) -> None:
    """``value`` as JSON on stdout; pydantic models are dumped."""
    dump = [_plain(item) for item in value] if isinstance(value, list) else _plain(value)
    print(json.dumps(dump, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
