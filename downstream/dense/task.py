"""What both dense tasks share: from a checkpoint, a source and a protocol to a trained model and its record.

A task is a class of settings and four functions: what is read, which model and transforms there are, what is measured and
what a picture shows. ``run_dense`` does the rest. A CKPT that is a finished model of the task is only evaluated.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch

from downstream.dense import openmmlab
from downstream.dense.batches import Truth
from downstream.dense.protocol import DenseProtocol
from downstream.evaluate import Request, carry_out, load_protocol, pass_of, precision_name, settings_of, show_result
from downstream.features import Pass
from downstream.folders import output_folder, refuse_clash
from downstream.job import Job, Opened
from mte_bench import distributed, records
from mte_bench.data.sources import SPLITS, ImageSet, Split, parse_source
from mte_bench.dense.resampling import IMAGES_NAME
from mte_bench.device import peak_memory
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.encoders.encoder import Encoder, EncoderSpec
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.encoders.weight_files import read_metadata, read_safetensors, write_safetensors
from mte_bench.errors import UserError
from mte_bench.files import hash_of, sha256_file
from mte_bench.records import Cost, Data, Metric, Record, Subject, make_record
from mte_bench.settings import override
from mte_bench.training.live import CURVES

if TYPE_CHECKING:
    from downstream.dense.runner import Runner

MODEL_NAME = "model.safetensors"
MODEL_FORMAT = "mte-bench-dense/1"
SMOKE_IMAGES: dict[Split, int] = {"train": 4, "val": 2}
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
    """What an evaluation found; it has written ``images.parquet``."""

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

    @property
    def verb(self) -> str:
        """Its command."""
        return self.name

    def job(self, request: Request, opened: Opened) -> Job:
        """What ``request`` asks for, ready to be done by this process."""
        return prepare(self, request, opened)


@dataclass(frozen=True)
class Finished:
    """A trained model of a task, as a folder or file."""

    file: Path
    metadata: dict[str, str]

    def read(self, key: str) -> Any:
        """What the header holds under ``key``, decoded."""
        return json.loads(self.metadata[key])

    @property
    def summary(self) -> dict[str, str]:
        """Which model it is, for the record."""
        return {"model": str(self.file), "sha256": sha256_file(self.file)}


def run_dense(task: DenseTask[D, T], request: Request, save_minutes: float, shown: int) -> Record | None:
    """Train and evaluate as ``request`` asks, or only evaluate a finished model; returns the record, None for a dry run.

    ``shown`` images go into the picture. Processes under ``torchrun`` train and evaluate together; the first returns the record
    and shows it, the others return None. Raises ``UserError`` for everything that the user can mend.
    """
    process = distributed.start(request.device)
    try:
        return carry_out(prepare(task, request, Opened(), save_minutes, shown, process), request, show_result)
    finally:
        distributed.stop()


def prepare(
    task: DenseTask[D, T],
    request: Request,
    opened: Opened,
    save_minutes: float = 10.0,
    shown: int = 4,
    process: tuple[int, int] = (0, 1),
) -> Job:
    """What ``request`` asks of ``task``, ready to be done. Raises ``UserError`` as ``run_dense`` does; writes nothing."""
    if request.others:
        raise UserError(f"{task.name} trains one encoder, not {1 + len(request.others)} together; leave the others out")
    if parse_source(request.data).kind != task.name:
        raise UserError(
            f"--data {request.data}: {task.name} needs the truth in the layout of {task.name}:PATH; see docs/dense.md"
        )
    finished = find_finished(request.checkpoint, task.name)
    name, protocol = _protocol(task, request, finished)
    how = pass_of(request)
    wanted: tuple[Split, ...] = ("val",) if finished else SPLITS
    at_most = SMOKE_IMAGES if request.smoke else {}
    images = {split: opened.split(request.data, split, at_most.get(split)) for split in wanted}
    splits = {split: task.open(protocol, request.data, split, images[split]) for split in wanted}
    train, val = splits.get("train"), splits["val"]
    checkpoint = _encoder(request, opened, finished)
    folder = output_folder(request, task.name, name, protocol, checkpoint)
    stated = records.Protocol(name=name, version=protocol.version, settings=settings_of(protocol))
    fingerprint = hash_of([truth.fingerprint for truth in splits.values()])
    classes = tuple(finished.read("classes")) if finished else val.classes
    for truth in splits.values():
        if truth.classes != classes:
            strange = sorted(set(truth.classes) ^ set(classes)) or ["their order"]
            than = "the model was trained on" if finished else f"{val.images.split} has"
            raise UserError(f"{request.data}: {truth.images.split} has other classes than {than} ({', '.join(strange[:3])})")
    openmmlab.require(task.package)

    def model() -> Any:
        return _model(task, protocol, checkpoint.encoder, len(classes))

    def runner() -> "Runner":
        from downstream.dense.runner import Runner

        assert train is not None
        identity = {
            "task": task.name,
            "protocol": stated.settings,
            "encoder": checkpoint.sha256,
            "data": fingerprint,
            "precision": precision_name(how),
            "processes": process[1],
        }
        transform = openmmlab.build_transforms(task.package, task.transforms(protocol))
        return Runner(
            protocol, model(), train, transform, folder, how=how, identity=identity, save_minutes=save_minutes, process=process
        )

    def check() -> None:
        for truth in splits.values():
            truth.check(trained=truth is train)

    def planned() -> dict[str, Any]:
        check()
        resolved: dict[str, Any] = {"task": task.name, "protocol": name, "settings": stated.settings, "out": str(folder)}
        resolved |= {"encoder": f"{checkpoint.subject.checkpoint} ({checkpoint.encoder.spec.arch})", "classes": len(classes)}
        resolved["images"] = {split: len(truth.images) for split, truth in splits.items()}
        return resolved | _estimate(runner() if train else None, model())

    def run() -> Record | None:
        began = time.monotonic()
        refuse_clash(folder, task.name, checkpoint.subject, val.images.source, fingerprint)
        trained = None
        if finished:
            check()
            tested = _load(model(), finished).to(how.device)
        else:
            trained = runner()
            if not trained.started:
                check()
            if not trained.train() and (folder / records.RECORD_NAME).exists():
                return records.read_record(folder / records.RECORD_NAME) if process[0] == 0 else None
            tested = trained.model
            if process[0] == 0:
                _save(folder / MODEL_NAME, tested, task.name, stated, checkpoint, classes)
        test_began = time.monotonic()
        tested.eval()
        outcome = task.evaluate(tested, protocol, val, Context(folder, how, process, shown))
        if process[0]:
            return None
        seconds = time.monotonic() - test_began
        record = make_record(
            task=task.name,
            protocol=stated,
            subject=checkpoint.subject,
            data=Data(
                source=val.images.source,
                split="val",
                images={split: len(truth.images) for split, truth in splits.items()},
                classes=len(classes),
                fingerprint=fingerprint,
                subset=val.images.subset,
                corrupt=sorted({*(trained.corrupt if trained else ()), *outcome.corrupt}),
            ),
            metrics=outcome.metrics,
            cost=Cost(
                seconds=round(trained.seconds + seconds if trained else time.monotonic() - began, 3),
                images_per_second=round(len(val.images) / seconds, 2),
                peak_memory_bytes=peak_memory(how.device),
            ),
            predictions=IMAGES_NAME,
            files={**outcome.files, **({"model": MODEL_NAME, "curves": CURVES} if trained else {})},
            details={
                **outcome.details,
                "trained": trained.summary if trained else finished.summary if finished else None,
                "test_seconds_per_image": round(seconds / len(val.images), 4),
                "parameters": sum(parameter.numel() for parameter in tested.parameters()),
                "processes": process[1],
                "precision": precision_name(how),
                "versions": openmmlab.versions(task.package),
            },
        )
        records.write_record(folder, record)
        return record

    return Job(task.name, stated, checkpoint.subject, fingerprint, precision_name(how), folder, (), planned, run)


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
            name, values["test"] = name if other == name else f"{name}-tested-{other}", settings_of(asked)["test"]
        for assignment in request.set:
            if not assignment.startswith(tuple(f"{group}." for group in CHANGEABLE)):
                raise UserError(
                    f"--set {assignment}: the model is trained; only settings of {' and '.join(CHANGEABLE)} can change"
                )
        protocol = task.protocol.check(override({"task": task.name, **values}, list(request.set)), f"{finished.file}: settings")
    return name, protocol.for_smoke() if request.smoke else protocol


def _encoder(request: Request, opened: Opened, finished: Finished | None) -> Checkpoint:
    """The encoder that is trained, or one of the kind that a finished model has in it."""
    if finished is None:
        return opened.checkpoint(request.checkpoint, allow_partial=request.allow_partial)
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


def _save(path: Path, model: Any, task: str, stated: records.Protocol, checkpoint: Checkpoint, classes: tuple[str, ...]) -> None:
    metadata = {
        "format": MODEL_FORMAT,
        "task": task,
        "protocol": stated.name,
        "settings": {"version": stated.version, **stated.settings},
        "classes": list(classes),
        "spec": checkpoint.encoder.spec.model_dump(mode="json"),
        "subject": checkpoint.subject.model_dump(mode="json"),
    }
    write_safetensors(path, model.state_dict(), metadata)


def _load(model: Any, finished: Finished) -> Any:
    tensors, _ = read_safetensors(finished.file)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{finished.file}: does not fit its own settings ({reason}); is it of another version?") from error
    return model


def _estimate(runner: "Runner | None", model: Any) -> dict[str, Any]:
    """What it would take, from two steps measured on this machine; ``runner`` is None where nothing is trained."""
    parameters = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if runner is None:
        return parameters | {"task_seconds": None}
    seconds = runner.seconds_per_step()
    return parameters | {
        "steps": runner.total_steps,
        "seconds_per_step": float(f"{seconds:.3g}"),
        "task_seconds": float(f"{seconds * runner.total_steps:.3g}"),
        "task_memory_bytes": peak_memory(runner.how.device),
    }
