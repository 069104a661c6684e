"""Ridge classifier: one linear layer by least squares on the labels, in closed form.

All penalties share one eigendecomposition of the features' covariance, so a sweep costs as much as a single one: a pass over
the features, which may be larger than memory. What it predicts is what scikit-learn's ``RidgeClassifier`` predicts.
"""

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat
from torch import Tensor

from downstream.linear.heads import NEVER, Heads, accuracy, best_of, hold_out, rank, warn_of_edge
from downstream.linear.protocol import LinearProtocol
from downstream.task import FeatureProtocol, Outcome, Split, TaskEstimate, top_metrics
from mte_bench.errors import UserError

ROWS = 16_384
"""Features that are in memory at a time, in float64."""


class Moments:
    """What least squares needs to know of some images: their number, sums and products, in float64."""

    def __init__(self, width: int, classes: int, device: torch.device):
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.sums = torch.zeros(classes, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in features ``x`` (``b c``, float64) with labels ``y`` (``b``)."""
        self.gram.addmm_(x.T, x)
        self.sums.index_add_(0, y, x)
        self.counts += torch.bincount(y, minlength=len(self.counts))

    def __add__(self, other: "Moments") -> "Moments":
        """Those of the images of both."""
        both = Moments(len(self.gram), len(self.counts), self.gram.device)
        both.gram, both.sums, both.counts = self.gram + other.gram, self.sums + other.sums, self.counts + other.counts
        return both

    def of(self, columns: Tensor) -> "Moments":
        """Those of some features alone, at ``columns``: a block of these."""
        block = Moments(0, len(self.counts), self.gram.device)
        block.gram, block.sums, block.counts = self.gram[columns][:, columns], self.sums[:, columns], self.counts
        return block

    def solve(self, penalties: Sequence[float]) -> tuple[Heads, list[float]]:
        """The classifier of every penalty (float64), and the penalties as scikit-learn's ``alpha``.

        A penalty is relative to the mean eigenvalue of the centred Gram matrix, so that the same ones fit features of any scale
        and number. Targets are 1 for the label and -1 for other classes; the intercept is not penalised.
        """
        n = self.counts.sum()
        mean, share = self.sums.sum(0) / n, self.counts / n
        values, vectors = torch.linalg.eigh(self.gram - n * torch.outer(mean, mean))
        values = values.clamp(min=0)
        alphas = [penalty * float(values.mean()) for penalty in penalties]
        # Targets less their mean are twice the one-hot ones less theirs.
        products = 2 * (self.sums - torch.outer(self.counts, mean)) @ vectors
        weight = torch.stack([(products / (values + alpha)) @ vectors.T for alpha in alphas])
        return Heads(weight, (2 * share - 1 - weight @ mean).masked_fill(self.counts == 0, NEVER)), alphas


class Halves(NamedTuple):
    """What a ridge probe needs to know of train images: of those it is solved for, and of those that choose the penalty."""

    kept: Moments
    held: Moments
    asked: Tensor
    """The held-out features ``h c``."""
    truth: Tensor
    """Their labels ``h``."""

    def of(self, columns: Tensor) -> "Halves":
        """The same of some features alone, without going through the images again."""
        return Halves(self.kept.of(columns), self.held.of(columns), self.asked[:, columns], self.truth)


class RidgeProbe:
    """Ridge classifier whose penalty is chosen among many on held-out images.

    Args:
        penalties: relative to the mean eigenvalue of the features' centred Gram matrix.
        held_out: share of each class's train images on which the penalty is chosen, 0 to 1, exclusive.
        seed: of the held-out images.
        device: where it is solved, in float64.

    Attributes after ``fit``: ``penalty_`` and ``alpha_`` (the chosen one, relative and as scikit-learn's), ``heads_`` (of every
    penalty, on all images), ``held_out_top1_`` (percent, by penalty).
    """

    def __init__(
        self,
        penalties: Sequence[float],
        held_out: float = 0.1,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.penalties = penalties
        self.held_out = held_out
        self.seed = seed
        self.device = device

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """Choose the penalty and solve for all of ``features`` (``n c``, read in parts) and ``labels`` (``n``).

        Raises ``UserError`` where there are fewer than two classes, or no class has an image to hold out.
        """
        return self.solve(self.halves(features, labels))

    def halves(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Halves:
        """What ``solve`` takes, of ``features`` (``n c``, read in parts) and ``labels`` (``n``). Raises as ``fit`` does."""
        if len(np.unique(labels)) < 2:
            raise UserError("linear: the train images are of one class only; at least two are needed")
        out = hold_out(labels, self.held_out, self.seed)
        device = torch.device("cpu" if torch.device(self.device).type == "mps" else self.device)  # which has no float64
        kept, held = (Moments(features.shape[1], int(labels.max()) + 1, device) for _ in range(2))
        for start in range(0, len(features), ROWS):
            rows = slice(start, start + ROWS)
            x = torch.from_numpy(np.array(features[rows], dtype=np.float64)).to(device)
            y = torch.from_numpy(np.array(labels[rows], dtype=np.int64)).to(device)
            chosen = torch.from_numpy(out[rows]).to(device)
            kept.add(x[~chosen], y[~chosen])
            held.add(x[chosen], y[chosen])
        asked, truth = (np.array(values[out]) for values in (features, labels))
        return Halves(kept, held, torch.from_numpy(asked), torch.from_numpy(truth.astype(np.int64)))

    def solve(self, halves: Halves) -> Self:
        """Choose the penalty and solve for all images of ``halves``."""
        self.held_out_top1_, losses = accuracy(halves.kept.solve(self.penalties)[0], halves.asked, halves.truth)
        self.best_ = best_of(self.held_out_top1_, losses)
        self.heads_, alphas = (halves.kept + halves.held).solve(self.penalties)
        self.penalty_, self.alpha_ = self.penalties[self.best_], alphas[self.best_]
        return self

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """The five most likely classes of ``features`` (``q c``), best first: ``q 5``, or as many as there are classes."""
        return rank(self.heads_.take([self.best_]), torch.from_numpy(np.array(features)))


class RidgeProtocol(LinearProtocol):
    """Settings of the ridge probe; ``RidgeProbe`` says what they mean."""

    solver: Literal["ridge"]
    penalties: tuple[PositiveFloat, ...] = Field(min_length=1)

    def probe(self, device: torch.device) -> RidgeProbe:
        """The estimator with these settings."""
        return RidgeProbe(**self.model_dump(exclude={*FeatureProtocol.model_fields, "solver"}), device=device)

    def evaluate(self, train: Split, val: Split, device: torch.device) -> Outcome:
        """Top-1 and top-5 of the val split; every penalty's held-out accuracy among the details."""
        probe = self.probe(device).fit(train.features, train.labels)
        on_val, _ = accuracy(probe.heads_, torch.from_numpy(np.array(val.features)), torch.from_numpy(val.labels))
        warn_of_edge("penalty", probe.penalty_, probe.penalties)
        details = {
            "penalty": probe.penalty_,
            "alpha": float(f"{probe.alpha_:.6g}"),
            "reported": "solved for all train images with the penalty chosen on held-out train images",
            "penalties": list(probe.penalties),
            "held_out_top1": [round(value, 3) for value in probe.held_out_top1_],
            "held_out_images": int(hold_out(train.labels, self.held_out, self.seed).sum()),
            "top1_if_chosen_on_val": round(max(on_val), 3),
        }
        return Outcome(top_metrics(probe.predict(val.features), val.labels, len(train.classes)), details)

    def estimate(self, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
        """From the products of some rows and one decomposition, measured on random features."""
        rows = min(ROWS, train)
        x = torch.randn(rows, width, dtype=torch.float64, device=device)
        moments = Moments(width, classes, device)
        began = time.perf_counter()
        moments.add(x, torch.arange(rows, device=device) % classes)
        passing = time.perf_counter() - began
        began = time.perf_counter()
        float(moments.solve(self.penalties)[0].bias.sum())
        solving = time.perf_counter() - began
        values = rows * width + 4 * width * width + 2 * len(self.penalties) * classes * width
        return TaskEstimate(passing * train / rows + 2 * solving, 8 * values)
