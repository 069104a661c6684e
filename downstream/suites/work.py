"""The cells of a suite done by any number of processes, on one machine or several that share a file system.

Each process goes through the cells and takes those that no other holds: a lock in the cell's folder, which ends with the
process however that ends. A cell is done when its record says what the cell would say (``Job.content``), whoever made it.
So the same command again goes on after a kill, and twice at once is no mistake. What one cell's features have in common
with the others' of its checkpoint comes from one pass over the images.
"""

import fcntl
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from downstream.evaluate import pass_of
from downstream.feature_kinds import kind_of
from downstream.features import extract
from downstream.job import Job, Opened, Wanted
from downstream.suites.cells import Cell
from mte_bench.cli import mendable
from mte_bench.console import log
from mte_bench.device import ALONE, Place
from mte_bench.errors import UserError
from mte_bench.files import hash_of, write_text
from mte_bench.records import Record, as_if_typed

LOCK_NAME = ".lock"
ERROR_NAME = "error.txt"

Status = Literal["done", "found", "failed", "elsewhere"]


@dataclass(frozen=True)
class Result:
    """How a cell ended: done now, found done, failed (``error``), or held by another process."""

    cell: Cell
    status: Status
    record: Record | None = None
    error: str | None = None


def work(cells: Sequence[Cell], share: Place = ALONE, wait: bool = True) -> list[Result]:
    """Do those of ``cells`` that are not done; the results in the order of ``cells``.

    A cell that fails does not stop the others; what it failed with stays in ``error.txt`` of its folder, and it is tried
    again by the next run, not by the other processes of this one. With ``wait`` the cells that others hold are waited for
    and done here if their process was killed. Raises ``UserError`` where the folders cannot be written or locked.
    """
    return _Worker(cells, share).work(wait)


class _Worker:
    def __init__(self, cells: Sequence[Cell], share: Place):
        self.cells, self.share = cells, share
        self.results: dict[str, Result] = {}
        self.failed_before = {str(cell.folder): _failure_time(cell) for cell in cells}
        self.opened = Opened()

    def work(self, wait: bool) -> list[Result]:
        groups = [list(group) for _, group in groupby(self.cells, key=lambda cell: cell.checkpoint)]
        start = self.share.rank * len(groups) // self.share.processes
        while left := self._left(self.cells):
            for group in groups[start:] + groups[:start]:
                self._work_on(self._left(group))
            if not (held := self._left(left)):
                break
            if not wait:
                self.results |= {str(cell.folder): Result(cell, "elsewhere") for cell in held}
                break
            log(f"waiting for another process: {held[0].title}")
            with _locked(held[0], wait=True):
                pass
        return [self.results[str(cell.folder)] for cell in self.cells]

    def _left(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if str(cell.folder) not in self.results]

    def _work_on(self, group: list[Cell]) -> None:
        """Do what is not held by others of the cells of one checkpoint."""
        jobs = _Jobs(group, self.opened)
        for cell in group:
            with _locked(cell) as mine:
                if mine:
                    result = self._result(cell, jobs)
                    self.results[str(cell.folder)] = result
                    self._tell(result)
        self.opened.forget_checkpoints()

    def _result(self, cell: Cell, jobs: "_Jobs") -> Result:
        error_file = cell.folder / ERROR_NAME
        if _failure_time(cell) != self.failed_before[str(cell.folder)]:
            return Result(cell, "failed", error=error_file.read_text(encoding="utf-8").strip())
        try:
            job = jobs.of(cell)
            found = job.found()
            if found is None:
                log(f"{self._count()} {cell.title}")
                jobs.share_features()
                with as_if_typed(cell.words), redirect_stdout(sys.stderr):
                    record = job.run()
        except Exception as error:
            line = _line(error)
            write_text(error_file, f"{line}\n")
            return Result(cell, "failed", error=line)
        error_file.unlink(missing_ok=True)
        return Result(cell, "done", record) if found is None else Result(cell, "found", found)

    def _count(self) -> str:
        who = f"process {self.share.rank + 1}: " if self.share.processes > 1 else ""
        return f"{who}{len(self.results) + 1}/{len(self.cells)}"

    def _tell(self, result: Result) -> None:
        if result.error:
            log(f"{result.cell.title}: error: {result.error}")
        elif result.status == "found":
            log(f"{result.cell.title}: already done")


class _Jobs:
    """The jobs of one checkpoint's cells, each made when it is first asked for."""

    def __init__(self, cells: Sequence[Cell], opened: Opened):
        self.cells, self.opened = cells, opened
        self.jobs: dict[str, Job] = {}
        self.shared = False

    def of(self, cell: Cell) -> Job:
        """The job of ``cell``; raises whatever is wrong with it."""
        key = str(cell.folder)
        if key not in self.jobs:
            self.jobs[key] = cell.offer.job(cell.request, self.opened)
        return self.jobs[key]

    def share_features(self) -> None:
        """Extract, once, what the cells that are not done want of the same images: all their kinds in one pass.

        Whatever is wrong with one cell is left for that cell to say, not for the one that happens to be the first.
        """
        if self.shared:
            return
        self.shared = True
        together: dict[str, tuple[Wanted, list[str]]] = {}
        for cell in self.cells:
            with suppress(Exception):
                job = self.of(cell)
                for wanted in job.wanted if job.found() is None else ():
                    for kind in wanted.kinds:
                        kind_of(kind, wanted.part.checkpoint.encoder, wanted.part.transform.crop)  # or it would spoil the pass
                    kinds = together.setdefault(pass_key(wanted), (wanted, []))[1]
                    kinds += [kind for kind in wanted.kinds if kind not in kinds]
        how = pass_of(self.cells[0].request)
        for wanted, kinds in together.values():
            if len(kinds) > 1:
                checkpoint, transform = wanted.part
                with suppress(Exception):
                    extract(checkpoint.encoder, checkpoint.sha256, wanted.images, transform, kinds, how)


def pass_key(wanted: Wanted) -> str:
    """Equal for features that one pass of an encoder over the images can give."""
    checkpoint, transform = wanted.part
    spec = checkpoint.encoder.spec.model_dump(mode="json")
    return hash_of([checkpoint.sha256, spec, transform.model_dump(mode="json"), wanted.images.fingerprint])


def _line(error: Exception) -> str:
    """What went wrong in one line; a bug's traceback is shown."""
    line = mendable(error)
    if line is None:
        traceback.print_exception(error)
        line = f"{type(error).__name__}: {' '.join(str(error).split())} (a bug: its traceback was printed)"
    return line


def _failure_time(cell: Cell) -> int | None:
    """When the cell last failed, as the file system counts, in nanoseconds; None if it did not."""
    try:
        return (cell.folder / ERROR_NAME).stat().st_mtime_ns
    except OSError:
        return None


@contextmanager
def _locked(cell: Cell, wait: bool = False) -> Iterator[bool]:
    """Hold ``cell`` for this process and yield True, or False if another has it; with ``wait``, wait for that one.

    The lock is a POSIX one, as that of the feature store.
    """
    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        lock = open(cell.folder / LOCK_NAME, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{cell.folder}: cannot be written ({error.strerror}); choose another --out") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except (BlockingIOError, PermissionError):
            mine = False
        except OSError as error:
            raise UserError(f"{cell.folder}: the file system has no locks ({error.strerror}); choose another --out") from error
        yield mine
