"""What all evaluations share: from a checkpoint, a source and a protocol to a record with its predictions.

A task is a class of settings, whose values its protocol files state, and a function from the features of two splits to
predictions. The rest is done here: ``prepare`` resolves what was asked, and its job extracts the features, puts intervals
to the numbers and writes the output folder, ``record.json`` last.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from downstream.features import FeatureDtype, Features, Pass, extract
from downstream.folders import output_folder, refuse_clash
from downstream.job import Job, Opened, Wanted
from downstream.plan import Part, plan, show_plan
from downstream.task import I_co, ImageProtocol, Material, P, Split, Task, TaskProtocol, WithProtocol
from mte_bench import records
from mte_bench.console import log, show_json, show_table
from mte_bench.data.sources import SPLITS, ImageSet, Subset, require_classes
from mte_bench.data.sources import Split as SplitName
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.device import Place, peak_memory, pick_device, pick_precision
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.errors import UserError, did_you_mean
from mte_bench.files import atomic, hash_of
from mte_bench.knn_bank import normalise
from mte_bench.naming import architecture_title, data_title, method_title
from mte_bench.records import Cost, Data, Metric, Record, Subject, make_record
from mte_bench.settings import load_yaml, names_in, override
from mte_bench.statistics import bootstrap_ci

PROTOCOLS = Path(__file__).parent / "protocols"
SMOKE_BATCHES = 2
BATCH, CUDA_BATCH = 64, 256
MOST_WORKERS = 16


@dataclass(frozen=True)
class Request:
    """One evaluation as asked for on the command line; the options' help explains the fields."""

    checkpoint: str
    data: str
    protocol: str
    others: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    out: str | None = None
    device: str = "auto"
    precision: str = "auto"
    feature_dtype: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    cache: str | None = None
    allow_corrupt: int = 0
    allow_partial: bool = False
    json: bool = False
    dry_run: bool = False
    smoke: bool = False


def load_protocol(task: WithProtocol[I_co], name: str, assignments: tuple[str, ...] = ()) -> tuple[str, I_co]:
    """The full name and the settings of protocol ``name`` (``linear-fast``, short ``fast``; or a YAML path) with overrides."""
    known = names_in(PROTOCOLS)
    if f"{task.name}-{name}" in known:
        name = f"{task.name}-{name}"
    if name not in known and not name.endswith((".yaml", ".yml")):
        raise UserError(f"no protocol named '{name}'{_own_protocols(task, name)}")
    values = load_yaml(name, PROTOCOLS, "protocol")
    if values.get("task") != task.name:
        raise UserError(f"protocol '{name}' is for task '{values.get('task')}', not '{task.name}'{_own_protocols(task, name)}")
    for assignment in assignments:
        if (key := assignment.partition("=")[0]) in ("task", "version"):
            raise UserError(f"--set {assignment}: a protocol's {key} says what its numbers are; leave it out")
    return Path(name).stem, task.protocol.check(override(values, list(assignments)), f"protocol {name}")


def _own_protocols(task: WithProtocol[I_co], name: str) -> str:
    """The protocol of ``task`` that ``name`` may have meant, or all of them, by their short names."""
    own = [known for known in names_in(PROTOCOLS) if load_yaml(known, PROTOCOLS, "protocol").get("task") == task.name]
    return did_you_mean(name.removeprefix(f"{task.name}-"), [known.removeprefix(f"{task.name}-") for known in own])


def evaluate(task: Task[P], request: Request) -> Record | None:
    """Do what ``request`` asks of ``task`` and show the result; returns the record, or None for a dry run.

    Processes under ``torchrun`` share the extraction of features and training on augmented views; the first one does the rest,
    the others return None.
    Raises ``UserError`` for everything that the user can mend.
    """
    return carry_out(prepare(task, request, Opened()), request, show_result)


