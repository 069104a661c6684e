"""k-nearest neighbours: the exact search and DINO's weighted vote, for the evaluation and for a look during training.

The order of neighbours is defined once, whatever finds them: by cosine similarity in float64 rounded to ten decimals,
and among equals by the place in the bank. A fast search in float32 proposes candidates with some to spare; their
similarities are computed again in float64, and where a candidate that was left out could still belong to the nearest
(duplicates, a collapsed encoder) the query is compared with the whole bank. So a result depends on neither the
library, the device nor the block size. Nothing here needs the bank in memory: it is read in blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mte_bench.knn_bank import Bank, normalise
from mte_bench.knn_search import Propose, propose

SPARE = 32  # candidates beyond k, so that a whole-bank comparison is rarely needed
DECIMALS = 1e10
_PAIR_VALUES = 1 << 18  # of the features compared in float64 at once (2 MiB of each side: more fall out of the cache)
_BLOCK_VALUES = 1 << 23  # similarities in float64 held at once (64 MiB)
_WHOLE_ROWS = 1 << 13


def search(queries: Tensor, bank: Bank, k: int, propose: Propose = propose) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of ``bank`` for each of ``queries`` (``q c``, of any length and on any device).

    Returns, on the bank's device, cosine similarities (``q k``, float64, descending) and bank indices (``q k``); ``k`` is at
    most the rows of the bank. ``propose`` finds the candidates; the result does not depend on it.
    """
    queries = normalise(queries.cpu()).to(bank.device)
    return refine(queries, bank, k, *propose(queries, bank, min(k + SPARE, len(bank))))


def refine(queries: Tensor, bank: Bank, k: int, similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest among the candidates of a float32 search (``q m``, descending), in the defined order.

    ``queries`` (``q c``) have unit length. Falls back to the whole bank for those whose candidates are not certain to include
    the nearest ``k``.
    """
    exact = _cosines(queries, bank, indices)
    nearest, chosen = _first(exact, indices, k, len(bank))
    if indices.shape[1] < len(bank):
        error = 2 * float((exact - similarities).abs().max()) + 1e-7  # of the float32 search, as seen on these candidates
        unsure = nearest[:, -1] <= similarities[:, -1] + error
        if unsure.any():
            nearest[unsure], chosen[unsure] = _whole_bank(queries[unsure], bank, k)
    return nearest, chosen


def vote(similarities: Tensor, labels: Tensor, classes: int, k: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """DINO's weighted vote: each of the nearest ``k`` gives its class exp(similarity / temperature).

    ``similarities`` and ``labels`` (of the neighbours) are ``q m`` with the nearest first. Returns, for each of ``k``
    (at most ``m``), the classes by votes: ``q 5`` (or as many as there are classes), equal votes by class index. A
    class without any vote is not ranked: its place holds -1. Source: DINO ``eval_knn.py``, where the order of equal
    votes and of classes without one is left to the sort.
    """
    weights, labels = (similarities.double().cpu() / temperature).exp(), labels.cpu()
    ranked, start = {}, 0
    votes = torch.zeros(len(labels), classes, dtype=torch.float64)
    for stop in sorted(set(k)):
        votes.scatter_add_(1, labels[:, start:stop], weights[:, start:stop])
        ranked[stop] = _winners(votes, min(5, classes))
        start = stop
    return ranked


def _winners(votes: Tensor, count: int) -> Tensor:
    """The ``count`` classes with most votes (``q count``); ``topk`` would leave the order of equal ones open."""
    votes, winners = votes.clone(), []
    for _ in range(count):
        most = votes.max(dim=1, keepdim=True)  # the first of equals
        winners.append(most.indices.masked_fill(most.values <= 0, -1))
        votes.scatter_(1, most.indices, -1.0)
    return torch.cat(winners, dim=1)


def _cosines(queries: Tensor, bank: Bank, indices: Tensor) -> Tensor:
    """Similarities of each query (``q c``) with its candidates (``q m`` bank indices) in float64: ``q m``.

    The bank is gone through once from its start to its end, as a bank in a file wants it.
    """
    m = indices.shape[1]
    exact = torch.empty(indices.numel(), dtype=torch.float64, device=queries.device)
    ascending = indices.flatten().sort()
    size = max(1, _PAIR_VALUES // queries.shape[1])
    for rows, pairs in zip(ascending.values.split(size), ascending.indices.split(size), strict=True):
        distinct, place = rows.unique_consecutive(return_inverse=True)
        found = bank.rows(distinct.cpu()).double().index_select(0, place)
        exact[pairs] = torch.linalg.vecdot(found, queries.index_select(0, pairs // m).double())
    return exact.view_as(indices)


def _keys(exact: Tensor, indices: Tensor, n: int) -> Tensor:
    """Rounded similarity and bank index (of ``n``) as one integer without ties: the larger, the nearer."""
    return (exact * DECIMALS).round().long() * n - indices


def _first(exact: Tensor, indices: Tensor, k: int, n: int) -> tuple[Tensor, Tensor]:
    """The first ``k`` of each row in the defined order."""
    return _unpack(_keys(exact, indices, n).topk(k, dim=1).values, n)


def _unpack(keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Similarities and bank indices again."""
    rounded = -(-keys).div(n, rounding_mode="floor")
    return rounded.double() / DECIMALS, rounded * n - keys


def _whole_bank(queries: Tensor, bank: Bank, k: int) -> tuple[Tensor, Tensor]:
    """As ``refine`` with every row of the bank a candidate."""
    n = len(bank)
    nearest = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)  # keys
    size = max(1, _BLOCK_VALUES // _WHOLE_ROWS)
    for start, block in bank.blocks(_WHOLE_ROWS):
        rows, place = block.double().T, start + torch.arange(len(block), device=queries.device)
        kept = min(k, nearest.shape[1] + len(block))
        nearest = torch.cat(
            [
                torch.cat([best, _keys(part.double() @ rows, place, n)], dim=1).topk(kept, dim=1).values
                for best, part in zip(nearest.split(size), queries.split(size), strict=True)
            ]
        )
    return _unpack(nearest, n)
