"""What an evaluation on features is: settings, and a function from the features of two splits to predictions."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mte_bench.settings import Settings

TOP = 5


class ImageProtocol(Settings):
    """Settings that every evaluation and analysis has."""

    task: str
    version: int
    """Raised when the same settings come to mean something else; numbers of different versions are not comparable."""
    image_size: int | None
    """Side of the centre crop in pixels; null takes the encoder's own."""
    resize: int | None
    """Shorter side before the crop; null takes 256/224 of the crop."""

    def for_smoke(self) -> Self:
        """The same, as short as can be."""
        return self


class FeatureProtocol(ImageProtocol):
    """Settings that every evaluation on features has."""

    feature: str
    """A kind of ``downstream.features``; ``global`` is the global token after the final norm."""


P = TypeVar("P", bound=FeatureProtocol)
I_co = TypeVar("I_co", bound=ImageProtocol, covariant=True)


class WithProtocol(Protocol[I_co]):
    """Whatever has a name and protocols: a ``Task`` or an analysis."""

    @property
    def name(self) -> str:
        """The task's name in protocol files and records."""

    @property
    def protocol(self) -> type[I_co]:
        """The class of its settings."""


class Split(NamedTuple):
    """The features of one split as a task sees them."""

    features: NDArray[np.floating]
    """``n c``."""
    labels: NDArray[np.int64]
    """``n``, indices of ``classes``."""
    classes: tuple[str, ...]
    """The same for train and val."""


class Predictions(NamedTuple):
    """What one metric counts: ``predicted`` (``n`` classes) is right where it equals the label."""

    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """``n``."""
        return self.predicted == self.labels


class Outcome(NamedTuple):
    """What a task found."""

    metrics: dict[str, Predictions]
    details: dict[str, Any]


class TaskEstimate(NamedTuple):
    """What a task will take beyond the features."""

    seconds: float
    memory_bytes: int


class Task(NamedTuple, Generic[P]):
    """One evaluation on features."""

    name: str
    protocol: type[P]
    default: str
    """The protocol that is used if none is named."""
    evaluate: Callable[[P, Split, Split, torch.device], Outcome]
    estimate: Callable[[P, int, int, int, int, torch.device], TaskEstimate]
    """From the protocol, images of train and of val, width of a feature, number of classes, device."""


def top_metrics(ranked: NDArray[np.int64], labels: NDArray[np.int64], classes: int, suffix: str = "") -> dict[str, Predictions]:
    """``top1`` and, of more than five classes, ``top5`` from the ranked classes (``n 5``, best first, -1 for none).

    The prediction that ``top5`` counts is the label where that is among the five, otherwise the first of them.
    """
    metrics = {f"top1{suffix}": Predictions(ranked[:, 0], labels)}
    if classes > TOP:
        hit = (ranked[:, :TOP] == labels[:, None]).any(axis=1)
        metrics[f"top5{suffix}"] = Predictions(np.where(hit, labels, ranked[:, 0]), labels)
    return metrics
