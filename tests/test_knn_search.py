"""The searches behind k-NN: what they may leave out, what they read, and that nothing depends on which of them it was."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from downstream import neighbours
from downstream.knn import KNN
from mte_bench import knn_search, knn_vote
from mte_bench.errors import UserError
from mte_bench.knn_bank import Bank, normalise
from mte_bench.knn_search import propose_in_tiles, propose_plainly
from mte_bench.knn_vote import search

WIDTH = 16


def features(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)


def by_class():
    """Tight classes one after the other: a query meets all that is like it at once."""
    centres = np.repeat(features(20), 30, axis=0)
    return centres + 0.05 * features(600, seed=1), features(20)


def ever_better():
    """Every row is nearer to the queries than all before it: no threshold saves anything."""
    turn = np.linspace(np.pi, 0, 700)
    bank = np.zeros((700, WIDTH), np.float32)
    bank[:, 0], bank[:, 1] = np.cos(turn), np.sin(turn)
    return bank, np.repeat(np.eye(1, WIDTH, dtype=np.float32), 19, axis=0)


BANKS = {  # bank, queries
    "noise": (features(777), features(21, seed=1)),
    "by class": by_class(),
    "ever better": ever_better(),
    "ever worse": (ever_better()[0][::-1].copy(), ever_better()[1]),
    "all the same": (np.ones((300, WIDTH), np.float32), features(9)),
    "all negative": (-np.abs(features(300)), np.abs(features(9))),
    "one row": (features(1), features(3, seed=1)),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, and buffers that fill up, with few rows."""
    for name, value in {"QUERIES": 8, "ROWS": 64, "GROUP": 4, "_ROOM": 24}.items():
        monkeypatch.setattr(knn_search, name, value)


@pytest.mark.parametrize("m", [1, 12, 100])
@pytest.mark.parametrize("name", BANKS)
def test_no_row_that_is_left_out_is_more_similar_than_the_last_candidate(name, m, small_tiles):
    rows, asked = BANKS[name]
    bank, queries = Bank(rows), normalise(torch.from_numpy(asked))
    m = min(m, len(rows))
    values, indices = propose_in_tiles(queries, bank, m)
    product = queries.double() @ bank.rows(slice(None)).double().T
    assert values.shape == indices.shape == (len(asked), m)
    assert all(len(set(row)) == m for row in indices.tolist())
    assert torch.allclose(values.double(), product.gather(1, indices), atol=1e-6)
    assert torch.allclose(values.double(), product.sort(dim=1, descending=True).values[:, :m], atol=1e-6)


@pytest.mark.parametrize("name", ["noise", "by class", "ever better"])
def test_only_what_can_be_among_the_nearest_is_sorted(name, small_tiles, monkeypatch):
    """Of a bank in any other order than the worst, few of the similarities get further than the comparison."""
    seen, topk = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **k: seen.append(x.numel()) or topk(x, *a, **k))
    rows, asked = BANKS[name]
    propose_in_tiles(normalise(torch.from_numpy(asked)), Bank(rows), 3)
    sorted_share = sum(seen) / (len(asked) * len(rows))
    assert sorted_share > 1 if name == "ever better" else sorted_share < 0.7


def test_neighbours_depend_neither_on_the_search_nor_on_blocks(small_tiles, monkeypatch):
    rows, asked = BANKS["by class"]
    rows = np.concatenate([rows, rows[::3], rows[:1].repeat(70, axis=0)])  # ties at and beyond the edge of the candidates
    queries = torch.from_numpy(np.concatenate([asked, rows[:5]]))
    whole = search(queries, Bank(rows), 20, propose_plainly)
    for name, value in {"_PAIR_VALUES": 7 * WIDTH, "_BLOCK_VALUES": 100, "_WHOLE_ROWS": 37}.items():
        monkeypatch.setattr(knn_vote, name, value)
    for name, value in {"PLAIN_ROWS": 50, "_PLAIN_VALUES": 170}.items():
        monkeypatch.setattr(knn_search, name, value)
    monkeypatch.setattr(neighbours, "PLAIN_ROWS", 50)
    unsure = []
    monkeypatch.setattr(knn_vote, "_whole_bank", lambda q, *rest, f=knn_vote._whole_bank: unsure.append(len(q)) or f(q, *rest))
    for propose in (
        propose_in_tiles,
        propose_plainly,
        neighbours.proposer("faiss", torch.device("cpu"), 52)[1],
        neighbours.proposer("torch", torch.device("cpu"), 52)[1],
    ):
        found = search(queries, Bank(rows), 20, propose)
        assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    assert len(unsure) == 4 and all(0 < count < len(queries) for count in unsure)


