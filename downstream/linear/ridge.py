"""Ridge classifier: one linear layer by least squares on the labels, in closed form.

All penalties share one eigendecomposition of the features' covariance, so a sweep costs as much as a single one: a pass over
the features, which may be larger than memory. What it predicts is what scikit-learn's ``RidgeClassifier`` predicts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat
from torch import Tensor

from downstream.linear.heads import NEVER, Heads
from downstream.linear.kept import KeptProtocol, Probe
from downstream.task import TaskEstimate

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


@dataclass(eq=False)
class RidgeProbe(Probe):
    """Ridge classifier whose penalty is chosen among many; solved in float64.

    Args:
        penalties: relative to the mean eigenvalue of the features' centred Gram matrix.

    ``sweep_`` is of all train images; ``alpha_`` is the chosen penalty as scikit-learn's.
    """

    penalties: Sequence[float]

    names = ("penalty", "penalties")

    @property
    def details(self) -> dict[str, Any]:
        """See ``Probe``."""
        return {"alpha": float(f"{self.alpha_:.6g}")}

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """See ``Probe``; the features are read in parts."""
        return self.solve(self.halves(features, labels))

    def halves(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Halves:
        """What ``solve`` takes, of ``features`` (``n c``, read in parts) and ``labels`` (``n``). Raises as ``fit`` does."""
        out = self._held(labels)
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
        best = self._choose(halves.kept.solve(self.penalties)[0], halves.asked, halves.truth)
        self.sweep_, alphas = (halves.kept + halves.held).solve(self.penalties)
        self.heads_, self.alpha_ = self.sweep_.take([best]), alphas[best]
        return self


class RidgeProtocol(KeptProtocol):
    """Settings of the ridge probe; ``RidgeProbe`` says what they mean."""

    estimator = RidgeProbe
    solver: Literal["ridge"]
    penalties: tuple[PositiveFloat, ...] = Field(min_length=1)

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
