"""What two tokens know together that neither knows alone: accuracy of each pair against its better half (MTE, Fig. 9).

By k-NN and by a linear probe, ridge in closed form. The tokens of a pair lie side by side, each of unit length.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from downstream.analysis.lookup import Classify, ProbesProtocol, TokenRidge, pairs_of, predictions, prepare_tokens
from downstream.analysis.pairs_map import draw_pairs
from downstream.analysis.study import Analysis, Outcome, Prepared, Seen, rounded
from downstream.evaluate import percentage
from mte_bench.records import Metric
from mte_bench.statistics import paired_bootstrap

Floats = NDArray[np.floating]


class Gains(NamedTuple):
    """What one classifier says of all tokens and pairs."""

    alone: list[NDArray[np.bool_]]
    """For each token, which of the ``n`` val images it is right on."""
    together: Floats
    """Top-1 in percent of pairs and, on the diagonal, of single tokens: ``t t``."""
    gain: Floats
    """Percentage points over the better token of the pair, NaN on the diagonal: ``t t``."""
    headline: Metric
    """The mean gain over pairs of auxiliary tokens; over all pairs where there are none."""
    averaged: int
    """Pairs in the headline."""


def gains(classify: Classify, labels: NDArray[np.int64], count: int) -> Gains:
    """Ask ``classify`` about each of ``count`` tokens and each pair of them; ``labels`` (``n``) are the val images'."""
    alone = [classify([place]) == labels for place in range(count)]
    gain, together = np.full((count, count), np.nan), np.full((count, count), np.nan)
    np.fill_diagonal(together, [100 * hits.mean() for hits in alone])
    averaged = []  # of these pairs, which images the pair and its better token are right on
    for first, second in pairs_of(count):
        hits = classify([first, second]) == labels
        better = max(alone[first], alone[second], key=lambda one: one.mean())
        together[first, second] = together[second, first] = 100 * hits.mean()
        gain[first, second] = gain[second, first] = 100 * (hits.mean() - better.mean())
        if first > 0 or count == 2:
            averaged.append((hits, better))
    pair, half = (np.sum([item[side] for item in averaged], axis=0) for side in (0, 1))
    tested, scale = paired_bootstrap(pair, half), 100 / len(averaged)
    headline = Metric(value=scale * tested.difference, ci95=(scale * tested.low, scale * tested.high), n=len(labels))
    return Gains(alone, together, gain, headline, len(averaged))


def measure_pairs(protocol: ProbesProtocol, prepared: Prepared, seen: Seen) -> Outcome:
    """The mean over pairs of auxiliary tokens (of all tokens where there are none) of what the pair gains on its better half."""
    names, ridge = prepared.names, TokenRidge(protocol, seen)
    knn = gains(partial(predictions, protocol, seen), seen.labels, len(names))
    linear = gains(ridge.predictions, seen.labels, len(names))
    shared = {"pair_gain": knn.headline, "pair_gain_linear": linear.headline}
    found = {"": knn, "linear_": linear}
    return Outcome(
        metrics=shared
        | {
            f"top1_{prefix}{name.replace(' ', '_').lower()}": percentage(hits)
            for prefix, one in found.items()
            for name, hits in zip(names, one.alone, strict=True)
        },
        values={
            "names": names,
            "top1": rounded(knn.together),
            "gain": _known(knn.gain),
            "top1_linear": rounded(linear.together),
            "gain_linear": _known(linear.gain),
        },
        draw=lambda path, subject: draw_pairs(
            path,
            {"k-NN": knn.gain, "linear probe": linear.gain},
            names,
            f"Two tokens together\n{subject}",
            "top-1 minus the better token's, percentage points",
            digits=1,
            diverging=True,
        ),
        details={
            "pairs": knn.averaged,
            "pair_gain": "mean over pairs of auxiliary tokens of top-1 minus the better token's",
            "probes_with_a_penalty_at_the_edge": ridge.at_edge_,
        },
    )


def _known(matrix: Floats) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(float(value), 3) for value in row] for row in matrix]


PAIRS = Analysis("pairs", ProbesProtocol, prepare_tokens, measure_pairs, labelled=True)
