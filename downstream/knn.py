"""k-NN: how well the labels of the most similar training images name a validation image. Nothing is trained.

Features of unit length, cosine similarity with every image of the bank, DINO's weighted vote (``mte_bench.knn_vote``).
Source: DINO ``eval_knn.py``; MTE reports k = 10.
"""

import time
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from downstream.task import FeatureProtocol, Outcome, Predictions, Split, Task, TaskEstimate, top_metrics
from mte_bench.console import log
from mte_bench.errors import UserError
from mte_bench.knn_vote import SPARE, normalise, refine, search, vote


class KNN:
    """Weighted k-nearest-neighbour classifier on features.

    Args:
        k: numbers of neighbours; all are answered from one search of the largest.
        temperature: each neighbour's vote weighs exp(cosine similarity / temperature).
        device: where the search runs: FAISS on ``cpu``; on ``cuda`` FAISS's GPU build where it is installed, else torch.

    Attributes after ``fit``: ``bank_`` (``n c``, unit length), ``labels_`` (``n``), ``classes_`` (their number).

    >>> knn = KNN(k=(1,)).fit(np.eye(3, dtype="float32"), np.array([0, 1, 2]))
    >>> knn.predict(np.array([[0.1, 0.9, 0.2]], dtype="float32"))[1][0]
    array([ 1, -1, -1])
    """

    def __init__(self, k: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07, device: str | torch.device = "cpu"):
        self.k = k
        self.temperature = temperature
        self.device = device

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """Keep ``features`` (``n c``) and ``labels`` (``n``) as the bank; raises ``UserError`` if it is smaller than a ``k``."""
        if max(self.k) > len(features):
            raise UserError(
                f"k-NN: k {max(self.k)} is more than the {len(features)} images of the bank; set smaller values for k"
            )
        self.bank_ = normalise(torch.from_numpy(np.array(features)).to(self.device))
        self.labels_ = torch.from_numpy(np.array(labels, dtype=np.int64))
        self.classes_ = int(self.labels_.max()) + 1
        return self

    def neighbours(self, features: NDArray[np.floating]) -> tuple[Tensor, Tensor]:
        """Similarities and bank indices of the largest ``k`` for each of ``features`` (``q c``), nearest first, each ``q k``."""
        queries, k = normalise(torch.from_numpy(np.array(features)).to(self.device)), max(self.k)
        candidates = _faiss(queries, self.bank_, min(k + SPARE, len(self.bank_)))
        return search(queries, self.bank_, k) if candidates is None else refine(queries, self.bank_, k, *candidates)

    def predict(self, features: NDArray[np.floating]) -> dict[int, NDArray[np.int64]]:
        """For each of ``k``, the classes of ``features`` (``q c``) by votes: ``q 5``, -1 where no class has any left."""
        similarities, indices = self.neighbours(features)
        ranked = vote(similarities, self.labels_[indices.cpu()], self.classes_, self.k, self.temperature)
        return {k: ranked[k].numpy() for k in self.k}


def _faiss(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """FAISS's exact search by inner product, without the copy of the bank that ``IndexFlatIP`` makes; None if it cannot."""
    import faiss

    arguments = queries.cpu().numpy(), bank.cpu().numpy(), k
    if queries.device.type == "cpu":
        found = faiss.knn(*arguments, metric=faiss.METRIC_INNER_PRODUCT)
    elif queries.device.type == "cuda" and hasattr(faiss, "knn_gpu") and faiss.get_num_gpus() > 0:
        found = faiss.knn_gpu(
            faiss.StandardGpuResources(), *arguments, metric=faiss.METRIC_INNER_PRODUCT, device=queries.device.index or 0
        )
    else:
        return None
    return torch.from_numpy(found[0]).to(queries.device), torch.from_numpy(found[1]).to(queries.device)


class KNNProtocol(FeatureProtocol):
    """Settings of k-NN."""

    k: tuple[PositiveInt, ...] = Field(min_length=1)
    """Numbers of neighbours; those larger than the bank are left out, with a remark."""
    temperature: float = Field(gt=0)


def evaluate_knn(protocol: KNNProtocol, train: Split, val: Split, device: torch.device) -> Outcome:
    """Top-1 and top-5 of the val split for each ``k`` that the bank is large enough for."""
    k = [k for k in protocol.k if k <= len(train.labels)]
    left_out = [k for k in protocol.k if k > len(train.labels)]
    if not k:
        raise UserError(
            f"the bank has {len(train.labels)} images, fewer than the smallest k; use more, or --set k=[{len(train.labels)}]"
        )
    if left_out:
        log(f"k = {', '.join(map(str, left_out))} left out: the bank has {len(train.labels)} images")
    knn = KNN(k, protocol.temperature, device).fit(train.features, train.labels)
    metrics: dict[str, Predictions] = {}
    for count, ranked in knn.predict(val.features).items():
        metrics |= top_metrics(ranked, val.labels, len(train.classes), f"_k{count}")
    return Outcome(metrics, {"k_larger_than_bank": left_out})


def estimate_knn(protocol: KNNProtocol, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
    """From a small search, measured on random features."""
    bank, queries = min(train, 16_384), min(val, 256)
    generator = np.random.default_rng(0)
    k = [k for k in protocol.k if k <= bank] or [bank]
    knn = KNN(k, protocol.temperature, device).fit(generator.standard_normal((bank, width)), np.arange(bank) % classes)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        knn.predict(generator.standard_normal((queries, width)))
        seconds = time.perf_counter() - began
    values = (train + val) * width + 3 * val * (max(k) + SPARE)
    return TaskEstimate(seconds * (train / bank) * (val / queries), 4 * values)


KNN_TASK = Task("knn", KNNProtocol, "knn", evaluate_knn, estimate_knn)
