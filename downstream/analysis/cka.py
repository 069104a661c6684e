"""How alike two tokens see the same images: linear CKA between all pairs of tokens, exact and by minibatches.

Linear CKA (Kornblith et al., 2019, arXiv 1905.00414) compares what two sets of features say about which images are
alike. It is 1 for features that differ by a rotation and a scale. The exact value over n images is biased upwards:
independent features of width c give about c / (n + c), not 0. The minibatch estimator (Nguyen, Raghu and Kornblith,
2021, arXiv 2010.15327) averages the unbiased HSIC of Song et al. (2012) and has no such floor. Both are reported,
with the largest difference between them.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from downstream.analysis.pairs_map import draw_pairs
from downstream.analysis.study import Analysis, AnalysisProtocol, Outcome, Prepared, Seen, rounded
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.errors import UserError
from mte_bench.records import Metric

Floats = NDArray[np.floating]

GLOBAL = "global"


def linear_cka(features: Sequence[Floats]) -> Floats:
    """Linear CKA of every pair of t feature sets, each (n, c_t) over the same n images, as a (t, t) matrix in [0, 1].

    With centred X and Y: ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), in float64. Each set is multiplied once with all sets
    stacked, so that no more than c_t times the sum of the widths is held.
    """
    centred = [_centre(x) for x in features]
    stacked = np.concatenate(centred, axis=1)  # n, sum of the widths
    starts = np.cumsum([0, *(x.shape[1] for x in centred)])[:-1]
    cross = np.empty((len(centred), len(centred)))
    for index, x in enumerate(centred):
        product = x.T @ stacked[:, starts[index] :]
        squares = np.einsum("ij,ij->j", product, product)
        cross[index, index:] = cross[index:, index] = np.add.reduceat(squares, starts[index:] - starts[index])
    return _normalise(cross)


def minibatch_cka(features: Sequence[Floats], batch: int = 256, passes: int = 10, seed: int = 0) -> Floats:
    """The minibatch estimate of linear CKA of every pair of t feature sets (n, c_t), as a (t, t) matrix.

    Each pass shuffles the images and cuts them into whole batches (one batch of all n, once, where n is smaller);
    the unbiased HSIC is averaged over batches and passes before numerator is divided by denominator. Values may be
    a little below 0 for unrelated tokens. Raises ``UserError`` where there are too few images for an estimate.
    """
    centred = [_centre(x) for x in features]  # HSIC_1 does not change, rounding does
    n = len(centred[0])
    if n < 4:
        raise UserError(f"CKA of {n} images: the unbiased estimator needs 4 at least; raise --count or use more images")
    generator = np.random.default_rng(seed)
    batch, passes = (n, 1) if n <= batch else (batch, passes)
    total = np.zeros((len(centred), len(centred)))
    for _ in range(passes):
        order = generator.permutation(n)
        for chosen in order[: n - n % batch].reshape(-1, batch):
            total += unbiased_hsic([x[chosen] for x in centred])
    if (np.diag(total) <= 0).any():
        raise UserError(f"CKA of {n} images: too few for the unbiased estimator; raise --count or use more images")
    return _normalise(total)


def unbiased_hsic(features: Sequence[Floats]) -> Floats:
    """HSIC_1 with linear kernels of every pair of t feature sets (n, c_t), n >= 4, as a (t, t) matrix.

    With K and L whose diagonals are set to 0: (tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1) / (n(n-3)).
    Source: Song et al. (2012), equation 5.
    """
    kernels = np.stack([x @ x.T for x in features])  # t, n, n
    count, n, _ = kernels.shape
    kernels[:, range(n), range(n)] = 0
    flat, rows = kernels.reshape(count, n * n), kernels.sum(axis=2)
    sums = rows.sum(axis=1)
    return (flat @ flat.T + np.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def mean_between(matrix: Floats, rows: Sequence[int], columns: Sequence[int] | None = None) -> float:
    """The mean of ``matrix`` over ``rows`` x ``columns``; without ``columns``, over the pairs of different ``rows``."""
    if columns is not None:
        return float(matrix[np.ix_(rows, columns)].mean())
    inner = matrix[np.ix_(rows, rows)]
    return float(inner[~np.eye(len(rows), dtype=bool)].mean())


def refuse_constant(features: Sequence[Floats], names: Sequence[str]) -> None:
    """Raise ``UserError`` for a token that is the same for every image, to float32's rounding: its CKA is undefined."""
    for name, x in zip(names, features, strict=True):
        if np.linalg.norm(_centre(x)) <= 1e-6 * np.linalg.norm(x.astype(np.float64)):
            raise UserError(f"token '{name}': the same for every image, so its CKA is undefined; the encoder has collapsed")


