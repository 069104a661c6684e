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


def of_table(number: int) -> list[Row]:
    """The recipes of the paper's table ``number`` in its order, with the numbers that it prints."""
    recipes = {row["paper_row"]: row for row in rows("recipes") if row["paper_row"]}
    found = []
    for printed in rows("paper", f"tab{number}.*"):
        recipe = recipes.get(printed["name"], {})
        numbers = {key: value for key, value in printed.items() if key != "name"}
        found.append({"recipe": recipe.get("name"), **numbers})
    return found


def _some(every: list[Row]) -> list[str]:
    """The names to choose a suggestion from; none if there are too many to print."""
    names = [row["name"] for row in every]
    return names if len(names) <= 30 else []
