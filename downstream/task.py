"""What an evaluation on features is: settings, and a function from the features of two splits to predictions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.settings import Settings

if TYPE_CHECKING:
    from downstream.evaluate import Request
    from downstream.job import Job, Opened

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
    images: ImageSet | None = None
    """One for each row, where the task shows or names them."""


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
    scores: Mapping[str, NDArray[np.floating]] = {}
    """Metrics that are means over the val images: ``n`` values from 0 to 1 each."""
    columns: Mapping[str, Any] = {}
    """What else belongs beside the predictions: a value or a list for each of ``n`` val images."""
    draw: Callable[[Path, EvaluationTransform, str], None] | None = None
    """Draws the task's picture at this path: images as the encoder saw them, and a title that names encoder and data."""


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

    @property
    def verb(self) -> str:
        """Its command."""
        return self.name

    def job(self, request: "Request", opened: "Opened") -> "Job":
        """What ``request`` asks for, ready to be done."""
        from downstream.evaluate import prepare  # which is made of what stands above

        return prepare(self, request, opened)


def top_metrics(ranked: NDArray[np.int64], labels: NDArray[np.int64], classes: int, suffix: str = "") -> dict[str, Predictions]:
    """``top1`` and, of more than five classes, ``top5`` from the ranked classes (``n 5``, best first, -1 for none).

    The prediction that ``top5`` counts is the label where that is among the five, otherwise the first of them.
    """
    metrics = {f"top1{suffix}": Predictions(ranked[:, 0], labels)}
    if classes > TOP:
        hit = (ranked[:, :TOP] == labels[:, None]).any(axis=1)
        metrics[f"top5{suffix}"] = Predictions(np.where(hit, labels, ranked[:, 0]), labels)
    return metrics
