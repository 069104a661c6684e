"""The engine: going on after a stop is exact, and what a step computes does not depend on how it is spread."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mte_bench.data.sources import open_source
from mte_bench.errors import UserError
from mte_bench.training import state
from mte_bench.training.live import CURVES
from pretrain.optimiser import EMA, clip_per_tensor
from pretrain.recipe import Recipe
from pretrain.trainer import Trainer
from tiny import CPU, TINY, Killed, assert_same_end, first_gradients, make, run_until, tensors


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    make(folder, out).run()
    return out


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_stopped_run_goes_on_exactly(folder: Path, whole: Path, tmp_path: Path, stop: int) -> None:
    """Saved after every step, killed before step ``stop``, run again: the same weights, state and curves' steps."""
    run_until(make(folder, tmp_path, save_minutes=0.0), stop)
    assert state.read(tmp_path / state.NAME)["step"] == stop
    assert make(folder, tmp_path).run().details["resumed"] == 1
    ours, theirs = tensors(tmp_path), tensors(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert (tmp_path / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_a_run_killed_while_it_saves_goes_on_exactly(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = 0
    save = torch.save

    def die_half_way(value: Any, path: Path) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            Path(path).write_bytes(b"half a file")
            raise Killed
        save(value, path)

    monkeypatch.setattr(torch, "save", die_half_way)
    with pytest.raises(Killed):
        make(folder, tmp_path).run()
    monkeypatch.undo()
    assert state.read(tmp_path / state.NAME)["step"] == 4
    make(folder, tmp_path).run()
    assert_same_end(tmp_path, whole)


def test_workers_do_not_change_the_result(folder: Path, whole: Path, tmp_path: Path) -> None:
    make(folder, tmp_path, workers=2).run()
    assert_same_end(tmp_path, whole)


def test_accumulated_micro_batches_give_the_same_gradients(folder: Path, tmp_path: Path) -> None:
    whole = first_gradients(make(folder, tmp_path / "1", batch_size=16))
    parts = first_gradients(make(folder, tmp_path / "4", batch_size=16, accumulate=4))
    assert whole.keys() == parts.keys() and len(whole) > 30
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_two_processes_give_the_gradients_and_losses_of_one(folder: Path, tmp_path: Path, batch_norm: bool) -> None:
    """torchrun with gloo, the same global batch: curves equal up to the order of reduction, also with drop path."""
    changes = {
        "optimiser": {"lr": 1e-4, "warmup_epochs": 0},
        "method_settings": {**TINY["method_settings"], "batch_norm_in_head": batch_norm},
    }
    one, two = by_one_and_by_two_processes({**TINY, **changes}, folder, tmp_path)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4 if batch_norm else 2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2 if batch_norm else 1e-3)


def by_one_and_by_two_processes(values: dict[str, Any], folder: Path, tmp_path: Path) -> list[list[dict[str, float]]]:
    """The curves of the same run by one process and by two."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(values))
    options = ["pretrain", str(recipe), "--data", str(folder), "--workers", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port())]
    for name, command in {"one": [sys.executable], "two": launcher}.items():
        words = [*command, "-m", "mte_bench", *options, "--out", str(tmp_path / name)]
        subprocess.run(words, check=True, env=environment, capture_output=True)
    return [[json.loads(line) for line in (tmp_path / name / CURVES).read_text().splitlines()] for name in ("one", "two")]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_run_with_other_settings_is_not_gone_on_with(folder: Path, whole: Path) -> None:
    with pytest.raises(UserError, match=r"recipe.optimiser.lr: 0.01 there, 0.02 now"):
        make(folder, whole, optimiser={"lr": 0.02, "warmup_epochs": 1}).run()
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        make(folder, whole, seed=1).run()


def test_a_finished_run_is_left_as_it_is(folder: Path, whole: Path) -> None:
    files = [whole / state.NAME, whole / "record.json", whole / "encoder.safetensors"]
    before = [path.stat().st_mtime_ns for path in files]
    record = make(folder, whole).run()
    assert [path.stat().st_mtime_ns for path in files] == before
    assert record.task == "pretrain" and record.subject.mte and record.subject.seed == 0


def test_a_non_finite_loss_stops_with_what_is_needed_to_look_into_it(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, tmp_path)
    step = trainer.take_step

    def poisoned(*arguments: Any) -> Any:
        if trainer.step == 5:
            with torch.no_grad():
                trainer.student.head.layers[0].weight[0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
        return step(*arguments)

    trainer.take_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"loss is nan at step 6 \(epoch 2\).*last good checkpoint is .*training.pt"):
        trainer.run()
    listed = (tmp_path / "non_finite_batch.txt").read_text().split()
    images = open_source(str(folder), "train")
    assert len(listed) == 8 and set(listed) <= {images.name(index) for index in range(len(images))}
    assert state.read(tmp_path / state.NAME)["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in state.read(tmp_path / state.NAME)["student"].values())


def test_the_non_finite_listing_is_the_batch_that_was_seen(folder: Path, tmp_path: Path) -> None:
    images = open_source(str(folder), "train")
    seen: list[str] = []

    class Watched(type(images)):  # type: ignore[misc]
        def image(self, index: int) -> Image.Image:
            seen.append(self.name(index))
            return super().image(index)

    images.__class__ = Watched
    trainer = Trainer(Recipe(**TINY), images, tmp_path, device=CPU, workers=0)
    with torch.no_grad():
        trainer.student.head.layers[0].weight[0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="step 1 "):
        trainer.run()
    drawn = seen[3:]  # the first three are shown in views.png
    assert set((tmp_path / "non_finite_batch.txt").read_text().split()) <= set(drawn[: len(drawn)])


def test_ema_and_clipping_equal_the_loops_of_the_reference() -> None:
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    expected = [0.9 * t.detach() + 0.1 * s.detach() for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    EMA(teacher, student).update(0.9)
    for parameter, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=1e-7)

    for parameter in student.parameters():
        parameter.grad = 5 * torch.randn_like(parameter)
    loop = []
    for parameter in student.parameters():
        assert parameter.grad is not None
        norm = parameter.grad.norm()
        loop.append(parameter.grad * min(1.0, 3.0 / (norm.item() + 1e-6)))
    clip_per_tensor(student, 3.0)
    for parameter, value in zip(student.parameters(), loop, strict=True):
        torch.testing.assert_close(parameter.grad, value)


def test_heads_of_a_stack_are_clipped_as_the_tensors_they_would_be_alone() -> None:
    from mte_bench.encoders.heads import StackedLinear

    stack = StackedLinear(3, 4, 5)
    stack.weight.grad = torch.stack([torch.full((5, 4), value) for value in (0.01, 1.0, 10.0)])
    stack.bias.grad = torch.zeros(3, 5)  # type: ignore[union-attr]
    clip_per_tensor(stack, 3.0)
    norms = stack.weight.grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([0.01 * 20**0.5, 3.0, 3.0]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_killed_at_ten_random_moments(folder: Path, whole: Path, tmp_path: Path) -> None:
    """SIGKILL, at moments drawn over starting, training and saving; then run again until done.

    They are drawn by lines of the curves, four an epoch, and not by the clock, which other work on the machine upsets.
    """
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps({**TINY, "epochs": 200}))
    command = [sys.executable, "-m", "mte_bench", "pretrain", str(recipe), "--data", str(folder), "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, **quiet)
    draw, out = random.Random(0), tmp_path / "killed"
    for _ in range(10):
        until = _lines(out) + draw.randrange(60)
        process = subprocess.Popen([*command, "--out", str(out)], start_new_session=True, **quiet)
        while process.poll() is None and _lines(out) <= until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--out", str(out)], check=True, **quiet)
    assert_same_end(out, tmp_path / "whole")


def _lines(out: Path) -> int:
    path = out / CURVES
    return path.read_bytes().count(b"\n") if path.exists() else 0
