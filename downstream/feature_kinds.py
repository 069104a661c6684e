"""Kinds of features, by name: what of an encoder's tokens represents an image.

| kind | what it is | width | as in |
|---|---|---|---|
| ``global`` | the global token after the final norm | c | DINO eval_knn.py |
| ``cls-last{N}`` | CLS after each of the last N blocks, in their order, each through the final norm | N c | DINO eval_linear.py |
| ``cls+patch-mean`` | CLS and the mean patch, both after the final norm | 2 c | iBOT eval_linear.py, avgpool 2 |
| ``cls-last{N}+patch-mean`` | the same with CLS of the last N blocks | (N + 1) c | the same; DINOv2 linear.py |
| ``patch-mean`` | the mean patch before the final norm | c | iBOT eval_knn.py, avgpool 1 |
| ``patch-mean-normed`` | the mean patch after the final norm | c | |
| ``patches`` | all patches after the final norm, row by row: reshape a row to (n, c) | n c | DINOv2 |
| ``patches-top{N}`` | raw mean of the N patches that CLS attends to most in the last block | c | iBOT linear_part |
| ``patches-bottom{N}`` | raw mean of those that it attends to least | c | the same, reversed |
| ``pooled-last{N}`` | of a Swin: the mean token after each of the last N blocks, final norm in the last stage only | | iBOT |

Raw is before the final norm; CLS attention is the mean over heads. Of a Swin-T, ``pooled-last4`` is 384 + 384 + 768 + 768
= 2304 wide.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mte_bench.encoders.encoder import Encoder, Tokens
from mte_bench.errors import UserError, did_you_mean


class Kind(NamedTuple):
    """What one kind makes of the tokens (``b c``), and what it needs besides the last ones."""

    compute: Callable[[Tokens], Tensor]
    blocks: tuple[int, ...] = ()
    """Blocks after which it needs the tokens, as indices for ``Encoder``."""
    attention: bool = False
    """Whether it needs the CLS attention of the last block."""


def kind_of(name: str, encoder: Encoder, size: int | None = None) -> Kind:
    """The kind called ``name`` for ``encoder``, and for square images of ``size`` pixels.

    Raises ``UserError`` for a name that is none, and for a kind that the encoder does not have or that asks for more
    patches than such an image has.
    """
    if size is not None and patches_taken(name) > (patches := math.prod(encoder.patch_grid(size))):
        raise UserError(f"feature '{name}': an image of {size} pixels has only {patches} patches; choose fewer")
    for pattern, make in KINDS.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\{N\}", r"([1-9]\d*)"), name)
        if match:
            return make(name, encoder, int(match[1]) if match.groups() else 0)
    known = [pattern.replace("{N}", "4") for pattern in KINDS]
    raise UserError(f"feature '{name}': there is no such kind{did_you_mean(name, known)}")


def patches_taken(name: str) -> int:
    """How many patches a kind chooses of an image; 0 where it chooses none."""
    match = re.fullmatch(r"patches-(?:top|bottom)(\d+)", name)
    return int(match[1]) if match else 0


def _global(name: str, encoder: Encoder, number: int) -> Kind:
    return Kind(lambda tokens: tokens.global_token)


def _patch_mean(name: str, encoder: Encoder, number: int) -> Kind:
    return Kind(lambda tokens: tokens.raw_patches.mean(dim=1))


def _patch_mean_normed(name: str, encoder: Encoder, number: int) -> Kind:
    return Kind(lambda tokens: tokens.patches.mean(dim=1))


def _patches(name: str, encoder: Encoder, number: int) -> Kind:
    return Kind(lambda tokens: tokens.patches.flatten(1))


def _cls_last(name: str, encoder: Encoder, number: int) -> Kind:
    _require_cls(name, encoder)
    _require_blocks(name, encoder, number)
    norm: Callable[[Tensor], Tensor] = encoder.model.norm  # type: ignore[assignment]
    blocks = tuple(range(-number, 0))
    return Kind(lambda tokens: torch.cat([norm(cls) for cls, _ in tokens.blocks], dim=1), blocks)


def _cls_last_patch_mean(name: str, encoder: Encoder, number: int) -> Kind:
    cls = _cls_last(name, encoder, number or 1)
    return Kind(lambda tokens: torch.cat([cls.compute(tokens), tokens.patches.mean(dim=1)], dim=1), cls.blocks)


def _attended(sign: int) -> Callable[[str, Encoder, int], Kind]:
    def make(name: str, encoder: Encoder, number: int) -> Kind:
        _require_cls(name, encoder)

        def compute(tokens: Tokens) -> Tensor:
            assert tokens.attention is not None
            chosen = (sign * tokens.attention.mean(dim=1)).topk(number, dim=1).indices
            return tokens.raw_patches.take_along_dim(chosen.unsqueeze(2), dim=1).mean(dim=1)

        return Kind(compute, attention=True)

    return make


def _pooled_last(name: str, encoder: Encoder, number: int) -> Kind:
    if encoder.is_vit:
        raise UserError(f"feature '{name}': is a Swin's, and {encoder.spec.arch} is none; choose cls-last{number}")
    _require_blocks(name, encoder, number)
    norm: Callable[[Tensor], Tensor] = encoder.model.norm  # type: ignore[assignment]

    def compute(tokens: Tokens) -> Tensor:
        # only the last stage is as wide as the encoder
        normed = [norm(patches) if patches.shape[2] == encoder.width else patches for _, patches in tokens.blocks]
        return torch.cat([patches.mean(dim=1) for patches in normed], dim=1)

    return Kind(compute, tuple(range(-number, 0)))


def _require_cls(name: str, encoder: Encoder) -> None:
    if not encoder.has_cls:
        instead = "patch-mean" if encoder.is_vit else "pooled-last4 or patch-mean"
        raise UserError(f"feature '{name}': {encoder.spec.arch} has no CLS token; choose global, {instead}")


def _require_blocks(name: str, encoder: Encoder, number: int) -> None:
    if number > len(encoder.block_list):
        raise UserError(f"feature '{name}': {encoder.spec.arch} has {len(encoder.block_list)} blocks; choose fewer")


KINDS: dict[str, Callable[[str, Encoder, int], Kind]] = {
    "global": _global,
    "cls-last{N}": _cls_last,
    "cls+patch-mean": _cls_last_patch_mean,
    "cls-last{N}+patch-mean": _cls_last_patch_mean,
    "patch-mean": _patch_mean,
    "patch-mean-normed": _patch_mean_normed,
    "patches": _patches,
    "patches-top{N}": _attended(1),
    "patches-bottom{N}": _attended(-1),
    "pooled-last{N}": _pooled_last,
}
"""What makes each kind, by its name; {N} stands for a number from 1."""
