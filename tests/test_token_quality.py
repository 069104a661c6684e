"""Tokens along pre-training: each state is measured as it is by itself, once, and runs stand side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from downstream.analysis import token_quality
from downstream.suites.cells import cells_of, load_suite
from downstream.suites.work import work
from mte_bench.cli import run
from mte_bench.data.sources import open_source
from mte_bench.encoders.checkpoint import save_encoder
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.encoders.snapshots import snapshot_folder
from mte_bench.errors import UserError
from mte_bench.settings import merge
from pretrain.recipe import Recipe
from pretrain.trainer import Trainer
from tiny import CPU, TINY, Killed

RANDOM = "random:vit_tiny_patch16_224?image_size=32&patch_size=8&depth=1"
FEW = ["--set", "k=5", "--set", "penalties=[0.01, 1]", "--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of DINO+MTE with two tokens of each kind, and a snapshot of each."""
    out = tmp_path_factory.mktemp("trained")
    recipe = merge(TINY, {"mte": {"auxiliary_cls": 2, "pooled": 2}, "epochs": 2, "snapshot_every": 1})
    Trainer(Recipe.check(recipe, "recipe"), open_source(str(folder), "train"), out, device=CPU, workers=0).run()
    return out


def analyse(folder: Path, out: Path, *arguments: str) -> Any:
    return run(["analyze", "token-quality", *arguments, "--data", str(folder), "--out", str(out), *FEW])


def test_each_state_is_worth_what_other_analyses_of_it_find(folder: Path, trained: Path, tmp_path: Path) -> None:
    record = analyse(folder, tmp_path / "quality", str(trained), "--with", RANDOM)
    ours = json.loads((tmp_path / "quality" / "token-quality.json").read_text())["runs"]
    first, second = ours.values()
    assert first["epochs"] == [0, 1, 2] and second["epochs"] == [0]
    for place, state in enumerate([snapshot_folder(trained, 0), snapshot_folder(trained, 1), trained]):
        options = [str(state), "--data", str(folder), *FEW, "--out", str(tmp_path / f"alone-{place}")]
        alone = run(["analyze", "pairs", *options]).metrics
        for probe, name in (("knn", "top1_"), ("linear", "top1_linear_")):
            found = {key: values[place] for key, values in first["top1"].items()}
            for token in ("global", "cls_1", "cls_2", "pooled_1", "pooled_2"):
                assert found[f"{probe}_{token}"] == alone[name + token].value
            for kind in ("cls", "pooled"):
                mean = np.mean([alone[f"{name}{kind}_{number}"].value for number in (1, 2)])
                assert found[f"{probe}_mean_{kind}"] == pytest.approx(mean)
    options = [str(trained), "--data", str(folder), "--set", "k=5", "--workers", "0", "--out", str(tmp_path / "by-class")]
    together = run(["analyze", "per-class", *options]).metrics["top1_all_auxiliary"].value
    assert first["top1"]["knn_all_auxiliary"][-1] == together
    assert set(second["top1"]) == {"knn_global", "linear_global"}
    assert record.metrics[f"top1_knn_global_{trained.name}"].value == first["top1"]["knn_global"][-1]
    assert len(record.subject.parts) == 2


def test_a_stop_loses_no_state_that_was_measured(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    real = token_quality.measure_tokens

    def counted(*arguments: Any) -> Any:
        if len(measured) == 2:
            raise Killed
        measured.append(1)
        return real(*arguments)

    monkeypatch.setattr(token_quality, "measure_tokens", counted)
    with pytest.raises(Killed):
        analyse(folder, tmp_path, str(trained))
    assert not (tmp_path / "record.json").exists()
    measured.clear()
    stopped_once = analyse(folder, tmp_path, str(trained))
    assert len(measured) == 1
    assert list(stopped_once.details["runs"][trained.name]["epochs"]) == [0, 1, 2]


def test_a_suite_lists_it_and_a_state_without_an_epoch_is_refused(folder: Path, trained: Path, tmp_path: Path) -> None:
    settings = json.dumps({"k": 5, "penalties": [0.01, 1]})
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"checkpoints: ['{trained}']\ndata: '{folder}'\ntasks: [{{task: token-quality, set: {settings}}}]\n")
    cells = cells_of(load_suite(str(suite)), "suite", tmp_path / "out", {"device": "cpu", "workers": 0})
    (done,) = work(cells)
    assert done.status == "done" and done.record is not None and done.record.task == "token-quality"
    assert [result.status for result in work(cells)] == ["found"]
    spec = EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"depth": 1})
    save_encoder(tmp_path / "someone.safetensors", build_encoder(spec), {})
    with pytest.raises(UserError, match="after how many epochs it is, is not known"):
        analyse(folder, tmp_path / "never", str(tmp_path / "someone.safetensors"))
