"""How things are written in markdown that GitHub renders."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text; a line break in a cell is ``\\n``. ``align`` is ``l`` or ``r`` for each column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str

    def markdown(self) -> str:
        """The table as GitHub writes it."""
        rule = tuple({"l": ":---", "r": "---:"}[side] for side in self.align)
        lines = [self.columns, rule, *self.rows]
        return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", "<br>")


def plain_text(text: str) -> str:
    """``text`` from a record (a name, a path, a reason) such that markdown shows it as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]~]|\b_|_\b", r"\\\g<0>", text)


def code(text: str) -> str:
    """``text`` as it is written in code, also where it holds what would end the code."""
    inside = " ".join(text.replace("`", "'").split())
    return f"`{inside or ' '}`"


def fence(lines: Iterable[str]) -> str:
    """What opens and closes a block of code that holds ``lines``."""
    runs = [len(run) for line in lines for run in re.findall("`+", line)]
    return "`" * (max([2, *runs]) + 1)


def number(value: float | None) -> str:
    """One decimal, as the paper has it."""
    return MISSING if value is None else f"{value:.1f}"


def interval(ends: tuple[float, float] | None, signed: bool = False) -> str:
    """``[61.4, 63.3]``."""
    if ends is None:
        return f"[{MISSING}]"
    low, high = (plus_minus(end) if signed else f"{end:.1f}" for end in ends)
    return f"[{low}, {high}]"


def plus_minus(value: float, decimals: int = 1) -> str:
    """A difference with its sign, a true minus among them."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def probability(value: float | None) -> str:
    """A p-value, with no more digits than it deserves."""
    return MISSING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def link(path: Path, out: Path) -> str:
    """``path`` relative to the report, as a link writes it; of what is itself a link, the place of that."""
    place = Path(os.path.realpath(path.parent)) / path.name
    return quote(Path(os.path.relpath(place, os.path.realpath(out))).as_posix())


def link_text(path: Path, out: Path) -> str:
    """``path`` relative to the report, for people."""
    return unquote(link(path, out))
