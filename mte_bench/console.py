"""What people see: results on stdout, progress and remarks on stderr (plain lines when it is no terminal)."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any


def log(message: str) -> None:
    """One remark on stderr."""
    print(message, file=sys.stderr, flush=True)


class ProgressLine:
    """One line on stderr that changes: redrawn in place on a terminal, otherwise written anew every ``seconds``."""

    def __init__(self, seconds: float = 15.0):
        self.terminal = sys.stderr.isatty()
        self.interval = 0.2 if self.terminal else seconds
        self.began = self.shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning; never 0."""
        return max(time.monotonic() - self.began, 1e-9)

    def show(self, text: str, last: bool = False) -> None:
        """Show ``text`` if it is time, or if it is the ``last``."""
        now = time.monotonic()
        if not last and now - self.shown < self.interval:
            return
        self.shown = now
        if self.terminal:
            print(f"\r\x1b[2K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            log(text)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A short table on stdout: numbers right-aligned, None as an en dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*("–" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    # In a pipe or a file every row stays one line and nothing is cut. Brackets are text, no markup.
    console = Console(width=None if sys.stdout.isatty() else 10_000, markup=False)
    if title:
        console.print(title, style="bold")
    console.print(table)


def show_json(value: Any) -> None:
    """``value`` as JSON on stdout; pydantic models are dumped."""
    dump = [_plain(item) for item in value] if isinstance(value, list) else _plain(value)
    print(json.dumps(dump, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
