"""Suites that several processes do: each cell once, whoever is killed, late or submitted."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from downstream.suites.cells import load_suite
from downstream.suites.run import run_suite
from downstream.suites.work import LOCK_NAME, work
from mte_bench.device import ALONE, Place
from mte_bench.records import find_records, read_record
from suites import SWIN, VIT, cells, do, facts, options, stamps, suite_folder, write

SLURM = pytest.mark.skipif(not os.environ.get("SLURM_ALLOWED"), reason="submits jobs; SLURM_ALLOWED=1 allows it")


@pytest.fixture
def place(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return suite_folder(tmp_path, folder, monkeypatch)


def child(place: Path, share: Place, wait: bool, start: Any, answer: Any, out: str) -> None:
    """The suite in a process of its own; how each cell ended goes into ``answer``."""
    import torch

    torch.set_num_threads(1)
    chosen = cells(place, out)
    start.wait()
    answer.put([(result.status, result.error) for result in work(chosen, share, wait)])


def holder(cell_folder: Path, held: Any, let_go: Any, error: str | None) -> None:
    """Holds a cell until told otherwise, and says that it failed if it is to."""
    import fcntl

    cell_folder.mkdir(parents=True)
    with open(cell_folder / LOCK_NAME, "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        held.set()
        let_go.wait()
        if error is not None:
            (cell_folder / "error.txt").write_text(error)


class Started:
    """Processes that have imported everything and wait for the word."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["downstream.suites.run", "downstream.retrieval", "downstream.linear"])
        self.running: list[Any] = []
        self.kept: list[Any] = []  # an event must live until its process has started

    def suite(self, place: Path, share: Place = ALONE, wait: bool = True, start: Any = None, out: str = "out") -> tuple[Any, Any]:
        answer, at_once = self.context.Queue(), self.context.Event()
        at_once.set()
        return self.process(child, place, share, wait, start or at_once, answer, out), answer

    def process(self, function: Callable[..., None], *arguments: Any) -> Any:
        process = self.context.Process(target=function, args=arguments)
        process.start()
        self.running.append(process)
        self.kept += arguments
        return process


@pytest.fixture
def started() -> Iterator[Started]:
    processes = Started()
    yield processes
    for process in processes.running:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Any]:
    """What the suite of ``place`` leaves."""
    place = tmp_path_factory.mktemp("undisturbed")
    write(place, folder)
    assert do(place) == 0
    return facts(place)


def test_two_suites_at_once_divide_the_work(place: Path, started: Started, undisturbed: dict[str, Any]) -> None:
    start = started.context.Event()
    both = [started.suite(place, start=start) for _ in range(2)]
    start.set()
    results = [answer.get(timeout=120) for _, answer in both]
    for outcomes in zip(*results, strict=True):
        assert sorted(status for status, _ in outcomes) == ["done", "found"]
    assert facts(place) == undisturbed


def test_two_suites_of_their_own_folders_share_a_cache_at_once(
    place: Path, started: Started, undisturbed: dict[str, Any]
) -> None:
    start, outs = started.context.Event(), ("one", "two")
    both = [started.suite(place, start=start, out=out) for out in outs]
    start.set()
    assert all(status == "done" for _, answer in both for status, _ in answer.get(timeout=120))
    assert facts(place, "one") == facts(place, "two") == undisturbed
    assert len(list((place / "cache").glob("*/features.npy"))) == 2 * 2 * 2  # checkpoints, splits, kinds: each kept once


def test_kills_leave_what_was_done_and_the_rest_is_done_later(place: Path, started: Started, undisturbed: dict[str, Any]) -> None:
    kept: dict[Path, int] = {}
    for finished in (0, 3):
        process, _ = started.suite(place)
        while len(stamps(place)) <= finished:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = stamps(place)
        assert kept.items() <= now.items() and len(now) < 6
        kept = now
    _, answer = started.suite(place)
    statuses = [status for status, _ in answer.get(timeout=120)]
    assert statuses.count("found") == len(kept) and statuses.count("done") == 6 - len(kept)
    assert facts(place) == undisturbed and kept.items() <= stamps(place).items()


def test_a_cell_that_another_process_holds_is_waited_for(place: Path, started: Started, undisturbed: dict[str, Any]) -> None:
    """Killed, its process leaves the cell to us; a failure of its own is reported and not tried again."""
    held, let_go = [started.context.Event() for _ in range(2)], started.context.Event()
    killed, failed = cells(place)[2].folder, cells(place)[4].folder
    first = started.process(holder, killed, held[0], started.context.Event(), None)
    started.process(holder, failed, held[1], let_go, "out of luck\n")
    assert all(event.wait(60) for event in held)
    without = work(cells(place), wait=False)
    assert [result.status for result in without] == ["done", "done", "elsewhere", "done", "elsewhere", "done"]
    _, answer = started.suite(place)
    first.kill()
    while not (killed / "record.json").exists():
        time.sleep(0.002)
    let_go.set()
    results = answer.get(timeout=120)
    assert results[2] == ("done", None) and results[4] == ("failed", "out of luck")
    assert facts(place) == {name: record for name, record in undisturbed.items() if not failed.as_posix().endswith(name)}


def test_processes_of_a_launcher_begin_apart_and_the_first_one_speaks(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write(place, folder, tasks=["attention", "retrieval"], checkpoints=[VIT, {"name": "last", "checkpoint": SWIN}])
    assert not run_suite(str(place / "suite.yaml"), out=str(place / "out"), **options(place))
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("last, attention: error: ")
    assert shown.err.splitlines()[1] == "process 2: 2/4 last, retrieval"
    assert "RANK" not in os.environ  # nothing in a cell takes itself for one of several that share a task
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_suite(str(place / "suite.yaml"), out=str(place / "out"), **options(place))
    assert "failed" in capsys.readouterr().out


@pytest.mark.slow
def test_torchrun_divides_the_cells(place: Path, undisturbed: dict[str, Any]) -> None:
    import subprocess

    given = [word for key, value in options(place).items() for word in (f"--{key}", str(value))]
    command = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "mte_bench", "run", "suite.yaml", "--out", "out", *given]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint") == 1 and "process 1: " in done.stderr and "process 2: " in done.stderr
    assert facts(place) == undisturbed


@pytest.mark.parametrize(
    ("cluster", "workers"),
    [
        ("local", 1),
        pytest.param("local", 2, marks=pytest.mark.slow),
        pytest.param("slurm", 2, marks=[pytest.mark.slow, SLURM]),
    ],
)
def test_submitted_workers_do_the_suite(cluster: str, workers: int, place: Path, undisturbed: dict[str, Any]) -> None:
    """By SLURM where that is allowed, and with processes of this machine in its place."""
    from downstream.suites.submit import submit

    name = str(place / "suite.yaml")
    assignments = [f"cluster={cluster}", f"workers={workers}", "timeout_min=5", "cpus_per_task=1"]
    if cluster == "local":
        assignments.append("slurm_partition=none")
    jobs = submit(load_suite(name), name, place / "out", options(place), assignments)
    assert [job.result() for job in jobs] == [0] * workers
    assert facts(place) == undisturbed
    worker = jobs[0].submission().function
    assert worker.checkpoint().function == worker  # what is queued again if it is pre-empted
    assert "retrieval map" in jobs[0].stdout() and (place / "out" / "slurm").is_dir()
    commands = {read_record(path).command.partition(" --")[0] for path in find_records([place / "out"])}
    assert commands >= {f"mte-bench knn '{VIT}'", f"mte-bench retrieval '{VIT}&seed=1'"}