def carry_out(job: Job, request: Request, show: Callable[[Record, bool], None]) -> Record | None:
    """Do ``job`` and ``show`` its record, or show its plan.

    Returns the record; None for a dry run, and in a process of several that does not write it.
    """
    if request.dry_run:
        if Place.of_this_process().rank == 0:
            show_plan(job.plan(), request.json)
        return None
    record = job.run()
    if record is None:
        return None
    show(record, request.json)
    for file in record.files:
        log(f"{file}: {job.folder / record.files[file]}")
    log(f"record: {job.folder / records.RECORD_NAME}")
    return record


def prepare(task: Task[P], request: Request, opened: Opened) -> Job:
    """What ``request`` asks of ``task``, ready to be done. Raises ``UserError`` as ``evaluate`` does; writes nothing."""
    name, protocol = load_protocol(task, request.protocol, request.set)
    protocol = protocol.for_smoke() if request.smoke else protocol
    how = pass_of(request)
    train, val = (open_split(request, split, opened) for split in SPLITS)
    require_labels(train, val)
    protocol.require_images(len(train))
    parts = []
    for text in (request.checkpoint, *request.others):
        checkpoint = opened.checkpoint(text, allow_partial=request.allow_partial, image_size=protocol.image_size)
        parts.append(Part(checkpoint, evaluation_transform(checkpoint, protocol)))
    if protocol.views and request.others:
        raise UserError(f"--with: protocol {name} trains on augmented views of one encoder; choose one on kept features")
    folder = output_folder(request, task.name, name, protocol, parts[0].checkpoint)
    stated = records.Protocol(name=name, version=protocol.version, settings=settings_of(protocol))
    subject = Subject.ensemble([part.checkpoint.subject for part in parts])
    fingerprint = hash_of([train.fingerprint, val.fingerprint])

    def planned() -> dict[str, Any]:
        resolved = {"task": task.name, "protocol": name, "settings": stated.settings, "out": str(folder)}
        return resolved | plan(task, protocol, parts, train, val, how)

    def run() -> Record | None:
        began = time.monotonic()
        refuse_clash(folder, task.name, subject, val.source, fingerprint)
        found = [_features(part, train, val, protocol, how) for part in parts]
        readable = [_kept(images, features) for images, features in zip((train, val), found[0], strict=True)]
        splits = _splits(parts, found, protocol, readable)
        bank, asked = next(iter(splits.values()))
        if task.evaluate_on_views is not None and protocol.views:
            identity = hash_of([subject.sha256, fingerprint, precision_name(how), len(readable[0])])
            encoder, transform = parts[0].checkpoint.encoder, parts[0].transform
            material = Material(encoder, readable[0], transform, how, splits, folder, identity)
            outcome = task.evaluate_on_views(protocol, material)
            if how.rank > 0:
                return None
        elif how.rank > 0:
            return None  # its share of the features is all that is wanted of it
        elif task.evaluate_kinds is not None and len(splits) > 1:
            outcome = task.evaluate_kinds(protocol, splits, how.device)
        else:
            outcome = task.evaluate(protocol, bank, asked, how.device)
        predictions = {f"prediction:{metric}": result.predicted for metric, result in outcome.metrics.items()}
        write_predictions(folder, readable[1], predictions | dict(outcome.columns))
        files = {}
        if outcome.draw is not None:
            files["picture"] = f"{task.name}.png"
            title = subject_title(subject, val.source, len(asked.labels))
            outcome.draw(folder / files["picture"], parts[0].transform, title)
        record = make_record(
            task=task.name,
            protocol=stated,
            subject=subject,
            data=Data(
                source=val.source,
                split="val",
                images={"train": len(bank.labels), "val": len(asked.labels)},
                classes=len(train.classes),
                fingerprint=fingerprint,
                subset=", ".join(dict.fromkeys(images.subset for images in (train, val) if images.subset)) or None,
                corrupt=[name for features in found[0] for name in features.corrupt],
            ),
            metrics={
                **{metric: percentage(values) for metric, values in outcome.scores.items()},
                **{metric: percentage(result.correct) for metric, result in outcome.metrics.items()},
            },
            cost=_cost(began, [features for both in found for features in both], how.device),
            predictions=records.PREDICTIONS_NAME,
            files=files,
            details={
                **outcome.details,
                "transform": _single([part.transform.model_dump(mode="json") for part in parts]),
                "precision": precision_name(how),
                "features_cached": _single([[features.cached for features in both] for both in found]),
                "data_wait": _single([[round(features.waiting, 3) for features in both] for both in found]),
            },
        )
        records.write_record(folder, record)
        if outcome.recorded is not None:
            outcome.recorded()
        return record

    wanted = tuple(Wanted(part, images, protocol.kinds(part.checkpoint.encoder)) for part in parts for images in (train, val))
    return Job(task.name, stated, subject, fingerprint, precision_name(how), folder, wanted, planned, run)


