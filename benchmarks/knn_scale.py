"""k-NN at the size of ImageNet: 50,000 queries against a bank of 1,281,167 features of width 384, k = 20 and 200; and small.

The features are made up: 1,000 classes around random centres, noise whose variance falls off over the directions as an
encoder's does. In turns, so that a slower machine is slower for all:

- ours: from a file in memory to neighbours in the exact order, unit length and float64 included;
- the floor: the matrix product of queries and bank alone, in the tiles in which it is fastest here, on a bank in memory;
- product and topk in torch, 500 queries at a time, as DINO's evaluation does it; FAISS's IndexFlatIP; scikit-learn's brute
  force. These also get the bank in memory and of unit length, and stop at float32.

All are timed on a part of the queries, the peers perhaps on a smaller one, never below 512, since FAISS takes five times as long
for each query of 300 or fewer: all times are for each query. One thread
is timed by the processor time it takes, which other work on the machine changes little, more threads by the clock on the
wall. The neighbours are compared with those of the plain torch search, and must be equal.

    OMP_NUM_THREADS=2 taskset -c 2,3 python benchmarks/knn_scale.py      # 4,096 of the queries, 1,000 for the peers
    python benchmarks/knn_scale.py --by-class                            # the bank's classes one after the other
    python benchmarks/knn_scale.py --queries 50000 --peer-queries 50000  # all: hours, because of the peers
    python benchmarks/knn_scale.py --quick                               # a tenth of the bank, once
    python benchmarks/knn_scale.py --small                               # a bank of 50,000, once
    python benchmarks/knn_scale.py --small --rows 4000 --width 96        # and of a small study
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from downstream.knn import KNN
from mte_bench.knn_bank import Bank, normalise
from mte_bench.knn_search import propose_plainly
from mte_bench.knn_vote import search
from mte_bench.records import environment

BANK, ALL_QUERIES, WIDTH, CLASSES = 1_281_167, 50_000, 384, 1000
SMALL_BANK, LEAST_QUERIES = 50_000, 512
K = (20, 200)
TILE = 2048, 4096  # queries and rows of the floor's products: the fastest of six shapes from 1024 x 4096 to 4096 x 8192
DINO_CHUNK = 500  # a hundredth of the queries
MEMORY_ROWS = 350_000  # more than a block of the bank


def make_features(path: Path, n: int, width: int, by_class: bool, seed: int) -> NDArray[np.float32]:
    """``n`` features in a new file, mapped into memory: ``n c``."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, width), dtype=np.float32)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((width, width)))[0]
    spread = 1 / np.sqrt(1 + np.arange(width))
    noise = (np.sqrt(width / (spread**2).sum()) * spread[:, None] * turn).astype(np.float32)
    generator = np.random.default_rng((2, seed))
    labels = generator.integers(CLASSES, size=n)
    if by_class:
        labels.sort()
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, width))
    for start in range(0, n, 1 << 16):
        own = labels[start : start + (1 << 16)]
        rows[start : start + (1 << 16)] = centres[own] + generator.standard_normal((len(own), width), dtype=np.float32) @ noise
    rows.flush()
    del rows
    return np.load(path, mmap_mode="r")


