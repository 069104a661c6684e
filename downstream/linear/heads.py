"""Many linear classifiers on the same features, trained together by SGD.

The classifiers of a sweep differ in nothing but the learning rate: all see the same batches and have the same start. Their
weights are stacked, so that a step on all of them is one matrix product forward and one back. The gradient of the
cross-entropy in the logits is written down (softmax minus target); nothing is recorded for a backward pass.

Where the features are normalised by batch statistics before the classifiers (MAE), the running statistics become part of the
weights that are handed out (``HeadTrainer.ready``), so that what measures the classifiers knows nothing of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mte_bench.console import log
from mte_bench.errors import UserError

NEVER = -1e4
"""Bias of a class that no train image has."""
_BLOCK_VALUES = 1 << 25  # logits held at once (128 MiB)
_EPS, _MOMENTUM = 1e-6, 0.1  # of batch normalisation; MAE main_linprobe.py and torch's BatchNorm1d


class Heads(NamedTuple):
    """r linear classifiers."""

    weight: Tensor
    """``r classes c``."""
    bias: Tensor
    """``r classes``."""

    def take(self, chosen: Sequence[int]) -> "Heads":
        """Copies of the heads at ``chosen``."""
        return Heads(self.weight[list(chosen)], self.bias[list(chosen)])


class Running(NamedTuple):
    """Of each feature over the batches so far, the latest counting most: ``r c`` each, the same for every head."""

    mean: Tensor
    variance: Tensor


def fresh_heads(count: int, classes: int, width: int, std: float, generator: torch.Generator) -> Heads:
    """``count`` heads with the same weights, normal with standard deviation ``std``, and biases 0, on the CPU."""
    start = torch.randn(classes, width, generator=generator) * std
    return Heads(start.repeat(count, 1, 1), torch.zeros(count, classes))


class HeadTrainer:
    """SGD on all of ``heads`` at once; ``step`` changes their tensors in place.

    Args:
        heads: what is trained, float32, on the device of the features.
        momentum: of SGD.
        nesterov: as torch's ``SGD(nesterov=True)``.
        weight_decay: on weights and biases.
        clip: largest norm of a head's whole gradient; None for any.
        smoothing: of the labels, 0 to 1: what a label gives up is spread evenly over all classes.
        trust: of LARS, which makes a step on a head's weights as long as ``trust`` times their norm and leaves the bias as it
            is, without weight decay; None for plain SGD. Source: MAE ``util/lars.py``, which has it from MoCo v3.
        norm_batch: most images whose mean and variance normalise the features, before the heads and without a scale of their
            own: a larger batch is cut into equal parts. None for features as they are. Running statistics are those of the
            first part, as torch's distributed training keeps those of the first process.
    """

    def __init__(
        self,
        heads: Heads,
        momentum: float = 0.9,
        *,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip: float | None = None,
        smoothing: float = 0.0,
        trust: float | None = None,
        norm_batch: int | None = None,
    ):
        self.heads = heads
        self.velocity = Heads(*map(torch.zeros_like, heads))
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.clip, self.smoothing = clip, smoothing
        self.trust, self.norm_batch = trust, norm_batch
        per_head = heads.weight[:, 0]
        self.running = Running(torch.zeros_like(per_head), torch.ones_like(per_head))

    @property
    def ready(self) -> Heads:
        """The heads as they act on features as they are."""
        if self.norm_batch is None:
            return self.heads
        weight = self.heads.weight * (self.running.variance + _EPS).rsqrt().unsqueeze(1)
        return Heads(weight, self.heads.bias - (weight @ self.running.mean.unsqueeze(2)).squeeze(2))

    def step(self, x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
        """One step on features ``x`` (``b c``) and labels ``y`` (``b``) at a learning rate per head (``r``).

        Returns each head's mean cross-entropy before the step (``r``).
        """
        weight, bias = self.heads
        r, classes, c = weight.shape
        x = self._normalised(x)
        # Classes before images, so that the softmax runs over contiguous images: r classes b.
        error = torch.addmm(bias.view(-1, 1), weight.view(-1, c), x.T).view(r, classes, len(x))
        loss = self._to_error(error, y)
        # From here on the gradient of the summed cross-entropy in the logits.
        per_image = error.view(-1, len(x))
        if self.clip is None and self.trust is None and not self.nesterov:
            self._add_gradient(self.velocity, per_image, x, keep=self.momentum)
            update = self.velocity
        else:
            gradient = Heads(*map(torch.empty_like, self.heads))
            self._add_gradient(gradient, per_image, x, keep=0)
            for value, part in zip(self.velocity, gradient, strict=True):
                value.mul_(self.momentum).add_(part)
                if self.nesterov:
                    part.add_(value, alpha=self.momentum)
            update = gradient if self.nesterov else self.velocity
        rates = rates.to(weight)
        weight.addcmul_(update.weight, rates.view(-1, 1, 1), value=-1)
        bias.addcmul_(update.bias, rates.view(-1, 1), value=-1)
        return loss

    def _normalised(self, x: Tensor) -> Tensor:
        """``x`` (``b c``) by the statistics of its own parts; those of the first enter the running ones."""
        if self.norm_batch is None:
            return x
        parts = x.chunk(-(-len(x) // self.norm_batch))
        first = parts[0]
        self.running.mean.lerp_(first.mean(0), _MOMENTUM)
        self.running.variance.lerp_(first.var(0, correction=min(1, len(first) - 1)), _MOMENTUM)
        return torch.cat([(part - part.mean(0)) * (part.var(0, correction=0) + _EPS).rsqrt() for part in parts])

    def _to_error(self, logits: Tensor, y: Tensor) -> Tensor:
        """Turn ``logits`` (``r classes b``) into softmax minus target, in place; returns the mean cross-entropy (``r``)."""
        images, classes = torch.arange(len(y), device=y.device), logits.shape[1]
        logits.sub_(logits.amax(1, keepdim=True))
        agreed = (1 - self.smoothing) * logits[:, y, images]
        if self.smoothing:
            agreed += self.smoothing * logits.mean(1)
        total = logits.exp_().sum(1, keepdim=True)
        loss = (total.squeeze(1).log() - agreed).mean(1)
        logits.div_(total)
        if self.smoothing:
            logits.sub_(self.smoothing / classes)
        logits[:, y, images] -= 1 - self.smoothing
        return loss

    def _add_gradient(self, into: Heads, error: Tensor, x: Tensor, keep: float) -> None:
        """``into`` becomes ``keep`` times itself plus the gradient of the mean cross-entropy and of the weight decay."""
        weight, bias = self.heads
        into.weight.view(-1, x.shape[1]).addmm_(error, x, beta=keep, alpha=1 / len(x))
        into.bias.mul_(keep) if keep else into.bias.zero_()
        into.bias.view(-1).add_(error.sum(1), alpha=1 / len(x))
        # Clipping and LARS only ever come with keep = 0.
        if self.clip is not None:  # of the gradient alone, before weight decay
            norm = (into.weight.square().sum((1, 2)) + into.bias.square().sum(1)).sqrt()
            shrink = (self.clip / (norm + 1e-6)).clamp(max=1)
            into.weight.mul_(shrink.view(-1, 1, 1))
            into.bias.mul_(shrink.view(-1, 1))
        if self.weight_decay:
            into.weight.add_(weight, alpha=self.weight_decay)
            if self.trust is None:
                into.bias.add_(bias, alpha=self.weight_decay)
        if self.trust is not None:
            norm, length = weight.norm(dim=(1, 2)), into.weight.norm(dim=(1, 2))
            scale = torch.where((norm > 0) & (length > 0), self.trust * norm / length, 1)
            into.weight.mul_(scale.view(-1, 1, 1))


def logits(heads: Heads, x: Tensor) -> Tensor:
    """``r classes b`` of features ``x`` (``b c``)."""
    r, classes, c = heads.weight.shape
    return torch.addmm(heads.bias.reshape(-1, 1), heads.weight.reshape(-1, c), x.T).view(r, classes, len(x))


def accuracy(heads: Heads, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Top-1 in percent and mean cross-entropy of every head on ``x`` (``n c``) with labels ``y`` (``n``).

    A head that diverged has 0 % and infinite loss. ``x`` and ``y`` may lie on another device than the heads.
    """
    r, classes, _ = heads.weight.shape
    right, loss = torch.zeros(r, dtype=torch.float64), torch.zeros(r, dtype=torch.float64)
    size = max(1, _BLOCK_VALUES // max(1, r * classes))
    for xb, yb in zip(x.split(size), y.split(size), strict=True):
        scores, labels = logits(heads, xb.to(heads.weight)), yb.to(heads.weight.device)
        right += (scores.argmax(1) == labels).cpu().double().sum(1)
        losses = torch.logsumexp(scores, 1) - scores[:, labels, torch.arange(len(xb), device=labels.device)]
        loss += losses.cpu().double().sum(1)
    finite = loss.isfinite()
    return (100 * right.where(finite, 0) / len(x)).tolist(), (loss.where(finite, math.inf) / len(x)).tolist()


def rank(heads: Heads, x: Tensor) -> NDArray[np.int64]:
    """The five most likely classes of ``x`` (``q c``) by the first head, best first: ``q 5``, or as many as there are classes."""
    single = heads.take([0])
    size = max(1, _BLOCK_VALUES // single.bias.shape[1])
    count = min(5, single.bias.shape[1])
    ranked = [logits(single, xb.to(single.weight))[0].T.topk(count, dim=1).indices.cpu() for xb in x.split(size)]
    return torch.cat(ranked).numpy()


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
        raise UserError("linear: every class has a single train image, so none can be held out to choose a setting")
    return held


def best_of(top1: Sequence[float], loss: Sequence[float]) -> int:
    """Which has the highest top-1; of equal ones, which the lower loss."""
    return max(range(len(top1)), key=lambda index: (top1[index], -loss[index]))


def warn_of_edge(what: str, chosen: float, values: Sequence[float]) -> None:
    """Say so if the ``chosen`` one of several ``values`` is the smallest or largest."""
    if len(values) > 1 and chosen in (min(values), max(values)):
        log(f"linear: the chosen {what} {chosen:g} is at the edge of the sweep; a wider one may be better")