def test_shares_of_the_bank_on_several_devices_give_what_one_gives(monkeypatch):
    rows, asked = BANKS["noise"]
    alone = KNN(k=(30,), library="torch").fit(rows, np.zeros(len(rows), int)).neighbours(asked)
    monkeypatch.setattr(neighbours, "_devices", lambda _: [torch.device("cpu")] * 5)
    for library in ("torch", "faiss"):
        shared = KNN(k=(30,), library=library).fit(rows, np.zeros(len(rows), int)).neighbours(asked)
        assert torch.equal(alone[0], shared[0]) and torch.equal(alone[1], shared[1])
    few = KNN(k=(3,), library="torch").fit(rows[:3], np.zeros(3, int)).neighbours(asked)[1]  # fewer rows than devices
    assert few.sort().values.tolist() == [[0, 1, 2]] * len(asked)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_bank_in_a_file_gives_what_it_gives_in_memory_and_is_read_in_blocks(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(knn_search, "ROWS", 64)
    rows, asked = features(777).astype(dtype), features(21, seed=1)
    np.save(tmp_path / "bank.npy", rows)
    bank = np.load(tmp_path / "bank.npy", mmap_mode="r")
    read, blocks = [], Bank.blocks

    def noted(*arguments):
        for first, block in blocks(*arguments):
            read.append(len(block))
            yield first, block

    monkeypatch.setattr(Bank, "blocks", noted)
    found = KNN(k=(10,)).fit(bank, np.zeros(777, int)).neighbours(asked)
    assert read == 12 * [64] + [9]
    expected = KNN(k=(10,), library="torch").fit(rows, np.zeros(777, int)).neighbours(asked)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_blocks_are_the_rows_in_one_piece_of_memory(dtype, tmp_path):
    rows = features(100).astype(dtype)
    rows[3] = 0
    np.save(tmp_path / "bank.npy", rows)
    expected = torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=1)
    for given in (rows, np.load(tmp_path / "bank.npy", mmap_mode="r"), rows.repeat(2, axis=0)[::2]):
        found = [(first, block.clone(), block.data_ptr()) for first, block in Bank(given).blocks(32, 10, 90)]
        assert [first for first, *_ in found] == [10, 42, 74] and len({place for *_, place in found}) == 1
        assert torch.equal(torch.cat([block for _, block, _ in found]), expected[10:90])
        assert torch.equal(Bank(given).rows(slice(10, 90)), expected[10:90])
    assert np.array_equal(rows, np.load(tmp_path / "bank.npy"))  # nobody wrote to them


def test_queries_beyond_the_memory_set_aside_are_searched_in_turns(monkeypatch):
    rows, asked = BANKS["noise"]
    knn = KNN(k=(5, 10)).fit(rows, np.arange(len(rows)) % 7)
    expected, neighbours_of = knn.predict(asked), knn.neighbours(asked)
    monkeypatch.setattr("downstream.knn._BYTES", 1 << 16)
    monkeypatch.setattr("downstream.knn._VOTERS", 2)
    assert len(list(knn._searched(asked))) > 2
    assert torch.equal(knn.neighbours(asked)[1], neighbours_of[1])
    for key, classes in knn.predict(asked).items():
        assert np.array_equal(classes, expected[key])


def test_the_library_is_chosen_by_the_rule(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)

    def chosen(*arguments):
        return neighbours.proposer(*arguments)[0]

    for platform, name in (("linux", "faiss or tiles"), ("darwin", "tiles")):
        monkeypatch.setattr(sys, "platform", platform)
        assert (chosen("auto", cpu, 42), chosen("auto", torch.device("mps"), 42)) == (name, name)
    assert chosen("auto", cuda, 42) == "torch"  # FAISS is here without GPUs
    monkeypatch.setattr("faiss.get_num_gpus", lambda: 1)
    monkeypatch.setattr("faiss.StandardGpuResources", object, raising=False)
    assert chosen("auto", cuda, 42) == "faiss" and chosen("auto", cuda, 3000) == "torch"
    with pytest.raises(UserError, match=r"'faiss'.*at most 2048 candidates \(here 3000\); take torch"):
        chosen("faiss", cuda, 3000)
    with pytest.raises(UserError, match="'tiles' searches on a CPU; take torch or faiss"):
        chosen("tiles", cuda, 42)
    with pytest.raises(UserError, match=r"'tile': one of auto, tiles, torch, faiss.*did you mean 'tiles'"):
        chosen("tile", cpu, 42)


def test_many_queries_go_to_faiss_and_few_to_tiles(monkeypatch):
    rows, asked = BANKS["noise"]
    expected = KNN(k=(5,), library="torch").fit(rows, np.zeros(len(rows), int)).neighbours(asked)
    taken = []
    for module, name in ((neighbours, "propose_in_tiles"), (neighbours, "_faiss")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: taken.append(n) or f(*a))
    for many in (len(asked), len(asked) + 1):
        monkeypatch.setattr(neighbours, "MANY", many)
        found = KNN(k=(5,)).fit(rows, np.zeros(len(rows), int)).neighbours(asked)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert taken == (["_faiss", "propose_in_tiles"] if sys.platform == "linux" else ["propose_in_tiles"] * 2)


def test_cuda_without_a_number_is_every_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [device.index for device in neighbours._devices(torch.device("cuda"))] == [0, 1, 2]
    assert neighbours._devices(torch.device("cuda", 1)) == [torch.device("cuda", 1)]


ANONYMOUS = """
import sys, threading, time
import numpy as np
from downstream import neighbours
from downstream.knn import KNN

neighbours._FAISS_VALUES = 1 << 24

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

bank = np.load(sys.argv[1], mmap_mode="r")[: int(sys.argv[2])]
queries = np.random.default_rng(1).standard_normal((512, bank.shape[1]), dtype=np.float32)
most, done = [resident()], threading.Event()
def watch():
    while not done.wait(0.005):
        most[0] = max(most[0], resident())
watcher = threading.Thread(target=watch)
watcher.start()
KNN(k=(20, 200)).fit(bank, np.arange(len(bank)) % 100).predict(queries)
done.set()
watcher.join()
print(most[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_times_the_bank_takes_the_same_memory(tmp_path):
    """With blocks of an eighth of the usual size, so that a tenth of the bank already fills one."""
    n, width = 700_000, 384
    bank = np.lib.format.open_memmap(tmp_path / "bank.npy", "w+", np.float16, (n, width))
    generator = np.random.default_rng(0)
    for start in range(0, n, 10_000):
        bank[start : start + 10_000] = generator.standard_normal((10_000, width), dtype=np.float32)
    bank.flush()
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", ANONYMOUS, str(tmp_path / "bank.npy"), str(rows)],
                check=True,
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
        )
        for rows in (n // 10, n)
    ]
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] - peaks[0] < n * width * 2 / 1024 / 4  # far from a copy, in KiB
