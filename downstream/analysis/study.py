"""What the analyses share: from a checkpoint, a source and a protocol to a record, its picture and its values.

An analysis is a class of settings and two functions. ``prepare`` says what is computed from a batch of images, and refuses
a checkpoint that has none of it; ``measure`` makes numbers and a picture of what was computed. The rest is done here.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from downstream.evaluate import (
    Request,
    carry_out,
    evaluation_transform,
    load_protocol,
    open_split,
    pass_of,
    precision_name,
    require_labels,
    require_readable,
    settings_of,
    subject_title,
)
from downstream.features import Pass, decoded_batches
from downstream.folders import output_folder, refuse_clash
from downstream.job import Job, Opened
from downstream.plan import seconds_of
from downstream.task import ImageProtocol, WithProtocol
from mte_bench import records
from mte_bench.console import ProgressLine, show_json, show_table
from mte_bench.data.sources import ImageSet, take
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.device import autocast, peak_memory
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.errors import UserError
from mte_bench.files import hash_of, write_json
from mte_bench.records import Cost, Data, Metric, Record, make_record
from mte_bench.statistics import bootstrap_ci

Floats = NDArray[np.floating]


class AnalysisProtocol(ImageProtocol):
    """Settings that every analysis has."""

    count: int = Field(ge=4)
    """Images of the val split to measure on: always the same ones, balanced over the classes; all if there are fewer."""


class LookupProtocol(AnalysisProtocol):
    """Settings of analyses that compare val images with train images."""

    bank: int = Field(ge=4)
    """Images of the train split to look up in, chosen like ``count``."""


A = TypeVar("A", bound=AnalysisProtocol)


class Prepared(NamedTuple):
    """What is computed."""

    model: nn.Module
    """What computes; brought to the device and into evaluation mode."""
    compute: Callable[[Tensor], Sequence[Tensor]]
    """From images ``b c h w`` to any number of tensors ``b ...``."""
    names: tuple[str, ...]
    """Of whatever the analysis compares: tokens, heads, layers."""


class Gallery(NamedTuple):
    """The images that a picture shows, spread evenly over the classes of those that were measured."""

    rows: NDArray[np.int64]
    """Which of the measured images they are."""
    captions: list[str]
    images: Floats
    """``i h w 3`` in [0, 1]: what the encoder saw."""


class Bank(NamedTuple):
    """What was computed of train images."""

    arrays: list[Floats]
    labels: NDArray[np.int64]


class Seen(NamedTuple):
    """What was computed of the val images."""

    arrays: list[Floats]
    """Each ``n ...``."""
    labels: NDArray[np.int64]
    """``n``, indices of ``classes``; -1 for none."""
    classes: tuple[str, ...]
    gallery: Gallery
    bank: Bank | None = None
    """Of analyses that look up in the train split."""


class Outcome(NamedTuple):
    """What an analysis found."""

    metrics: dict[str, Metric]
    values: dict[str, Any]
    """What the picture shows, as plain data."""
    draw: Callable[[Path, str], None]
    """Draw the picture at this path; the text says of what it is."""
    details: dict[str, Any]


class Analysis(NamedTuple, Generic[A]):
    """One analysis."""

    name: str
    protocol: type[A]
    prepare: Callable[[A, Checkpoint], Prepared]
    """Raises ``UserError`` for a checkpoint that the analysis is not for."""
    measure: Callable[[A, Prepared, Seen], Outcome]
    """Numbers and a picture of what was computed of all images."""
    labelled: bool = False
    """Whether every image must have a label."""
    shown: int = 0
    """Images in the picture if the request does not say."""

    @property
    def default(self) -> str:
        """The protocol that is used if none is named."""
        return self.name

    @property
    def verb(self) -> str:
        """Its command."""
        return f"analyze {self.name}"

    def job(self, request: Request, opened: Opened, shown: int | None = None) -> Job:
        """What ``request`` asks for, ready to be done, with ``shown`` images in the picture.

        Raises ``UserError`` for everything that the user can mend; writes nothing.
        """
        return _job(self, request, opened, self.shown if shown is None else shown)


def study(analysis: Analysis[A], request: Request, shown: int | None = None) -> Record | None:
    """Do what ``request`` asks of ``analysis``, with ``shown`` images in the picture; returns the record, None for a dry run.

    Raises ``UserError`` for everything that the user can mend.
    """
    return carry_out(analysis.job(request, Opened(), shown), request, _show)


class Resolved(NamedTuple, Generic[A]):
    """What a request asks for, but for the checkpoint."""

    protocol: A
    stated: records.Protocol
    """The protocol as the record states it."""
    how: Pass
    splits: dict[str, ImageSet]
    """``val``, and before it ``train`` for a protocol that looks up in it."""
    fingerprint: str

    @property
    def images(self) -> ImageSet:
        """Those that are measured on."""
        return self.splits["val"]


class Looked(NamedTuple):
    """What was computed of all images, and of how many."""

    seen: Seen
    images: dict[str, int]
    corrupt: list[str]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of the pass over the images."""
        return round((sum(self.images.values()) + len(self.corrupt)) / self.seconds, 1)

    def data(self, resolved: "Resolved[Any]") -> Data:
        """The images as a record states them."""
        images = resolved.images
        return Data(
            source=images.source,
            split="val",
            images=self.images,
            classes=len(images.classes) or None,
            fingerprint=resolved.fingerprint,
            subset=images.subset,
            corrupt=self.corrupt,
        )


