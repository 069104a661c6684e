"""What can be listed: each package offers its rows through the entry-point group ``mte_bench.catalogues``."""

import re
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
        meant = did_you_mean(pattern.strip("*"), (row["name"] for row in every))
        raise UserError(f"list {what}: no name is like '{pattern}'{meant}")
    return found


def of_table(number: int) -> list[Row]:
    """The recipes of the paper's table ``number`` in its order, with the numbers that it prints."""
    recipes = {row["paper_row"]: row for row in rows("recipes") if row["paper_row"]}
    every = rows("paper")
    if not (table := [row for row in every if row["name"].startswith(f"tab{number}.")]):
        known = sorted({int(match[1]) for row in every if (match := re.match(r"tab(\d+)\.", row["name"]))})
        raise UserError(f"list recipes --table {number}: not known; the tables are {', '.join(map(str, known))}")
    found = []
    for printed in table:
        recipe = recipes.get(printed["name"], {})
        numbers = {key: value for key, value in printed.items() if key != "name"}
        found.append({"recipe": recipe.get("name"), **numbers})
    return found
