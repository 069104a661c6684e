"""What two tokens know together that neither knows alone: accuracy of each pair against its better half (MTE, Fig. 9)."""

import numpy as np

from downstream.analysis.lookup import NeighbourProtocol, pairs_of, predictions, prepare_tokens
from downstream.analysis.pairs_map import draw_pairs
from downstream.analysis.study import Analysis, Outcome, Prepared, Seen, rounded
from downstream.evaluate import percentage
from mte_bench.records import Metric
from mte_bench.statistics import paired_bootstrap


def measure_pairs(protocol: NeighbourProtocol, prepared: Prepared, seen: Seen) -> Outcome:
    """The mean over pairs of auxiliary tokens (of all tokens where there are none) of what the pair gains on its better half."""
    names = prepared.names
    alone = [predictions(protocol, seen, [place]) == seen.labels for place in range(len(names))]
    count = len(names)
    gain, together = np.full((count, count), np.nan), np.full((count, count), np.nan)
    np.fill_diagonal(together, [100 * hits.mean() for hits in alone])
    gains = []  # of pairs that the headline averages, image by image
    for first, second in pairs_of(count):
        hits = predictions(protocol, seen, [first, second]) == seen.labels
        better = max(alone[first], alone[second], key=lambda one: one.mean())
        together[first, second] = together[second, first] = 100 * hits.mean()
        gain[first, second] = gain[second, first] = 100 * (hits.mean() - better.mean())
        if first > 0 or count == 2:
            gains.append((hits, better))
    pair, half = (np.sum([item[side] for item in gains], axis=0) for side in (0, 1))
    tested = paired_bootstrap(pair, half)
    scale = 100 / len(gains)
    metrics = {
        "pair_gain": Metric(value=scale * tested.difference, ci95=(scale * tested.low, scale * tested.high), n=len(seen.labels)),
        **{f"top1_{name.replace(' ', '_').lower()}": percentage(hits) for name, hits in zip(names, alone, strict=True)},
    }
    return Outcome(
        metrics=metrics,
        values={"names": names, "top1": rounded(together), "gain": [[_known(value) for value in row] for row in gain]},
        draw=lambda path, subject: draw_pairs(
            path,
            gain,
            names,
            f"k-NN of two tokens together\n{subject}",
            "top-1 minus the better token's, percentage points",
            digits=1,
            diverging=True,
        ),
        details={"pairs": len(gains), "pair_gain": "mean over pairs of auxiliary tokens of top-1 minus the better token's"},
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 3)


PAIRS = Analysis("pairs", NeighbourProtocol, prepare_tokens, measure_pairs, labelled=True)
