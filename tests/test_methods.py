"""What is true of every method, plain and with MTE: it goes on exactly after a stop, and is the same on two processes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pretrain.methods
from mte_bench.encoders.heads import StackedBatchNorm, StackedMLP
from mte_bench.training import state
from mte_bench.training.schedules import cosine
from pretrain.methods import METHODS, Method
from tiny import TINY, assert_same_end, first_steps, first_steps_in_two_processes, make, random, run_until

SMALL = {"prototypes": 64, "hidden": 32, "bottleneck": 16, "output": 16, "queue": 16}
"""Of these, a method takes the settings that it has."""
SWIN = {
    "arch": "swin_tiny_patch4_window7_224",
    "patch_size": None,
    "arch_options": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
}
WITH = {"": None, "+MTE": {"pooled": 2, "kernel": 3}}


def case(name: str, mte: str, arch: dict[str, Any]) -> dict[str, Any]:
    """The method's changes to the tiny recipe."""
    settings = {key: value for key, value in SMALL.items() if key in METHODS[name].Settings.model_fields}
    views = {**TINY["views"], "local_count": 0}
    if METHODS[name].labelled:  # one view, and nothing that is drawn for a process's part of the batch
        views, settings = {**views, "global2": None}, {"mixup": 0, "cutmix": 0}
    return {"method": name, "method_settings": settings, "epochs": 2, "views": views, "mte": WITH[mte], **arch}