def _features(part: Part, train: ImageSet, val: ImageSet, protocol: P, how: Pass) -> list[Features]:
    encoder, weights = part.checkpoint.encoder, part.checkpoint.sha256
    return [extract(encoder, weights, images, part.transform, protocol.kinds(encoder), how) for images in (train, val)]


def _splits(
    parts: list[Part], found: list[list[Features]], protocol: P, images: Sequence[ImageSet]
) -> dict[str, tuple[Split, Split]]:
    """Train and val by kind of feature; what the encoders of an ensemble take for it may differ."""
    kinds = [protocol.kinds(part.checkpoint.encoder) for part in parts]

    def split(place: int, number: int) -> Split:
        arrays = [both[place].arrays[own[number]] for both, own in zip(found, kinds, strict=True)]
        return Split(joined(arrays), images[place].labels, images[place].classes, images[place])

    return {kind: (split(0, number), split(1, number)) for number, kind in enumerate(kinds[0])}


def _kept(images: ImageSet, features: Features) -> ImageSet:
    """The images that have features."""
    require_readable(images, len(features.kept))
    return Subset(images, features.kept, "decodable") if features.corrupt else images


def joined(features: Sequence[NDArray[np.floating]]) -> NDArray[np.floating]:
    """The features of an ensemble (MTE, Table 4): each encoder's (``n c``) at unit length, side by side.

    Those of a single encoder stay as they are.
    """
    if len(features) == 1:
        return features[0]
    return np.concatenate([normalise(torch.from_numpy(np.array(part))).numpy() for part in features], axis=1)


def _single(values: list[Any]) -> Any:
    """One encoder's value by itself, an ensemble's as a list."""
    return values[0] if len(values) == 1 else values


def percentage(values: NDArray[Any]) -> Metric:
    """The mean of ``values`` (``n``, right or wrong, or from 0 to 1) in percent, with its interval over images."""
    low, high = bootstrap_ci(values)
    return Metric(value=100 * float(values.mean()), ci95=(100 * low, 100 * high), n=len(values))


def write_predictions(folder: Path, images: ImageSet, columns: dict[str, Any]) -> None:
    """Write ``predictions.parquet``: a row per image with name, label and the task's ``columns``.

    A prediction (column ``prediction:<metric>``) counts as right where it equals the label; -1 is no class. The file's
    metadata holds the class names.
    """
    import pyarrow
    import pyarrow.parquet

    named = {"name": [images.name(index) for index in range(len(images))], "label": images.labels}
    classes = json.dumps(images.classes, ensure_ascii=False)
    table = pyarrow.table(named | columns).replace_schema_metadata({"classes": classes})
    with atomic(folder / records.PREDICTIONS_NAME) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def show_result(record: Record, as_json: bool) -> None:
    """The record's metrics as a short table on stdout (accuracies in percent), or all of it as JSON."""
    if as_json:
        show_json(record)
        return
    rows = []
    for name, metric in record.metrics.items():
        interval = None if metric.ci95 is None else f"{metric.ci95[0]:.2f} to {metric.ci95[1]:.2f}"
        rows.append([name, metric.value, interval, metric.n])
    title = f"{record.protocol.name} of {record.subject.checkpoint} on {record.data.source}"
    show_table(title, ["metric", "value", "95 % interval", "n"], rows)


