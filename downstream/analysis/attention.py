"""Where the global token looks: the attention of the CLS query over the patches in a ViT's last block, head by head."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from downstream.analysis.maps import draw_maps
from downstream.analysis.study import Analysis, AnalysisProtocol, Outcome, Prepared, Seen, mean_over_images, rounded
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.errors import UserError

Floats = NDArray[np.floating]


def attention_entropy(attention: Floats) -> Floats:
    """Entropy in nats of each head's attention over the patches: ``b heads h w`` to ``b heads``, in [0, log(h w)].

    The share of attention that goes to the CLS token itself is left out and the rest scaled to sum to 1.
    """
    share = attention.reshape(*attention.shape[:2], -1).astype(np.float64)
    share = share / share.sum(axis=-1, keepdims=True)
    return -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(axis=-1)


def prepare_attention(protocol: AnalysisProtocol, checkpoint: Checkpoint) -> Prepared:
    """The attention ``b heads h w``."""
    encoder = checkpoint.encoder
    if not encoder.has_cls:
        raise UserError(f"{checkpoint.subject.checkpoint}: {encoder.spec.arch} has no CLS token whose attention could be shown")
    if encoder.token_learning is not None:
        raise UserError(
            f"{checkpoint.subject.checkpoint}: with TokenLearner the CLS token of the last block attends to no patches"
        )

    def attention(images: Tensor) -> list[Tensor]:
        tokens = encoder(images, attention=True)
        return [tokens.attention.unflatten(-1, tokens.grid)]

    return Prepared(encoder, attention, tuple(f"head {index + 1}" for index in range(encoder.num_heads)))


def measure_attention(protocol: AnalysisProtocol, prepared: Prepared, seen: Seen) -> Outcome:
    """How spread the attention is, on average over heads; ``largest_entropy`` is that of an even map."""
    (attention,), gallery = seen.arrays, seen.gallery
    entropy, shown = attention_entropy(attention), attention[gallery.rows]
    with_mean = np.concatenate([shown.mean(axis=1, keepdims=True), shown], axis=1)
    names = ("mean of heads", *prepared.names)
    return Outcome(
        metrics={"attention_entropy": mean_over_images(entropy.mean(axis=1))},
        values={
            "names": names,
            "entropy_of_heads": rounded(entropy.mean(axis=0)),
            "images": gallery.captions,
            "maps": rounded(with_mean),
        },
        draw=lambda path, subject: draw_maps(
            path,
            gallery.captions,
            gallery.images,
            with_mean,
            names,
            f"Attention of CLS over the patches in the last block\n{subject}",
            "attention, relative to an even map",
        ),
        details={"unit": "nats", "largest_entropy": math.log(attention[0, 0].size)},
    )


ATTENTION = Analysis("attention", AnalysisProtocol, prepare_attention, measure_attention, shown=6)
