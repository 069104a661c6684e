"""One evaluation before it is done: what will be measured, by which settings and on what. Commands do one, suites many."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from downstream.plan import Part
from mte_bench import __version__, records
from mte_bench.data.sources import ImageSet, open_source, take
from mte_bench.data.sources import Split as SplitName
from mte_bench.encoders.checkpoint import Checkpoint, open_checkpoint
from mte_bench.errors import UserError
from mte_bench.files import hash_of
from mte_bench.records import Record, Subject, read_record


class Opened:
    """Checkpoints and images, each opened once for all the jobs that are made with it."""

    def __init__(self) -> None:
        self._checkpoints: dict[tuple[str, bool, int | None], Checkpoint] = {}
        self._splits: dict[tuple[str, SplitName, int | None], ImageSet] = {}

    def checkpoint(self, text: str, *, allow_partial: bool = False, image_size: int | None = None) -> Checkpoint:
        """As ``open_checkpoint``."""
        key = text, allow_partial, image_size
        if key not in self._checkpoints:
            self._checkpoints[key] = open_checkpoint(text, allow_partial=allow_partial, image_size=image_size)
        return self._checkpoints[key]

    def split(self, source: str, split: SplitName, at_most: int | None = None) -> ImageSet:
        """As ``open_source``; of its images at most so many, balanced over the classes."""
        key = source, split, at_most
        if key not in self._splits:
            images = open_source(source, split)
            self._splits[key] = images if at_most is None else take(images, "images", at_most)
        return self._splits[key]

    def forget_checkpoints(self) -> None:
        """Let their memory go; the images stay."""
        self._checkpoints.clear()


class Wanted(NamedTuple):
    """Features that a job will ask for."""

    part: Part
    images: ImageSet
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One evaluation or analysis, resolved but not done."""

    task: str
    protocol: records.Protocol
    subject: Subject
    fingerprint: str
    """Of the data, as the record will state it."""
    precision: str
    """Of the encoder, as the record's details will state it."""
    folder: Path
    """Where the record and what belongs to it go."""
    wanted: tuple[Wanted, ...]
    plan: Callable[[], dict[str, Any]]
    """What would be done and would take: ``task_seconds`` and, beside them, ``feature_seconds`` where features are wanted."""
    run: Callable[[], Record | None]
    """Does it and writes ``folder``, the record last; under ``torchrun`` only the first process, the others return None.
    Raises ``UserError`` for everything that the user can mend."""

    @property
    def content(self) -> str:
        """A hash of all that decides what the record says: task and protocol, weights, data, precision and version."""
        return _content(self.task, self.protocol, self.subject, self.fingerprint, self.precision, __version__)

    def found(self) -> Record | None:
        """The record in ``folder`` if it is of this job and this version of the program, else None."""
        try:
            record = read_record(self.folder / records.RECORD_NAME)
        except UserError:
            return None
        version = record.environment.get("versions", {}).get("mte-bench")
        precision = record.details.get("precision")
        own = _content(record.task, record.protocol, record.subject, record.data.fingerprint, precision, version)
        return record if own == self.content else None


def _content(
    task: str, protocol: records.Protocol, subject: Subject, fingerprint: str, precision: str | None, version: str | None
) -> str:
    return hash_of([task, protocol.model_dump(mode="json"), subject.sha256, fingerprint, precision, version])
