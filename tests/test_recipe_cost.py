"""``analyze cost``: the paper's figures, a step by its closed form, and the record of what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.formulas import SMALL
from benchmarks.formulas import TINY as MODEL
from mte_bench.cli import _parser
from mte_bench.device import forget_peak, peak_memory
from mte_bench.errors import UserError
from mte_bench.records import read_record
from pretrain import commands
from pretrain.cost import Counts, count, with_and_without
from pretrain.recipe import Recipe

TINY: dict[str, Any] = {
    **MODEL,
    "method": "ibot",
    "method_settings": SMALL,
    "views": {"global1": {"size": 32}, "global2": {"size": 32}, "local": {"size": 16}, "local_count": 2},
}


def counts(by_definition: bool = True, **values: Any) -> tuple[Counts, Counts]:
    plain, enhanced = with_and_without(Recipe.check(values, "recipe")).values()
    return count(plain, by_definition), count(enhanced, by_definition)


def test_ibot_is_the_papers_6_1_and_with_mte_its_6_4() -> None:
    plain, enhanced = counts(method="ibot")
    assert plain.forward_macs / 1e9 == pytest.approx(6.096, abs=0.001)
    assert enhanced.forward_macs / 1e9 == pytest.approx(6.393, abs=0.001)
    assert plain.macs["encoder"] == enhanced.macs["encoder"] == pytest.approx(4.598e9, abs=1e6)
    assert plain.parameters["encoder"] == enhanced.parameters["encoder"] == pytest.approx(21.67e6, abs=5e3)
    n, c = 196, 384
    assert enhanced.macs["auxiliary CLS"] == 12 * (12 * 4 * c * c + 2 * 4 * (n + 1 + 4) * c)
    assert enhanced.macs["TEN"] == 2 * n * c * c + 4 * (2 + 8) * c * c + 2 * 4 * n * c
    assert enhanced.macs["poolers"] == n * c * c + n * c * 6 * 11 * 11
    mlp = c * 2048 + 2048 * 2048 + 2048 * 256
    assert plain.macs["heads"] == 197 * mlp and enhanced.macs["heads"] == (197 + 10) * mlp
    assert enhanced.macs["prototypes or predictor"] == (197 + 1) * 256 * 8192
    assert enhanced.parameters["heads"] == 11 * (mlp + 2048 + 2048 + 256)
    computed = counts(by_definition=False, method="ibot")[1]
    assert computed.forward_macs / 1e9 == pytest.approx(6.348, abs=0.001)


def test_dino_has_its_head_on_the_global_token_alone() -> None:
    plain, enhanced = counts(method="dino")
    assert plain.forward_macs / 1e9 == pytest.approx(4.62, abs=0.005)
    assert enhanced.forward_macs / 1e9 == pytest.approx(4.93, abs=0.01)
    assert plain.step_macs == 2 * 3 * plain.forward_macs + 2 * plain.forward_macs


def test_a_step_of_ibot_by_its_parts() -> None:
    """Masked patches are 15 % on average; local views have no patches in the loss; all of a teacher's patches are targets."""
    plain, enhanced = counts(**TINY)
    d, k = 24, 24 * 32 + 32 * 32 + 32 * 16 + 16 * 64
    n, local = 16, 4

    def encoder(tokens: int) -> int:
        return (tokens - 1) * 192 * d + 2 * (12 * tokens * d * d + 2 * tokens * tokens * d)

    student = 2 * (encoder(n + 1) + k + 0.15 * n * k) + 2 * (encoder(local + 1) + k)
    assert plain.step_macs == pytest.approx(3 * student + 2 * (encoder(n + 1) + k + n * k))
    assert plain.forward_macs == encoder(n + 1) + (n + 1) * k
    assert enhanced.step_macs > plain.step_macs


def test_parts_add_up_to_the_whole_whatever_the_method_has() -> None:
    for values in (
        {"mte": {"fusion": "concat", "heads": "shared"}},
        {"method_settings": {"prototypes": 32}},
        {"mte": {"pooled": 0}},
    ):
        for found in counts(**{**TINY, **values}):
            assert found.forward_macs == sum(found.macs.values()) > found.macs["encoder"] > 0
            assert all(value >= 0 for value in found.macs.values())
    swin = {"arch": "swin_tiny_patch4_window7_224", "patch_size": None}
    options = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    _, enhanced = counts(**{**TINY, **swin, "method": "dino", "arch_options": options})
    assert "auxiliary CLS" not in enhanced.macs and enhanced.macs["poolers"] > 0
    learned, _ = counts(method="dino", token_learner={"tokens": 8})
    assert learned.macs["encoder"] / 1e9 == pytest.approx(2.43, abs=0.01)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


def test_the_record_and_what_is_shown(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = commands.cost(recipe, batch_size=2, repeats=2, out=str(tmp_path / "out"), device="cpu")
    assert record == read_record(tmp_path / "out" / "record.json")
    assert record.task == "cost" and record.subject.recipe == "mine" and record.subject.method == "ibot"
    for key in ("plain", "mte"):
        assert record.metrics[f"step_seconds_{key}"].n == 2
        assert record.metrics[f"step_seconds_{key}"].value == pytest.approx(sum(record.details["seconds"][key]["step"]) / 2)
        assert 0 < record.metrics[f"inference_seconds_{key}"].value < record.metrics[f"step_seconds_{key}"].value
        parts = record.details["parts"][key]
        assert record.metrics[f"forward_macs_{key}"].value == sum(parts["macs"].values())
    out = capsys.readouterr().out
    assert all(word in out for word in ("TEN", "poolers", "prototypes", "with MTE", "±", "exported encoder", "2 + 2 views"))
    assert not (tmp_path / "recipe.yaml").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "out"]


def test_counting_alone(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = commands.cost(recipe, no_time=True, json=True, set_=["mte.pooled=2", "mte.auxiliary_cls=1"])
    assert json.loads(capsys.readouterr().out) == record.model_dump(mode="json")
    assert not any("seconds" in name or "memory" in name for name in record.metrics)
    assert record.details["recipes"]["mte"]["mte"]["pooled"] == 2 and record.details["recipes"]["plain"]["mte"] is None


def test_mistakes(recipe: str) -> None:
    with pytest.raises(UserError, match=r"unknown setting 'mte\.pool'"):
        commands.cost(recipe, set_=["mte.pool=2"])
    with pytest.raises(UserError, match="no recipe named 'dinoo'"):
        commands.cost("dinoo")
    with pytest.raises(UserError, match="token_learner"):
        commands.cost(recipe, set_=["token_learner=true"], no_time=True)


def test_the_verb_is_declared() -> None:
    import tomllib
    from importlib import import_module

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["mte_bench.commands"]["analyze.cost"].partition(":")
    assert getattr(import_module(module), name) is commands.cost
    assert {"--set", "--batch-size", "--device", "--repeats", "--no-time", "--json", "--out"} <= {
        option for parameter in _parser("cost", commands.cost).params for option in parameter.opts
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can only be forgotten on Linux")
def test_a_peak_can_be_forgotten() -> None:
    device = torch.device("cpu")
    before = peak_memory(device)
    torch.ones(100 << 20, dtype=torch.float32).sum()  # 400 MiB, gone at once
    high = peak_memory(device)
    assert high >= before and high > 400 << 20
    assert forget_peak(device)
    assert peak_memory(device) < high - (300 << 20)
