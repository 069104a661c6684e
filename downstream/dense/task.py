"""What both dense tasks share: from a checkpoint, a source and a protocol to a trained model and its record.

A task is a class of settings and four functions: what is read, which model and transforms there are, what is measured and
what a picture shows. ``run_dense`` does the rest. A CKPT that is a finished model of the task is only evaluated.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from downstream.dense import openmmlab
from downstream.dense.batches import Truth
from downstream.dense.protocol import DenseProtocol
from downstream.evaluate import (
    Request,
    load_protocol,
    output_folder,
    pass_of,
    refuse_clash,
    settings_of,
    show_result,
)
from downstream.features import Pass
from downstream.plan import show_plan
from mte_bench import distributed, records
from mte_bench.console import log
from mte_bench.data.sources import SPLITS, ImageSet, Split, open_source, take
from mte_bench.device import peak_memory
from mte_bench.encoders.checkpoint import Checkpoint, open_checkpoint
from mte_bench.encoders.encoder import Encoder, EncoderSpec, fresh_encoder
from mte_bench.encoders.weight_files import read_metadata, read_safetensors, write_safetensors
from mte_bench.errors import UserError
from mte_bench.files import hash_of
from mte_bench.records import Cost, Data, Metric, Record, Subject, make_record
from mte_bench.settings import override
from mte_bench.training.live import CURVES

MODEL_NAME = "model.safetensors"
MODEL_FORMAT = "mte-bench-dense/1"
SMOKE_IMAGES = {"train": 4, "val": 2}
CHANGEABLE = ("test", "labels")
"""Groups of settings that may be changed where a finished model is only evaluated."""

D = TypeVar("D", bound=DenseProtocol)
T = TypeVar("T", bound=Truth)


class Context(NamedTuple):
    """Where and how a finished model is evaluated."""

    folder: Path
    how: Pass
    process: tuple[int, int]
    """Rank and number of processes; each takes its share of the images."""
    shown: int
    """Images in the picture."""


class Outcome(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, Metric]
    details: dict[str, Any]
    files: dict[str, str]
    corrupt: list[str]
    """Images that could not be read and do not count."""


class DenseTask(NamedTuple, Generic[D, T]):
    """One dense task."""

    name: str
    package: openmmlab.Package
    protocol: type[D]
    default: str
    """The protocol that is used if none is named."""
    open: Callable[[D, str, Split, ImageSet], T]
    """The truth of the images of one split of a source."""
    config: Callable[[D, dict[str, Any], tuple[int, ...], int, EncoderSpec], dict[str, Any]]
    """The model's configuration, from a backbone's, the widths of its maps and the number of classes."""
    transforms: Callable[[D], list[dict[str, Any]]]
    evaluate: Callable[[Any, D, T, Context], Outcome]


@dataclass(frozen=True)
class Finished:
    """A trained model of a task, as a folder or file."""

    file: Path
    metadata: dict[str, str]

    def read(self, key: str) -> Any:
        """What the header holds under ``key``, decoded."""
        return json.loads(self.metadata[key])


def run_dense(
    task: DenseTask[D, T], request: Request, save_minutes: float, shown: int, process: tuple[int, int] = (0, 1)
) -> Record | None:
    """Train and evaluate as ``request`` asks, or only evaluate a finished model; returns the record, None for a dry run.

    ``shown`` images go into the picture. Of several processes the first returns the record and the others None. Raises
    ``UserError`` for everything that the user can mend.
    """
    began = time.monotonic()
    finished = find_finished(request.checkpoint, task.name)
    name, protocol = _protocol(task, request, finished)
    how = pass_of(request)
    wanted: tuple[Split, ...] = ("val",) if finished else SPLITS
    splits = {split: task.open(protocol, request.data, split, _images(request, split)) for split in wanted}
    train, val = splits.get("train"), splits["val"]
    checkpoint = _encoder(request, finished)
    folder = output_folder(request, task.name, name, protocol, checkpoint)
    fingerprint = hash_of([truth.fingerprint for truth in splits.values()])
    refuse_clash(folder, checkpoint.subject, val.images.source, fingerprint)
    classes = tuple(finished.read("classes")) if finished else val.classes
    for truth in splits.values():
        if truth.classes != classes:
            strange = sorted(set(truth.classes) ^ set(classes)) or ["their order"]
            raise UserError(f"{request.data}: {truth.images.split} has other classes than trained on ({', '.join(strange[:3])})")

    openmmlab.require(task.package)
    from downstream.dense.runner import Runner

    model = _model(task, protocol, checkpoint.encoder, len(classes))
    if request.dry_run:
        for truth in splits.values():
            truth.check(trained=truth is train)
        show_plan(_plan(task, name, protocol, model, train, val, checkpoint, folder, how, process), request.json)
        return None
    runner = None
    seconds = 0.0
    if finished:
        val.check(trained=False)
        _load(model, finished)
        model.to(how.device)
    else:
        assert train is not None
        identity = {
            "protocol": settings_of(protocol),
            "sha256": checkpoint.sha256,
            "data": fingerprint,
            "precision": str(how.precision).removeprefix("torch."),
            "processes": process[1],
        }
        transform = openmmlab.build_transforms(task.package, task.transforms(protocol))
        runner = Runner(
            protocol, model, train, transform, folder, how=how, identity=identity, save_minutes=save_minutes, process=process
        )
        if not runner.started:
            for truth in splits.values():
                truth.check(trained=truth is train)
        runner.run()
        seconds = runner.seconds
        model = runner.model
        if process[0] == 0:
            _save(folder / MODEL_NAME, model, task.name, name, protocol, checkpoint, classes)
    distributed.barrier()

    test_began = time.monotonic()
    model.eval()
    outcome = task.evaluate(model, protocol, val, Context(folder, how, process, shown))
    test_seconds = time.monotonic() - test_began
    if process[0]:
        return None
    record = make_record(
        task=task.name,
        protocol=records.Protocol(name=name, version=protocol.version, settings=settings_of(protocol)),
        subject=checkpoint.subject,
        data=Data(
            source=val.images.source,
            split="val",
            images={split: len(truth.images) for split, truth in splits.items()},
            classes=len(classes),
            fingerprint=fingerprint,
            subset=val.images.subset,
            corrupt=sorted({*(runner.corrupt if runner else ()), *outcome.corrupt}),
        ),
        metrics=outcome.metrics,
        cost=Cost(
            seconds=round(seconds + test_seconds if runner else time.monotonic() - began, 3),
            images_per_second=round(len(val.images) / test_seconds, 2),
            peak_memory_bytes=peak_memory(how.device),
        ),
        files={**outcome.files, **({"model": MODEL_NAME, "curves": CURVES} if runner else {})},
        details={
            **outcome.details,
            "trained": {
                "steps": runner.step,
                "epochs": round(runner.epoch, 3),
                "seconds": round(seconds, 1),
                "resumed": runner.resumed,
            }
            if runner
            else {"model": str(finished.file) if finished else ""},
            "test_seconds_per_image": round(test_seconds / len(val.images), 4),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "processes": process[1],
            "precision": str(how.precision).removeprefix("torch."),
            "versions": openmmlab.versions(task.package),
        },
    )
    path = records.write_record(folder, record)
    show_result(record, request.json)
    for key in ("picture", "predictions"):
        if key in outcome.files:
            log(f"{key}: {folder / outcome.files[key]}")
    log(f"record: {path}")
    return record


def find_finished(text: str, task: str) -> Finished | None:
    """The finished model that ``text`` (a folder or file) holds; None if it holds an encoder or nothing.

    Raises ``UserError`` if it is a model of another task.
    """
    path = Path(text)
    file = path / MODEL_NAME if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    metadata = read_metadata(file)
    if metadata.get("format") != MODEL_FORMAT:
        return None
    if metadata["task"] != task:
        raise UserError(f"{file}: a model of the task {metadata['task']}; evaluate it with `mte-bench {metadata['task']}`")
    return Finished(file, metadata)


def _protocol(task: DenseTask[D, T], request: Request, finished: Finished | None) -> tuple[str, D]:
    """Name and settings: as asked for; of a finished model its own, with the test of the protocol that is asked for."""
    if finished is None:
        name, protocol = load_protocol(task, request.protocol or task.default, request.set)
    else:
        name, values = finished.metadata["protocol"], finished.read("settings")
        if request.protocol:
            other, asked = load_protocol(task, request.protocol)
            name, values["test"] = f"{name}-tested-{other}", settings_of(asked)["test"]
        for assignment in request.set:
            if not assignment.startswith(tuple(f"{group}." for group in CHANGEABLE)):
                raise UserError(
                    f"--set {assignment}: the model is trained; only settings of {' and '.join(CHANGEABLE)} can change"
                )
        protocol = task.protocol.check(override({"task": task.name, **values}, list(request.set)), f"{finished.file}: settings")
    return name, protocol.for_smoke() if request.smoke else protocol


def _images(request: Request, split: Split) -> ImageSet:
    images = open_source(request.data, split)
    return take(images, "images", SMOKE_IMAGES[split]) if request.smoke else images


def _encoder(request: Request, finished: Finished | None) -> Checkpoint:
    """The encoder that is trained, or one of the kind that a finished model has in it."""
    if finished is None:
        return open_checkpoint(request.checkpoint, allow_partial=request.allow_partial)
    spec = EncoderSpec.check(finished.read("spec"), str(finished.file))
    subject = Subject.check(finished.read("subject"), str(finished.file))
    folder = Path(request.checkpoint) if Path(request.checkpoint).is_dir() else None
    return Checkpoint(fresh_encoder(spec), subject, folder)


def _model(task: DenseTask[D, T], protocol: D, encoder: Encoder, classes: int) -> Any:
    from downstream.dense.adapter import Backbone

    joining = {key: getattr(protocol.joining, key) for key in type(protocol.joining).model_fields}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(protocol.seed)
        backbone = Backbone(encoder, **joining)

        def given() -> Backbone:
            return backbone

        config = task.config(protocol, {"type": given}, backbone.widths, classes, encoder.spec)
        return openmmlab.build_model(task.package, config)


def _save(path: Path, model: Any, task: str, name: str, protocol: D, checkpoint: Checkpoint, classes: tuple[str, ...]) -> None:
    metadata = {
        "format": MODEL_FORMAT,
        "task": task,
        "protocol": name,
        "settings": {"version": protocol.version, **settings_of(protocol)},
        "classes": list(classes),
        "spec": checkpoint.encoder.spec.model_dump(mode="json"),
        "subject": checkpoint.subject.model_dump(mode="json"),
    }
    write_safetensors(path, model.state_dict(), metadata)


def _load(model: Any, finished: Finished) -> None:
    tensors, _ = read_safetensors(finished.file)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{finished.file}: does not fit its own settings ({reason}); is it of another version?") from error


def _plan(
    task: DenseTask[D, T],
    name: str,
    protocol: D,
    model: Any,
    train: T | None,
    val: T,
    checkpoint: Checkpoint,
    folder: Path,
    how: Pass,
    process: tuple[int, int],
) -> dict[str, Any]:
    """What would be done and, from one step measured on this machine, what it would take."""
    from downstream.dense.runner import Runner

    plan: dict[str, Any] = {
        "task": task.name,
        "protocol": name,
        "settings": settings_of(protocol),
        "out": str(folder),
        "encoder": f"{checkpoint.subject.checkpoint} ({checkpoint.encoder.spec.arch})",
        "images": {"val": len(val.images)} | ({"train": len(train.images)} if train else {}),
        "classes": len(val.classes),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if train is not None:
        transform = openmmlab.build_transforms(task.package, task.transforms(protocol))
        runner = Runner(protocol, model, train, transform, folder, how=how, identity={}, process=process)
        seconds = runner.seconds_per_step()
        plan |= {
            "steps": runner.total_steps,
            "seconds_per_step": float(f"{seconds:.3g}"),
            "train_seconds": float(f"{seconds * runner.total_steps:.3g}"),
            "peak_memory_bytes": peak_memory(how.device),
        }
    return plan
