"""What can be listed: each package offers its rows through the entry-point group ``mte_bench.catalogues``."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from typing import Any

from mte_bench.errors import UserError, did_you_mean

GROUP = "mte_bench.catalogues"
Row = dict[str, Any]


def rows(what: str, pattern: str = "*") -> list[Row]:
    """The rows of catalogue ``what`` whose ``name`` is like ``pattern``, of all packages that offer some."""
    entries = entry_points(group=GROUP)
    offers = entries.select(name=what)
    if not offers:
        raise UserError(f"list: nothing is called '{what}'{did_you_mean(what, entries.names)}")
    functions: list[Callable[[], list[Row]]] = [entry.load() for entry in offers]
    every = [row for function in functions for row in function()]
    found = [row for row in every if fnmatchcase(row["name"], pattern)]
    if not found:
        raise UserError(f"list {what}: no name is like '{pattern}'{did_you_mean(pattern.strip('*'), _some(every))}")
    return found


def _some(every: list[Row]) -> list[str]:
    """The names to choose a suggestion from; none if there are too many to print."""
    names = [row["name"] for row in every]
    return names if len(names) <= 30 else []
