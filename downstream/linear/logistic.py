"""Multinomial logistic regression on features of unit length, solved to the end by scikit-learn's L-BFGS.

The objective is that of iBOT ``eval_logistic_regression.py``: mean cross-entropy plus half the penalty times the squared norm of
the weights, no intercept. iBOT stops its own solver (cyanure's, catalyst-miso) after 100 epochs; the minimum is the same.
"""

import time
import warnings
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat

from downstream.linear.heads import NEVER, Heads, accuracy, best_of, hold_out, rank
from downstream.linear.protocol import LinearProtocol
from downstream.task import FeatureProtocol, Outcome, Split, TaskEstimate, top_metrics
from mte_bench.console import log
from mte_bench.errors import UserError
from mte_bench.knn_bank import normalise


class LogisticProbe:
    """Logistic regression whose penalty is chosen among several on held-out images.

    Args:
        penalties: on half the squared norm of the weights, beside the mean cross-entropy.
        held_out: share of each class's train images on which the penalty is chosen, 0 to 1, exclusive.
        tolerance: largest entry of the gradient of the mean objective at which it is solved.
        iterations: after so many of L-BFGS it stops with a remark.
        seed: of the held-out images.

    Attributes after ``fit``: ``penalty_`` (the chosen one), ``heads_`` (of every penalty, on all images), ``held_out_top1_``
    (percent, by penalty), ``best_`` (place of the chosen one).
    """

    def __init__(
        self,
        penalties: Sequence[float] = (0.01, 0.1, 1.0),
        held_out: float = 0.1,
        tolerance: float = 1e-6,
        iterations: int = 1000,
        seed: int = 0,
    ):
        self.penalties = penalties
        self.held_out = held_out
        self.tolerance = tolerance
        self.iterations = iterations
        self.seed = seed

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """Choose the penalty and solve for all of ``features`` (``n c``) and ``labels`` (``n``).

        Raises ``UserError`` where there are fewer than two classes, or no class has an image to hold out.
        """
        if len(np.unique(labels)) < 2:
            raise UserError("linear: the train images are of one class only; at least two are needed")
        out = hold_out(labels, self.held_out, self.seed)
        x = self.transform(features)
        y = torch.from_numpy(np.array(labels, dtype=np.int64))
        self.held_out_top1_, losses = accuracy(self._solve(x[~out], labels[~out], int(labels.max()) + 1), x[out], y[out])
        self.best_ = best_of(self.held_out_top1_, losses)
        self.penalty_ = self.penalties[self.best_]
        self.heads_ = self._solve(x, labels, int(labels.max()) + 1)
        return self

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """The five most likely classes of ``features`` (``q c``), best first: ``q 5``, or as many as there are classes."""
        return rank(self.heads_.take([self.best_]), self.transform(features))

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


class LogisticProtocol(LinearProtocol):
    """Settings of logistic regression; ``LogisticProbe`` says what they mean."""

    solver: Literal["logistic"]
    penalties: tuple[PositiveFloat, ...] = Field(min_length=1)
    tolerance: float = Field(gt=0)
    iterations: int = Field(gt=0)

    def for_smoke(self) -> Self:
        """Two iterations."""
        return self.model_copy(update={"iterations": 2})

    def probe(self) -> LogisticProbe:
        """The estimator with these settings."""
        return LogisticProbe(**self.model_dump(exclude={*FeatureProtocol.model_fields, "solver"}))

    def evaluate(self, train: Split, val: Split, device: torch.device) -> Outcome:
        """Top-1 and top-5 of the val split; every penalty's accuracy among the details."""
        probe = self.probe().fit(train.features, train.labels)
        on_val, _ = accuracy(probe.heads_, probe.transform(val.features), torch.from_numpy(val.labels))
        details = {
            "penalty": probe.penalty_,
            "reported": "solved for all train images with the penalty chosen on held-out train images",
            "penalties": list(probe.penalties),
            "held_out_top1": [round(value, 3) for value in probe.held_out_top1_],
            "held_out_images": int(hold_out(train.labels, self.held_out, self.seed).sum()),
            "val_top1": [round(value, 3) for value in on_val],  # iBOT prints these
            "top1_if_chosen_on_val": round(max(on_val), 3),
        }
        return Outcome(top_metrics(probe.predict(val.features), val.labels, len(train.classes)), details)

    def estimate(self, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
        """From one evaluation of the objective on some random features, and 200 for each penalty in each of the two fits."""
        rows = min(train, 4096)
        x, weight = torch.randn(rows, width, dtype=torch.float64), torch.randn(classes, width, dtype=torch.float64)
        began = time.perf_counter()
        torch.softmax(x @ weight.T, 1).T @ x
        seconds = time.perf_counter() - began
        return TaskEstimate(seconds * train / rows * 400 * len(self.penalties), 8 * 2 * train * (width + classes))
