"""k-NN: how well the labels of the most similar training images name a validation image. Nothing is trained.

Features of unit length, cosine similarity with every image of the bank, DINO's weighted vote (``mte_bench.knn_vote``).
Source: DINO ``eval_knn.py``; MTE reports k = 10. With few images of each class: DINOv2 ``eval/knn.py``.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import Tensor

from downstream.feature_kinds import patches_taken
from downstream.kinds_picture import draw_kinds
from downstream.neighbours import MANY, proposer
from downstream.task import FeatureProtocol, Outcome, Predictions, Split, Task, TaskEstimate, top_metrics
from mte_bench.console import log
from mte_bench.encoders.encoder import Encoder
from mte_bench.errors import UserError
from mte_bench.knn_bank import Bank
from mte_bench.knn_search import state_bytes
from mte_bench.knn_vote import SPARE, search, vote
from mte_bench.settings import Settings

_BYTES = 1 << 30  # of queries in work: more of them are searched in turns
_VOTERS = 1 << 13  # queries whose votes are counted at once


class KNN:
    """Weighted k-nearest-neighbour classifier on features.

    Args:
        k: numbers of neighbours; all are answered from one search of the largest.
        temperature: each neighbour's vote weighs exp(cosine similarity / temperature); all are answered from that search.
        device: where the search runs; ``cuda`` is all visible devices, ``cuda:1`` that one.
        library: what searches, one of ``downstream.neighbours.LIBRARIES``; the neighbours do not depend on it.

    Attributes after ``fit``: ``bank_`` (a ``Bank`` of ``n`` rows), ``labels_`` (``n``), ``classes_`` (their number) and
    ``library_`` (the one that ``auto`` chose).

    >>> knn = KNN(k=(1,)).fit(np.eye(3, dtype="float32"), np.array([0, 1, 2]))
    >>> knn.predict(np.array([[0.1, 0.9, 0.2]], dtype="float32"))[1, 0.07][0]
    array([ 1, -1, -1])
    """

    def __init__(
        self,
        k: Sequence[int] = (10, 20, 100, 200),
        temperature: Sequence[float] = (0.07,),
        device: str | torch.device = "cpu",
        library: str = "auto",
    ):
        self.k = k
        self.temperature = temperature
        self.device = device
        self.library = library

    def fit(self, features: NDArray[np.floating], labels: NDArray[np.int64]) -> Self:
        """Take ``features`` (``n c``) with ``labels`` (``n``) as the bank.

        They are not copied but read, block by block, while a search goes on, so they may be a file mapped into memory.
        Raises ``UserError`` if they are fewer than a ``k``, or the library cannot search on the device.
        """
        if max(self.k) > len(features):
            raise UserError(
                f"k-NN: k {max(self.k)} is more than the {len(features)} images of the bank; set smaller values for k"
            )
        self.bank_ = Bank(features, self.device)
        self.labels_ = torch.from_numpy(np.array(labels, dtype=np.int64))
        self.classes_ = int(self.labels_.max()) + 1
        self.library_, self._propose = proposer(self.library, torch.device(self.device), max(self.k) + SPARE)
        return self

    def neighbours(self, features: NDArray[np.floating]) -> tuple[Tensor, Tensor]:
        """Similarities and bank indices of the largest ``k`` for each of ``features`` (``q c``), nearest first, each ``q k``."""
        similarities, indices = zip(*self._searched(features), strict=True)
        return torch.cat(similarities), torch.cat(indices)

    def predict(self, features: NDArray[np.floating]) -> dict[tuple[int, float], NDArray[np.int64]]:
        """For each ``k`` and temperature, the classes of ``features`` (``q c``) by votes: ``q 5``, -1 where none has any left."""
        ranked: dict[tuple[int, float], list[Tensor]] = {key: [] for key in product(self.k, self.temperature)}
        for found in self._searched(features):
            for similarities, indices in zip(*(part.cpu().split(_VOTERS) for part in found), strict=True):
                for temperature in self.temperature:
                    votes = vote(similarities, self.labels_[indices], self.classes_, self.k, temperature)
                    for k, classes in votes.items():
                        ranked[k, temperature].append(classes)
        return {key: torch.cat(parts).numpy() for key, parts in ranked.items()}

    def _searched(self, features: NDArray[np.floating]) -> Iterator[tuple[Tensor, Tensor]]:
        """``neighbours`` of as many queries at a time as fit into the memory that is set aside for them."""
        k, size = max(self.k), max(1, _BYTES // _query_bytes(max(self.k)))
        for start in range(0, len(features), size):
            queries = torch.from_numpy(np.array(features[start : start + size]))
            yield search(queries, self.bank_, k, self._propose)


def _query_bytes(k: int) -> int:
    """What a search holds of each query: the state of the search, then candidates with similarities, order and keys."""
    return state_bytes(k + SPARE) + 40 * (k + SPARE)


class FewShot(Settings):
    """Banks of a few train images of each class, drawn at random. Source: DINOv2 ``eval/knn.py``."""

    per_class: tuple[PositiveInt, ...] = Field(min_length=1)
    """Images of each class; a class that has fewer gives all."""
    draws: PositiveInt
    """Banks of each size."""
    seed: NonNegativeInt


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


class KNNProtocol(FeatureProtocol):
    """Settings of k-NN."""

    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_as_list)]
    """One number of neighbours, or a list; those larger than the bank are left out, with a remark."""
    temperature: Annotated[tuple[PositiveFloat, ...], Field(min_length=1), BeforeValidator(_as_list)]
    """One, or a list: all are reported, each metric then named with its temperature."""
    few_shot: FewShot | None = None
    """In place of the whole bank. Of k, those up to the images per class are taken, and that number itself."""

    @property
    def compares_kinds(self) -> bool:
        """Each kind is evaluated by itself."""
        return True

    def require_images(self, train: int) -> None:
        """The bank holds the neighbours of the smallest ``k``; few-shot banks choose their own."""
        if not self.few_shot and min(self.k) > train:
            raise UserError(f"the bank has {train} images, fewer than the smallest k; use more, or --set k={train}")

    def kinds(self, encoder: Encoder) -> tuple[str, ...]:
        """As for any protocol; of several kinds, those that take more patches than an image has are left out."""
        kinds = super().kinds(encoder)
        if len(kinds) == 1:
            return kinds
        patches = math.prod(encoder.patch_grid(encoder.spec.side))
        return tuple(kind for kind in kinds if patches_taken(kind) <= patches)

    @model_serializer(mode="wrap")
    def _as_in_a_file(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """One temperature as a number, and nothing about few-shot banks where there are none."""
        values = write(self)
        if len(self.temperature) == 1:
            values["temperature"] = self.temperature[0]
        if self.few_shot is None:
            values.pop("few_shot", None)
        return values

    def for_smoke(self) -> Self:
        """One draw of each few-shot bank."""
        return self.model_copy(update={"few_shot": self.few_shot and self.few_shot.model_copy(update={"draws": 1})})


def evaluate_knn(protocol: KNNProtocol, train: Split, val: Split, device: torch.device) -> Outcome:
    """Top-1 and top-5 of the val split for each ``k`` and temperature, on the whole bank or on few-shot banks."""
    if protocol.few_shot:
        return _evaluate_few_shot(protocol, protocol.few_shot, train, val, device)
    protocol.require_images(len(train.labels))
    k = [k for k in protocol.k if k <= len(train.labels)]
    left_out = [k for k in protocol.k if k > len(train.labels)]
    if left_out:
        log(f"k = {', '.join(map(str, left_out))} left out: the bank has {len(train.labels)} images")
    knn = KNN(k, protocol.temperature, device).fit(train.features, train.labels)
    return Outcome(_metrics(knn, val, len(train.classes)), {"k_larger_than_bank": left_out, "searched_by": knn.library_})


def _metrics(knn: KNN, val: Split, classes: int, prefix: str = "", suffix: str = "") -> dict[str, Predictions]:
    """``top1_k10``, or of several temperatures ``top1_k10_t0.07``, and so on."""
    metrics: dict[str, Predictions] = {}
    for (k, temperature), ranked in knn.predict(val.features).items():
        name = f"{prefix}_k{k}" + (f"_t{temperature:g}" if len(knn.temperature) > 1 else "")
        metrics |= top_metrics(ranked, val.labels, classes, name + suffix)
    return metrics


def _evaluate_few_shot(protocol: KNNProtocol, few: FewShot, train: Split, val: Split, device: torch.device) -> Outcome:
    """Every draw by itself (``top1_n5_k5_draw0``); mean and standard deviation over draws (n - 1) among the details."""
    metrics: dict[str, Predictions] = {}
    for n in few.per_class:
        for draw in range(few.draws):
            bank = draw_bank(train.labels, n, np.random.default_rng([few.seed, n, draw]))
            k = sorted({k for k in (*protocol.k, n) if k <= min(n, len(bank))})
            knn = KNN(k or [len(bank)], protocol.temperature, device).fit(train.features[bank], train.labels[bank])
            metrics |= _metrics(knn, val, len(train.classes), f"_n{n}", f"_draw{draw}")
    accuracy: dict[str, list[float]] = {}
    for name, result in metrics.items():
        accuracy.setdefault(name.rpartition("_draw")[0], []).append(100 * float(result.correct.mean()))
    over_draws = {
        name: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        for name, values in accuracy.items()
    }
    for name, found in over_draws.items():
        spread = "one draw" if found["sd"] is None else f"sd {found['sd']:.2f} over {few.draws} draws"
        log(f"{name}: mean {found['mean']:.2f}, {spread}")
    counts = np.unique(train.labels, return_counts=True)[1]
    short = {str(n): int((counts < n).sum()) for n in few.per_class if (counts < n).any()}
    for size, fewer in short.items():
        log(f"{fewer} classes have fewer than {size} images and give all of them")
    details = {"over_draws": over_draws, "draws": few.draws, "classes_with_fewer": short, "searched_by": knn.library_}
    return Outcome(metrics, details)


def draw_bank(labels: NDArray[np.int64], n: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """``n`` random images of every class in ``labels`` (all, where it has fewer): their indices, ascending."""
    order = np.lexsort((generator.random(len(labels)), labels))  # shuffled within each class
    sorted_labels = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(order[place < n])


def estimate_knn(protocol: KNNProtocol, train: int, val: int, width: int, classes: int, device: torch.device) -> TaskEstimate:
    """From a small search, measured on random features; a bank that is a file in memory is not counted."""
    searches = [train]
    if few := protocol.few_shot:
        searches = [min(train, n * classes) for n in few.per_class] * few.draws
    bank, queries = min(max(searches), 1 << 16), min(val, MANY)
    generator = np.random.default_rng(0)
    k = [k for k in protocol.k if k <= bank] or [bank]
    features = generator.standard_normal((bank, width), dtype=np.float32)
    knn = KNN(k, protocol.temperature, device).fit(features, np.arange(bank) % classes)
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        knn.predict(generator.standard_normal((queries, width), dtype=np.float32))
        seconds = time.perf_counter() - began
    held = min(_BYTES, val * _query_bytes(max(k))) + 4 * val * width
    return TaskEstimate(seconds * (sum(searches) / bank) * (val / queries), held)


def evaluate_kinds(protocol: KNNProtocol, splits: dict[str, tuple[Split, Split]], device: torch.device) -> Outcome:
    """As ``evaluate_knn`` for each kind of feature, whose name ends those of its metrics; with a picture of the first ``k``."""
    metrics: dict[str, Predictions] = {}
    details: dict[str, Any] = {}
    for kind, (train, val) in splits.items():
        outcome = evaluate_knn(protocol, train, val, device)
        metrics |= {f"{name}_{kind}": found for name, found in outcome.metrics.items()}
        details[kind] = outcome.details
    asked = [kind.strip() for kind in protocol.feature.split(",")]
    if left_out := [kind for kind in asked if kind not in splits]:
        log(f"left out, as images have fewer patches: {', '.join(left_out)}")
    first = {kind: next(found for name, found in metrics.items() if name.endswith(f"_{kind}")) for kind in splits}
    top1 = {kind: 100 * float(found.correct.mean()) for kind, found in first.items()}
    return Outcome(metrics, {"kinds": details, "kinds_left_out": left_out}, draw=partial(draw_kinds, top1, protocol.k[0]))


KNN_TASK = Task("knn", KNNProtocol, "knn", evaluate_knn, estimate_knn, evaluate_kinds=evaluate_kinds)
