"""The loop of every training that goes step by step: it can be stopped at any moment and goes on exactly where it stopped.

Read ``Loop.train`` first. A subclass states what a step does. Its randomness comes from (seed, step) and an image's from
(seed, epoch, image), so nothing random is carried along, and all that a step needs of the past are the weights, the
optimiser and its number.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from mte_bench import distributed
from mte_bench.console import log
from mte_bench.device import peak_memory
from mte_bench.errors import UserError
from mte_bench.training import state
from mte_bench.training.batches import Batch, StepSampler
from mte_bench.training.live import Curves, LiveLine

LINES_PER_EPOCH = 20

B = TypeVar("B", bound=Batch)


class Loop(ABC, Generic[B]):
    """One training in the folder ``out``, by this process, ``process`` (rank, number of processes) of those that share it.

    ``save_minutes`` is the longest time between two states that are saved.
    """

    identity: dict[str, Any]
    """What must be the same for a run to go on: the result depends on it and on nothing else."""
    optimiser: torch.optim.Optimizer
    by_epoch = True
    """Whether a state is saved, and a line of the curves written, at the end of every epoch."""

    def __init__(
        self,
        out: Path,
        *,
        device: torch.device,
        precision: torch.dtype,
        save_minutes: float,
        process: tuple[int, int],
    ):
        self.out, self.device, self.precision, self.save_minutes = out, device, precision, save_minutes
        self.rank, self.processes = process
        self.step = self.measured = self.resumed = 0
        self.seconds = self.paused = 0.0
        self.corrupt: set[str] = set()
        self.curves: Curves | None = None
        sampler = self.sampler()  # refuses a batch that does not fit
        self.batch_size, self.accumulate = sampler.batch_size, sampler.accumulate
        self.micro_batch = self.batch_size // (self.processes * self.accumulate)
        self.steps_per_epoch = sampler.steps_per_epoch
        self.total_steps = sampler.epochs * self.steps_per_epoch
        self.line_every = max(1, self.steps_per_epoch // LINES_PER_EPOCH)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    # What a training states of itself ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """What has weights or buffers that the state must hold, by name."""

    @abstractmethod
    def sampler(self) -> StepSampler:
        """Which images in which of the steps that are left; called before all else. Raises ``UserError`` if they do not fit."""

    @abstractmethod
    def batches(self) -> Iterator[B]:
        """The batches of the steps that are left."""

    @abstractmethod
    def wrapped(self) -> Any:
        """What is trained, as a step calls it: among several processes it shares its gradients with them."""

    @abstractmethod
    def take_step(self, model: Any, batches: Iterator[B]) -> dict[str, float]:
        """One optimiser step of ``model`` (``wrapped``) on the next batches; returns its ``loss`` and what else curves show."""

    @abstractmethod
    def describe(self) -> None:
        """Write what a reader of the folder wants first; called by the first process when a run begins."""

    def measures(self, epoch: int) -> bool:
        """Whether there is anything to ``measure`` after so many epochs."""
        return False

    def measure(self) -> None:
        """Measure what has been trained, on all processes."""

    def export(self) -> None:
        """Write what is to lie in the folder beside every state; called by the first process."""

    # The loop ---------------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.step / self.steps_per_epoch

    @property
    def trained_seconds(self) -> float:
        """Wall-clock seconds so far, over all restarts, without the pauses in which it measures and saves."""
        return self.seconds - self.paused

    @property
    def started(self) -> bool:
        """Whether an earlier run left its state in the folder."""
        return (self.out / state.NAME).exists()

    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.step == self.total_steps and not self._unmeasured

    def train(self) -> bool:
        """Train to the end, going on where an earlier run in this folder stopped; returns whether anything was left to do.

        Raises ``UserError`` if that run had another ``identity``, naming each difference.
        """
        if self.restore():
            if self.rank == 0 and not self.finished():
                log(f"{self.out}: going on from step {self.step} of {self.total_steps} (epoch {self.epoch:.2f})")
        elif self.rank == 0:
            self.describe()
        if self.finished():
            return False
        model = self.wrapped()
        self.curves = Curves(self.out, self.step) if self.rank == 0 else None
        began = time.monotonic() - self.seconds
        saved = time.monotonic()
        try:
            with LiveLine(self.total_steps, silent=self.rank != 0) as live:
                batches = live.timed(self.batches())
                while not self.finished():
                    if self._unmeasured:
                        self._measure()
                        self.paused += time.monotonic() - began - self.seconds
                    else:
                        values = self.take_step(model, batches)
                        self.step += 1
                        self.seconds = time.monotonic() - began
                        live.step(self.step, self.epoch, self.batch_size, values["loss"], peak_memory(self.device))
                        if self.curves:
                            self.curves.add(values)
                            if self._at_milestone or self.step % self.line_every == 0:
                                self.curves.write(self.step, self.epoch, self.trained_seconds)
                    now = time.monotonic()
                    self.seconds = now - began
                    late = now - saved > 60 * self.save_minutes
                    if (late or self._at_milestone) and not self._unmeasured:
                        self.save()
                        saved = time.monotonic()
                        self.paused += saved - now
        finally:
            if self.curves:
                self.curves.close()
        distributed.barrier()  # what the first process has written is there for all
        return True

    def save(self) -> None:
        """Write the state, which only the first process does: the others need not come here at the same step."""
        if self.rank == 0:
            if self.curves:
                self.curves.write(self.step, self.epoch, self.trained_seconds)  # what is not written would be lost
            self.export()
            state.write(self.out, self.state())

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly, as ``load`` takes it."""
        return {
            "identity": self.identity,
            "step": self.step,
            "measured": self.measured,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "seconds": self.seconds,
            "paused": self.paused,
            "corrupt": sorted(self.corrupt),
            "resumed": self.resumed,
        }

    def load(self, values: dict[str, Any]) -> None:
        """Take over a ``state``."""
        for name, part in self.parts.items():
            part.load_state_dict(values[name])
        self.optimiser.load_state_dict(values["optimiser"])
        self.scaler.load_state_dict(values["scaler"])
        self.step, self.measured, self.seconds = values["step"], values["measured"], values["seconds"]
        self.paused = values.get("paused", 0.0)  # which states of earlier versions do not tell
        self.corrupt.update(values["corrupt"])
        self.resumed = values["resumed"] + (not self.finished())

    def restore(self) -> bool:
        """Take over the state that an earlier run left in the folder; returns whether there was one."""
        values = state.read_own(self.out, self.identity)
        if values is not None:
            self.load(values)
        return values is not None

    @property
    def _at_milestone(self) -> bool:
        return self.step == self.total_steps or (self.by_epoch and self.step % self.steps_per_epoch == 0)

    @property
    def _unmeasured(self) -> bool:
        """Whether an epoch has ended after which there is something to measure that has not been."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        return rest == 0 and self.measured < self.step and self.measures(epoch)

    def _measure(self) -> None:
        try:
            self.measure()
        except UserError:  # an image that cannot be read is no reason to lose the epoch
            self.save()
            raise
        self.measured = self.step

    # What steps share -------------------------------------------------------------------------------------------------------

    def micro_step(self, model: Any, micro: int) -> AbstractContextManager[Any]:
        """Around the ``micro``-th forward and backward pass of a step: gradients travel with the last one only."""
        return nullcontext() if self.processes == 1 or micro == self.accumulate - 1 else model.no_sync()

    def means(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """A step's ``values``, the same ones in all processes, as curves show them: each the mean over the processes."""
        means = distributed.mean(torch.stack([own.float() for own in values.values()]))
        return dict(zip(values, means.tolist(), strict=True))

    def refuse_non_finite(self, loss: float, mend: str, findings: Callable[[], str] = str) -> None:
        """Raise ``UserError``, with ``findings``, unless ``loss`` is finite: before the step touches weights or state."""
        if not math.isfinite(loss):
            where = f"step {self.step + 1} (epoch {int(self.epoch) + 1})"
            raise UserError(f"the loss is {loss} at {where}; {findings()}try {mend} or --precision float32")

    def update_weights(self) -> None:
        """The optimiser's step with the gradients that there are, which are then forgotten."""
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