def resolve(task: WithProtocol[A], request: Request, opened: Opened, labelled: bool) -> Resolved[A]:
    """The settings and images of ``request``; with ``labelled``, every image must have a label.

    Raises ``UserError`` for everything that the user can mend.
    """
    name, protocol = load_protocol(task, request.protocol, request.set)
    splits = {}
    if isinstance(protocol, LookupProtocol):
        splits["train"] = _some(open_split(request, "train", opened), protocol.bank)
    splits["val"] = _some(open_split(request, "val", opened), protocol.count)
    if labelled:
        require_labels(*splits.values())
    fingerprints = [images.fingerprint for images in splits.values()]
    fingerprint = fingerprints[0] if len(splits) == 1 else hash_of(fingerprints)
    stated = records.Protocol(name=name, version=protocol.version, settings=settings_of(protocol))
    return Resolved(protocol, stated, pass_of(request), splits, fingerprint)


def look(resolved: Resolved[A], prepared: Prepared, transform: EvaluationTransform, shown: int) -> Looked:
    """Compute what ``prepared`` says of all images; ``shown`` of them go into the gallery."""
    began = time.monotonic()
    prepared.model.eval().to(resolved.how.device)
    passes = {split: _collect(prepared, images, transform, resolved.how) for split, images in resolved.splits.items()}
    seconds = time.monotonic() - began
    arrays, kept, _ = passes["val"]
    images, train = resolved.images, resolved.splits.get("train")
    bank = None if train is None else Bank(passes["train"][0], train.labels[passes["train"][1]])
    seen = Seen(arrays, images.labels[kept], images.classes, _gallery(images, kept, transform, shown), bank)
    counts = {split: len(found) for split, (_, found, _) in passes.items()}
    return Looked(seen, counts, [name for _, _, lost in passes.values() for name in lost], seconds)


def _job(analysis: Analysis[A], request: Request, opened: Opened, shown: int) -> Job:
    if request.others:
        raise UserError(f"{analysis.verb}: looks into one encoder, not into the {1 + len(request.others)} of an ensemble")
    resolved = resolve(analysis, request, opened, analysis.labelled)
    protocol, stated, how = resolved.protocol, resolved.stated, resolved.how
    checkpoint = opened.checkpoint(request.checkpoint, allow_partial=request.allow_partial, image_size=protocol.image_size)
    transform = evaluation_transform(checkpoint, protocol)
    folder = output_folder(request, analysis.name, stated.name, protocol, checkpoint)
    prepared = analysis.prepare(protocol, checkpoint)

    def planned() -> dict[str, Any]:
        resolved_to = {"task": analysis.name, "protocol": stated.name, "settings": stated.settings, "out": str(folder)}
        return resolved_to | plan_of(resolved, prepared, transform, checkpoint)

    def run() -> Record:
        began = time.monotonic()
        refuse_clash(folder, analysis.name, checkpoint.subject, resolved.images.source, resolved.fingerprint)
        looked = look(resolved, prepared, transform, shown)
        outcome = analysis.measure(protocol, prepared, looked.seen)
        files = {"picture": f"{analysis.name}.png", "values": f"{analysis.name}.json"}
        title = subject_title(checkpoint.subject, resolved.images.source, len(looked.seen.labels))
        outcome.draw(folder / files["picture"], title)
        write_json(folder / files["values"], outcome.values)
        record = make_record(
            task=analysis.name,
            protocol=stated,
            subject=checkpoint.subject,
            data=looked.data(resolved),
            metrics=outcome.metrics,
            cost=Cost(
                seconds=round(time.monotonic() - began, 3),
                images_per_second=looked.images_per_second,
                peak_memory_bytes=peak_memory(how.device),
            ),
            files=files,
            details={
                **outcome.details,
                **({"shown": looked.seen.gallery.captions} if shown else {}),
                "transform": transform.model_dump(mode="json"),
                "precision": precision_name(how),
            },
        )
        records.write_record(folder, record)
        return record

    return Job(analysis.name, stated, checkpoint.subject, resolved.fingerprint, precision_name(how), folder, (), planned, run)


