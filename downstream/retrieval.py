"""Retrieval: do an encoder's nearest images show the same class? Recall of the first few, mean average precision, a picture.

Every val image asks; the train images answer, or the other val images (leave-one-out). Features have unit length and are
compared by cosine similarity. An image that has no other of its class in the bank counts as not found.
"""

import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from downstream.neighbour_picture import Answers, draw_neighbours
from downstream.task import FeatureProtocol, Outcome, Predictions, Split, Task, TaskEstimate
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.errors import UserError
from mte_bench.knn_bank import Bank
from mte_bench.knn_vote import SPARE, refine

SHOWN = 6  # queries in the picture
SHOWN_NEIGHBOURS = 8
_BLOCK_VALUES = 1 << 25  # similarities held at once (float32: 128 MiB), and once more while they are sorted


class RetrievalProtocol(FeatureProtocol):
    """Settings of retrieval."""

    bank: Literal["train", "val"]
    """Where the answers come from: the train images, or the other val images."""
    recall: tuple[PositiveInt, ...] = Field(min_length=1)
    """Numbers of nearest images among which the class must be; the largest is how many neighbours are kept."""

    def require_images(self, train: int) -> None:
        """As many in the bank as neighbours are kept, where the train images are the bank."""
        if self.bank == "train":
            self.require_bank(train)

    def require_bank(self, count: int) -> None:
        """Raise ``UserError`` if a bank of ``count`` images holds too few neighbours."""
        if (k := max(self.recall)) > count:
            raise UserError(f"retrieval: recall {k} is more than the {count} images of the bank; set smaller values for recall")


class Retrieved(NamedTuple):
    """What the bank answers to each of ``q`` queries."""

    similarities: Tensor
    """``q k``, float64, nearest first; NaN where the bank has fewer images."""
    indices: Tensor
    """``q k``, rows of the bank; -1 where it has fewer."""
    average_precision: NDArray[np.float64]
    """``q``, of the whole bank in the order of similarity; 0 where no image of the class is in it."""