CASES = {
    f"{name}{mte} {label}": case(name, mte, arch)
    for name in METHODS
    for mte in WITH
    for label, arch in {"ViT": {}, "Swin": SWIN}.items()
    if mte or label == "ViT" or name == "moby"
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the views takes longer than training here."""
    monkeypatch.setattr("pretrain.trainer.draw_views", lambda path, *_: path.touch())


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_exactly(folder: Path, tmp_path: Path, name: str) -> None:
    """Everything that a step changes is in the saved state: weights, batch statistics, centres, queues."""
    make(folder, tmp_path / "whole", **CASES[name]).run()
    run_until(make(folder, tmp_path / "stopped", save_minutes=0.0, **CASES[name]), 5)
    assert state.read(tmp_path / "stopped" / state.NAME)["step"] == 5
    make(folder, tmp_path / "stopped", **CASES[name]).run()
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


@pytest.fixture(scope="module")
def two_processes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, Any]]:
    """Of all cases, as starting the processes takes longer than their steps; only once it is asked for."""

    @functools.cache
    def steps() -> dict[str, Any]:
        return first_steps_in_two_processes(folder, tmp_path_factory.mktemp("two"), CASES, 2)

    return steps


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_losses_and_gradients_of_one(
    folder: Path, tmp_path: Path, two_processes: Callable[[], dict[str, Any]], name: str
) -> None:
    """The same global batch, two steps: batch statistics, negatives and queues are those of all processes."""
    one, two = first_steps(make(folder, tmp_path, **CASES[name]), 2), two_processes()[name]
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and len(a) > 20
        largest = max(gradient.abs().max().item() for key, gradient in a.items() if key != "loss")
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=1e-6 * largest, msg=lambda text, key=key: f"{key}: {text}")
    assert (one[0]["loss"] - one[1]["loss"]).abs() > 1e-6


@pytest.mark.parametrize("share", [5, 1, 0])
def test_batch_statistics_of_processes_are_those_of_all_rows_however_many_each_has(tmp_path: Path, share: int) -> None:
    """Two processes have ``share`` and the rest of eight rows: values, gradients and running statistics."""
    torch.multiprocessing.spawn(_normalise_share, (tmp_path, share), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    rows = random(8, 6, dtype=torch.float64).requires_grad_()
    norm = nn.BatchNorm1d(6).double()
    normed = norm(rows)
    (normed * random(8, 6, seed=1, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(torch.cat([part["normed"] for part in found]), normed.detach())
    torch.testing.assert_close(torch.cat([part["gradient"] for part in found]), rows.grad)
    for part in found:
        torch.testing.assert_close(part["mean"], norm.running_mean)
        torch.testing.assert_close(part["variance"], norm.running_var)


def _normalise_share(rank: int, out: Path, share: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    own = slice(0, share) if rank == 0 else slice(share, 8)
    rows = random(8, 6, dtype=torch.float64)[own].requires_grad_()
    norm = StackedBatchNorm(1, 6).double()
    normed = norm(rows.unsqueeze(0)).squeeze(0)
    (normed * random(8, 6, seed=1, dtype=torch.float64)[own]).sum().backward()
    found = {"normed": normed.detach(), "gradient": rows.grad, "mean": norm.running_mean, "variance": norm.running_var}
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_for_statistics_pass_by_the_running_ones(rows: int) -> None:
    """As the masked patches of a small batch, of which by chance there are none."""
    norm = StackedBatchNorm(2, 3)
    norm.running_mean.fill_(2.0)  # type: ignore[union-attr]
    x = random(2, rows, 3)
    torch.testing.assert_close(norm(x), (x - 2) / (1 + norm.eps) ** 0.5)
    assert torch.equal(norm.running_mean, torch.full((6,), 2.0)) and norm.training


def test_batch_statistics_of_processes_hold_where_rows_differ_little(tmp_path: Path) -> None:
    """As the global tokens of a fresh network do: a thousandth of their own size."""
    rows = 100 + 0.1 * torch.randn(16, 8)
    norm = StackedBatchNorm(1, 8)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        ours = norm._over_processes(rows)
    finally:
        torch.distributed.destroy_process_group()
    theirs = F.batch_norm(rows.double(), None, None, training=True)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_moves_when_the_method_says(folder: Path, tmp_path: Path, name: str) -> None:
    changes = {**case(name, "", {}), "momentum": (0.5, 1.0), "optimiser": {"lr": 0.01, "warmup_epochs": 0}}
    trainer = make(folder, tmp_path, **changes)
    forward = trainer.forward
    seen: list[tuple[Tensor, Tensor]] = []

    def weights() -> tuple[Tensor, Tensor]:
        branches = (trainer.teacher, trainer.student)
        teacher, student = (branch.encoder.model.blocks[0].mlp.fc1.weight.detach().clone() for branch in branches)
        return teacher, student

    def watched(*arguments: Any) -> Any:
        seen.append(weights())
        return forward(*arguments)

    trainer.forward = watched  # type: ignore[method-assign]
    run_until(trainer, 2)
    (start, same), (teacher, student), (end, last) = *seen, weights()
    first, second = (cosine(step, trainer.total_steps, 0.5, 1.0) for step in range(2))
    assert torch.equal(start, same) and not torch.equal(student, start) and not torch.equal(last, student)
    if METHODS[name].teacher_moves == "before":
        torch.testing.assert_close(teacher, second * start + (1 - second) * student)
        assert torch.equal(end, teacher)
    else:
        torch.testing.assert_close(teacher, first * start + (1 - first) * student)
        torch.testing.assert_close(end, second * teacher + (1 - second) * last)


class Toy(Method):
    """Cosine similarity: all that a method must state."""

    title = "Toy"
    output_width = 8  # type: ignore[assignment]

    def head(self, width: int, copies: int) -> nn.Module:
        return StackedMLP(copies, [width, 16, 8])

    def tail(self, student: bool) -> nn.Module:
        return nn.Identity()

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        return 1 - F.cosine_similarity(prediction, target).mean()


@pytest.mark.parametrize("mte", WITH)
def test_a_method_of_ten_lines_trains_and_has_its_mte(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mte: str
) -> None:
    monkeypatch.setitem(METHODS, "toy", Toy)
    trainer = make(folder, tmp_path, method="toy", method_settings={}, mte=WITH[mte], epochs=4)
    before = {name: parameter.detach().clone() for name, parameter in trainer.student.named_parameters()}
    record = trainer.run()
    assert trainer.recipe.title == "Toy" + mte and record.subject.mte == bool(mte)
    assert record.metrics["loss"].value < 0.3
    assert [name for name, parameter in trainer.student.named_parameters() if torch.equal(parameter, before[name])] == []


def test_no_method_knows_of_mte() -> None:
    files = sorted(Path(pretrain.methods.__file__).parent.glob("*.py"))
    assert len(files) > len(METHODS)
    for path in files:
        assert "mte" not in path.read_text().lower().replace("mte_bench", ""), path.name
