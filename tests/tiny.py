"""What tests share: random tensors and weights, and training runs that are small enough, with what there is to compare."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.formulas import SMALL
from benchmarks.formulas import TINY as MODEL
from mte_bench.data.sources import open_source
from mte_bench.data.transforms import normalise
from mte_bench.training import state
from mte_bench.training.live import CURVES
from pretrain.recipe import Recipe
from pretrain.trainer import Trainer

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "method": "dino",
    **MODEL,
    "method_settings": {**SMALL, "warmup_teacher_temperature_epochs": 2},
    "drop_path": 0.2,
    "epochs": 3,
    "batch_size": 8,
    "views": {"global1": {"size": 32}, "global2": {"size": 32}, "local": {"size": 16}, "local_count": 1},
    "optimiser": {"lr": 0.01, "warmup_epochs": 1},
    "mte": {"auxiliary_cls": 1, "pooled": 2, "kernel": 3},
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(module: torch.nn.Module) -> Any:
    """Every weight moved away from its initial value, so that none is 0 or 1 by chance."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.2 * random(*parameter.shape, seed=index + 1).to(parameter.dtype))
    return module


def make(folder: Path, out: Path, **changes: Any) -> Trainer:
    options = {key: changes.pop(key) for key in ("seed", "process", "save_minutes", "held_out", "workers") if key in changes}
    return Trainer(Recipe(**{**TINY, **changes}), open_source(str(folder), "train"), out, device=CPU, **{"workers": 0, **options})


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's state by its path, with its step."""
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}")
        elif isinstance(value, int):
            found[path] = torch.tensor(value)

    walk({key: value for key, value in state.read(out / state.NAME).items() if key not in ("seconds", "resumed")}, "")
    return found


def assert_same_end(out: Path, reference: Path) -> None:
    ours, theirs = tensors(out), tensors(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (out / "encoder.safetensors").read_bytes() == (reference / "encoder.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (out / CURVES).read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (reference / CURVES).read_text().splitlines()]


class Killed(Exception):
    pass


def first_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradients of the first step, which is not taken, and its loss."""
    found: dict[str, torch.Tensor] = {}

    def keep(momentum: float) -> dict[str, float]:
        found.update({name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None})
        raise Killed

    trainer.update = keep  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    return found


def run_until(trainer: Trainer, stop: int) -> None:
    """Run, as if killed before step ``stop``."""
    step = trainer.take_step

    def until(*arguments: Any) -> Any:
        if trainer.step == stop:
            raise Killed
        return step(*arguments)

    trainer.take_step = until  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()


def first_steps(trainer: Trainer, steps: int) -> list[dict[str, torch.Tensor]]:
    """The loss (``loss``) and all gradients of the first ``steps`` steps, computed in float64."""
    found: list[dict[str, torch.Tensor]] = []
    for module in (trainer.method, trainer.student, trainer.teacher):
        module.double()
    step, update = trainer.take_step, trainer.update

    def watched(*arguments: Any) -> dict[str, float]:
        values = step(*arguments)
        found[-1]["loss"] = torch.tensor(values["loss"], dtype=torch.float64)
        return values

    def keep(momentum: float) -> dict[str, float]:
        found.append({name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None})
        return update(momentum)

    trainer.take_step, trainer.update = watched, keep  # type: ignore[method-assign]
    with (
        mock.patch("pretrain.trainer.normalise", lambda *arguments: normalise(*arguments).double()),
        mock.patch("pretrain.trainer.draw_views"),
    ):
        run_until(trainer, steps)
    return found


def first_steps_in_two_processes(folder: Path, out: Path, cases: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """``first_steps`` of each case (its changes to ``TINY``), in two processes; those of the first."""
    torch.multiprocessing.spawn(_process, (folder, out, cases, steps), nprocs=2)
    return torch.load(out / "steps.pt")


def _process(rank: int, folder: Path, out: Path, cases: dict[str, dict[str, Any]], steps: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    found = {
        name: first_steps(make(folder, out / f"{index}", process=(rank, 2), **changes), steps)
        for index, (name, changes) in enumerate(cases.items())
    }
    if rank == 0:
        torch.save(found, out / "steps.pt")
    torch.distributed.destroy_process_group()
