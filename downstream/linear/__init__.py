"""Linear probes: how well one linear layer on an encoder's features names a class.

Read ``probe.py`` (kept features, the fast default) or ``training.py`` (augmented views, the references' protocols) first;
both train with ``heads.py``. ``ridge.py`` and ``logistic.py`` are solved instead.
"""

from typing import Any

from downstream.linear.augmented import AugmentedProtocol
from downstream.linear.logistic import LogisticProtocol
from downstream.linear.probe import SweepProtocol
from downstream.linear.protocol import LinearProtocol
from downstream.linear.ridge import RidgeProtocol
from downstream.task import Task
from mte_bench.errors import UserError, did_you_mean

SOLVERS: dict[str, type[LinearProtocol]] = {
    "sgd-augmented": AugmentedProtocol,
    "ridge": RidgeProtocol,
    "logistic": LogisticProtocol,
}
"""By the protocol's ``solver``. Where none is named it is SGD on kept features."""


class AnyLinearProtocol(LinearProtocol):
    """The settings of whichever solver they name."""

    @classmethod
    def check(cls, values: Any, where: str) -> LinearProtocol:  # type: ignore[override]
        """As ``Settings.check`` of the solver's class."""
        if "solver" not in values:
            return SweepProtocol.check(values, where)
        solver = str(values["solver"])
        if solver not in SOLVERS:
            raise UserError(f"{where}: no solver '{solver}'{did_you_mean(solver, SOLVERS)}")
        return SOLVERS[solver].check(values, where)


LINEAR: Task[LinearProtocol] = Task(
    "linear",
    AnyLinearProtocol,
    "linear-fast",
    lambda protocol, *splits_and_device: protocol.evaluate(*splits_and_device),
    lambda protocol, *sizes_and_device: protocol.estimate(*sizes_and_device),
    lambda protocol, material: protocol.evaluate_on_views(material),
)
