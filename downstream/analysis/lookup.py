"""What each token knows by itself and together with others: k-NN accuracy, for the analyses of tokens."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from downstream.analysis.study import LookupProtocol, Prepared, Seen
from downstream.evaluate import joined
from downstream.knn import KNN
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.errors import UserError

Floats = NDArray[np.floating]

GLOBAL = "global"


class NeighbourProtocol(LookupProtocol):
    """Settings of analyses that ask the nearest train images."""

    k: int = Field(gt=0)
    temperature: float = Field(gt=0)


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
