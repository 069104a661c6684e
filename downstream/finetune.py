"""Fine-tuning as a task: an encoder is trained further with a classifier on labelled images; then what that is worth.

The protocols follow iBOT's recipe, BEiT's with layer decay, which MTE uses, and MAE's. They report the best epoch on val, as
their references do; the record says so and also has the last one's accuracy.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from downstream.evaluate import (
    Request,
    evaluation_transform,
    load_protocol,
    open_split,
    output_folder,
    pass_of,
    percentage,
    refuse_clash,
    require_labels,
    settings_of,
    show_result,
    write_predictions,
)
from downstream.plan import show_plan
from downstream.task import top_metrics
from downstream.tuning.estimate import estimate
from downstream.tuning.protocol import SMOKE_BATCH, FinetuneProtocol
from downstream.tuning.tuner import Tuner
from mte_bench import distributed, records
from mte_bench.console import log
from mte_bench.data.sources import SPLITS, ImageSet
from mte_bench.device import peak_memory
from mte_bench.encoders.checkpoint import open_checkpoint
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
    """The columns ``prediction:<metric>``: ``n`` classes, right where they equal the label."""
    files: dict[str, str]
    """Side files, by what they are."""


class Tuning(NamedTuple, Generic[F]):
    """A task that fine-tunes."""

    name: str
    protocol: type[F]
    measure: Callable[[F, Answers], Measured]


def tune(task: Tuning[F], request: Request, save_minutes: float = 10.0) -> Record | None:
    """Do what ``request`` asks of ``task`` and show the result; returns the record, or None for a dry run and for all but
    the first of several processes.

    Raises ``UserError`` for everything that the user can mend.
    """
    process = distributed.start(request.device)
    try:
        return _tune(task, request, save_minutes, process)
    finally:
        distributed.stop()


def _tune(task: Tuning[F], request: Request, save_minutes: float, process: tuple[int, int]) -> Record | None:
    name, protocol = load_protocol(task, request.protocol, request.set)
    if request.smoke:
        protocol, request = protocol.for_smoke(), replace(request, batch_size=SMOKE_BATCH)
    how = pass_of(request)
    train, val = (open_split(request, split) for split in SPLITS)
    require_labels(train, val)
    for remark in (*train.remarks, *val.remarks) if process[0] == 0 else ():
        log(remark)
    checkpoint = open_checkpoint(request.checkpoint, allow_partial=request.allow_partial, image_size=protocol.image_size)
    transform = evaluation_transform(checkpoint, protocol).model_copy(update={"interpolation": protocol.interpolation})
    subject, folder = checkpoint.subject, output_folder(request, task.name, name, protocol, checkpoint)
    fingerprint = hash_of([train.fingerprint, val.fingerprint])
    tuner = Tuner(
        protocol,
        checkpoint,
        train,
        val,
        folder,
        how=how,
        transform=transform,
        identity={
            "task": task.name,
            "protocol": protocol.model_dump(mode="json"),
            "encoder": subject.sha256,
            "data": fingerprint,
            "precision": str(how.precision).removeprefix("torch."),
        },
        metadata={
            **subject.model_dump(mode="json", include={"mte", "seed", "recipe", "recipe_hash"}),
            "method": f"{subject.method or subject.family}, fine-tuned",
            "data": " then ".join(filter(None, (subject.pretrain_data, train.source))),
        },
        save_minutes=save_minutes,
        process=process,
    )
    if request.dry_run:
        resolved = {"task": task.name, "protocol": name, "settings": settings_of(protocol), "out": str(folder)}
        show_plan(resolved | estimate(tuner), request.json)
        return None
    refuse_clash(folder, subject, val.source, fingerprint)
    if not tuner.run() and (folder / records.RECORD_NAME).exists():
        record = records.read_record(folder / records.RECORD_NAME)
        if process[0] == 0:
            show_result(record, request.json)
            log(f"already done: {folder / records.RECORD_NAME}")
        return record
    averaged = tuner.evaluate_ema()
    if process[0]:
        return None
    found = tuner.reported
    kept = np.flatnonzero(found.ranked[:, 0] >= 0)
    measured = task.measure(protocol, Answers(found.ranked[kept], val.labels[kept], train, folder))
    metrics = dict(measured.metrics)
    if averaged is not None:
        metrics["top1_ema"] = percentage(averaged.ranked[kept, 0] == val.labels[kept])
    write_predictions(folder, [val.name(int(i)) for i in kept], val.labels[kept], train.classes, measured.predictions)
    assert tuner.best is not None and tuner.last is not None
    record = make_record(
        task=task.name,
        protocol=records.Protocol(name=name, version=protocol.version, settings=settings_of(protocol)),
        subject=subject,
        data=records.Data(
            source=val.source,
            split="val",
            images={"train": len(train), "val": len(kept)},
            classes=len(train.classes),
            fingerprint=fingerprint,
            subset=val.subset,
            corrupt=sorted({*tuner.corrupt, *(val.name(int(i)) for i in np.flatnonzero(found.ranked[:, 0] < 0))}),
        ),
        metrics=metrics,
        cost=records.Cost(
            seconds=round(tuner.seconds, 3),
            images_per_second=round(tuner.total_steps * protocol.batch_size / tuner.seconds, 1),
            peak_memory_bytes=peak_memory(how.device),
        ),
        predictions=records.PREDICTIONS_NAME,
        files={"curves": CURVES, "encoder": "encoder.safetensors", "classifier": "classifier.safetensors", **measured.files},
        details={
            "reported": "the best epoch on val (optimistic)" if protocol.reports == "best" else "the last epoch",
            "epoch": found.epoch,
            "best_top1": round(tuner.best.top1, 3),
            "last_top1": round(tuner.last.top1, 3),
            "epochs_done": round(tuner.epoch),
            "steps": tuner.step,
            "resumed": tuner.resumed,
            "processes": process[1],
            "precision": tuner.identity["precision"],
            "transform": transform.model_dump(mode="json"),
            "remarks": [*train.remarks, *val.remarks],
        },
    )
    path = records.write_record(folder, record)
    show_result(record, request.json)
    log(f"record: {path}")
    return record


def accuracy(protocol: FinetuneProtocol, answers: Answers) -> Measured:
    """Top-1 and, of more than five classes, top-5."""
    found = top_metrics(answers.ranked, answers.labels, len(answers.train.classes))
    metrics = {metric: percentage(result.correct) for metric, result in found.items()}
    return Measured(metrics, {metric: result.predicted for metric, result in found.items()}, {})


FINETUNE = Tuning("finetune", FinetuneProtocol, accuracy)
