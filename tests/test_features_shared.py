"""A pass that several processes share: the same bytes as one alone, whoever is killed, late or absent."""

import itertools
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import features
from downstream.features import extract
from drawn import TRANSFORM, Drawn, alive, decoded, encoder, flip, how
from mte_bench import cli
from mte_bench.device import Place, refuse_shared
from mte_bench.errors import CorruptImage, UserError

KINDS = ["global", "patch-mean"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(features, "LEAST_BATCHES", 2)


def written(cache):
    """The bytes of all finished features."""
    assert not list(cache.glob("*/pieces"))
    return sorted(path.read_bytes() for path in cache.glob("*/features.npy"))


def alone(folder, n=96, **options):
    extract(encoder(), "w", Drawn(n, **options), TRANSFORM, KINDS, how(folder, allow_corrupt=9))
    return written(folder)


def test_spans_are_whole_batches_and_everything_once():
    for images, batch in ((1, 8), (96, 8), (97, 8), (1_281_167, 256)):
        spans = features._spans(images, batch)
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == images
        assert all(start % batch == 0 for start, _ in spans) and len(spans) <= features.MOST_PIECES


@pytest.mark.parametrize("corrupt", [(), (3, 16, 17, 95), tuple(range(16, 32))])
def test_one_of_many_does_it_all_if_the_others_never_come(tmp_path, corrupt):
    """Also with corrupt images at the ends of pieces and with nothing but corrupt ones in a piece."""
    log = tmp_path / "log"
    images = Drawn(96, corrupt=corrupt, log=log, fingerprint="c")
    shared = how(tmp_path / "shared", rank=2, processes=3, allow_corrupt=16)
    found = extract(encoder(), "w", images, TRANSFORM, KINDS, shared)
    assert sorted(decoded(log)) == list(range(96))
    assert found.corrupt == [f"{index}.png" for index in corrupt] and not found.cached and found.seconds > 0
    expected = extract(encoder(), "w", images, TRANSFORM, KINDS, how(tmp_path / "alone", allow_corrupt=16))
    assert list(found.kept) == list(expected.kept)
    assert written(tmp_path / "shared") == written(tmp_path / "alone")
    for rank in (0, 1):
        assert extract(encoder(), "w", images, TRANSFORM, KINDS, shared._replace(rank=rank)).cached
    if corrupt:
        with pytest.raises(CorruptImage, match=rf"/data/{corrupt[0]}\.png"):
            extract(encoder(), "w", images, TRANSFORM, KINDS, shared._replace(allow_corrupt=0))


def test_a_damaged_piece_is_computed_again(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    with pytest.raises(CorruptImage):
        extract(encoder(), "w", Drawn(96, corrupt=(90,)), TRANSFORM, KINDS, how(cache, processes=2))
    first = min(cache.glob("*/pieces/*/features.npy"), key=lambda path: path.stat().st_mtime_ns)
    flip(first, -100)
    extract(encoder(), "w", Drawn(96, log=log), TRANSFORM, KINDS, how(cache, processes=2))
    assert written(cache) == alone(tmp_path / "alone")
    assert len(decoded(log)) == (96 - 80) - 8 + 8  # what was missing, but for a batch that was there, and the damaged batch


def test_a_single_process_goes_on_with_the_pieces(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    with pytest.raises(CorruptImage):
        extract(encoder(), "w", Drawn(96, corrupt=(40,)), TRANSFORM, KINDS, how(cache, processes=2))
    extract(encoder(), "w", Drawn(96, log=log), TRANSFORM, KINDS, how(cache))
    assert decoded(log) == list(range(40, 96))
    assert written(cache) == alone(tmp_path / "alone")


def test_a_cache_that_somebody_empties_meanwhile(tmp_path, monkeypatch):
    calls, sync = itertools.count(), os.fsync

    def emptied(file):
        if next(calls) == 1:
            shutil.rmtree(tmp_path / "cache")
        sync(file)

    monkeypatch.setattr(os, "fsync", emptied)
    with pytest.raises(UserError, match="features cannot be kept there"):
        extract(encoder(), "w", Drawn(96), TRANSFORM, KINDS, how(tmp_path / "cache", processes=2))


# Processes ---------------------------------------------------------------------------------------------------------------


def child(cache, rank, delay, answer):
    torch.set_num_threads(1)
    features.LEAST_BATCHES = 1
    images = Drawn(96, delay=delay, log=cache.parent / "log")
    found = extract(encoder(), "w", images, TRANSFORM, KINDS, how(cache, rank=rank, processes=3))
    answer.put({kind: np.array(rows) for kind, rows in found.arrays.items()})


@pytest.fixture(scope="module")
def start():
    """Starts ``child`` with a rank, and hands back process and queue."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["downstream.features"])

    def run(cache, rank, delay=0.002):
        answer = context.Queue()
        process = context.Process(target=child, args=(cache, rank, delay, answer))
        process.start()
        return process, answer

    return run


def finish(running):
    results = [answer.get(timeout=60) for _, answer in running]
    for process, _ in running:
        process.join()
    return results


def test_three_processes_decode_every_image_once(tmp_path, start):
    results = finish([start(tmp_path / "cache", rank, delay=0.01) for rank in range(3)])
    assert sorted(decoded(tmp_path / "log")) == list(range(96))
    assert all(np.array_equal(results[0][kind], result[kind]) for result in results for kind in KINDS)
    assert written(tmp_path / "cache") == alone(tmp_path / "alone")


def test_kills_at_random_moments_never_yield_a_wrong_feature(tmp_path, start):
    """One of three is killed at a time; the others, or the next three, do what it left."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    draw = random.Random(0)
    for _ in range(3):
        log.unlink(missing_ok=True)
        running = [start(cache, rank) for rank in range(3)]
        images = draw.randrange(1, 20)
        while len(decoded(log)) < images:
            time.sleep(0.0005)
        for process, _ in draw.sample(running, 3):
            os.kill(process.pid, 9)
            time.sleep(draw.random() * 0.02)
        while any(alive(process.pid) for process, _ in running):
            [process.join(0.001) for process, _ in running]
    log.unlink()
    survivors = [start(cache, rank) for rank in range(3)]
    while len(decoded(log)) < 5:
        time.sleep(0.0005)
    os.kill(survivors.pop(0)[0].pid, 9)
    finish(survivors)
    assert written(cache) == alone(tmp_path / "alone")


def test_shared_and_single_passes_at_once(tmp_path, start):
    """Who comes without torchrun works at the whole; neither disturbs the other."""
    cache = tmp_path / "cache"
    running = [start(cache, rank) for rank in range(2)]
    single = extract(encoder(), "w", Drawn(96), TRANSFORM, KINDS, how(cache))
    results = finish(running)
    expected = alone(tmp_path / "alone")
    assert all(np.array_equal(single.arrays[kind], result[kind]) for result in results for kind in KINDS)
    assert sorted(path.read_bytes() for path in Path(cache).glob("*/features.npy")) == expected


class Held(Drawn):
    """Images of which one, once ``reached``, is there when it may ``go`` on."""

    def __init__(self, n, reached, go):
        super().__init__(n)
        self.reached, self.go = reached, go

    def image(self, index):
        if index == 20:
            self.reached.set()
            self.go.wait()
        return super().image(index)


def held_child(cache, reached, go):
    extract(encoder(), "w", Held(96, reached, go), TRANSFORM, KINDS, how(cache, processes=2))


def test_pieces_stay_while_another_process_is_at_them(tmp_path):
    """It began when nothing was there; meanwhile somebody has the whole, and a third comes by and tidies up."""
    context, cache = multiprocessing.get_context("forkserver"), tmp_path / "cache"
    reached, go = context.Event(), context.Event()
    process = context.Process(target=held_child, args=(cache, reached, go))
    process.start()
    assert reached.wait(60)
    expected = alone(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", cache, dirs_exist_ok=True)
    assert extract(encoder(), "w", Drawn(96), TRANSFORM, KINDS, how(cache)).cached
    assert len(list(cache.glob("*/pieces"))) == len(KINDS)
    go.set()
    process.join(60)
    assert process.exitcode == 0 and written(cache) == expected


def test_the_place_that_torchrun_gives(monkeypatch):
    assert Place.of_this_process() == (0, 1, 0, 1)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Place.of_this_process() == (5, 8, 1, 4)
    assert Place.of_this_process().own(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("verb", ["pretrain", "linear", "knn", "run"])
def test_a_single_gpu_for_several_processes_is_refused(verb, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    first = {"pretrain": "dino_tiny_scenes", "run": "scenes-random"}.get(verb, "random:vit_tiny_patch16_224?image_size=32")
    assert cli.main([verb, first, "--data", "scenes", "--out", str(tmp_path / "out"), "--device", "cuda:0"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --device cuda:0: one GPU for 2 processes; leave --device at cuda, and each takes its own\n"
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    refuse_shared("cuda:0")
