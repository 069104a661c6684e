"""Linear probe, the fast form: one linear layer on kept features, all learning rates trained together in one pass.

The rate is chosen on a held-out part of the train split; what is reported was trained again with that rate on all of it and
has never seen, nor been chosen on, the val split.

Follows iBOT ``eval_linear_multi.py`` (rates, SGD, cosine, initialisation), with two differences that make it fast and fair:
features of the evaluation transform without augmentation, and no choice of rate or epoch on the val split. Its numbers are
therefore not those of the paper's protocol.
"""

import math
import time
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from downstream.linear.heads import Heads, HeadTrainer, accuracy, best_of, fresh_heads, hold_out, rank, warn_of_edge
from downstream.linear.protocol import LinearProtocol
from downstream.task import FeatureProtocol, Outcome, Split, TaskEstimate, top_metrics
from mte_bench.console import ProgressLine
from mte_bench.errors import UserError

IBOT_RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in range(1, 10))
"""{1..9} x 10^{-4..0}, ascending: 45 learning rates per 256 images."""


class LinearProbe:
    """Linear classifier whose learning rate is chosen among many on held-out images.

    Args:
        rates: learning rates per ``rate_per`` images of a batch (linear scaling).
        rate_per: see ``rates``.
        epochs: passes over the features; the rate follows a cosine from epoch to epoch, to 0.
        batch_size: images of a step; the last of an epoch takes what is left.
        momentum: of SGD.
        weight_decay: on weights and biases.
        init_std: standard deviation of the weights' normal initialisation; biases start at 0.
        held_out: share of each class's train images on which the rate is chosen, 0 to 1, exclusive.
        standardise: give each feature mean 0 and variance 1 over the train images; the references do not.
        seed: of initialisation, batches and the held-out images. The same seed, device and number of threads give the
            same weights, bit for bit.
        device: where it is trained.

    Attributes after ``fit``: ``rate_`` (the chosen one), ``heads_`` (one rate: its), ``sweep_`` (the sweep's heads),
    ``held_out_top1_`` (``r``, percent) and ``held_out_loss_`` (``r``, nats).
    """

    def __init__(
        self,
        rates: Sequence[float] = IBOT_RATES,
        rate_per: int = 256,
        epochs: int = 100,
        batch_size: int = 1024,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        init_std: float = 0.01,
        held_out: float = 0.1,
        standardise: bool = False,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.rates = rates
        self.rate_per = rate_per
        self.epochs = epochs
        self.batch_size = batch_size
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.init_std = init_std
        self.held_out = held_out
        self.standardise = standardise
        self.seed = seed
        self.device = device

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """Choose the rate and train with it on all of ``features`` (``n c``) and ``labels`` (``n``).

        Raises ``UserError`` where there are fewer than two classes, or no class has an image to hold out.
        """
        y = torch.from_numpy(np.array(labels, dtype=np.int64)).to(self.device)
        if len(y) == 0 or int(y.min()) == int(y.max()):
            raise UserError("linear: the train images are of one class only; at least two are needed")
        x = torch.from_numpy(np.array(features)).to(self.device)  # once, in the precision that it is kept in
        self.mean_, self.scale_ = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
        if self.standardise:
            x = x.float()
            self.mean_, self.scale_ = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
            x = (x - self.mean_) / self.scale_
        out = torch.from_numpy(hold_out(np.asarray(labels), self.held_out, self.seed)).to(self.device)
        kept = (~out).nonzero().squeeze(1)
        self.sweep_ = self._train(x, y, kept, int(y.max()) + 1, self.rates)
        self.held_out_top1_, self.held_out_loss_ = accuracy(self.sweep_, x[out], y[out])
        self.rate_ = self.rates[best_of(self.held_out_top1_, self.held_out_loss_)]
        everything = torch.arange(len(x), device=x.device)
        self.heads_ = self._train(x, y, everything, int(y.max()) + 1, [self.rate_])
        return self

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """The five most likely classes of ``features`` (``q c``), best first: ``q 5``, or as many as there are classes."""
        return rank(self.heads_, self.transform(features))

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


class SweepProtocol(LinearProtocol):
    """Settings of the fast linear probe; ``LinearProbe`` says what they mean."""

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

    def probe(self, device: torch.device) -> LinearProbe:
        """The estimator with these settings."""
        return LinearProbe(**self.model_dump(exclude=set(FeatureProtocol.model_fields)), device=device)

    def evaluate(self, train: Split, val: Split, device: torch.device) -> Outcome:
        """Top-1 and top-5 of the val split; every rate's held-out accuracy among the details."""
        probe = self.probe(device).fit(train.features, train.labels)
        on_val = accuracy(probe.sweep_, probe.transform(val.features), torch.from_numpy(val.labels).to(device))[0]
        warn_of_edge("learning rate", probe.rate_, probe.rates)
        details = {
            "rate": probe.rate_,
            "reported": "trained on all train images with the rate chosen on held-out train images",
            "rates": list(probe.rates),
            "held_out_top1": [round(value, 3) for value in probe.held_out_top1_],
            "held_out_images": int(hold_out(train.labels, self.held_out, self.seed).sum()),
            # The references choose the rate on val. That is optimistic: for comparison with their numbers only.
            "top1_if_chosen_on_val": round(max(on_val), 3),
        }
        return Outcome(top_metrics(probe.predict(val.features), val.labels, len(train.classes)), details)

    def estimate(self, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
        """From two steps of the sweep and of the final training, measured on random features."""
        r, steps, seconds = len(self.rates), 2, 0.0
        x = torch.randn(steps * self.batch_size, width, device=device)
        y = torch.arange(len(x), device=device) % classes
        probe = self.for_smoke().probe(device)
        for rates in (self.rates, self.rates[:1]):
            for warm in (True, False):
                began = time.perf_counter()
                probe._train(x, y, torch.arange(len(x), device=device), classes, rates)[0].sum().item()
                seconds += 0 if warm else time.perf_counter() - began
        values = (train + val) * width + 2 * r * classes * width + 2 * r * classes * self.batch_size
        return TaskEstimate(seconds / len(x) * train * self.epochs, 4 * values)
