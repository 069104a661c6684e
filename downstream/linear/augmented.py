"""Settings of a linear probe on augmented views, and the learning rate that they mean at each step."""

import math
import time
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from downstream.linear.heads import Heads, HeadTrainer, fresh_heads
from downstream.linear.protocol import LinearProtocol
from downstream.linear.training import Training
from downstream.linear.views import Steps, ViewSettings
from downstream.task import Material, Outcome, TaskEstimate


def _is_none(value: object) -> bool:
    """What is not there is not written: hashes and records of protocols that came before a setting stay what they were."""
    return value is None


class AugmentedProtocol(LinearProtocol):
    """Settings of a linear probe on augmented views. Learning rates are per ``rate_per`` images of a batch."""

    solver: Literal["sgd-augmented"]
    rates: tuple[float, ...] = Field(min_length=1)
    rate_per: int = Field(gt=0)
    schedule: Literal["epoch", "step", "late-step", "step-after-warmup"]
    """When the rate moves along its cosine: with the epoch, with the step, or (MoBY) a step late. The cosine counts from the
    beginning of training, with ``step-after-warmup`` (MAE) from the end of the warm-up."""
    warmup_epochs: float = Field(ge=0)
    """The rate first rises from ``warmup_rate`` in a line."""
    warmup_rate: float = Field(ge=0)
    final_rate: float = Field(ge=0)
    epochs: int = Field(gt=0)
    steps_per_epoch: int | None = Field(gt=0)
    """Null: an epoch is a pass over the train images."""
    batch_size: int = Field(gt=0)
    """Images of a step, over all processes."""
    drop_last: bool
    """Whether a pass leaves out what fills no batch."""
    momentum: float = Field(ge=0, lt=1)
    nesterov: bool
    weight_decay: float = Field(ge=0)
    clip: float | None = Field(gt=0)
    """Largest norm of a head's gradient."""
    smoothing: float = Field(ge=0, lt=1)
    """Of the labels."""
    trust: float | None = Field(None, gt=0, exclude_if=_is_none)
    """Of LARS; null is plain SGD."""
    norm_batch: int | None = Field(None, gt=1, exclude_if=_is_none)
    """Most images whose statistics normalise the features before the heads; null leaves the features as they are."""
    init_std: float = Field(ge=0)
    drop_path: float = Field(ge=0, lt=1)
    """Stochastic depth in the frozen encoder while heads are trained (MoBY); none when they are measured."""
    view: ViewSettings
    interpolation: Literal["bicubic", "bilinear"]
    """Of the evaluation transform."""
    val_every_epoch: bool
    """Whether val is measured after every epoch and the best epoch counts, or only after the last."""

    @property
    def views(self) -> bool:
        """True: features of the evaluation transform are only measured on."""
        return True

    def require_images(self, train: int) -> None:
        """At least a batch of them."""
        self.steps(train).per_epoch  # noqa: B018

    def view_passes(self, train: int) -> float:
        """How often the encoder goes over the train images."""
        return self.epochs if self.steps_per_epoch is None else self.epochs * self.steps_per_epoch * self.batch_size / train

    def for_smoke(self) -> Self:
        """Two steps."""
        return self.model_copy(update={"epochs": 1, "steps_per_epoch": 2, "batch_size": 32})

    def steps(self, images: int) -> Steps:
        """Which images each step takes."""
        return Steps(images, self.batch_size, self.epochs, self.steps_per_epoch, self.drop_last, self.seed)

    def rates_at(self, step: int, per_epoch: int) -> Tensor:
        """The learning rate of every head at ``step`` of the run (``r``, float64)."""
        scale = self.batch_size / self.rate_per
        peak, first, last = torch.tensor(self.rates, dtype=torch.float64), self.warmup_rate, self.final_rate
        moment = {"epoch": step // per_epoch * per_epoch, "late-step": max(0, step - 1)}.get(self.schedule, step)
        warmup, total = self.warmup_epochs * per_epoch, self.epochs * per_epoch
        if moment < warmup:
            return scale * (first + (peak - first) * (moment / warmup))
        start = warmup if self.schedule == "step-after-warmup" else 0
        return scale * (last + (peak - last) * (0.5 * (1 + math.cos(math.pi * (moment - start) / (total - start)))))

    def trainer(self, heads: Heads) -> HeadTrainer:
        """SGD with these settings."""
        return HeadTrainer(
            heads,
            self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            clip=self.clip,
            smoothing=self.smoothing,
            trust=self.trust,
            norm_batch=self.norm_batch,
        )

    def evaluate_on_views(self, material: Material) -> Outcome:
        """Train, or go on with it, and predict val."""
        return Training(self, material).run()

    def estimate(self, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
        """From one step of the heads, measured on random features."""
        r = len(self.rates)
        x = torch.randn(self.batch_size, width, device=device)
        y = torch.arange(len(x), device=device) % classes
        fresh = fresh_heads(r, classes, width, self.init_std, torch.Generator().manual_seed(0))
        trainer = self.trainer(Heads(*(part.to(device) for part in fresh)))
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            trainer.step(x, y, self.rates_at(0, 1)).sum().item()
            seconds = time.perf_counter() - began
        sets = 2 if r > 1 else 1
        steps = self.view_passes(train) * train / self.batch_size
        values = (
            sets * (2 + bool(self.clip or self.nesterov or self.trust)) * r * classes * width + 2 * r * classes * self.batch_size
        )
        return TaskEstimate(sets * steps * seconds, 4 * values)
