"""Multinomial logistic regression on features of unit length, solved to the end by scikit-learn's L-BFGS.

The objective is that of iBOT ``eval_logistic_regression.py``: mean cross-entropy plus half the penalty times the squared norm of
the weights, no intercept. iBOT stops its own solver (cyanure's, catalyst-miso) after 100 epochs; the minimum is the same.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat

from downstream.linear.heads import NEVER, Heads
from downstream.linear.kept import KeptProtocol, Probe
from downstream.task import TaskEstimate
from mte_bench.console import log
from mte_bench.knn_bank import normalise


@dataclass(eq=False)
class LogisticProbe(Probe):
    """Logistic regression whose penalty is chosen among several; solved on the CPU, whatever the device.

    Args:
        penalties: on half the squared norm of the weights, beside the mean cross-entropy.
        tolerance: largest entry of the gradient of the mean objective at which it is solved.
        iterations: after so many of L-BFGS it stops with a remark.

    ``sweep_`` is of all train images.
    """

    penalties: Sequence[float] = (0.01, 0.1, 1.0)
    tolerance: float = 1e-6
    iterations: int = 1000

    names = ("penalty", "penalties")

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """See ``Probe``."""
        out = self._held(labels)
        x, classes = self.transform(features), int(labels.max()) + 1
        of_kept = self._solve(x[~out], labels[~out], classes)
        best = self._choose(of_kept, x[out], torch.from_numpy(np.array(labels[out], dtype=np.int64)))
        self.sweep_ = self._solve(x, labels, classes)
        self.heads_ = self.sweep_.take([best])
        return self

    def transform(self, features: NDArray[np.floating]) -> torch.Tensor:
        """``features`` (``q c``) at unit length, float32."""
        return normalise(torch.from_numpy(np.array(features)))

    def _solve(self, x: torch.Tensor, labels: NDArray[np.int64], classes: int) -> Heads:
        """The classifiers of all penalties, each started from that of the next larger one."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        present, in_memory = np.unique(labels), x.double().numpy()  # in float32 its line search gives up early
        weights = torch.zeros(len(self.penalties), classes, x.shape[1])
        biases = torch.full((len(self.penalties), classes), NEVER)
        solver = LogisticRegression(tol=self.tolerance, max_iter=self.iterations, fit_intercept=False, warm_start=True)
        for place in sorted(range(len(self.penalties)), key=lambda place: -self.penalties[place]):
            # scikit-learn sums the cross-entropy, and of two classes it penalises the difference, w, in place of +- w / 2.
            solver.C = (2 if len(present) == 2 else 1) / (len(x) * self.penalties[place])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # said below, in this program's words
                solver.fit(in_memory, labels)
            if solver.n_iter_.max() >= self.iterations:
                log(f"linear: penalty {self.penalties[place]:g} was not solved in {self.iterations} iterations")
            coefficients = torch.from_numpy(solver.coef_).float()
            weights[place, present] = torch.cat([-coefficients, coefficients]) / 2 if len(present) == 2 else coefficients
            biases[place, present] = 0
        return Heads(weights, biases)


class LogisticProtocol(KeptProtocol):
    """Settings of logistic regression; ``LogisticProbe`` says what they mean."""

    estimator = LogisticProbe
    solver: Literal["logistic"]
    penalties: tuple[PositiveFloat, ...] = Field(min_length=1)
    tolerance: float = Field(gt=0)
    iterations: int = Field(gt=0)

    def for_smoke(self) -> Self:
        """Two iterations."""
        return self.model_copy(update={"iterations": 2})

    def estimate(self, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
        """From one evaluation of the objective on some random features, and 200 for each penalty in each of the two fits."""
        rows = min(train, 4096)
        x, weight = torch.randn(rows, width, dtype=torch.float64), torch.randn(classes, width, dtype=torch.float64)
        began = time.perf_counter()
        torch.softmax(x @ weight.T, 1).T @ x
        seconds = time.perf_counter() - began
        return TaskEstimate(seconds * train / rows * 400 * len(self.penalties), 8 * 2 * train * (width + classes))
