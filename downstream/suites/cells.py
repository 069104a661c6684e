"""Suites: a file of checkpoints and tasks, whose every pair is a cell that ends as one record.

    checkpoints:
      - runs/dino
      - {name: DINO+MTE, checkpoint: runs/dino-mte}
      - {name: both, checkpoint: [runs/dino, runs/dino-mte]}        # an ensemble: features side by side
    data: imagefolder:/data/imagenet
    tasks:
      - knn
      - {task: linear, protocol: fast, set: {epochs: 50}, metrics: [top1, top5]}
      - {task: retrieval, data: scenes}
      - {task: pooling, only: [DINO+MTE]}

Paths are relative to where the command is called. A task is whatever an entry point of the group ``mte_bench.tasks`` names
and has the attributes of ``Offer``; another package can add some. ``work`` does the cells.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, model_validator

from downstream.evaluate import Request, load_protocol
from downstream.folders import data_name, slug
from downstream.job import Job, Opened
from downstream.task import TaskProtocol
from mte_bench.data.sources import parse_source
from mte_bench.errors import UserError, did_you_mean
from mte_bench.files import hash_of
from mte_bench.settings import Settings, load_yaml

GROUP = "mte_bench.tasks"
SUITES = Path(__file__).parent


class Offer(Protocol):
    """What a suite needs to know of a task."""

    @property
    def name(self) -> str:
        """The task's name in protocol files and records."""

    @property
    def default(self) -> str:
        """The protocol that is used if none is named."""

    @property
    def verb(self) -> str:
        """Its command, such as ``analyze cka``."""

    @property
    def protocol(self) -> type[TaskProtocol]:
        """The class of its settings."""

    def job(self, request: Request, opened: Opened) -> Job:
        """What ``request`` asks for, ready to be done."""


def _short_form(key: str, values: Any) -> Any:
    return {key: values} if isinstance(values, str) else values


class CheckpointEntry(Settings):
    """A checkpoint as commands take it, or just that text."""

    checkpoint: str | tuple[str, ...] = Field(min_length=1)
    """Several are an ensemble."""
    name: str | None = None
    """In the table and of the folder; by default made of the checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: Any) -> Any:
        return _short_form("checkpoint", values)

    @property
    def parts(self) -> tuple[str, ...]:
        """The checkpoints."""
        return (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint

    @property
    def title(self) -> str:
        """The name in the table."""
        return self.name or "+".join(map(slug, self.parts))


class TaskEntry(Settings):
    """A task, or just its name."""

    task: str
    protocol: str | None = None
    """By default the task's own."""
    data: str | None = None
    """A source; by default the suite's."""
    set: dict[str, Any] = {}
    """Settings of the protocol that are changed."""
    metrics: tuple[str, ...] = ()
    """In the table; by default the first of the record. The record has all of them."""
    only: tuple[str, ...] = ()
    """Names of the checkpoints that it is for, such as those with auxiliary tokens; by default all."""
    name: str | None = None
    """In the table and of the folder; by default made of protocol, data and a hash of what is set, as far as is needed."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: Any) -> Any:
        return _short_form("task", values)


class Suite(Settings):
    """Checkpoints x tasks."""

    checkpoints: tuple[CheckpointEntry, ...] = ()
    tasks: tuple[TaskEntry, ...] = Field(min_length=1)
    data: str | None = None


@dataclass(frozen=True)
class Cell:
    """One task on one checkpoint."""

    checkpoint: str
    """Its name in the table."""
    task: str
    """Its name in the table."""
    metrics: tuple[str, ...]
    offer: Offer
    request: Request
    """``out`` is the cell's folder."""

    @property
    def folder(self) -> Path:
        """Where its record goes."""
        return Path(str(self.request.out))

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.checkpoint}, {self.task}"

    @property
    def words(self) -> list[str]:
        """The command that does this cell alone. The cache is left out: it changes nothing."""
        request, words = self.request, [*self.offer.verb.split(), self.request.checkpoint]
        for field in fields(request):
            value = getattr(request, field.name)
            if field.name in ("checkpoint", "cache", "json", "dry_run") or value == field.default:
                continue
            option = "--with" if field.name == "others" else f"--{field.name.replace('_', '-')}"
            values = value if isinstance(value, tuple) else (value,)
            words += [option] if value is True else [word for one in values for word in (option, str(one))]
        return words


