"""A checkpoint's own classifier on a val split: supervised training, as in MTE's Tables 8 and 14. Nothing is trained.

Read ``match`` first: an answer counts only if it is known which class of the data each output of the classifier means.
"""

import time
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo
from torch import Tensor, nn

from downstream.evaluate import (
    Request,
    carry_out,
    evaluation_transform,
    load_protocol,
    open_split,
    pass_of,
    percentage,
    precision_name,
    require_labels,
    require_readable,
    settings_of,
    show_result,
    write_predictions,
)
from downstream.folders import output_folder, refuse_clash
from downstream.job import Job, Opened
from downstream.plan import seconds_of
from downstream.ranking import ranked_classes
from downstream.task import TOP, ImageProtocol, Predictions, top_metrics
from mte_bench import distributed, records
from mte_bench.console import log
from mte_bench.data.sources import Subset
from mte_bench.device import autocast, peak_memory
from mte_bench.encoders.classifier import Trained, trained_classifier
from mte_bench.encoders.families import first_few
from mte_bench.errors import UserError
from mte_bench.records import Record, make_record

IMAGENET_CLASSES = 1000


class ClassifyProtocol(ImageProtocol):
    """All that determines the evaluation of a classifier, apart from checkpoint and data."""

    interpolation: Literal["bicubic", "bilinear"]
    """With which images are resized."""
    candidates: Literal["all", "data"]
    """Where the classifier knows more classes than the data have: ``all`` may be answered, and the others are wrong; ``data``
    lets only the data's classes compete."""


class Match(NamedTuple):
    """Which class of the data each output of a classifier means."""

    classes: NDArray[np.int64]
    """By output; -1 for a class that the data do not have."""
    by: str
    """How that is known."""


def match(trained: Trained, classes: tuple[str, ...], checkpoint: str, source: str) -> Match:
    """The outputs of ``trained`` beside the ``classes`` of the data: by name where the names are known, else by number.

    A classifier of 1000 classes without names is taken for one of ImageNet-1K in its usual order (that of the synsets' names)
    where all of the data's classes are synsets of it. Raises ``UserError`` for a class that the classifier does not know, and
    for another number of classes than that of a classifier without names.
    """
    names, known = trained.classes, "by name"
    if names is None and trained.outputs == IMAGENET_CLASSES:
        synsets = tuple(ImageNetInfo("imagenet-1k").label_names())
        if set(classes) <= set(synsets):
            names, known = synsets, "by ImageNet's synsets"
    if names is None:
        if trained.outputs != len(classes):
            raise UserError(
                f"{checkpoint}: its classifier tells {trained.outputs} classes apart, which have no names, and {source} has "
                f"{len(classes)}; give data with its classes, in its order"
            )
        return Match(np.arange(len(classes)), "by number: the classifier names no classes")
    strange = [name for name in classes if name not in names]
    if strange:
        raise UserError(
            f"{source}: the classifier of {checkpoint} does not know {first_few(strange)}; it knows {first_few(names)}: give "
            "data with its classes"
        )
    places = {name: place for place, name in enumerate(classes)}
    found = np.array([places.get(name, -1) for name in names])
    if names == classes:
        order = "in the same order"
    elif len(names) == len(classes):
        order = "in another order"
    else:
        order = f"{len(classes)} of the classifier's {len(names)}"
    return Match(found, f"{known}, {order}")


