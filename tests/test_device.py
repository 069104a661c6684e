"""Nothing is on the wrong device: steps of every method, and the verbs, on a CUDA device that is not there (``labelled``)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from test_evaluate import draw
from test_methods import CASES
from torch.utils._pytree import tree_map

from downstream import neighbours
from labelled import OnCUDA, cuda
from mte_bench import cli
from mte_bench.data.sources import open_source
from pretrain import trainer
from pretrain.loader import view_loader
from pretrain.recipe import Recipe
from pretrain.trainer import Trainer
from tiny import CPU, TINY


def test_the_device_finds_what_a_real_one_would() -> None:
    with cuda() as device:
        there, here = torch.ones(3, 4).to(device), torch.ones(3, 4)
        assert isinstance(there, OnCUDA) and there.device == device and (there + 1).cpu().sum() == 24
        assert isinstance(torch.nn.Linear(4, 2).to(device)(there), OnCUDA)
        mistakes: list[tuple[type[Exception], Callable[[], Any]]] = [
            (RuntimeError, lambda: there + here),
            (RuntimeError, lambda: torch.nn.Linear(4, 2)(there)),
            (RuntimeError, lambda: here[there > 0]),
            (RuntimeError, lambda: torch.randn(3, device=device, generator=torch.Generator())),
            (TypeError, there.numpy),
            (TypeError, lambda: np.asarray(there)),
        ]
        for kind, mistake in mistakes:
            with pytest.raises(kind):
                mistake()


@pytest.mark.parametrize("name", CASES)
def test_two_steps_of_every_method_are_all_on_the_device(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the losses of the CPU; another trainer takes up the state of the first after one step."""
    recipe, images = Recipe(**{**TINY, **CASES[name]}), open_source(str(folder), "train")
    monkeypatch.setattr(trainer, "view_loader", unpinned)

    def losses(device: torch.device) -> list[float]:
        first, second = (Trainer(recipe, images, tmp_path, device=device, workers=0) for _ in range(2))
        batches = first.batches()
        found = [first.take_step(first.student, batches)["loss"]]
        first.export()
        stored = first.state() | {"step": 1}
        second.load(tree_map(lambda value: value.cpu() if isinstance(value, torch.Tensor) else value, stored))
        return [*found, second.take_step(second.student, batches)["loss"]]

    expected = losses(CPU)
    with cuda() as device:
        assert losses(device) == pytest.approx(expected, rel=1e-5)


def unpinned(*arguments: Any, **options: Any) -> Iterator[Any]:
    """Batches in memory that needs no driver."""
    return view_loader(*arguments, **options | {"pin_memory": False})


class InTurn:
    """Threads that do their work in the one that gives it: the device is there for that one alone."""

    def __init__(self, *_: Any):
        self.map = map

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


LINEAR = ["linear", "--smoke", "--protocol"]
VERBS = {
    "knn": ["knn", "--set", "k=[2]"],
    "linear": [*LINEAR, "linear-fast"],
    "linear on views": [*LINEAR, "ibot-sweep", "--set", "feature=cls-last2"],
    "ridge": [*LINEAR, "ridge"],
    "finetune": ["finetune", "--protocol", "tiny", "--set", "epochs=1", "--set", "batch_size=16", "--set", "drop_path=0.2"],
    "retrieval": ["retrieval"],
    **{name: ["analyze", name] for name in ("cka", "per-class", "pairs", "pseudo-labels", "pooling", "attention")},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(draw(tmp_path_factory.mktemp("drawn")))


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pre-training on the device, which k-NN is measured in."""
    out = tmp_path_factory.mktemp("run")
    recipe = out / "tiny.yaml"
    recipe.write_text(json.dumps({**TINY, "epochs": 1, "knn_every": 1}))
    with cuda():
        words = ["pretrain", str(recipe), "--data", data, "--out", str(out), "--workers", "0", "--precision", "float32"]
        cli.run([*words, "--device", "cuda:0"])
    assert "knn_top1" in (out / "curves.jsonl").read_text()
    return out


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_all_on_the_device(data: str, run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what the CPU gives."""
    monkeypatch.setattr(neighbours, "ThreadPoolExecutor", InTurn)

    def metrics(device: str) -> dict[str, float]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / device / "cache"))
        words = ["--data", data, "--workers", "0", "--precision", "float32", "--device", device, "--out", str(tmp_path / device)]
        record = cli.run([*VERBS[name], str(run), *words])
        return {metric: found.value for metric, found in record.metrics.items()}

    with cuda() as device:
        found = metrics(str(device))
    assert found == pytest.approx(metrics("cpu"), rel=1e-3)