def load_suite(name: str, checkpoints: Sequence[str] = (), data: str | None = None) -> Suite:
    """The suite ``name`` (of the program's own, or a path to a YAML file), with other checkpoints or data where given.

    Raises ``UserError`` for an unknown or incomplete one.
    """
    values = load_yaml(name, SUITES, "suite")
    given: dict[str, Any] = {"checkpoints": list(checkpoints)} if checkpoints else {}
    suite = Suite.check({**values, **given, **({"data": data} if data else {})}, f"suite {name}")
    if not suite.checkpoints:
        raise UserError(f"suite {name}: lists no checkpoints; name some: mte-bench run {name} CKPT ...")
    return suite


def cells_of(suite: Suite, name: str, out: Path, options: Mapping[str, Any]) -> list[Cell]:
    """Every cell of the suite ``name``, checkpoint by checkpoint, its folder below ``out``; nothing is opened.

    ``options`` are further fields of ``Request`` that all cells share. Raises ``UserError`` for unknown tasks, protocols,
    settings and kinds of sources, and for two checkpoints or tasks of the same name.
    """
    tasks = [_resolved(entry, suite, f"suite {name}: tasks.{index}") for index, entry in enumerate(suite.tasks)]
    _refuse_twice([slug(entry.title) for entry in suite.checkpoints], f"suite {name}: checkpoints")
    _refuse_twice([folder for _, folder, _ in tasks], f"suite {name}: tasks")
    names = [entry.title for entry in suite.checkpoints]
    for index, entry in enumerate(suite.tasks):
        for unknown in set(entry.only) - set(names):
            raise UserError(f"suite {name}: tasks.{index}.only: no checkpoint is named '{unknown}'{did_you_mean(unknown, names)}")
    short = [
        entry.name or _protocol_title(offer, values["protocol"])
        for (offer, _, values), entry in zip(tasks, suite.tasks, strict=True)
    ]
    titles = [title if short.count(title) == 1 else folder for title, (_, folder, _) in zip(short, tasks, strict=True)]
    cells = []
    for checkpoint in suite.checkpoints:
        first, *others = checkpoint.parts
        for (offer, folder, values), entry, title in zip(tasks, suite.tasks, titles, strict=True):
            if entry.only and checkpoint.title not in entry.only:
                continue
            place = out / slug(checkpoint.title) / folder
            request = Request(**options, **values, checkpoint=first, others=tuple(others), out=str(place))
            cells.append(Cell(checkpoint.title, title, entry.metrics, offer, request))
    return cells


def offered(name: str) -> Offer:
    """The task ``name``; raises ``UserError`` if no package offers it or it cannot be imported."""
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in entries:
        raise UserError(f"there is no task '{name}'{did_you_mean(name, entries)}")
    try:
        offer: Offer = entries[name].load()
    except Exception as error:
        raise UserError(f"task '{name}' cannot be imported ({error}); mend or remove {entries[name].value}") from error
    return offer


def _resolved(entry: TaskEntry, suite: Suite, where: str) -> tuple[Offer, str, dict[str, Any]]:
    """The task of ``entry``, the name of its folder, and what it puts into a request."""
    try:
        offer = offered(entry.task)
        data = entry.data or suite.data
        if data is None:
            raise UserError("has no data; give the suite or the task a source, or name one by --data")
        parse_source(data)
        protocol = entry.protocol or offer.default
        assignments = tuple(f"{key}={json.dumps(value)}" for key, value in entry.set.items())
        load_protocol(offer, protocol, assignments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    parts = [_protocol_title(offer, protocol), data_name(data), *([hash_of(assignments)[:6]] if assignments else [])]
    folder = slug(entry.name) if entry.name else "-".join(parts)
    return offer, folder, {"protocol": protocol, "data": data, "set": assignments}


def _protocol_title(offer: Offer, protocol: str) -> str:
    name = slug(protocol)
    return name if name.startswith(offer.name) else f"{offer.name}-{name}"


def _refuse_twice(names: list[str], where: str) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(f"{where}: '{twice[0]}' is there twice; give one of them another name: {{name: ...}}")