class _Candidates(nn.Module):
    """``model`` with only some of its outputs."""

    def __init__(self, model: nn.Module, outputs: NDArray[np.int64]):
        super().__init__()
        self.model = model
        self.register_buffer("outputs", torch.from_numpy(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).index_select(-1, self.outputs)


class Classify(NamedTuple):
    """The task."""

    name: str = "classify"
    default: str = "classify"
    protocol: type[ClassifyProtocol] = ClassifyProtocol

    @property
    def verb(self) -> str:
        """Its command."""
        return self.name

    def job(self, request: Request, opened: Opened) -> Job:
        """What ``request`` asks for, ready to be done by this process."""
        return prepare(request, opened)


CLASSIFY = Classify()


def classify(request: Request) -> Record | None:
    """Do what ``request`` asks and show the result; returns the record, or None for a dry run.

    Processes under ``torchrun`` share the images; the first one does the rest, the others return None. Raises ``UserError`` for
    everything that the user can mend.
    """
    process = distributed.start(request.device)
    try:
        return carry_out(prepare(request, Opened(), process), request, show_result)
    finally:
        distributed.stop()


def prepare(request: Request, opened: Opened, process: tuple[int, int] = (0, 1)) -> Job:
    """What ``request`` asks for, ready to be done. Raises ``UserError`` as ``classify`` does; writes nothing."""
    if request.others:
        raise UserError(f"classify: takes one classifier, not the {1 + len(request.others)} of an ensemble; leave the others out")
    name, protocol = load_protocol(CLASSIFY, request.protocol, request.set)
    how = pass_of(request)
    val = open_split(request, "val", opened)
    require_labels(val)
    checkpoint = opened.checkpoint(request.checkpoint, allow_partial=request.allow_partial, image_size=protocol.image_size)
    transform = evaluation_transform(checkpoint, protocol)
    trained = trained_classifier(checkpoint)
    matched = match(trained, val.classes, request.checkpoint, val.source)
    outputs = np.flatnonzero(matched.classes >= 0) if protocol.candidates == "data" else np.arange(trained.outputs)
    model = _Candidates(trained.model, outputs).eval()
    subject, folder = checkpoint.subject, output_folder(request, CLASSIFY.name, name, protocol, checkpoint)
    stated = records.Protocol(name=name, version=protocol.version, settings=settings_of(protocol))

    def planned() -> dict[str, Any]:
        batch = torch.stack([transform(val.image(0))] * min(how.batch_size, 16)).to(how.device)
        model.to(how.device)

        def score() -> None:
            with torch.inference_mode(), autocast(how.device, how.precision):
                model(batch).sum().item()

        decode, encode = seconds_of(lambda: transform(val.image(0))), seconds_of(score) / len(batch)
        per_image = max(encode, decode / how.workers) if how.workers else encode + decode
        return {
            "task": CLASSIFY.name,
            "protocol": name,
            "settings": stated.settings,
            "out": str(folder),
            "encoder": f"{subject.checkpoint} ({subject.arch}, {checkpoint.encoder.spec.image_size} px)",
            "data": val.source,
            "images": {"val": len(val)},
            "classes": len(val.classes),
            "classes_matched": matched.by,
            "transform": transform.model_dump(mode="json"),
            "task_seconds": float(f"{len(val) * per_image / process[1]:.3g}"),
        }

    def run() -> Record | None:
        began = time.monotonic()
        refuse_clash(folder, CLASSIFY.name, subject, val.source, val.fingerprint)
        if process[0] == 0 and trained.classes != val.classes:
            log(f"classes matched {matched.by}")
        top = min(TOP, len(outputs))
        answers = ranked_classes(model.to(how.device), val, transform, how, top, process, "classified images of val")
        seconds = time.monotonic() - began
        if process[0]:
            return None
        answers = answers.reshape(-1, len(val), top)
        lost = np.flatnonzero(answers[0, :, 0] < 0)
        kept = np.setdiff1d(np.arange(len(val)), lost)
        require_readable(val, len(kept))
        images = Subset(val, kept, "decodable") if len(lost) else val
        found: dict[str, Predictions] = {}
        for ranked, suffix in zip(answers[:, kept], trained.suffixes, strict=True):
            found |= top_metrics(matched.classes[outputs[ranked]], images.labels, len(outputs), suffix)
        record = make_record(
            task=CLASSIFY.name,
            protocol=stated,
            subject=subject,
            data=records.Data(
                source=val.source,
                split="val",
                images={"val": len(images)},
                classes=len(val.classes),
                fingerprint=val.fingerprint,
                subset=val.subset,
                corrupt=[val.name(int(index)) for index in lost],
            ),
            metrics={metric: percentage(result.correct) for metric, result in found.items()},
            cost=records.Cost(
                seconds=round(seconds, 3),
                images_per_second=round(len(val) / seconds, 1),
                peak_memory_bytes=peak_memory(how.device),
            ),
            predictions=records.PREDICTIONS_NAME,
            details={
                "classes_matched": matched.by,
                "classes_of_the_classifier": trained.outputs,
                "transform": transform.model_dump(mode="json"),
                "precision": precision_name(how),
                "remarks": list(val.remarks),
            },
        )
        write_predictions(folder, images, {f"prediction:{metric}": result.predicted for metric, result in found.items()})
        records.write_record(folder, record)
        return record

    return Job(CLASSIFY.name, stated, subject, val.fingerprint, precision_name(how), folder, (), planned, run)
