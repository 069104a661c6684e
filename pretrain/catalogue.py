"""What this package offers to ``mte-bench list``: recipes and methods."""

from typing import Any


def recipes() -> list[dict[str, Any]]:
    """The recipes that come with the program; ``about`` is the first line of each file's opening comment."""
    from mte_bench.settings import names_in
    from pretrain.recipe import RECIPES, load_recipe

    rows = []
    for name in names_in(RECIPES):
        recipe = load_recipe(name)
        with open(RECIPES / f"{name}.yaml", encoding="utf-8") as file:
            about = file.readline().removeprefix("#").strip()
        row = {"name": name, "method": recipe.title, "arch": recipe.arch, "epochs": recipe.epochs}
        rows.append({**row, "paper_row": recipe.paper_row, "about": about})
    return rows


def methods() -> list[dict[str, Any]]:
    """The pre-training methods, each with its loss in a sentence."""
    from pretrain.methods import METHODS

    return [{"name": name, "title": method.title, "about": _first_line(method)} for name, method in sorted(METHODS.items())]


def _first_line(method: type) -> str:
    return (method.__doc__ or "").strip().partition("\n")[0]
