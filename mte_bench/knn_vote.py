"""k-nearest neighbours: the exact search and DINO's weighted vote, for the evaluation and for a look during training.

The order of neighbours is defined once, whatever finds them: by cosine similarity in float64 rounded to ten decimals,
and among equals by the place in the bank. A fast search in float32 proposes candidates with some to spare; their
similarities are computed again in float64, and where a candidate that was left out could still belong to the nearest
(duplicates, a collapsed encoder) the query is compared with the whole bank. So a result depends on neither the
library, the device nor the block size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SPARE = 32  # candidates beyond k, so that a whole-bank comparison is rarely needed
DECIMALS = 1e10
_BLOCK_VALUES = 1 << 25  # similarities held at once (float32: 128 MiB)


def normalise(features: Tensor) -> Tensor:
    """Rows of ``features`` (``n c``) with unit length, float32; a zero row stays zero."""
    return F.normalize(features.float(), dim=1)


def search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest rows of ``bank`` (``n c``) for each of ``queries`` (``q c``), both of unit length, one device.

    Returns similarities (``q k``, float64, descending) and bank indices (``q k``); ``k`` is at most ``n``.
    """
    if queries.device.type == "mps":  # has no float64
        queries, bank = queries.cpu(), bank.cpu()
    size = max(1, _BLOCK_VALUES // len(bank))
    found = []
    for block in queries.split(size):
        candidates = (block @ bank.T).topk(min(k + SPARE, len(bank)), dim=1)
        found.append(refine(block, bank, k, candidates.values, candidates.indices))
    similarities, indices = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(indices)


def refine(queries: Tensor, bank: Tensor, k: int, similarities: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest among the candidates of a float32 search (``q m``, descending), in the defined order.

    Falls back to the whole bank for queries whose candidates are not certain to include the nearest ``k``.
    """
    exact = torch.empty(indices.shape, dtype=torch.float64, device=queries.device)
    for start in range(0, len(queries), size := max(1, _BLOCK_VALUES // (8 * indices.shape[1] * queries.shape[1]))):
        rows = slice(start, start + size)
        exact[rows] = torch.bmm(bank[indices[rows]].double(), queries[rows].double().unsqueeze(2)).squeeze(2)
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
        order = votes.sort(dim=1, descending=True, stable=True)
        ranked[stop] = order.indices[:, :5].masked_fill(order.values[:, :5] == 0, -1)
        start = stop
    return ranked


def _first(exact: Tensor, indices: Tensor, k: int, n: int) -> tuple[Tensor, Tensor]:
    """The first ``k`` of each row by (rounded similarity, bank index), as one integer key that has no ties."""
    rounded = (exact * DECIMALS).round().long()
    order = (rounded * n - indices).topk(k, dim=1).indices
    return rounded.gather(1, order).double() / DECIMALS, indices.gather(1, order)


def _whole_bank(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``refine`` with every row of the bank a candidate."""
    n, size = len(bank), max(1, _BLOCK_VALUES // len(bank))
    found = []
    for block in queries.double().split(size):
        exact = torch.cat([block @ part.double().T for part in bank.split(1 << 16)], dim=1)
        found.append(_first(exact, torch.arange(n, device=bank.device).expand(len(block), n), k, n))
    similarities, indices = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(indices)
