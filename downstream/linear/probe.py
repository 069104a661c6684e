"""Linear probe, the fast form: one linear layer on kept features, all learning rates trained together in one pass.

Follows iBOT ``eval_linear_multi.py`` (rates, SGD, cosine, initialisation), with two differences that make it fast and fair:
features of the evaluation transform without augmentation, and no choice of rate or epoch on the val split. Its numbers are
therefore not those of the paper's protocol.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from downstream.linear.heads import Heads, HeadTrainer, fresh_heads
from downstream.linear.kept import KeptProtocol, Probe
from downstream.task import TaskEstimate
from mte_bench.console import ProgressLine

IBOT_RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in range(1, 10))
"""{1..9} x 10^{-4..0}, ascending: 45 learning rates per 256 images."""


@dataclass(eq=False)
class LinearProbe(Probe):
    """Linear classifier whose learning rate is chosen among many.

    Args:
        rates: learning rates per ``rate_per`` images of a batch (linear scaling).
        rate_per: see ``rates``.
        epochs: passes over the features; the rate follows a cosine from epoch to epoch, to 0.
        batch_size: images of a step; the last of an epoch takes what is left.
        momentum: of SGD.
        weight_decay: on weights and biases.
        init_std: standard deviation of the weights' normal initialisation; biases start at 0.
        standardise: give each feature mean 0 and variance 1 over the train images; the references do not.

    The same seed, device and number of threads give the same weights, bit for bit. ``sweep_`` is of the train images that are
    not held out.
    """

    rates: Sequence[float] = IBOT_RATES
    rate_per: int = 256
    epochs: int = 100
    batch_size: int = 1024
    momentum: float = 0.9
    weight_decay: float = 0.0
    init_std: float = 0.01
    standardise: bool = False

    names = ("rate", "rates")

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """See ``Probe``."""
        out = torch.from_numpy(self._held(labels)).to(self.device)
        y = torch.from_numpy(np.array(labels, dtype=np.int64)).to(self.device)
        x = torch.from_numpy(np.array(features)).to(self.device)  # once, in the precision that it is kept in
        self.mean_, self.scale_ = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
        if self.standardise:
            x = x.float()
            self.mean_, self.scale_ = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
            x = (x - self.mean_) / self.scale_
        everything, classes = torch.arange(len(x), device=x.device), int(y.max()) + 1
        self.sweep_ = self._train(x, y, everything[~out], classes, self.rates)
        best = self._choose(self.sweep_, x[out], y[out])
        self.heads_ = self._train(x, y, everything, classes, self.rates[best : best + 1])
        return self

    def transform(self, features: NDArray[np.floating]) -> Tensor:
        """``features`` (``q c``) as the heads take them."""
        x = torch.from_numpy(np.array(features, dtype=np.float32)).to(self.device)
        return (x - self.mean_) / self.scale_ if self.standardise else x

    def _train(self, x: Tensor, y: Tensor, rows: Tensor, classes: int, rates: Sequence[float]) -> Heads:
        """A head for each of ``rates``, trained on some ``rows`` of features ``x`` (``n c``) and labels ``y`` (``n``)."""
        generator = torch.Generator().manual_seed(self.seed)
        r = len(rates)
        fresh = fresh_heads(r, classes, x.shape[1], self.init_std, generator)
        trainer = HeadTrainer(Heads(*(part.to(x.device) for part in fresh)), self.momentum, weight_decay=self.weight_decay)
        scaled = torch.tensor(rates, dtype=torch.float64) * (self.batch_size / self.rate_per)
        line = ProgressLine()
        for epoch in range(self.epochs):
            rate = (scaled * (0.5 * (1 + math.cos(math.pi * epoch / self.epochs)))).float().to(x.device)
            for chosen in rows[torch.randperm(len(rows), generator=generator).to(x.device)].split(self.batch_size):
                trainer.step(x[chosen].float(), y[chosen], rate)
            text = f"linear, {r} rate{'s' if r > 1 else ''}: epoch {epoch + 1}/{self.epochs}  {line.seconds:.0f} s"
            line.show(text, last=line.terminal and epoch + 1 == self.epochs)
        return trainer.heads


class SweepProtocol(KeptProtocol):
    """Settings of the fast linear probe; ``LinearProbe`` says what they mean."""

    estimator = LinearProbe
    rates: tuple[float, ...] = Field(min_length=1)
    rate_per: int = Field(gt=0)
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    init_std: float = Field(ge=0)
    standardise: bool

    def for_smoke(self) -> Self:
        """One epoch."""
        return self.model_copy(update={"epochs": 1})

    def estimate(self, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
        """From two steps of the sweep and of the final training, measured on random features."""
        r, steps, seconds = len(self.rates), 2, 0.0
        x = torch.randn(steps * self.batch_size, width, device=device)
        y = torch.arange(len(x), device=device) % classes
        probe = self.for_smoke().probe(device)
        assert isinstance(probe, LinearProbe)
        for rates in (self.rates, self.rates[:1]):
            for warm in (True, False):
                began = time.perf_counter()
                probe._train(x, y, torch.arange(len(x), device=device), classes, rates)[0].sum().item()
                seconds += 0 if warm else time.perf_counter() - began
        values = (train + val) * width + 2 * r * classes * width + 2 * r * classes * self.batch_size
        return TaskEstimate(seconds / len(x) * train * self.epochs, 4 * values)
