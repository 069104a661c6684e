"""What looks for the neighbours, and where: FAISS or tiles on a CPU, FAISS or torch on one accelerator or several.

The rule of ``auto``: on a CPU FAISS finds the neighbours of many queries at once, and few are searched in tiles
(``mte_bench.knn_search``), each where ``benchmarks/knn_scale.py`` found it ahead; only in tiles where torch and FAISS each
bring an OpenMP runtime that does not bear the other (macOS). CUDA devices take FAISS where its GPU build is installed and
finds so many neighbours, else torch. ``cuda:1`` is that one device; ``cuda`` is all that are visible: each searches a share
of the bank, and the best of all shares are kept. Whatever proposes, the neighbours are the same, because
``mte_bench.knn_vote.refine`` decides. The searches on CUDA have not run on such devices yet: what is tested is the sharing, on
CPUs, and the rule.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mte_bench.errors import UserError, did_you_mean
from mte_bench.knn_bank import Bank
from mte_bench.knn_search import PLAIN_ROWS, Nearest, Propose, best_of, plain, propose_by_blocks, propose_in_tiles

LIBRARIES = ("auto", "tiles", "torch", "faiss")
_MOST_ON_GPU = 2048  # neighbours that FAISS selects on a GPU
_FAISS_ROWS = 4096  # of the bank in one product; FAISS's own 1024 take a tenth longer
_FAISS_VALUES = 1 << 27  # of a block of the bank (512 MiB): in smaller ones more rows enter the nearest for a while
MANY = 512  # queries; FAISS 1.15 takes five times as long for each of 300 or fewer as for each of 400 or more


def proposer(library: str, device: torch.device, m: int) -> tuple[str, Propose]:
    """The search for ``m`` candidates on ``device`` and its name; ``library`` is one of ``LIBRARIES``.

    Raises ``UserError`` if it is none of them or cannot search there.
    """
    if library not in LIBRARIES:
        raise UserError(f"k-NN library '{library}': one of {', '.join(LIBRARIES)}{did_you_mean(library, LIBRARIES)}")
    cuda = device.type == "cuda"
    if library == "auto" and not cuda and sys.platform == "linux":
        return "faiss or tiles", _on_cpu
    if library == "auto":
        library = "tiles" if not cuda else "faiss" if _faiss_on_gpu(m) else "torch"
    if library == "tiles" and cuda:
        raise UserError("k-NN library 'tiles' searches on a CPU; take torch or faiss on CUDA")
    if library == "faiss" and cuda and not _faiss_on_gpu(m):
        raise UserError(
            f"k-NN library 'faiss': on CUDA it needs its GPU build and at most {_MOST_ON_GPU} candidates (here {m}); take torch"
        )
    if library == "tiles":
        return library, propose_in_tiles
    return library, partial(_on_devices, devices=_devices(device), library=_faiss if library == "faiss" else _torch)


def _on_cpu(queries: Tensor, bank: Bank, m: int) -> tuple[Tensor, Tensor]:
    """The faster ``Propose`` of a CPU for so many queries."""
    if len(queries) < MANY:
        return propose_in_tiles(queries, bank, m)
    rows = max(1, _FAISS_VALUES // bank.features.shape[1])
    return propose_by_blocks(queries, bank.blocks(rows), m, _faiss(bank.device))


def _faiss_on_gpu(m: int) -> bool:
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0 and m <= _MOST_ON_GPU


def _devices(device: torch.device) -> list[torch.device]:
    """``cuda`` without a number is every one that is visible; all others are themselves."""
    if str(device) == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu") if device.type == "mps" else device]


def _on_devices(
    queries: Tensor,
    bank: Bank,
    m: int,
    devices: list[torch.device],
    library: Callable[[torch.device], Nearest],
) -> tuple[Tensor, Tensor]:
    """A ``Propose`` that gives each of ``devices`` an equal share of the bank, in order, and all queries."""
    edges = [len(bank) * place // len(devices) for place in range(len(devices) + 1)]

    def search(device: torch.device, start: int, stop: int) -> tuple[Tensor, Tensor]:
        blocks = Bank(bank.features, device).blocks(PLAIN_ROWS, start, stop)
        return propose_by_blocks(queries.to(device), blocks, m, library(device))

    with ThreadPoolExecutor(len(devices)) as threads:
        found = list(threads.map(search, devices, edges[:-1], edges[1:]))
    values, indices = zip(*found, strict=True)
    return best_of([part.to(bank.device) for part in values], [part.to(bank.device) for part in indices], m)


def _faiss(device: torch.device) -> Nearest:
    """FAISS's exact search by inner product on ``device``, without the copy of the bank that an index makes.

    On a CPU it takes as many threads as torch.
    """
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT
    if device.type == "cuda":
        find = partial(faiss.knn_gpu, faiss.StandardGpuResources(), metric=metric, device=device.index or 0)
    else:
        find = partial(faiss.knn, metric=metric)

    def nearest(queries: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(torch.get_num_threads())  # which OpenMP keeps for each thread of Python apart
        with _wide_products():
            values, places = find(queries.cpu().numpy(), block.cpu().numpy(), k)
        return torch.from_numpy(values).to(device), torch.from_numpy(places).to(device)

    return nearest


@contextmanager
def _wide_products() -> Iterator[None]:
    """On a CPU FAISS multiplies with ``_FAISS_ROWS`` of the bank at once inside."""
    import faiss

    others = faiss.cvar.distance_compute_blas_database_bs
    faiss.cvar.distance_compute_blas_database_bs = _FAISS_ROWS
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_database_bs = others


def _torch(_device: torch.device) -> Nearest:
    return plain
