"""Features whose files are damaged or whose process is killed: never wrong, and no work lost that was done."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import features
from downstream.features import extract, extracted
from drawn import TRANSFORM, Drawn, alive, decoded, encoder, flip, how
from mte_bench.errors import CorruptImage, UserError


@pytest.fixture
def whole(tmp_path):
    """The features of an undisturbed pass."""
    return np.array(extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path / "whole")).arrays["global"])


# Whatever happens to the files ------------------------------------------------------------------------------------------


def half_done(cache, log, **options):
    """A pass that was stopped by the 24th image."""
    with pytest.raises(CorruptImage):
        extract(encoder(), "w", Drawn(corrupt=(24,)), TRANSFORM, how=how(cache, **options))
    return Drawn(log=log), next(cache.glob("*/features.npy")), next(cache.glob("*/features.json"))


def test_a_stopped_pass_goes_on_where_it_was(tmp_path, whole):
    images, data, _ = half_done(tmp_path, tmp_path / "log")
    data.write_bytes(data.read_bytes() + b"half a row that nobody vouches for")
    assert extracted(encoder(), "w", images, TRANSFORM, "global", how(tmp_path)) == 24
    found = extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    assert np.array_equal(found.arrays["global"], whole) and decoded(tmp_path / "log") == list(range(24, 40))


def test_a_stopped_pass_of_another_batch_size_starts_afresh(tmp_path, whole):
    images, _, _ = half_done(tmp_path, tmp_path / "log", batch_size=4)
    found = extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    assert np.array_equal(found.arrays["global"], whole) and decoded(tmp_path / "log") == list(range(40))


DAMAGES = {
    "data cut short": lambda data, state: os.truncate(data, data.stat().st_size - 700),
    "data gone": lambda data, state: data.unlink(),
    "data empty": lambda data, state: os.truncate(data, 0),
    "a bit flipped": lambda data, state: flip(data, -2000),
    "state cut short": lambda data, state: os.truncate(state, state.stat().st_size // 2),
    "state gone": lambda data, state: state.unlink(),
    "state of something else": lambda data, state: state.write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_files_are_noticed_and_mended(tmp_path, whole, damage, finished):
    images, data, state = half_done(tmp_path, None)
    if finished:
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    DAMAGES[damage](data, state)
    assert np.array_equal(extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path)).arrays["global"], whole)
    assert extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path)).cached


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"features cannot be kept there \(.*\).*--cache"):
        extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path / "file" / "cache"))


# Whatever happens to the process ----------------------------------------------------------------------------------------


def child(cache, delay, workers, limit, answer):
    """A pass in a process of its own; what it ended with goes into ``answer``."""
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        images = Drawn(96, delay=delay, log=cache.parent / "log")
        found = extract(encoder(), "w", images, TRANSFORM, ["global", "patch-mean"], how(cache, workers=workers))
        answer.put({kind: np.array(rows) for kind, rows in found.arrays.items()})
    except UserError as error:
        answer.put(str(error))


@pytest.fixture(scope="module")
def start():
    """Starts ``child`` from a server that has imported everything and run nothing, and hands back process and queue."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["downstream.features"])

    def run(cache, delay=0.0, workers=0, limit=0):
        answer = context.Queue()
        process = context.Process(target=child, args=(cache, delay, workers, limit, answer))
        process.start()
        return process, answer

    return run


def done(start, *arguments, **options):
    process, answer = start(*arguments, **options)
    result = answer.get(timeout=60)
    process.join()
    return result


@pytest.mark.parametrize("workers", [0, 2])
def test_five_kills_at_random_moments_never_yield_a_wrong_feature(tmp_path, start, workers):
    undisturbed = done(start, tmp_path / "undisturbed" / "cache")
    cache, log, orphans = tmp_path / "killed" / "cache", tmp_path / "killed" / "log", []
    for number, images in enumerate(random.Random(workers).sample(range(1, 19), 5)):
        log.unlink(missing_ok=True)
        process, _ = start(cache, delay=0.002, workers=workers)
        while len(decoded(log)) < images:
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGSTOP)
        orphans += children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        while alive(process.pid):  # its workers live on for some seconds; nothing waits for them
            time.sleep(0.001)
        if not workers:  # what every single kill left must lead to the same end
            copy = tmp_path / str(number) / "cache"
            shutil.copytree(cache, copy)
            for kind, rows in done(start, copy).items():
                assert np.array_equal(rows, undisturbed[kind])
    log.unlink()
    finished = done(start, cache)
    assert all(np.array_equal(finished[kind], undisturbed[kind]) for kind in undisturbed)
    assert workers or 0 < len(decoded(log)) < 96  # it went on, it did not start again
    deadline = time.monotonic() + 30
    while (left := [pid for pid in orphans if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left  # workers end, also those that had only just started


def test_a_worker_ends_if_its_parent_died_before_it_could_watch_it(monkeypatch):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    features._end_without(os.getppid(), 0)
    with pytest.raises(SystemExit):
        features._end_without(os.getppid() + 1, 0)


def children(pid):
    listing = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listing.read_text().split()] if listing.exists() else []


def test_two_processes_with_the_same_key_do_the_work_once(tmp_path, start):
    running = [start(tmp_path / "cache", delay=0.002) for _ in range(2)]
    results = [answer.get(timeout=60) for _, answer in running]
    for process, _ in running:
        process.join()
    assert sorted(decoded(tmp_path / "log")) == list(range(96))
    assert all(np.array_equal(results[0][kind], results[1][kind]) for kind in results[0])


def test_a_full_disk_is_one_clear_line_and_loses_nothing_that_was_done(tmp_path, start):
    error = done(start, tmp_path / "cache", limit=8_000)
    assert "features cannot be kept there (File too large)" in error and "--cache" in error
    (tmp_path / "log").unlink()
    found = done(start, tmp_path / "cache")
    assert 0 < len(decoded(tmp_path / "log")) < 96
    expected = done(start, tmp_path / "other" / "cache")
    assert all(np.array_equal(found[kind], expected[kind]) for kind in expected)


PEAK = """
import sys
import numpy as np, torch
from pathlib import Path
from drawn import SPEC, Drawn, how
from downstream.features import extract
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.encoder import build_encoder

torch.manual_seed(0)
wide = SPEC.model_copy(update={"patch_size": 2, "options": {"embed_dim": 192, "depth": 1, "num_heads": 3}})
images, transform = Drawn(int(sys.argv[1])), EvaluationTransform.for_size(16, SPEC.mean, SPEC.std)
found = extract(build_encoder(wide).eval(), "w", images, transform, ["patches", "global"], how(Path(sys.argv[2])))
assert all(isinstance(rows, np.memmap) for rows in found.arrays.values())
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_times_the_images_take_the_same_memory(tmp_path):
    """Of features that would fill as much memory again, in a process of its own each: the most that it ever held, in KiB."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    peaks = []
    for count in (500, 5_000):
        command = [sys.executable, "-c", PEAK, str(count), str(tmp_path / str(count))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
        peaks.append(int(done.stdout))
    written = sum(path.stat().st_size for path in (tmp_path / "5000").glob("*/features.npy")) / 1024
    print(f"peak memory in MiB: {peaks[0] / 1024:.0f}, {peaks[1] / 1024:.0f}; features in MiB: {written / 1024:.0f}")
    assert peaks[1] < 1.2 * peaks[0]
    assert written > 0.25 * peaks[0]  # more than the bound leaves room for
