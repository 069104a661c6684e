"""What each token knows by itself and together with others: k-NN accuracy, for the analyses of tokens."""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat
from torch import Tensor

from downstream.analysis.study import LookupProtocol, Prepared, Seen
from downstream.evaluate import joined
from downstream.knn import KNN
from downstream.linear.ridge import RidgeProbe
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.errors import UserError
from mte_bench.knn_bank import normalise

Floats = NDArray[np.floating]

GLOBAL = "global"

Classify = Callable[[Sequence[int]], NDArray[np.int64]]
"""From the places of some tokens to the classes ``n`` that their features give the val images."""


class NeighbourProtocol(LookupProtocol):
    """Settings of analyses that ask the nearest train images."""

    k: int = Field(gt=0)
    temperature: float = Field(gt=0)


class ProbesProtocol(NeighbourProtocol):
    """Settings of analyses that ask a ridge probe too; ``RidgeProbe`` says what they mean."""

    penalties: tuple[PositiveFloat, ...] = Field(min_length=1)
    held_out: float = Field(gt=0, lt=1)
    seed: int = Field(ge=0)


def prepare_tokens(protocol: LookupProtocol, checkpoint: Checkpoint) -> Prepared:
    """The global and the auxiliary tokens, each ``b c``; of an encoder without auxiliary ones, the mean patch instead."""
    multi_token = checkpoint.multi_token()
    if multi_token is None:
        encoder = checkpoint.encoder

        def kept(images: Tensor) -> list[Tensor]:
            tokens = encoder(images)
            return [tokens.global_token, tokens.patches.mean(1)]

        return Prepared(encoder, kept, (GLOBAL, "mean patch"))

    def every(images: Tensor) -> list[Tensor]:
        tokens, auxiliary = multi_token(images)
        return [tokens.global_token, *auxiliary.unbind(1)]

    return Prepared(multi_token, every, (GLOBAL, *multi_token.names))


def sets_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Which tokens are asked together: each kind of auxiliary token of which there are several, and all of them."""
    places = {kind: [i for i, name in enumerate(names) if name.startswith(kind)] for kind in ("CLS", "pooled")}
    sets = {f"all {kind}": members for kind, members in places.items() if len(members) > 1}
    auxiliary = [*places["CLS"], *places["pooled"]]
    if len(sets) > 1 or (not sets and len(auxiliary) > 1):
        sets["all auxiliary"] = auxiliary
    if auxiliary:
        sets["all tokens"] = list(range(len(names)))
    return sets


def predictions(protocol: NeighbourProtocol, seen: Seen, members: Sequence[int]) -> NDArray[np.int64]:
    """The classes ``n`` that k-NN gives the val images, by the features of ``members`` side by side, each of unit length."""
    assert seen.bank is not None
    if protocol.k > len(seen.bank.labels):
        raise UserError(f"k {protocol.k}: the bank has {len(seen.bank.labels)} images; set a smaller k or a larger bank")
    knn = KNN((protocol.k,), (protocol.temperature,), torch.device("cpu"))
    knn.fit(joined([seen.bank.arrays[place] for place in members]), seen.bank.labels)
    return knn.predict(joined([seen.arrays[place] for place in members]))[protocol.k, protocol.temperature][:, 0]


class TokenRidge:
    """Ridge probes of any set of tokens from one pass over the train images.

    The Gram matrix of a set is a block of that of all tokens, so that a pair costs two small decompositions. Every token
    has unit length, as in ``predictions``: a token that is smaller than another is not penalised for it.

    Attributes: ``at_edge_``, how many of the sets asked so far chose the smallest or the largest penalty.
    """

    def __init__(self, protocol: ProbesProtocol, seen: Seen):
        assert seen.bank is not None
        self.probe = RidgeProbe(protocol.penalties, held_out=protocol.held_out, seed=protocol.seed)
        widths = [array.shape[1] for array in seen.arrays]
        self.columns = list(torch.arange(sum(widths)).split(widths))
        self.asked = _side_by_side(seen.arrays)
        self.halves = self.probe.halves(_side_by_side(seen.bank.arrays), seen.bank.labels)
        self.at_edge_ = 0

    def predictions(self, members: Sequence[int]) -> NDArray[np.int64]:
        """The classes ``n`` that the probe of ``members`` gives the val images."""
        columns = torch.cat([self.columns[place] for place in members])
        self.probe.solve(self.halves.of(columns))
        self.at_edge_ += self.probe.chosen_ in (min(self.probe.penalties), max(self.probe.penalties))
        return self.probe.predict(self.asked[:, columns.numpy()])[:, 0]


def _side_by_side(tokens: Sequence[Floats]) -> Floats:
    return np.concatenate([normalise(torch.from_numpy(token)).numpy() for token in tokens], axis=1)


def by_class(right: NDArray[np.bool_], labels: NDArray[np.int64], classes: int) -> Floats:
    """Accuracy in percent of each class (``classes``), NaN for one without images; ``right`` and ``labels`` are ``n``."""
    counts = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, weights=right, minlength=classes)
    return np.divide(100 * hits, counts, out=np.full(classes, np.nan), where=counts > 0)


def wins(accuracy: Floats) -> Floats:
    """In how many classes each row of ``accuracy`` (``t classes``) is the best; rows that tie share the class."""
    known = accuracy[:, ~np.isnan(accuracy).any(axis=0)]
    best = known == known.max(axis=0)
    return (best / best.sum(axis=0)).sum(axis=1)


def pairs_of(count: int) -> list[tuple[int, int]]:
    """All pairs of different tokens."""
    return list(combinations(range(count), 2))
