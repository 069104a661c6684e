"""What an evaluation on features is: settings, and a function from the features of two splits to predictions."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from downstream.features import Pass
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.encoder import Encoder
from mte_bench.errors import UserError
from mte_bench.settings import Settings

if TYPE_CHECKING:
    from downstream.evaluate import Request
    from downstream.job import Job, Opened

TOP = 5
WIDTH_OF_VIT_S = 384


class TaskProtocol(Settings):
    """Settings that every evaluation and analysis has."""

    task: str
    version: int
    """Raised when the same settings come to mean something else; numbers of different versions are not comparable."""

    def for_smoke(self) -> Self:
        """The same, as short as can be."""
        return self


class ImageProtocol(TaskProtocol):
    """Settings of those that take a square out of each image."""

    image_size: int | None
    """Side of the centre crop in pixels; null takes the encoder's own."""
    resize: int | None
    """Shorter side before the crop; null takes 256/224 of the crop."""


class FeatureProtocol(ImageProtocol):
    """Settings that every evaluation on features has."""

    feature: str
    """A kind of ``downstream.features``; ``global`` is the global token after the final norm. ``published`` is what DINO's
    and iBOT's linear probes take of the architecture. Where several kinds are compared, they are separated by commas."""
    decode: Literal["full", "reduced"] = Field("full", exclude_if=lambda decode: decode == "full")
    """``reduced`` decodes a JPEG at a half, a quarter or an eighth of its size where its shorter side stays at least
    ``resize``: faster, of other pixels, and so of other features. Augmented views and pictures are of whole images."""

    @property
    def views(self) -> bool:
        """Whether it trains on augmented views, for which it needs the images too."""
        return False

    @property
    def compares_kinds(self) -> bool:
        """Whether it takes several kinds of feature and compares them."""
        return self.views

    def view_passes(self, train: int) -> float:
        """How often the encoder goes over the ``train`` images to do so."""
        return 0

    def require_images(self, train: int) -> None:
        """Raise ``UserError`` if ``train`` images are too few for these settings."""

    def kinds(self, encoder: Encoder) -> tuple[str, ...]:
        """The kinds of feature that it asks of ``encoder``.

        Raises ``UserError`` for several where only one has a use, and for one that is listed twice.
        """
        if self.feature == "published":
            return (published_feature(encoder),)
        kinds = tuple(kind.strip() for kind in self.feature.split(","))
        if len(kinds) > 1 and not self.compares_kinds:
            raise UserError(f"feature '{self.feature}': this protocol takes a single kind")
        if len(set(kinds)) < len(kinds):
            raise UserError(f"feature '{self.feature}': lists a kind twice")
        return kinds


def published_feature(encoder: Encoder) -> str:
    """CLS of the last four blocks of a ViT up to the width of ViT-S, CLS and mean patch of a wider one; for a Swin, the
    pooled outputs of its last four blocks. Source: DINO and iBOT, the READMEs' commands for linear evaluation.
    """
    if not encoder.is_vit:
        return "pooled-last4"
    if not encoder.has_cls:
        return "global"
    return "cls-last4" if encoder.width <= WIDTH_OF_VIT_S else "cls+patch-mean"


P = TypeVar("P", bound=FeatureProtocol)
I_co = TypeVar("I_co", bound=TaskProtocol, covariant=True)


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


class Material(NamedTuple):
    """What an evaluation that trains on augmented views works with; images that cannot be read are left out."""

    encoder: Encoder
    images: ImageSet
    """Of the train split."""
    transform: EvaluationTransform
    how: Pass
    splits: dict[str, tuple[Split, Split]]
    """For each kind of feature, train and val under the evaluation transform."""
    folder: Path
    """Where the record will be, for what is kept to go on after a stop."""
    identity: str
    """A hash of weights, data and precision."""


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
    recorded: Callable[[], None] | None = None
    """Called when the record is written: removes what was kept to go on."""


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
    evaluate_on_views: Callable[[P, Material], Outcome] | None = None
    """For protocols whose ``views`` is true."""
    evaluate_kinds: Callable[[P, dict[str, tuple[Split, Split]], torch.device], Outcome] | None = None
    """For several kinds of feature: ``evaluate`` gets the first alone."""

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
