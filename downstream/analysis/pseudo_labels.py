"""How well the prototypes that tokens choose agree with the classes: NMI, ARI, accuracy after matching (MTE, Figs. 10, 11).

Each token passes its own projection head, a pair is the sum of two projections, and the fused vector the sum of all auxiliary
ones; the prototype with the highest score is the image's pseudo-label. Fig. 11 compares the same for two runs, with shared
and with independent heads. Source of the metrics: iBOT ``evaluation/unsupervised/unsup_cls.py``.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from downstream.analysis.lookup import GLOBAL, pairs_of
from downstream.analysis.pairs_map import draw_pairs
from downstream.analysis.study import Analysis, AnalysisProtocol, Outcome, Prepared, Seen, rounded
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.encoders.tokens import MultiToken, TokenHeads
from mte_bench.errors import UserError
from mte_bench.records import Metric

Floats = NDArray[np.floating]
Labels = NDArray[np.int64]


class _Projector(nn.Module):
    def __init__(self, tokens: MultiToken, heads: TokenHeads):
        super().__init__()
        self.tokens, self.heads = tokens, heads

    def forward(self, images: Tensor) -> list[Tensor]:
        tokens, auxiliary = self.tokens(images)
        return list(self.heads(tokens.global_token, auxiliary).unbind(1))


def prepare_pseudo_labels(protocol: AnalysisProtocol, checkpoint: Checkpoint) -> Prepared:
    """The projections of the global and the auxiliary tokens, each ``b d``."""
    tokens, heads = checkpoint.multi_token(), checkpoint.token_heads()
    if tokens is None or heads is None:
        raise UserError(
            f"{checkpoint.subject.checkpoint}: has no prototypes; give a run folder of `pretrain` with mte=true and a method "
            "that has them (DINO, iBOT, HSSL)"
        )
    projector = _Projector(tokens, heads)
    return Prepared(projector, projector, (GLOBAL, *tokens.names))


def agreement(found: Labels, labels: Labels) -> dict[str, float]:
    """NMI, ARI, and the accuracy in percent after the best one-to-one matching of prototypes to classes."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "nmi": float(normalized_mutual_info_score(labels, found)),
        "ari": float(adjusted_rand_score(labels, found)),
        "matched_accuracy": matched_accuracy(found, labels),
    }


def matched_accuracy(found: Labels, labels: Labels) -> float:
    """Percent of images whose prototype is matched to their class, by the matching that gives the most (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    _, cluster = np.unique(found, return_inverse=True)
    _, truth = np.unique(labels, return_inverse=True)
    counts = np.zeros((cluster.max() + 1, truth.max() + 1), np.int64)
    np.add.at(counts, (cluster, truth), 1)
    return 100 * float(counts[linear_sum_assignment(counts, maximize=True)].sum()) / len(labels)


def measure_pseudo_labels(protocol: AnalysisProtocol, prepared: Prepared, seen: Seen) -> Outcome:
    """The agreement of the global token, of the mean single auxiliary token, of the mean pair, and of all fused."""
    assert isinstance(prepared.model, _Projector)
    heads, names, n = prepared.model.heads.cpu(), prepared.names, len(seen.labels)

    def assigned(*places: int) -> Labels:
        total = np.sum([seen.arrays[place] for place in places], axis=0)
        with torch.inference_mode():
            return heads.assign(torch.from_numpy(total)).numpy()

    count = len(names)
    singles = [assigned(place) for place in range(count)]
    found = [agreement(labels, seen.labels) for labels in singles]
    nmi = np.diag([one["nmi"] for one in found])
    pairs = {pair: agreement(assigned(*pair), seen.labels) for pair in pairs_of(count)}
    for (first, second), one in pairs.items():
        nmi[first, second] = nmi[second, first] = one["nmi"]
    groups = {GLOBAL: found[:1], "auxiliary": found[1:], "pairs": [one for pair, one in pairs.items() if pair[0] > 0]}
    groups["fused"] = [agreement(assigned(*range(1, count)), seen.labels)]
    metrics = {
        f"{key}_{group}": Metric(value=float(np.mean([one[key] for one in members])), n=n)
        for group, members in groups.items()
        if members
        for key in ("nmi", "ari", "matched_accuracy")
    }
    fused = metrics["nmi_fused"].value
    return Outcome(
        metrics=metrics,
        values={
            "names": names,
            "nmi": rounded(nmi),
            "agreement": [{key: round(value, 5) for key, value in one.items()} for one in found],
            "prototypes_in_use": [len(np.unique(labels)) for labels in singles],
        },
        draw=lambda path, subject: draw_pairs(
            path,
            {"": nmi},
            names,
            f"NMI of pseudo-labels with classes: tokens (diagonal) and pairs; all fused {fused:.3f}\n{subject}",
            "normalised mutual information (1: the classes)",
            digits=3,
        ),
        details={"groups": "auxiliary and pairs are means over single auxiliary tokens and over pairs of them"},
    )


PSEUDO_LABELS = Analysis("pseudo-labels", AnalysisProtocol, prepare_pseudo_labels, measure_pseudo_labels, labelled=True)
