"""Where the adaptively pooled tokens look: their kernels, their weight maps over images, and how alike the maps are."""

from typing import TYPE_CHECKING

import numpy as np

from mte_bench.errors import UserError

if TYPE_CHECKING:
    from mte_bench.encoders.tokens import MultiToken

Array = np.ndarray


def pooling_kernels(model: "MultiToken") -> Array:
    """The depth-wise kernels of the pooled tokens, averaged over channels: ``t k k`` (MTE, Fig. 6).

    Raises ``UserError`` where there are no pooled tokens, or where they have no weights (average and max pooling).
    """
    settings = model.auxiliary.settings
    if not settings.pooled:
        raise UserError("this checkpoint has no pooled tokens (mte.pooled is 0): there are no kernels or weight maps to show")
    convolution = model.auxiliary.pool.depthwise
    if convolution is None:
        raise UserError(f"this checkpoint's pooling is '{settings.pooling}': it has no kernels or weight maps to show")
    kernels = convolution.weight.detach().float().cpu().squeeze(1)  # (channels x tokens) k k
    if settings.pooling == "independent":  # a token's channels lie side by side
        return kernels.unflatten(0, (settings.pooled, -1)).mean(1).numpy()
    return kernels.unflatten(0, (-1, settings.pooled)).mean(0).numpy()  # a channel's tokens lie side by side


def map_correlation(maps: Array) -> Array:
    """Pearson correlation over positions between the maps of an image: ``b t h w`` to ``b t t``; 0 with an even map."""
    flat = maps.reshape(*maps.shape[:2], -1).astype(np.float64)
    flat = flat - flat.mean(axis=2, keepdims=True)
    norm = np.linalg.norm(flat, axis=2, keepdims=True)
    flat = flat / np.where(norm > 0, norm, 1)
    return flat @ flat.transpose(0, 2, 1)


def map_variation(maps: Array) -> Array:
    """Standard deviation over mean of each map: ``b t h w`` to ``b t``; 0 is average pooling."""
    flat = maps.reshape(*maps.shape[:2], -1).astype(np.float64)
    mean = flat.mean(axis=2)
    return flat.std(axis=2) / np.where(mean > 0, mean, 1)


def mean_over_pairs(correlation: Array) -> Array:
    """The mean over pairs of different tokens: ``b t t`` to ``b``."""
    count = correlation.shape[1]
    return correlation[:, ~np.eye(count, dtype=bool)].mean(axis=1)