def pass_of(request: Request) -> Pass:
    """How ``request`` has the encoder go over the images."""
    place = Place.of_this_process()
    device = place.own(pick_device(request.device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // place.local_processes)
    if request.feature_dtype not in (known := get_args(FeatureDtype)):
        raise UserError(f"--feature-dtype {request.feature_dtype}: unknown{did_you_mean(request.feature_dtype, known)}")
    return Pass(
        device=device,
        precision=pick_precision(request.precision, device),
        batch_size=request.batch_size or (CUDA_BATCH if device.type == "cuda" and not request.smoke else BATCH),
        # On an accelerator all cores decode; on a CPU, where the encoder wants them, half of them.
        workers=min(cores if device.type == "cuda" else cores // 2, MOST_WORKERS) if request.workers is None else request.workers,
        allow_corrupt=request.allow_corrupt,
        cache=None if request.cache is None else Path(request.cache),
        feature_dtype=cast(FeatureDtype, request.feature_dtype),
        rank=place.rank,
        processes=place.processes,
    )


def open_split(request: Request, split: SplitName, opened: Opened) -> ImageSet:
    """The images of one split, for a smoke run two batches of them."""
    return opened.split(request.data, split, SMOKE_BATCHES * (request.batch_size or BATCH) if request.smoke else None)


def require_labels(*splits: ImageSet) -> None:
    """Raise ``UserError`` unless all images are labelled, with the same classes in all splits and two of them at least."""
    for images in splits:
        require_classes(images)
        if unlabelled := int((images.labels < 0).sum()):
            raise UserError(f"{images.source}: {unlabelled} images of {images.split} have no label; remove or label them")
    train, val = splits[0], splits[-1]
    if train.classes != val.classes:
        strange = sorted(set(train.classes) ^ set(val.classes)) or ["their order"]
        raise UserError(f"{val.source}: train and val do not list the same classes ({', '.join(strange[:3])})")


def require_readable(images: ImageSet, readable: int) -> None:
    """Raise ``UserError`` if none of ``images`` could be read, however many may be left out."""
    if not readable:
        raise UserError(f"{images.source}: not one of its {len(images)} images of {images.split} can be read")


def evaluation_transform(checkpoint: Checkpoint, protocol: ImageProtocol) -> EvaluationTransform:
    """How the images come to the encoder of ``checkpoint``."""
    spec = checkpoint.encoder.spec
    transform = EvaluationTransform.for_size(spec.side, spec.mean, spec.std)
    stated = {key: getattr(protocol, key, None) for key in ("resize", "interpolation", "decode")}
    changes = {key: value for key, value in stated.items() if value is not None}
    return EvaluationTransform.check({**transform.model_dump(), **changes}, f"protocol: {', '.join(changes)}")


def _cost(began: float, found: list[Features], device: torch.device) -> Cost:
    images, seconds = sum(len(f.kept) + len(f.corrupt) for f in found), sum(f.seconds for f in found)
    return Cost(
        seconds=round(time.monotonic() - began, 3),
        images_per_second=round(images / seconds, 1) if seconds else None,
        peak_memory_bytes=peak_memory(device),
    )


def precision_name(how: Pass) -> str:
    """The encoder's precision as records state it, and the features' type where that is not the usual one."""
    name, kept = str(how.precision).removeprefix("torch."), np.dtype(how.dtype).name
    return name if how.dtype == how._replace(feature_dtype="auto").dtype else f"{name}, features {kept}"


def subject_title(subject: Subject, source: str, count: int) -> str:
    """Two lines for a picture: the encoder as tables call it, with the length and seed of its pre-training; the images."""
    epochs = "" if subject.epochs is None else f", {subject.epochs:g} epochs"
    seed = "" if subject.seed is None else f", seed {subject.seed}"
    encoder = f"{method_title(subject)}, {architecture_title(subject)}{epochs}{seed}"
    return f"{encoder}\n{count:,} images of the val split of {data_title(source)}"


def settings_of(protocol: TaskProtocol) -> dict[str, Any]:
    """The settings as they go into a record."""
    return protocol.model_dump(mode="json", exclude={"task", "version"})
