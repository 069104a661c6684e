"""Settings that both dense tasks have: how the encoder is joined, how all is trained, and what the step's learning rate is."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from downstream.task import TaskProtocol
from mte_bench.settings import Settings

SMOKE_STEPS = 2


class Joining(Settings):
    """How the encoder becomes the backbone; ``downstream.dense.adapter.Backbone`` says what each means."""

    taps: tuple[int, int, int, int]
    tap_norm: bool
    adapt: bool = True
    frozen: bool = False
    drop_path: float = Field(ge=0, lt=1)
    position_size: tuple[PositiveInt, PositiveInt] | None = None
    checkpointing: bool = False


class Optimiser(Settings):
    """AdamW and the learning rate over the steps."""

    lr: float = Field(gt=0)
    """Of the heads; ``layer_decay`` makes it smaller towards the images."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(ge=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Embeddings learn at ``lr * layer_decay ** (depth + 1)``, block i (from 0) at ``lr * layer_decay ** (depth - i)``."""
    spared: Literal["vectors"] | tuple[str, ...] = "vectors"
    """On what weight decay does not act: on vectors and biases, or on parameters with one of these parts in their names."""
    schedule: Literal["steps", "poly"]
    """``steps``: a tenth after each of ``milestones``; ``poly``: ``(1 - done) ** power``."""
    milestones: tuple[int, ...] = ()
    """Epochs after which the rate falls."""
    power: float = 1.0
    warmup: int = Field(ge=0)
    """Steps over which the scheduled rate is multiplied with a line from ``warmup_ratio`` to 1."""
    warmup_ratio: float = Field(gt=0, le=1)


class DenseProtocol(TaskProtocol):
    """Settings of a dense task; those of its model, augmentation and test are added by the task."""

    joining: Joining
    optimiser: Optimiser
    epochs: int | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    """One of both says how long it is trained."""
    batch_size: int = Field(gt=0)
    """Images per step, over all processes."""
    accumulate: PositiveInt = 1
    """Parts that a process takes its share of the batch in, one after the other: less memory, other batch statistics."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, and set the other to null")
        if self.optimiser.schedule == "steps" and self.epochs is None:
            raise ValueError("a schedule by steps has its milestones in epochs: set epochs")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """How many steps are trained."""
        return self.steps or (self.epochs or 0) * steps_per_epoch

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """What ``lr`` is multiplied with at ``step`` (from 0); as mmcv's step, poly and linear warm-up hooks."""
        o = self.optimiser
        if o.schedule == "steps":
            scheduled = 0.1 ** sum(step // steps_per_epoch >= milestone for milestone in o.milestones)
        else:
            scheduled = (1 - step / self.total_steps(steps_per_epoch)) ** o.power
        if step < o.warmup:
            scheduled *= 1 - (1 - step / o.warmup) * (1 - o.warmup_ratio)
        return scheduled

    def for_smoke(self) -> Self:
        """Two steps of two images."""
        return self.model_copy(update={"epochs": None, "steps": SMOKE_STEPS, "batch_size": 2, "accumulate": 1})
