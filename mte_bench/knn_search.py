"""Candidates for the nearest neighbours: searches in float32, exact but for the rounding of similarities.

On a CPU nearly all of the time should go into the matrix product of queries and bank, so the similarities are looked at
once, while they are in the cache: the bank goes by in blocks, every query knows the similarity that it takes to be among
its best so far, and the largest of each group of similarities says whether any of the group is that good. Few are, and
they wait in a buffer beside the best until it is full; only then are they sorted. A block with many of them (the first
ones; a bank whose later rows are the better ones) is sorted as a whole.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mte_bench.knn_bank import Bank

QUERIES, ROWS = 1024, 4096  # one tile of the product: 16 MiB of similarities
GROUP = 16  # similarities that are compared as one; divides ROWS
_ROOM = 1024  # entrants that can wait, at least

PLAIN_ROWS = 1 << 16
_PLAIN_VALUES = 1 << 26  # similarities held at once by the plain search (256 MiB)

Propose = Callable[[Tensor, Bank, int], tuple[Tensor, Tensor]]
"""From queries (``q c``, unit length), the bank and m (at most its rows) to float32 similarities (``q m``, descending)
and the bank indices (``q m``); no row that is left out is more similar, in float32, than the last of the m."""

Nearest = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From queries (``q c``), a block of the bank and k (at most its rows) to similarities and places in the block (``q k``)."""


def propose(queries: Tensor, bank: Bank, m: int) -> tuple[Tensor, Tensor]:
    """The search that is the fastest on the bank's device without another library: a ``Propose``."""
    return (propose_in_tiles if bank.device.type == "cpu" else propose_plainly)(queries, bank, m)


def state_bytes(m: int) -> int:
    """What the search on a CPU keeps of each query."""
    return 8 * (m + max(_ROOM, 2 * m))


def propose_in_tiles(queries: Tensor, bank: Bank, m: int) -> tuple[Tensor, Tensor]:
    """The fast search on a CPU: a ``Propose``. It holds ``state_bytes(m)`` for each query."""
    best = _Best(len(queries), m)
    scores = torch.empty(QUERIES * ROWS)
    for start, block in bank.blocks(ROWS):
        width = -(-len(block) // GROUP) * GROUP
        for first, part in zip(range(0, len(queries), QUERIES), queries.split(QUERIES), strict=True):
            tile = scores[: len(part) * width].view(len(part), width)
            tile[:, len(block) :] = -math.inf
            torch.mm(part, block.T, out=tile[:, : len(block)])
            best.offer(first, tile, start)
    return best.sorted()


class _Best:
    """For each of ``q`` queries the best ``m`` so far, unordered, and behind them entrants that wait to be sorted."""

    def __init__(self, q: int, m: int):
        self.m, self.room = m, max(_ROOM, 2 * m)
        self.values = torch.full((q, m + self.room), -math.inf)
        self.indices = torch.zeros(q, m + self.room, dtype=torch.int32)
        self.filled = torch.zeros(q, dtype=torch.int64)
        self.threshold = torch.full((q,), -math.inf)  # the least of the best m when they were last sorted

    def offer(self, first: int, scores: Tensor, start: int) -> None:
        """Take what is needed of ``scores``: queries from ``first``, a multiple of ``GROUP`` bank rows from ``start``."""
        rows = slice(first, first + len(scores))
        grouped = scores.view(len(scores), GROUP, -1)  # a group's members lie apart, so that its maximum is taken in vectors
        enter = grouped.amax(1) > self.threshold[rows].unsqueeze(1)
        flooded = enter.sum(1) > self.room // GROUP
        if flooded.any():
            query = flooded.nonzero().squeeze(1)
            found = scores[query].topk(min(self.m, scores.shape[1]), dim=1)
            self._place(first + query, found.values, found.indices + start)
            enter[query] = False
        query, group = enter.nonzero(as_tuple=True)
        if len(query) == 0:
            return
        members = grouped[query, :, group]  # entering groups x GROUP
        which, member = (members > self.threshold[rows][query].unsqueeze(1)).nonzero(as_tuple=True)
        query = query[which]
        counts = query.bincount(minlength=len(scores))
        self._sort((self.filled[rows] + counts > self.values.shape[1]).nonzero().squeeze(1) + first)
        place = torch.arange(len(query)) - (counts.cumsum(0) - counts - self.filled[rows])[query]
        self.values[query + first, place] = members[which, member]
        self.indices[query + first, place] = (start + group[which] + member * grouped.shape[2]).int()
        self.filled[rows] += counts

    def _place(self, queries: Tensor, values: Tensor, indices: Tensor) -> None:
        """Sort in ``values`` and ``indices`` (each at most ``m`` a query)."""
        self._sort(queries)
        stop = self.m + values.shape[1]
        self.values[queries, self.m : stop], self.indices[queries, self.m : stop] = values, indices.int()
        self._sort(queries)

    def _sort(self, queries: Tensor) -> None:
        """Keep the best ``m`` of ``queries`` and set their thresholds."""
        if len(queries):
            kept = self.values[queries].topk(self.m, dim=1, sorted=False)
            self.indices[queries, : self.m] = self.indices[queries].gather(1, kept.indices)
            self.values[queries, : self.m], self.values[queries, self.m :] = kept.values, -math.inf
            self.filled[queries], self.threshold[queries] = self.m, kept.values.amin(1)

    def sorted(self) -> tuple[Tensor, Tensor]:
        """The best ``m`` of all queries, descending."""
        kept = self.values.topk(self.m, dim=1)
        return kept.values, self.indices.gather(1, kept.indices).long()


def propose_plainly(queries: Tensor, bank: Bank, m: int) -> tuple[Tensor, Tensor]:
    """Products with blocks of the bank and ``topk``: a ``Propose`` for any device, and the reference of the others."""
    return propose_by_blocks(queries, bank.blocks(PLAIN_ROWS), m, plain)


def plain(queries: Tensor, block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A product and ``topk``: a ``Nearest``."""
    found = [(part @ block.T).topk(k, dim=1) for part in queries.split(max(1, _PLAIN_VALUES // len(block)))]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def propose_by_blocks(
    queries: Tensor,
    blocks: Iterable[tuple[int, Tensor]],
    m: int,
    nearest: Nearest,
) -> tuple[Tensor, Tensor]:
    """Ask ``nearest`` (such as ``plain``) for the best of every block and keep the best ``m`` of all.

    ``blocks`` are as those of ``Bank``.
    """
    values = torch.empty(len(queries), 0, device=queries.device)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start, block in blocks:
        found = nearest(queries, block, min(m, len(block)))
        values, indices = best_of([values, found[0]], [indices, found[1] + start], m)
    return values, indices


def best_of(values: Sequence[Tensor], indices: Sequence[Tensor], m: int) -> tuple[Tensor, Tensor]:
    """The best ``m`` (or all, where they are fewer) of candidates found apart, each ``q ...``, descending."""
    all_values, all_indices = torch.cat(list(values), dim=1), torch.cat(list(indices), dim=1)
    kept = all_values.topk(min(m, all_values.shape[1]), dim=1)
    return kept.values, all_indices.gather(1, kept.indices)