class CKAProtocol(AnalysisProtocol):
    """Settings of CKA."""

    between: Literal["auto", "tokens", "layers"]
    """The global and the auxiliary tokens, or the global token after each block; ``auto`` takes tokens where there are
    auxiliary ones."""
    minibatch: int = Field(ge=4)
    """Images of a batch of the minibatch estimator; unbiased for any."""
    passes: int = Field(ge=1)
    """How often it goes through the images."""
    seed: int = Field(ge=0)
    """Of the composition of its batches."""


def prepare_cka(protocol: CKAProtocol, checkpoint: Checkpoint) -> Prepared:
    """The tokens or layers of ``checkpoint``, each ``b c``."""
    multi_token = None if protocol.between == "layers" else checkpoint.multi_token()
    if multi_token is None:
        if protocol.between == "tokens":
            raise UserError(f"{checkpoint.subject.checkpoint}: has no auxiliary tokens to compare; use --between layers")
        encoder = checkpoint.encoder
        depth = len(encoder.block_list)

        def layers(images: Tensor) -> list[Tensor]:
            tokens = encoder(images, blocks=range(depth))
            return [*(token for token, _ in tokens.blocks), tokens.global_token]

        return Prepared(encoder, layers, (*(f"block {index + 1}" for index in range(depth)), "final norm"))

    def tokens_of(images: Tensor) -> list[Tensor]:
        tokens, auxiliary = multi_token(images)
        return [tokens.global_token, *auxiliary.unbind(1)]

    return Prepared(multi_token, tokens_of, (GLOBAL, *multi_token.names))


def measure_cka(protocol: CKAProtocol, prepared: Prepared, seen: Seen) -> Outcome:
    """Mean CKA of groups of pairs (the first one is the headline), and both matrices."""
    features, names, count = seen.arrays, prepared.names, len(seen.labels)
    refuse_constant(features, names)
    exact = linear_cka(features)
    estimated = minibatch_cka(features, protocol.minibatch, protocol.passes, protocol.seed)
    metrics = {}
    for group, (rows, columns) in _groups(names).items():
        for suffix, matrix in (("", exact), ("_minibatch", estimated)):
            metrics[group + suffix] = Metric(value=mean_between(matrix, rows, columns), n=count)
    between = "tokens" if names[0] == GLOBAL else "layers"
    compared = "tokens" if between == "tokens" else "the global token after each block"
    return Outcome(
        metrics=metrics,
        values={"names": names, "exact": rounded(exact), "minibatch": rounded(estimated)},
        draw=lambda path, subject: draw_pairs(
            path, {"": exact}, names, f"Linear CKA between {compared}\n{subject}", "linear CKA (1: alike, 0: unrelated)", (0, 1)
        ),
        details={"between": between, "estimators_max_abs_difference": float(np.abs(exact - estimated).max())},
    )


CKA = Analysis("cka", CKAProtocol, prepare_cka, measure_cka)


def _groups(names: Sequence[str]) -> dict[str, tuple[list[int], list[int] | None]]:
    """Which pairs are averaged under which name: all pairs of different rows, or rows with columns."""
    places = list(range(len(names)))
    if names[0] != GLOBAL:
        return {"cka_layers": (places, None)}
    groups: dict[str, tuple[list[int], list[int] | None]] = {
        "cka_auxiliary": (places[1:], None),
        "cka_auxiliary_cls": ([place for place in places if names[place].startswith("CLS")], None),
        "cka_pooled": ([place for place in places if names[place].startswith("pooled")], None),
        "cka_global_auxiliary": ([0], places[1:]),
    }
    return {group: (rows, columns) for group, (rows, columns) in groups.items() if columns is not None or len(rows) > 1}


def _centre(x: Floats) -> Floats:
    x = x.astype(np.float64)
    return x - x.mean(axis=0)


def _normalise(hsic: Floats) -> Floats:
    scale = np.sqrt(np.diag(hsic))
    return hsic / np.outer(scale, scale)