def retrieve(queries: Split, bank: Split, k: int, device: torch.device, itself: bool = False) -> Retrieved:
    """The ``k`` nearest images of ``bank`` for each of ``queries``, and the average precision of the whole ranking.

    With ``itself`` the bank consists of the queries, and none is an answer to itself. The order of the nearest is that of
    ``mte_bench.knn_vote``. Average precision is the mean, over the bank's images of the query's class, of the share of that
    class among all that are at least as similar (scikit-learn's ``average_precision_score``), so that equal similarities
    have no order. Needs memory for both sets of features in float32 and for some 128 MiB blocks.
    """
    asked = Bank(queries.features, device).rows(slice(None))
    among = Bank(queries.features if itself else bank.features, device)
    answers = asked if itself else among.rows(slice(None))
    members = {int(label): np.flatnonzero(bank.labels == label) for label in np.unique(queries.labels)}
    wanted = min(k + itself, len(answers))
    similarities, indices, precisions = [], [], []
    for start in range(0, len(asked), size := max(1, _BLOCK_VALUES // len(answers))):
        rows = np.arange(start, min(start + size, len(asked)))
        block = asked[start : start + size]
        products = block @ answers.T
        candidates = products.topk(min(wanted + SPARE, len(answers)), dim=1)
        nearest, chosen = (part.cpu() for part in refine(block, among, wanted, candidates.values, candidates.indices))
        if itself:
            nearest, chosen = _without(nearest, chosen, torch.from_numpy(rows), k)
            products[torch.arange(len(rows)), torch.from_numpy(rows)] = -torch.inf
        similarities.append(nearest)
        indices.append(chosen)
        precisions.append(_precisions(products, [members[int(label)] for label in queries.labels[rows]]))
    return Retrieved(torch.cat(similarities), torch.cat(indices), np.concatenate(precisions))


def _without(similarities: Tensor, indices: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first ``k`` neighbours (``q k+1``) that are not the query's own row; padded where there are no more."""
    other = indices != rows[:, None]
    order = other.int().sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = other.gather(1, order)
    return similarities.gather(1, order).where(kept, torch.nan), indices.gather(1, order).where(kept, -1)


def _precisions(products: Tensor, members: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Average precision of each row of similarities (``q n``; -inf is no candidate), given the places of its class.

    Only the ranks of the class's images are needed: a sort of the values and a look-up of few of them.
    """
    ranked = np.sort(products.cpu().numpy(), axis=1)  # values alone: several times as fast as with their places
    found = np.zeros(len(ranked))
    for row, places in enumerate(members):
        relevant = products[row, torch.from_numpy(places).to(products.device)].cpu().numpy()
        relevant = np.sort(relevant[relevant > -np.inf])
        if len(relevant):
            at_least = len(ranked[row]) - np.searchsorted(ranked[row], relevant)
            of_class = len(relevant) - np.searchsorted(relevant, relevant)
            found[row] = (of_class / at_least).mean()
    return found


def evaluate_retrieval(protocol: RetrievalProtocol, train: Split, val: Split, device: torch.device) -> Outcome:
    """``map`` and ``recall_K``; the neighbours' names, labels and similarities beside the predictions; the picture."""
    itself = protocol.bank == "val"
    bank = val if itself else train
    protocol.require_bank(len(bank.labels) - itself)
    found = retrieve(val, bank, max(protocol.recall), device, itself)
    indices = found.indices.numpy()
    labels = bank.labels[indices]  # q k
    hits = labels == val.labels[:, None]
    metrics = {}
    for count in sorted(set(protocol.recall)):
        hit = hits[:, :count].any(axis=1)
        metrics[f"recall_{count}"] = Predictions(np.where(hit, val.labels, labels[:, 0]), val.labels)
    others = np.bincount(bank.labels, minlength=len(bank.classes))[val.labels] - itself
    assert val.images is not None and bank.images is not None
    queries, images = val.images, bank.images
    answers = Answers(indices, found.similarities.numpy(), hits)

    def draw(path: Path, transform: EvaluationTransform, title: str) -> None:
        title = f"Nearest {protocol.bank} images by cosine similarity\n{title}"
        draw_neighbours(path, queries, images, answers, transform, title, SHOWN, SHOWN_NEIGHBOURS)

    return Outcome(
        metrics=metrics,
        details={
            "queries": "every val image",
            "bank": "train" if not itself else "val without the query itself",
            "queries_without_their_class_in_the_bank": int((others == 0).sum()),
        },
        scores={"map": found.average_precision},
        columns={
            "average_precision": found.average_precision,
            "neighbours": [[images.name(int(index)) for index in row] for row in indices],
            "neighbour_labels": list(labels),
            "similarities": list(answers.similarities),
        },
        draw=draw,
    )


def estimate_retrieval(
    protocol: RetrievalProtocol, train: int, val: int, width: int, classes: int, device: torch.device
) -> TaskEstimate:
    """From a small retrieval, measured on random features; the sort grows a little faster than the product."""
    count = train if protocol.bank == "train" else val
    bank, queries = min(count, 16_384), min(val, 64)
    generator = np.random.default_rng(0)
    names = tuple(map(str, range(classes)))
    split = Split(generator.standard_normal((bank, width)).astype(np.float32), np.arange(bank) % classes, names)
    asked = Split(split.features[:queries], split.labels[:queries], names)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        retrieve(asked, split, min(max(protocol.recall), bank), device)
        seconds = time.perf_counter() - began
    values = (count + val) * width + 2 * _BLOCK_VALUES
    growth = (count / bank) * (np.log(max(count, 2)) / np.log(max(bank, 2)))
    return TaskEstimate(float(seconds * growth * (val / queries)), 4 * values)


RETRIEVAL = Task("retrieval", RetrievalProtocol, "retrieval", evaluate_retrieval, estimate_retrieval)
