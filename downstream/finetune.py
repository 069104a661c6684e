"""Fine-tuning as a task: an encoder is trained further with a classifier on labelled images; then what that is worth.

The protocols follow iBOT's recipe, BEiT's with layer decay, which MTE uses, and MAE's. They report the best epoch on val, as
their references do; the record says so and also has the last one's accuracy.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

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
    settings_of,
    show_result,
    write_predictions,
)
from downstream.folders import output_folder, refuse_clash
from downstream.job import Job, Opened
from downstream.task import top_metrics
from downstream.tuning.estimate import estimate
from downstream.tuning.protocol import SMOKE_BATCH, FinetuneProtocol
from downstream.tuning.tuner import Tuner
from mte_bench import distributed, records
from mte_bench.console import log
from mte_bench.data.sources import SPLITS, ImageSet, Subset, parse_source
from mte_bench.device import peak_memory
from mte_bench.encoders.checkpoint import CLASSIFIER_NAME, ENCODER_NAME
from mte_bench.errors import UserError
from mte_bench.files import hash_of
from mte_bench.records import Metric, Record, make_record
from mte_bench.training.live import CURVES

F = TypeVar("F", bound=FinetuneProtocol)


class Answers(NamedTuple):
    """What the fine-tuned encoder says of val, without the images that could not be read."""

    ranked: NDArray[np.int64]
    """The most likely classes of each image, best first: ``n 5``, or as many as there are classes."""
    labels: NDArray[np.int64]
    """``n``."""
    train: ImageSet
    folder: Path
    """For side files."""


class Measured(NamedTuple):
    """What a task makes of the answers."""

    metrics: dict[str, Metric]
    predictions: dict[str, NDArray[np.int64]]
    """By column: ``prediction:<metric>`` of ``n`` classes, right where they equal the label."""
    files: dict[str, str]
    """Side files, by what they are."""


class Tuning(NamedTuple, Generic[F]):
    """A task that fine-tunes."""

    name: str
    protocol: type[F]
    default: str
    """The protocol that is used if none is named."""
    measure: Callable[[F, Answers], Measured]
    kinds: tuple[str, ...] = ()
    """Kinds of source that it takes; none is all."""

    @property
    def verb(self) -> str:
        """Its command."""
        return self.name

    def job(self, request: Request, opened: Opened) -> Job:
        """What ``request`` asks for, ready to be done by this process."""
        return prepare(self, request, opened)


def tune(task: Tuning[F], request: Request, save_minutes: float = 10.0) -> Record | None:
    """Do what ``request`` asks of ``task`` and show the result; returns the record, or None for a dry run.

    Processes under ``torchrun`` train together; the first one does the rest, the others return None. Raises ``UserError`` for
    everything that the user can mend.
    """
    process = distributed.start(request.device)
    try:
        return carry_out(prepare(task, request, Opened(), save_minutes, process), request, show_result)
    finally:
        distributed.stop()


def prepare(
    task: Tuning[F], request: Request, opened: Opened, save_minutes: float = 10.0, process: tuple[int, int] = (0, 1)
) -> Job:
    """What ``request`` asks of ``task``, ready to be done. Raises ``UserError`` as ``tune`` does; writes nothing."""
    kind = parse_source(request.data).kind
    if task.kinds and kind not in task.kinds:
        raise UserError(
            f"--data {request.data}: {task.name} takes sources of kind {', '.join(task.kinds)}; for others use finetune"
        )
    if request.others:
        raise UserError(f"{task.name} trains one encoder, not {1 + len(request.others)} together; leave the others out")
    name, protocol = load_protocol(task, request.protocol, request.set)
    if request.smoke:
        protocol, request = protocol.for_smoke(), replace(request, batch_size=SMOKE_BATCH)
    how = pass_of(request)
    train, val = (open_split(request, split, opened) for split in SPLITS)
    require_labels(train, val)
    checkpoint = opened.checkpoint(request.checkpoint, allow_partial=request.allow_partial, image_size=protocol.image_size)
    transform = evaluation_transform(checkpoint, protocol).model_copy(update={"interpolation": protocol.interpolation})
    subject, folder = checkpoint.subject, output_folder(request, task.name, name, protocol, checkpoint)
    stated = records.Protocol(name=name, version=protocol.version, settings=settings_of(protocol))
    fingerprint = hash_of([train.fingerprint, val.fingerprint])
    precision = precision_name(how)
    identity = {
        "task": task.name,
        "protocol": protocol.model_dump(mode="json"),
        "encoder": subject.sha256,
        "data": fingerprint,
        "precision": precision,
    }
    metadata = {
        **subject.model_dump(mode="json", include={"mte", "seed", "recipe", "recipe_hash"}),
        "method": f"{subject.method or subject.family}, fine-tuned",
        "data": " then ".join(filter(None, (subject.pretrain_data, train.source))),
    }

    def tuner() -> Tuner:
        return Tuner(
            protocol,
            checkpoint,
            train,
            val,
            folder,
            how=how,
            transform=transform,
            identity=identity,
            metadata=metadata,
            save_minutes=save_minutes,
            process=process,
        )

    def planned() -> dict[str, Any]:
        resolved = {"task": task.name, "protocol": name, "settings": stated.settings, "out": str(folder)}
        return resolved | {"encoder": subject.checkpoint} | estimate(tuner())

    def run() -> Record | None:
        refuse_clash(folder, task.name, subject, val.source, fingerprint)
        tuned = tuner()
        for remark in (*train.remarks, *val.remarks) if process[0] == 0 else ():
            log(remark)
        if not tuned.train() and (folder / records.RECORD_NAME).exists():
            return records.read_record(folder / records.RECORD_NAME) if process[0] == 0 else None
        averaged = tuned.evaluate_ema()
        if process[0]:
            return None
        ranked = tuned.reported.ranked
        kept = np.flatnonzero(ranked[:, 0] >= 0)
        images = val if len(kept) == len(val) else Subset(val, kept, "decodable")
        measured = task.measure(protocol, Answers(ranked[kept], images.labels, train, folder))
        metrics = dict(measured.metrics)
        if averaged is not None:
            metrics["top1_ema"] = percentage(averaged.ranked[kept, 0] == images.labels)
        record = make_record(
            task=task.name,
            protocol=stated,
            subject=subject,
            data=records.Data(
                source=val.source,
                split="val",
                images={"train": len(train), "val": len(images)},
                classes=len(train.classes),
                fingerprint=fingerprint,
                subset=val.subset,
                corrupt=sorted({*tuned.corrupt, *(val.name(int(index)) for index in np.flatnonzero(ranked[:, 0] < 0))}),
            ),
            metrics=metrics,
            cost=records.Cost(
                seconds=round(tuned.seconds, 3),
                images_per_second=round(tuned.total_steps * protocol.batch_size / tuned.seconds, 1),
                peak_memory_bytes=peak_memory(how.device),
            ),
            predictions=records.PREDICTIONS_NAME,
            files={"curves": CURVES, "encoder": ENCODER_NAME, "classifier": CLASSIFIER_NAME, **measured.files},
            details={
                **tuned.summary,
                "precision": precision,
                "transform": transform.model_dump(mode="json"),
                "remarks": [*train.remarks, *val.remarks],
            },
        )
        write_predictions(folder, images, measured.predictions)
        records.write_record(folder, record)
        return record

    return Job(task.name, stated, subject, fingerprint, precision, folder, (), planned, run)


def accuracy(protocol: FinetuneProtocol, answers: Answers) -> Measured:
    """Top-1 and, of more than five classes, top-5."""
    found = top_metrics(answers.ranked, answers.labels, len(answers.train.classes))
    metrics = {metric: percentage(result.correct) for metric, result in found.items()}
    return Measured(metrics, {f"prediction:{metric}": result.predicted for metric, result in found.items()}, {})


FINETUNE = Tuning("finetune", FinetuneProtocol, "finetune-vits", accuracy)