def anonymous_memory() -> int:
    """Bytes of this process that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most of ``anonymous_memory`` inside, as the list's one item."""
    most, done = [anonymous_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def ours(bank: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> tuple[Tensor, Tensor]:
    return KNN(k=(k,)).fit(bank, np.zeros(len(bank), np.int64)).neighbours(queries)


def product(bank: Tensor, queries: Tensor, _k: int) -> None:
    tile = torch.empty(TILE)
    for rows in bank.split(TILE[1]):
        for part in queries.split(TILE[0]):
            torch.mm(part, rows.T, out=tile[: len(part), : len(rows)])


def product_and_topk(bank: Tensor, queries: Tensor, k: int) -> None:
    for part in queries.split(DINO_CHUNK):
        (part @ bank.T).topk(k, dim=1)


def index_flat(bank: Tensor, queries: Tensor, k: int) -> None:
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    index.search(queries.numpy(), k)


def brute_force(bank: Tensor, queries: Tensor, k: int) -> None:
    """By Euclidean distance, which orders rows of unit length as the cosine does and is its fastest way."""
    NearestNeighbors(n_neighbors=k, algorithm="brute", metric="sqeuclidean").fit(bank.numpy()).kneighbors(queries.numpy())


PEERS: dict[str, Callable[[Tensor, Tensor, int], None]] = {
    "torch product and topk": product_and_topk,
    "FAISS IndexFlatIP": index_flat,
    "scikit-learn brute": brute_force,
}


def timed(function: Callable[..., object], *arguments: object) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    function(*arguments)
    return clock() - began


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    bank = make_features(folder / "bank.npy", options.rows, options.width, options.by_class, seed=0)
    asked = make_features(folder / "queries.npy", ALL_QUERIES, options.width, by_class=False, seed=1)
    at_once = asked[: ALL_QUERIES // 10 if options.quick or options.small else ALL_QUERIES]
    with peak() as memory:  # whose size does not depend on the rows of the bank
        ours(bank[:MEMORY_ROWS], at_once, max(K))
    print(f"ours, {len(at_once):,} queries, k {max(K)}: peak memory {memory[0] / 1e9:.2f} GB")

    unit = normalise(torch.from_numpy(np.array(bank)))
    ready = normalise(torch.from_numpy(np.array(asked)))
    some, few = options.queries, options.peer_queries
    print(
        f"bank {len(bank):,} x {options.width}; ours on {some:,} queries of {ALL_QUERIES:,}, peers on {few:,}; "
        f"rounds: {options.rounds}"
    )
    print(f"{'':<28} {'ms/query':>9} {'all, s':>8} {'to floor':>9} {'ours is faster by':>18} {'memory, GB':>11}")
    ratios: dict[str, float] = {}
    rates = []
    for k in K:
        taken: dict[str, list[float]] = {name: [] for name in ("floor", "ours", *PEERS)}
        grown: dict[str, int] = {}
        for _ in range(options.rounds):
            taken["floor"].append(timed(product, unit, ready[:some], k) / some)
            taken["ours"].append(timed(ours, bank, asked[:some], k) / some)
            for name, peer in PEERS.items():
                before = anonymous_memory() - unit.nbytes  # the bank in memory is theirs
                with peak() as most:
                    taken[name].append(timed(peer, unit, ready[:few], k) / few)
                grown[name] = most[0] - before
        plain = search(torch.from_numpy(np.array(asked[:few])), Bank(bank), k, propose_plainly)
        found = ours(bank, asked[:few], k)
        assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]), "not the neighbours of the plain search"
        rates += [2 * len(bank) * options.width / seconds / 1e9 for seconds in taken["floor"]]
        for name, seconds in taken.items():
            over = statistics.median(t / f for t, f in zip(seconds, taken["floor"], strict=True))
            faster = statistics.median(t / o for t, o in zip(seconds, taken["ours"], strict=True))
            each = statistics.median(seconds)
            size = f"{grown[name] / 1e9:.2f}" if name in grown else ""
            shown = f"{faster:.2f}" if name in PEERS else ""
            print(f"k {k:<4} {name:<23} {1000 * each:9.2f} {each * ALL_QUERIES:8.0f} {over:9.2f} {shown:>18} {size:>11}")
            if name in PEERS:
                ratios[f"{name} / ours, k {k}"] = round(faster, 3)
            elif name == "ours":
                ratios[f"ours / floor, k {k}"] = round(over, 3)
    return {
        "benchmark": "knn_scale",
        "ratios": ratios,
        "floor": "the product alone",
        "floor_gflops": round(statistics.median(rates), 1),
        "peak_memory_bytes": memory[0],
        "bank": len(bank),
        "width": options.width,
        "by_class": options.by_class,
        "queries": some,
        "peer_queries": few,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "machine": environment()["device"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the bank, 1,000 queries, one round")
    parser.add_argument("--small", action="store_true", help="a bank of 50,000, 2,000 queries, one round")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the features")
    parser.add_argument("--rows", type=int, help="of the bank")
    parser.add_argument("--queries", type=int, help="for ours and the floor")
    parser.add_argument("--peer-queries", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--by-class", action="store_true", help="the bank's classes one after the other")
    parser.add_argument("--folder", type=Path, help="where to put 2 GB of features meanwhile (default: the system's)")
    options = parser.parse_args()
    options.rows = options.rows or (SMALL_BANK if options.small else BANK // 10 if options.quick else BANK)
    options.queries = options.queries or (2000 if options.small else 1000 if options.quick else 4096)
    options.peer_queries = options.peer_queries or (2000 if options.small else 1000)
    options.rounds = options.rounds or (1 if options.small or options.quick else 3)
    if min(options.queries, options.peer_queries) < LEAST_QUERIES:
        parser.error(f"at least {LEAST_QUERIES} queries")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
