"""``training.pt``: everything that is needed to go on exactly where a run stopped.

Nothing random is stored because nothing random is carried along: views, data order and stochastic depth are drawn
from (seed, epoch or step, image), so a step needs only its number.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mte_bench.errors import UserError
from mte_bench.files import atomic

if TYPE_CHECKING:
    from pretrain.trainer import Trainer

FORMAT = 1
NAME = "training.pt"


def save(trainer: "Trainer") -> None:
    """Write the run's state atomically."""
    state = {
        "format": FORMAT,
        "identity": trainer.identity,
        "step": trainer.step,
        "student": trainer.student.state_dict(),
        "teacher": trainer.teacher.state_dict(),
        "method": trainer.method.state_dict(),
        "optimiser": trainer.optimiser.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "seconds": trainer.seconds,
        "corrupt": sorted(trainer.corrupt),
    }
    with atomic(trainer.out / NAME) as path:
        torch.save(state, path)


def restore(trainer: "Trainer") -> bool:
    """Load the state of a run that stopped, if there is one; returns whether there was.

    Raises ``UserError`` if that run had other settings, data or seed, naming each difference.
    """
    path = trainer.out / NAME
    if not path.exists():
        return False
    state = read(path)
    different = list(_differences(state["identity"], trainer.identity))
    if different:
        raise UserError(
            f"{trainer.out}: holds a run with other settings ({'; '.join(different[:5])}); "
            "repeat its settings to go on, or choose another --out"
        )
    trainer.student.load_state_dict(state["student"])
    trainer.teacher.load_state_dict(state["teacher"])
    trainer.method.load_state_dict(state["method"])
    trainer.optimiser.load_state_dict(state["optimiser"])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.seconds = state["step"], state["seconds"]
    trainer.corrupt.update(state["corrupt"])
    return True


def read(path: Path) -> dict[str, Any]:
    """The state in ``path``, never executing code from it; raises ``UserError`` if it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise UserError(f"{path}: not a training state ({str(error).splitlines()[0]}); remove the file to start anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: a training state of another version; remove the file to start anew")
    return state


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """``key: old -> new`` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and list(old) == list(new):
        return []
    return [] if old == new else [f"{key}: {old} there, {new} now"]
