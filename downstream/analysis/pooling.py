"""Where the adaptively pooled tokens look: their kernels, their weight maps over images, and how alike the maps are."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from downstream.analysis.maps import draw_maps
from downstream.analysis.study import Analysis, AnalysisProtocol, Outcome, Prepared, Seen, mean_over_images, rounded
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.encoders.tokens import MultiToken
from mte_bench.errors import UserError

Floats = NDArray[np.floating]


def pooling_kernels(model: MultiToken) -> Floats | None:
    """The depth-wise kernels of the pooled tokens, averaged over channels: ``t k k`` (MTE, Fig. 6); TokenLearner has none.

    Raises ``UserError`` where there are no pooled tokens, or where they have no weights (average and max pooling).
    """
    settings = model.auxiliary.settings
    if not settings.pooled:
        raise UserError("this checkpoint has no pooled tokens (mte.pooled is 0), so there are no weight maps to show")
    if model.auxiliary.pool.learner is not None:
        return None
    convolution = model.auxiliary.pool.depthwise
    if convolution is None:
        raise UserError(f"this checkpoint's pooling is '{settings.pooling}': it has no kernels or weight maps to show")
    kernels = convolution.weight.detach().float().cpu().squeeze(1)  # (channels x tokens) k k
    if settings.pooling == "independent":  # a token's channels lie side by side
        return kernels.unflatten(0, (settings.pooled, -1)).mean(1).numpy()
    return kernels.unflatten(0, (-1, settings.pooled)).mean(0).numpy()  # a channel's tokens lie side by side


def map_correlation(maps: Floats) -> Floats:
    """Pearson correlation over positions between the maps of an image: ``b t h w`` to ``b t t``; 0 with an even map."""
    flat = maps.reshape(*maps.shape[:2], -1).astype(np.float64)
    flat = flat - flat.mean(axis=2, keepdims=True)
    norm = np.linalg.norm(flat, axis=2, keepdims=True)
    flat = flat / np.where(norm > 0, norm, 1)
    return flat @ flat.transpose(0, 2, 1)


def map_variation(maps: Floats) -> Floats:
    """Standard deviation over mean of each map: ``b t h w`` to ``b t``; 0 is average pooling."""
    flat = maps.reshape(*maps.shape[:2], -1).astype(np.float64)
    mean = flat.mean(axis=2)
    return flat.std(axis=2) / np.where(mean > 0, mean, 1)


def mean_over_pairs(correlation: Floats) -> Floats:
    """The mean over pairs of different tokens: ``b t t`` to ``b``."""
    count = correlation.shape[1]
    return correlation[:, ~np.eye(count, dtype=bool)].mean(axis=1)


def prepare_pooling(protocol: AnalysisProtocol, checkpoint: Checkpoint) -> Prepared:
    """The weight maps ``b t h w``."""
    model = checkpoint.multi_token()
    if model is None:
        raise UserError(f"{checkpoint.subject.checkpoint}: has no pooled tokens; give a run folder of `pretrain` with mte=true")
    pooling_kernels(model)  # refuses a model that has none

    def maps(images: Tensor) -> list[Tensor]:
        return [model.pooling_maps(images)]

    return Prepared(model, maps, tuple(name for name in model.names if name.startswith("pooled")))


def measure_pooling(protocol: AnalysisProtocol, prepared: Prepared, seen: Seen) -> Outcome:
    """How alike the tokens' maps of an image are (1: one token several times), and how uneven each is.

    Zero padding darkens the border of every map alike. ``map_correlation_centred`` is of what remains of the maps
    without each token's mean map over the images: of what depends on the image.
    """
    assert isinstance(prepared.model, MultiToken)
    (maps,), names, gallery = seen.arrays, prepared.names, seen.gallery
    correlation, kernels, shown = map_correlation(maps), pooling_kernels(prepared.model), maps[gallery.rows]
    metrics = {"map_variation": mean_over_images(map_variation(maps).mean(axis=1))}
    if len(names) > 1:
        centred = map_correlation(maps - maps.mean(axis=0))
        metrics = {
            "map_correlation": mean_over_images(mean_over_pairs(correlation)),
            "map_correlation_centred": mean_over_images(mean_over_pairs(centred)),
            **metrics,
        }
    return Outcome(
        metrics=metrics,
        values={
            "names": names,
            "map_correlation": rounded(correlation.mean(axis=0)),
            **({} if kernels is None else {"kernels": rounded(kernels)}),
            "images": gallery.captions,
            "maps": rounded(shown),
        },
        draw=lambda path, subject: draw_maps(
            path,
            gallery.captions,
            gallery.images,
            shown,
            names,
            f"Weights with which the pooled tokens add up the patches\n{subject}",
            "absolute weight, relative to the map's mean",
            kernels,
        ),
        details={},
    )


POOLING = Analysis("pooling", AnalysisProtocol, prepare_pooling, measure_pooling, shown=6)
