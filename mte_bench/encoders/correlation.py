"""Adaptive pooling without its weight maps.

A pooled token is the mean over positions ``p`` of ``w[p] * x[p]``, where the weights ``w`` are a depth-wise
convolution of a modulation map ``g`` with the token's kernel ``k``. Swapping the two sums,

    mean_p x[p] * (sum_d k[d] g[p + d])  =  sum_d k[d] * R[d],      R[d] = mean_p x[p] g[p + d],

so that one correlation ``R`` per channel, of the kernel's size, serves all tokens: for six tokens a sixth of the
multiply-accumulates of the convolutions, and none of their maps is ever written. Both gradients of ``R`` are again
plain depth-wise convolutions, with the small incoming gradient as the kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_pooling(x: Tensor, g: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Pooled tokens ``b t c`` of ``x`` (``b c h w``), weighted by ``conv2d(g, kernels, bias, padding="same", groups=c)``.

    ``kernels`` is ``(c * t) 1 k k`` with a channel's tokens side by side, as a depth-wise convolution with
    multiplier ``t`` has them; ``bias`` is ``(c * t)``.
    """
    _, c, h, w = x.shape
    before, after = (kernels.shape[-1] - 1) // 2, kernels.shape[-1] // 2
    near, far = min(before, max(h, w) - 1), min(after, max(h, w) - 1)
    window = slice(before - near, before + far + 1)  # farther away there are only zeros
    kernels = kernels[..., window, window]
    size = kernels.shape[-1]
    maps = correlate(x, g, size).flatten(2)  # b c k*k
    tokens = torch.einsum("bcd,ctd->btc", maps, kernels.reshape(c, -1, size * size).to(maps.dtype)) / (h * w)
    if bias is not None:
        tokens = tokens + x.mean((2, 3)).unsqueeze(1) * bias.view(c, -1).T
    return tokens


def correlate(x: Tensor, g: Tensor, size: int) -> Tensor:
    """``b c size size``: sums over positions of ``x[p] * g[p + d]`` for offsets ``d`` in a window of ``size``.

    The window is the one of a convolution with ``padding="same"``; outside of its map ``g`` is zero. The precision is
    that of ``g``: in mixed precision a convolution's, as the weights' would be.
    """
    return _Correlation.apply(x.to(g.dtype), g, size)


class _Correlation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, g)
        ctx.size = size
        return _depthwise(g, x, (size - 1) // 2, size // 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, g = ctx.saved_tensors
        before, after = (ctx.size - 1) // 2, ctx.size // 2
        for_x = _depthwise(g, gradient, before, after) if ctx.needs_input_grad[0] else None
        for_g = _depthwise(x, gradient.flip(2, 3), after, before) if ctx.needs_input_grad[1] else None
        return for_x, for_g, None


def _depthwise(maps: Tensor, kernels: Tensor, before: int, after: int) -> Tensor:
    """Slide each image's and channel's own kernel (``b c k l``) over its map (``b c h w``), padded with zeros."""
    b, c = maps.shape[:2]
    padded = F.pad(maps, (before, after, before, after))
    out = F.conv2d(padded.reshape(1, b * c, *padded.shape[2:]), kernels.reshape(b * c, 1, *kernels.shape[2:]), groups=b * c)
    return out.view(b, c, *out.shape[2:])
