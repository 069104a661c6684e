"""What linear probes on kept features share, however they are trained: one setting is chosen among several values.

Probes of all values are trained on train images less the held-out ones, which choose; what is reported was trained again on
all train images, and has never seen, nor been chosen on, the val split.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downstream.linear.heads import Heads, accuracy, best_of, hold_out, rank, warn_of_edge
from downstream.linear.protocol import LinearProtocol
from downstream.task import FeatureProtocol, Outcome, Split, top_metrics
from mte_bench.errors import UserError


@dataclass(eq=False, kw_only=True)
class Probe(ABC):
    """A linear classifier one setting of which is chosen among several values.

    Args:
        held_out: share of each class's train images that chooses, 0 to 1, exclusive.
        seed: of the held-out images and of all else that is drawn.
        device: where it is trained.

    Attributes after ``fit``: ``chosen_`` (the value), ``heads_`` (one: that of the value, of all train images), ``sweep_`` (a
    head for every value), ``held_out_top1_`` (percent) and ``held_out_loss_`` (nats) by value.
    """

    held_out: float = 0.1
    seed: int = 0
    device: str | torch.device = "cpu"

    names: ClassVar[tuple[str, str]]
    """Of the setting with several values, in the singular and in the plural, which is the argument's."""
    heads_: Heads = field(init=False, repr=False)
    sweep_: Heads = field(init=False, repr=False)

    @property
    def values(self) -> Sequence[float]:
        """Among which is chosen."""
        values: Sequence[float] = getattr(self, self.names[1])
        return values

    @property
    def details(self) -> dict[str, Any]:
        """What a record says of ``fit`` beyond what it says of every probe."""
        return {}

    @abstractmethod
    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """Choose the value and train with it on all of ``features`` (``n c``) and ``labels`` (``n``).

        Raises ``UserError`` where there are fewer than two classes, or no class has an image to hold out.
        """

    def predict(self, features: NDArray[np.floating]) -> NDArray[np.int64]:
        """The five most likely classes of ``features`` (``q c``), best first: ``q 5``, or as many as there are classes."""
        return rank(self.heads_, self.transform(features))

    def transform(self, features: NDArray[np.floating]) -> Tensor:
        """``features`` (``q c``) as the heads take them."""
        return torch.from_numpy(np.array(features))

    def _held(self, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the train images choose. Raises as ``fit`` does."""
        if len(np.unique(labels)) < 2:
            raise UserError("linear: the train images are of one class only; at least two are needed")
        return hold_out(labels, self.held_out, self.seed)

    def _choose(self, heads: Heads, x: Tensor, y: Tensor) -> int:
        """Place of the value whose head is the best on the held-out features ``x`` (``h c``) and labels ``y`` (``h``)."""
        self.held_out_top1_, self.held_out_loss_ = accuracy(heads, x, y)
        best = best_of(self.held_out_top1_, self.held_out_loss_)
        self.chosen_ = self.values[best]
        return best


class KeptProtocol(LinearProtocol):
    """Settings of a probe on kept features: the arguments of its ``estimator``, which says what they mean."""

    estimator: ClassVar[type[Probe]]

    def probe(self, device: torch.device) -> Probe:
        """The estimator with these settings."""
        return self.estimator(**self.model_dump(exclude={*FeatureProtocol.model_fields, "solver"}), device=device)

    def evaluate(self, train: Split, val: Split, device: torch.device) -> Outcome:
        """Top-1 and top-5 of the val split; the accuracy of every value among the details."""
        probe = self.probe(device).fit(train.features, train.labels)
        one, several = probe.names
        on_val, _ = accuracy(probe.sweep_, probe.transform(val.features), torch.from_numpy(val.labels))
        warn_of_edge(one, probe.chosen_, probe.values)
        details = {
            one: probe.chosen_,
            **probe.details,
            "reported": f"trained on all train images with the {one} chosen on held-out train images",
            several: list(probe.values),
            "held_out_top1": [round(value, 3) for value in probe.held_out_top1_],
            "held_out_images": int(hold_out(train.labels, self.held_out, self.seed).sum()),
            "val_top1": [round(value, 3) for value in on_val],
            # The references choose on val. That is optimistic: for comparison with their numbers only.
            "top1_if_chosen_on_val": round(max(on_val), 3),
        }
        return Outcome(top_metrics(probe.predict(val.features), val.labels, len(train.classes)), details)
