"""How good each kind of token is along pre-training, for several runs side by side (MTE, Figs. 12 and 13).

k-NN and a linear probe (ridge) of the global token, of the auxiliary ones by kind and of all of these together, at every
snapshot that a run kept (``snapshot_every``) and at its end. Runs with and without distillation (``mte.target=each``) or with a
frozen auxiliary part (``mte.frozen``) show what the two kinds of token give each other. A plain encoder has its global token.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from downstream.analysis.lookup import GLOBAL, Classify, ProbesProtocol, TokenRidge, predictions, prepare_tokens
from downstream.analysis.study import Prepared, Resolved, Seen, look, plan_of, resolve
from downstream.analysis.tracks_picture import Track, draw_tracks
from downstream.evaluate import Request, carry_out, evaluation_transform, percentage, precision_name, subject_title
from downstream.folders import output_folder, refuse_clash, slug
from downstream.job import Job, Opened
from mte_bench import __version__, records
from mte_bench.console import log, show_json, show_table
from mte_bench.device import peak_memory
from mte_bench.encoders.checkpoint import Checkpoint, open_checkpoint
from mte_bench.encoders.snapshots import snapshots_of
from mte_bench.errors import UserError
from mte_bench.files import hash_of, sha256_file, write_json
from mte_bench.records import Cost, Data, Metric, Record, Subject, make_record

TOKENS = {
    GLOBAL: "global token",
    "mean_cls": "auxiliary CLS tokens, mean of them",
    "mean_pooled": "pooled tokens, mean of them",
    "all_auxiliary": "all auxiliary tokens, side by side",
}
"""What is followed along training, by its name in metrics."""


class Point(NamedTuple):
    """A state of a run that is measured."""

    epoch: float
    checkpoint: str


@dataclass(frozen=True)
class Run:
    """A run and the states of it that there are."""

    title: str
    subject: Subject
    points: tuple[Point, ...]


class Measured(NamedTuple):
    """What one state is worth; it is kept on disk, so that a stop loses no more than the state being measured."""

    data: Data
    metrics: dict[str, Metric]
    """``PROBE_TOKENS``, as far as the state has such tokens, and ``PROBE_NAME`` for each token by itself."""
    images_per_second: float


def prepare_own_tokens(protocol: ProbesProtocol, checkpoint: Checkpoint) -> Prepared:
    """The global and the auxiliary tokens, each ``b c``; of a plain encoder the global token alone."""
    prepared = prepare_tokens(protocol, checkpoint)
    if checkpoint.auxiliary is not None:
        return prepared
    return Prepared(prepared.model, lambda images: prepared.compute(images)[:1], prepared.names[:1])


def measure_tokens(protocol: ProbesProtocol, names: Sequence[str], seen: Seen) -> dict[str, Metric]:
    """Top-1 of each token and of each of ``TOKENS`` by both probes; a mean over tokens is one over images and tokens."""
    kinds = {"mean_cls": "CLS", "mean_pooled": "pooled"}
    members = {key: [i for i, name in enumerate(names) if name.startswith(kind)] for key, kind in kinds.items()}
    metrics: dict[str, Metric] = {}
    probes: dict[str, Classify] = {"knn": partial(predictions, protocol, seen), "linear": TokenRidge(protocol, seen).predictions}
    for probe, classify in probes.items():
        alone = np.stack([classify([place]) == seen.labels for place in range(len(names))])
        found = {GLOBAL: alone[0]} | {key: alone[places].mean(axis=0) for key, places in members.items() if places}
        if len(names) > 2:
            found["all_auxiliary"] = classify(range(1, len(names))) == seen.labels
        found |= {_key(name): hits for name, hits in zip(names[1:], alone[1:], strict=True)}
        metrics |= {f"{probe}_{key}": percentage(hits) for key, hits in found.items()}
    return metrics


@dataclass(frozen=True)
class TokenQuality:
    """The analysis, as commands and suites know it."""

    name: str = "token-quality"
    default: str = "token-quality"
    verb: str = "analyze token-quality"
    protocol: type[ProbesProtocol] = ProbesProtocol

    def job(self, request: Request, opened: Opened) -> Job:
        """What ``request`` asks for, ready to be done; its other checkpoints are further runs.

        Raises ``UserError`` for everything that the user can mend; writes nothing.
        """
        resolved = resolve(self, request, opened, labelled=True)
        runs = _runs((request.checkpoint, *request.others), request, opened)
        stated = resolved.stated
        first = opened.checkpoint(request.checkpoint, allow_partial=request.allow_partial)
        folder = output_folder(request, self.name, stated.name, resolved.protocol, first)
        subject = Subject.ensemble([run.subject for run in runs])
        states = sum(len(run.points) for run in runs)

        def planned() -> dict[str, Any]:
            checkpoint = _open(request.checkpoint, request, resolved)
            of_one = plan_of(
                resolved,
                prepare_own_tokens(resolved.protocol, checkpoint),
                evaluation_transform(checkpoint, resolved.protocol),
                checkpoint,
            )
            return {
                "task": self.name,
                "protocol": stated.name,
                "settings": stated.settings,
                "out": str(folder),
                **of_one,
                "encoder": " + ".join(run.subject.checkpoint for run in runs),
                "states": {run.title: ", ".join(f"{point.epoch:g}" for point in run.points) for run in runs},
                "task_seconds": round(states * of_one["task_seconds"], 1),
            }

        def run() -> Record:
            began = time.monotonic()
            refuse_clash(folder, self.name, subject, resolved.images.source, resolved.fingerprint)
            found = [(run, [_measured(run, point, request, resolved, folder) for point in run.points]) for run in runs]
            return _write(found, subject, resolved, folder, time.monotonic() - began)

        return Job(self.name, stated, subject, resolved.fingerprint, precision_name(resolved.how), folder, (), planned, run)


TOKEN_QUALITY = TokenQuality()


def token_quality(request: Request) -> Record | None:
    """Do what ``request`` asks for and show it; returns the record, None for a dry run."""
    return carry_out(TOKEN_QUALITY.job(request, Opened()), request, _show)


def _runs(texts: Sequence[str], request: Request, opened: Opened) -> list[Run]:
    runs: list[Run] = []
    for text in texts:
        checkpoint = opened.checkpoint(text, allow_partial=request.allow_partial)
        epochs = 0.0 if checkpoint.family == "random" else checkpoint.subject.epochs
        if epochs is None:
            raise UserError(f"{text}: after how many epochs it is, is not known; give run folders of `pretrain`")
        kept = {} if checkpoint.folder is None else snapshots_of(checkpoint.folder)
        points = [Point(epoch, str(folder)) for epoch, folder in kept.items() if epoch < epochs]
        if epochs and not points:
            log(f"{text}: kept no snapshots, so its end alone is measured; pre-train with --set snapshot_every=N for more")
        title = slug(text)
        if any(title == run.title for run in runs):
            title = f"{title} ({len(runs) + 1})"
        runs.append(Run(title, checkpoint.subject, (*points, Point(epochs, text))))
    return runs


def _open(text: str, request: Request, resolved: Resolved[ProbesProtocol]) -> Checkpoint:
    return open_checkpoint(text, allow_partial=request.allow_partial, image_size=resolved.protocol.image_size)


def _measured(run: Run, point: Point, request: Request, resolved: Resolved[ProbesProtocol], folder: Path) -> Measured:
    """What the state is worth: read from ``folder`` if this was measured before, else measured and put there."""
    checkpoint = _open(point.checkpoint, request, resolved)
    auxiliary = checkpoint.auxiliary and sha256_file(checkpoint.auxiliary)
    settings, how = resolved.stated.model_dump(mode="json"), precision_name(resolved.how)
    key = hash_of([checkpoint.sha256, auxiliary, settings, resolved.fingerprint, how, __version__])
    path = folder / "states" / f"{run.title}-epoch-{point.epoch:g}-{key}.json"
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: Metric.check(value, str(path)) for name, value in values["metrics"].items()}
        return Measured(Data.check(values["data"], str(path)), metrics, values["images_per_second"])
    prepared = prepare_own_tokens(resolved.protocol, checkpoint)
    looked = look(resolved, prepared, evaluation_transform(checkpoint, resolved.protocol), shown=0)
    metrics = measure_tokens(resolved.protocol, prepared.names, looked.seen)
    measured = Measured(looked.data(resolved), metrics, looked.images_per_second)
    dumped = {name: metric.model_dump(mode="json") for name, metric in metrics.items()}
    values = {"data": measured.data.model_dump(mode="json"), "metrics": dumped, "images_per_second": measured.images_per_second}
    write_json(path, values)
    log(f"{run.title}, epoch {point.epoch:g}: k-NN of the global token {metrics['knn_global'].value:.2f} %")
    return measured


def _write(
    found: Sequence[tuple[Run, list[Measured]]],
    subject: Subject,
    resolved: Resolved[ProbesProtocol],
    folder: Path,
    seconds: float,
) -> Record:
    """Picture, values and, last, the record; its metrics are those of each run's end."""
    some = found[0][1][-1]
    images = some.data.images["val"]
    tracks = {
        run.title: Track(
            tuple(point.epoch for point in run.points),
            {name: [state.metrics[name].value for state in states] for name in states[0].metrics},
        )
        for run, states in found
    }
    ends = [metric.ci95 for _, states in found for state in states for metric in state.metrics.values() if metric.ci95]
    files = {"picture": "token-quality.png", "values": "token-quality.json"}
    what = subject_title(found[0][0].subject, resolved.images.source, images)
    draw_tracks(
        folder / files["picture"],
        tracks,
        {"knn": "k-NN top-1 (%)", "linear": "linear probe top-1 (%)"},
        TOKENS,
        f"Tokens along pre-training\n{what if len(found) == 1 else what.partition(', ')[2]}; "
        f"95 % intervals at most ± {max((high - low) / 2 for low, high in ends):.1f} points",
    )
    values = {title: track._asdict() for title, track in tracks.items()}
    write_json(folder / files["values"], {"tokens": TOKENS, "runs": values})
    record = make_record(
        task="token-quality",
        protocol=resolved.stated,
        subject=subject,
        data=some.data,
        metrics={
            f"top1_{name}{f'_{run.title}' if len(found) > 1 else ''}": metric
            for run, states in found
            for name, metric in states[-1].metrics.items()
        },
        cost=Cost(
            seconds=round(seconds, 3),
            images_per_second=some.images_per_second,
            peak_memory_bytes=peak_memory(resolved.how.device),
        ),
        files=files,
        details={
            "metrics": "of the end of each run; a mean is over the tokens of a kind, all_auxiliary is all of them side by side",
            "runs": values,
            "precision": precision_name(resolved.how),
        },
    )
    records.write_record(folder, record)
    return record


def _key(name: str) -> str:
    return name.replace(" ", "_").lower()


def _show(record: Record, as_json: bool) -> None:
    if as_json:
        show_json(record)
        return
    rows: list[list[object]] = []
    for title, run in record.details["runs"].items():
        for key, name in TOKENS.items():
            if f"knn_{key}" in run["top1"]:
                ends = [run["top1"][f"{probe}_{key}"][place] for probe in ("knn", "linear") for place in (0, -1)]
                rows.append([title, name, f"{run['epochs'][0]:g} to {run['epochs'][-1]:g}", *ends])
    columns = ["run", "tokens", "epochs", "k-NN, first", "k-NN, last", "linear, first", "linear, last"]
    show_table(f"{record.protocol.name} on {record.data.source}: top-1 in percent", columns, rows)
