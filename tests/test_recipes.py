"""The shipped recipes: valid, documented, and the rows of the paper that they say they are."""

import pytest

from mte_bench.catalogue import of_table, rows
from mte_bench.settings import names_in
from pretrain import mte
from pretrain.methods import METHODS
from pretrain.recipe import RECIPES, load_recipe

NAMES = names_in(RECIPES)
ARCHITECTURES = {
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_valid_and_says_what_it_costs_and_gives(name: str) -> None:
    recipe = load_recipe(name)
    mte.check(recipe, METHODS[recipe.method])
    text = (RECIPES / f"{name}.yaml").read_text()
    for word in ("# command:", "# cost:", "# expected:"):
        assert word in text, word
    assert f" {name} " in text.split("# command:")[1].splitlines()[0]
    if "_mte_" in name:
        plain = load_recipe(name.replace("_mte_", "_"), ["mte=true"])
        same = {"description": "", "paper_row": ""}
        assert plain.model_copy(update=same) == recipe.model_copy(update=same)


def test_a_setting_of_mte_switches_it_on() -> None:
    alone = load_recipe("byol_tiny_scenes", ["mte.target=each"])
    assert alone == load_recipe("byol_tiny_scenes", ["mte=true", "mte.target=each"])
    assert alone.mte is not None and alone.mte.target == "each" and alone.mte.count == 10
    assert load_recipe("byol_tiny_scenes").mte is None


@pytest.mark.parametrize("table", [5, 6, 8, 13, 14, 15, 16])
def test_every_row_of_a_table_has_its_recipe(table: int) -> None:
    printed = {row["name"]: row for row in rows("paper", f"tab{table}.*")}
    for row, found in zip(printed.values(), of_table(table), strict=True):
        if table == 16 and row["name"] != "tab16.1":  # its other rows are evaluations of the same two runs
            continue
        name = found["recipe"]
        assert name, row
        recipe = load_recipe(name)
        if table in (5, 6):
            assert (recipe.title.lower(), recipe.epochs) == (row["method"].lower(), row["epochs"])
            assert recipe.arch == ARCHITECTURES[row["architecture"]]
            assert recipe.views.local_count == (10 if table == 6 else 0)
        for number in (row[key] for key in ("knn_top1", "linear_top1", "top1") if row.get(key)):
            assert str(number) in (RECIPES / f"{name}.yaml").read_text(), (name, number)


def test_the_ablation_of_table_13_is_switched_as_printed() -> None:
    for row in rows("paper", "tab13.*"):
        name = next(recipe["name"] for recipe in rows("recipes") if recipe["paper_row"] == row["name"])
        tokens = load_recipe(name).mte
        switched = (
            (bool(tokens.auxiliary_cls), bool(tokens.pooled), bool(tokens.ten and tokens.auxiliary_cls))
            if tokens
            else (False,) * 3
        )
        assert switched == (row["aux_cls"], row["adaptive_pool"], row["ten"])
