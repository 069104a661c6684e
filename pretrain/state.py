"""What of a run goes into ``training.pt``.

Nothing random is stored because nothing random is carried along: views, data order and stochastic depth are drawn
from (seed, epoch or step, image), so a step needs only its number.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mte_bench.training import state
from mte_bench.training.state import NAME as NAME

if TYPE_CHECKING:
    from pretrain.trainer import Trainer

FORMAT = 1


def save(trainer: "Trainer") -> None:
    """Write the run's state atomically."""
    values = {
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
    state.write(trainer.out, FORMAT, values)


def restore(trainer: "Trainer") -> bool:
    """Load the state of a run that stopped, if there is one; returns whether there was.

    Raises ``UserError`` if that run had other settings, data or seed, naming each difference.
    """
    values = state.read_own(trainer.out, FORMAT, trainer.identity)
    if values is None:
        return False
    trainer.student.load_state_dict(values["student"])
    trainer.teacher.load_state_dict(values["teacher"])
    trainer.method.load_state_dict(values["method"])
    trainer.optimiser.load_state_dict(values["optimiser"])
    trainer.scaler.load_state_dict(values["scaler"])
    trainer.step, trainer.seconds = values["step"], values["seconds"]
    trainer.corrupt.update(values["corrupt"])
    return True


def read(path: Path) -> dict[str, Any]:
    """The state in ``path``, never executing code from it; raises ``UserError`` if it is none."""
    return state.read(path, FORMAT)
