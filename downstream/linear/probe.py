"""Linear probe, the fast form: one linear layer on kept features, all learning rates trained together in one pass.

A sweep of SGD classifiers differs from rate to rate in nothing but the rate: every head sees the same batches and has
the same start. Their weights are stacked, so that a step on all of them is one matrix product forward and one back.
The rate is chosen on a held-out part of the train split; what is reported was trained again with that rate on all of it and
has never seen, nor been chosen on, the val split.

Follows iBOT ``eval_linear_multi.py`` (rates, SGD, cosine, initialisation), with two differences that make it fast and fair:
features of the evaluation transform without augmentation, and no choice of rate or epoch on the val split. Its numbers are
therefore not those of the paper's protocol.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from downstream.task import FeatureProtocol, Outcome, Split, Task, TaskEstimate, top_metrics
from mte_bench.console import ProgressLine, log
from mte_bench.errors import UserError

IBOT_RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in range(1, 10))
"""{1..9} x 10^{-4..0}, ascending: 45 learning rates per 256 images."""

_BLOCK_VALUES = 1 << 25  # logits held at once (128 MiB)


class Heads(NamedTuple):
    """Linear classifiers of r learning rates."""

    weight: Tensor
    """``r classes c``."""
    bias: Tensor
    """``r classes``."""


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
        x = torch.from_numpy(np.array(features, dtype=np.float32)).to(self.device)
        self.mean_, self.scale_ = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
        if self.standardise:
            self.mean_, self.scale_ = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
            x = (x - self.mean_) / self.scale_
        out = torch.from_numpy(hold_out(np.asarray(labels), self.held_out, self.seed)).to(self.device)
        self.sweep_ = self._train(x[~out], y[~out], int(y.max()) + 1, self.rates)
        self.held_out_top1_, self.held_out_loss_ = accuracy(self.sweep_, x[out], y[out])
        best = max(range(len(self.rates)), key=lambda r: (self.held_out_top1_[r], -self.held_out_loss_[r]))
        self.rate_ = self.rates[best]
        self.heads_ = self._train(x, y, int(y.max()) + 1, [self.rate_])
        return self

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """The five most likely classes of ``features`` (``q c``), best first: ``q 5``, or as many as there are classes."""
        x = self.transform(features)
        logits = x @ self.heads_.weight[0].T + self.heads_.bias[0]
        return logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu().numpy()

    def transform(self, features: NDArray[np.floating]) -> Tensor:
        """``features`` (``q c``) as the heads take them."""
        x = torch.from_numpy(np.array(features, dtype=np.float32)).to(self.device)
        return (x - self.mean_) / self.scale_ if self.standardise else x

    def _train(self, x: Tensor, y: Tensor, classes: int, rates: Sequence[float]) -> Heads:
        """Train a head for each of ``rates`` on features ``x`` (``n c``) and labels ``y`` (``n``), all in one pass."""
        generator = torch.Generator().manual_seed(self.seed)
        r, c = len(rates), x.shape[1]
        start = (torch.randn(classes, c, generator=generator) * self.init_std).to(x.device)
        weight = start.repeat(r, 1)  # r·classes c
        bias = torch.zeros(r * classes, 1, device=x.device)
        weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
        scaled = torch.tensor(rates, dtype=torch.float64).repeat_interleave(classes).unsqueeze(1) * (
            self.batch_size / self.rate_per
        )
        line = ProgressLine()
        for epoch in range(self.epochs):
            rate = (scaled * (0.5 * (1 + math.cos(math.pi * epoch / self.epochs)))).float().to(x.device)
            for chosen in torch.randperm(len(x), generator=generator).to(x.device).split(self.batch_size):
                xb, yb, b = x[chosen], y[chosen], len(chosen)
                # Classes before images, so that the softmax runs over contiguous images: r classes b.
                error = torch.addmm(bias, weight, xb.T).view(r, classes, b)
                error.sub_(error.amax(1, keepdim=True)).exp_()
                error.div_(error.sum(1, keepdim=True))
                error[:, yb, torch.arange(b, device=x.device)] -= 1
                error = error.view(r * classes, b)  # the gradient of the summed cross-entropy in the logits
                weight_velocity.addmm_(error, xb, beta=self.momentum, alpha=1 / b)
                bias_velocity.mul_(self.momentum).add_(error.sum(1, keepdim=True), alpha=1 / b)
                if self.weight_decay:
                    weight_velocity.add_(weight, alpha=self.weight_decay)
                    bias_velocity.add_(bias, alpha=self.weight_decay)
                weight.addcmul_(weight_velocity, rate, value=-1)
                bias.addcmul_(bias_velocity, rate, value=-1)
            text = f"linear, {r} rate{'s' if r > 1 else ''}: epoch {epoch + 1}/{self.epochs}  {line.seconds:.0f} s"
            line.show(text, last=line.terminal and epoch + 1 == self.epochs)
        return Heads(weight.view(r, classes, c), bias.view(r, classes))


def hold_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Which of the ``n`` images to hold out: ``share`` of every class, rounded, at least one where the class has two.

    Raises ``UserError`` if no class has two.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[generator.permutation(members)[:count]] = True
    if not held.any():
        raise UserError("linear: every class has a single train image, so none can be held out to choose the learning rate")
    return held


def accuracy(heads: Heads, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Top-1 in percent and mean cross-entropy of every head on ``x`` (``n c``) with labels ``y`` (``n``).

    A head that diverged has 0 % and infinite loss.
    """
    r, classes, c = heads.weight.shape
    right, loss = torch.zeros(r, dtype=torch.float64), torch.zeros(r, dtype=torch.float64)
    for xb, yb in zip(x.split(size := max(1, _BLOCK_VALUES // (r * classes))), y.split(size), strict=True):
        logits = torch.addmm(heads.bias.view(-1, 1), heads.weight.view(-1, c), xb.T).view(r, classes, len(xb))
        right += (logits.argmax(1) == yb).double().sum(1).cpu()
        losses = torch.logsumexp(logits, 1) - logits[:, yb, torch.arange(len(xb), device=x.device)]
        loss += losses.double().sum(1).cpu()
    finite = loss.isfinite()
    return (100 * right.where(finite, 0) / len(x)).tolist(), (loss.where(finite, math.inf) / len(x)).tolist()


class LinearProtocol(FeatureProtocol):
    """Settings of the fast linear probe; ``LinearProbe`` says what they mean."""

    rates: tuple[float, ...] = Field(min_length=1)
    rate_per: int = Field(gt=0)
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    init_std: float = Field(ge=0)
    held_out: float = Field(gt=0, lt=1)
    standardise: bool
    seed: int = Field(ge=0)

    def for_smoke(self) -> Self:
        """One epoch."""
        return self.model_copy(update={"epochs": 1})

    def probe(self, device: torch.device) -> LinearProbe:
        """The estimator with these settings."""
        return LinearProbe(**self.model_dump(exclude=set(FeatureProtocol.model_fields)), device=device)


def evaluate_linear(protocol: LinearProtocol, train: Split, val: Split, device: torch.device) -> Outcome:
    """Top-1 and top-5 of the val split; every rate's held-out accuracy among the details."""
    probe = protocol.probe(device).fit(train.features, train.labels)
    on_val = accuracy(probe.sweep_, probe.transform(val.features), torch.from_numpy(val.labels).to(device))[0]
    if len(probe.rates) > 1 and probe.rate_ in (min(probe.rates), max(probe.rates)):
        log(f"linear: the chosen learning rate {probe.rate_:g} is at the edge of the sweep; a wider one may be better")
    details = {
        "rate": probe.rate_,
        "reported": "trained on all train images with the rate chosen on held-out train images",
        "rates": list(probe.rates),
        "held_out_top1": [round(value, 3) for value in probe.held_out_top1_],
        "held_out_images": int(hold_out(train.labels, protocol.held_out, protocol.seed).sum()),
        # The references choose the rate on val. That is optimistic: for comparison with their numbers only.
        "top1_if_chosen_on_val": round(max(on_val), 3),
    }
    return Outcome(top_metrics(probe.predict(val.features), val.labels, len(train.classes)), details)


def estimate_linear(
    protocol: LinearProtocol, train: int, val: int, width: int, classes: int, device: torch.device
) -> TaskEstimate:
    """From two steps of the sweep and of the final training, measured on random features."""
    r, steps, seconds = len(protocol.rates), 2, 0.0
    x = torch.randn(steps * protocol.batch_size, width, device=device)
    y = torch.arange(len(x), device=device) % classes
    probe = protocol.for_smoke().probe(device)
    for rates in (protocol.rates, protocol.rates[:1]):
        for warm in (True, False):
            began = time.perf_counter()
            probe._train(x, y, classes, rates)[0].sum().item()
            seconds += 0 if warm else time.perf_counter() - began
    values = (train + val) * width + 3 * r * classes * width + 2 * r * classes * protocol.batch_size
    return TaskEstimate(seconds / len(x) * train * protocol.epochs, 4 * values)


LINEAR = Task("linear", LinearProtocol, "linear-fast", evaluate_linear, estimate_linear)