def mean_over_images(values: Floats) -> Metric:
    """The mean of ``values`` (``n``, one per image) with its interval over images."""
    return Metric(value=float(values.mean()), ci95=bootstrap_ci(values), n=len(values))


def rounded(values: Floats, digits: int = 5) -> Any:
    """``values`` as nested lists of numbers with so many significant digits, for files that people read."""
    if values.ndim:
        return [rounded(part, digits) for part in values]
    return float(f"{float(values):.{digits}g}")


def _some(images: ImageSet, count: int) -> ImageSet:
    return take(images, "images", count) if count < len(images) else images


def _compute(prepared: Prepared, batch: Tensor, how: Pass) -> list[Floats]:
    with torch.inference_mode(), autocast(how.device, how.precision):
        return [part.float().cpu().numpy() for part in prepared.compute(batch.to(how.device, non_blocking=True))]


def _collect(
    prepared: Prepared, images: ImageSet, transform: EvaluationTransform, how: Pass
) -> tuple[list[Floats], NDArray[np.int64], list[str]]:
    """What is computed of all images that can be decoded; which these are; the names of the others."""
    parts: list[list[Floats]] = []
    lost: list[int] = []
    done, line = 0, ProgressLine()
    for batch, bad, _ in decoded_batches(images, transform, how):
        lost += bad
        good = np.setdiff1d(np.arange(len(batch)), np.array(bad, dtype=np.int64) - done)
        computed = [values[good] for values in _compute(prepared, batch, how)]
        for values in computed:
            finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            if not finite.all():
                name = images.name(done + int(good[np.argmin(finite)]))
                raise UserError(f"the encoder's tokens of {name} are not finite: a diverged checkpoint, or --precision float32")
        parts.append(computed)
        done += len(batch)
        line.show(f"{images.split}: {done}/{len(images)} images  {done / line.seconds:.0f} images/s", last=done == len(images))
    arrays = [np.concatenate(same) for same in zip(*parts, strict=True)]
    kept = np.setdiff1d(np.arange(len(images)), lost)
    require_readable(images, len(kept))
    return arrays, kept, [images.name(index) for index in lost]


def _gallery(images: ImageSet, kept: NDArray[np.int64], transform: EvaluationTransform, shown: int) -> Gallery:
    by_class = np.argsort(images.labels[kept], kind="stable")
    rows = by_class[np.linspace(0, len(kept) - 1, min(shown, len(kept))).round().astype(np.int64)]
    captions, pixels = [], []
    for index in kept[rows]:
        label, name = int(images.labels[index]), images.name(int(index)).rsplit("/", 1)[-1]
        captions.append(f"{images.classes[label]}: {name}" if label >= 0 else name)
        pixels.append(transform.seen(images.image(int(index))))
    return Gallery(rows, captions, np.array(pixels))


def _show(record: Record, as_json: bool) -> None:
    if as_json:
        show_json(record)
        return
    rows = []
    for name, metric in record.metrics.items():
        interval = None if metric.ci95 is None else f"{metric.ci95[0]:.3f} to {metric.ci95[1]:.3f}"
        rows.append([name, f"{metric.value:.3f}", interval, metric.n])
    title = f"{record.protocol.name} of {record.subject.checkpoint} on {record.data.source}"
    show_table(title, ["metric", "value", "95 % interval", "images"], rows)


def plan_of(resolved: Resolved[A], prepared: Prepared, transform: EvaluationTransform, checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``look`` would do and, measured on a few images of this machine, what it would take."""
    images, how = resolved.images, resolved.how
    prepared.model.eval().to(how.device)
    counts = {split: len(own) for split, own in resolved.splits.items()}
    total = sum(counts.values())
    batch = torch.stack([transform(images.image(0))] * min(how.batch_size, len(images), 16))
    decode = seconds_of(lambda: transform(images.image(0)))
    encode = seconds_of(lambda: _compute(prepared, batch, how)) / len(batch)
    bytes_per_image = sum(values[0].nbytes for values in _compute(prepared, batch[:1], how))
    return {
        "encoder": f"{checkpoint.subject.checkpoint} ({checkpoint.subject.arch}, {checkpoint.encoder.spec.image_size} px)",
        "data": images.source,
        "images": counts,
        "transform": transform.model_dump(mode="json"),
        "compared": ", ".join(prepared.names),
        "task_seconds": round(total * max(encode, decode / max(how.workers, 1)), 1),
        "task_memory_bytes": total * bytes_per_image,
    }
