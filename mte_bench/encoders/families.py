"""Checkpoints of other projects: recognised by their keys, renamed to timm's names, described by their shapes.

| family | recognised by | taken (others by ``FILE#PART``) |
|---|---|---|
| dino, ibot | ``teacher`` and ``student``, DINO's or iBOT's head or loss | ``teacher`` |
| dinov2 | ``mask_token`` beside layer scale, ``register_tokens``, ``dino_head`` | ``teacher``, or the file |
| mocov3 | ``base_encoder`` | ``base_encoder`` (not the EMA ``momentum_encoder``), 12 heads |
| mae | decoder; or ``model`` with a sin-cos position table | ``model`` |
| moby | ``encoder`` and ``encoder_k`` | ``encoder``, the online one |
| deit | ``dist_token``, or DeiT III's ``gamma_1`` | ``model`` |
| timm | everything else with a ViT's or Swin's names | ``model``, ``state_dict`` or the file |

Backbones that were cut out of their file and saved alone carry no mark of their method and are of family timm; at another
size, ``?resize_positions=dino`` gives them the positions that DINO and iBOT would (``positions.py``). iBOT's
Swin has LayerNorms with an eps of 1e-6, timm's and the other Swins 1e-5.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.encoders.positions import Resize
from mte_bench.errors import UserError, did_you_mean

Weights = dict[str, Tensor]

CONTAINERS = ("teacher", "model", "state_dict", "student", "model_ema", "state_dict_ema")
BRANCHES = ("base_encoder", "momentum_encoder", "encoder", "encoder_k")
METHODS = {"dino", "ibot", "dinov2", "mocov3", "mae", "moby"}
"""Families that are methods; the others do not say how they were trained."""

_RESIZES: dict[str, Resize] = {"dino": "dino", "ibot": "dino", "dinov2": "dino", "mae": "deit", "mocov3": "deit", "deit": "deit"}
"""How families resize tables of positions; DINOv2 only without registers."""

_WRAPPERS = re.compile(r"\b(module|backbone|_orig_mod)\.")
_NOT_ENCODER = re.compile(
    r"(head|head_dist|dino_head|ibot_head|fc|pre_logits|decoder_\w+)\."  # classifiers, projection heads, MAE's decoder
    r"|(mask_token|masked_embed|decoder_pos_embed)$"
    r"|.*\.(relative_position_index|attn_mask)$"  # buffers that timm computes
)
CLASSIFIER = re.compile(r"(head|head\.fc|head_dist)\.(weight|bias)")
"""Names of linear classifiers: timm's of ViTs and the original Swins, timm's of Swins, and the second one of distilled DeiTs."""
_VITS: dict[tuple[int, int], tuple[str, int]] = {  # (width, depth): name, heads
    (192, 12): ("tiny", 3),
    (384, 12): ("small", 6),
    (768, 12): ("base", 12),
    (1024, 24): ("large", 16),
    (1280, 32): ("huge", 16),
    (1536, 40): ("giant", 24),
}
_SWINS: dict[tuple[int, tuple[int, ...]], str] = {  # (width, depths): name
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}


class Found(NamedTuple):
    """What a file holds, as timm would have written its encoder."""

    family: str
    weights: Weights
    dropped: list[str]
    """Names in the file of what belongs to the training and not to the encoder."""
    head: Weights
    """Those of a linear classifier (``CLASSIFIER``) among them."""
    spec: EncoderSpec
    metadata: dict[str, Any]


def read_foreign(
    content: Mapping[str, Any], where: str, part: str | None = None, heads: int | None = None, image_size: Any = None
) -> Found:
    """Make sense of ``content``, what a ``.pth`` or ``.safetensors`` held; ``where`` names it in errors.

    ``part`` chooses another container or branch than the family's default. ``heads`` is the number of attention heads
    where shapes cannot tell it, ``image_size`` (height, width) the size that a position table is for which is no square.
    Raises ``UserError`` where no encoder is found or a choice is missing.
    """
    state, branch = _state_dict(content, where, part)
    family = _family(content, state)
    prefix = {"mocov3": f"{branch or 'base_encoder'}.", "moby": f"{branch or 'encoder'}."}.get(family, "")
    if branch and not prefix.startswith(branch):
        raise UserError(f"{where}: has no part '{branch}' (recognised as {family})")
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    dropped = [name for name in state if not name.startswith(prefix)]
    dropped += [prefix + name for name in inner if _NOT_ENCODER.match(name)]
    weights = _timm_names({name: tensor for name, tensor in inner.items() if not _NOT_ENCODER.match(name)})
    if "patch_embed.proj.weight" not in weights:
        raise UserError(f"{where}: holds no ViT or Swin under names that are known (it has {first_few(state)})")
    if "layers.0.blocks.0.attn.relative_position_bias_table" in weights:
        spec = _swin_spec(weights, 1e-6 if family == "ibot" else None)
    else:
        spec = _vit_spec(weights, where, 12 if family == "mocov3" else heads, family, image_size)
    epoch = content.get("epoch")
    return Found(family, weights, dropped, classifier_of(inner), spec, {"epoch": epoch} if isinstance(epoch, int) else {})


def _state_dict(content: Mapping[str, Any], where: str, part: str | None) -> tuple[Weights, str | None]:
    """The chosen container's tensors without wrappers' prefixes, and the branch that was asked for, if it is one."""
    containers = [key for key, value in content.items() if isinstance(value, Mapping) and _tensors(value)]
    chosen: Mapping[str, Any] = content
    branch = None
    if part in containers:
        chosen = content[str(part)]
    else:
        if part in BRANCHES:
            branch = part
        elif part is not None:
            raise UserError(f"{where}: has no part '{part}'{did_you_mean(part, containers)}")
        known = [key for key in CONTAINERS if key in containers]
        if known:
            chosen = content[known[0]]
        elif not _tensors(content):
            raise UserError(f"{where}: no weights under a name that is known (it has {first_few(content)}); name them: FILE#PART")
    return {_WRAPPERS.sub("", name): tensor for name, tensor in _tensors(chosen).items()}, branch


def _tensors(value: Mapping[str, Any]) -> Weights:
    return {name: item for name, item in value.items() if isinstance(name, str) and isinstance(item, Tensor)}


def _family(content: Mapping[str, Any], state: Weights) -> str:
    starts = {name.partition(".")[0] for name in state}
    if "base_encoder" in starts:
        return "mocov3"
    if {"encoder", "encoder_k"} <= starts:
        return "moby"
    if "masked_embed" in state or "ibot_loss" in content or _any(state, r"head\.(last_layer2|mlp2)\."):
        return "ibot"
    if starts & {"dino_head", "ibot_head", "register_tokens"} or ("mask_token" in state and _any(state, r".*\.ls1\.gamma")):
        return "dinov2"
    if "dino_loss" in content or _any(state, r"head\.last_layer\."):
        return "dino"
    if "mask_token" in state or any(start.startswith("decoder_") for start in starts):
        return "mae"
    if "dist_token" in state or _any(state, r".*\.gamma_1$"):
        return "deit"
    if "model" in content and _sin_cos(state.get("pos_embed")):
        return "mae"
    return "timm"


def _any(state: Weights, pattern: str) -> bool:
    return any(re.match(pattern, name) for name in state)


def _sin_cos(position: Tensor | None) -> bool:
    """Whether a position table is MAE's and MoCo v3's fixed one: zeros for CLS, sin 0 and cos 0 for the first patch."""
    if position is None:
        return False
    first = torch.cat([torch.zeros(position.shape[2] // 4), torch.ones(position.shape[2] // 4)]).repeat(2)
    return not position[0, 0].any() and len(first) == position.shape[2] and torch.allclose(position[0, 1].float(), first)


def classifier_of(state: Mapping[str, Tensor]) -> Weights:
    """The tensors of a linear classifier in ``state``; empty if it has none."""
    return {name: tensor for name, tensor in state.items() if CLASSIFIER.fullmatch(name)}


def _timm_names(state: Weights) -> Weights:
    """The encoder's tensors under the names that timm gives them."""
    swin = "layers.0.downsample.reduction.weight" in state  # the original merges patches after a stage, timm before
    weights = {}
    for name, tensor in state.items():
        if swin:
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name)
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # DINOv2 trains its blocks in chunks
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        weights[{"register_tokens": "reg_token"}.get(name, name)] = tensor
    if "register_tokens" in state:  # timm's models with registers keep no position for CLS
        weights["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        weights["pos_embed"] = state["pos_embed"][:, 1:]
    return weights


def _vit_spec(weights: Weights, where: str, heads: int | None, family: str, wanted: Any) -> EncoderSpec:
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = _count(weights, r"blocks\.(\d+)\.")
    size, usual_heads = _VITS.get((width, depth), (None, None))
    position = weights.get("pos_embed")
    if heads is None and usual_heads is None:
        raise UserError(f"{where}: a ViT of width {width}, depth {depth}; say how many attention heads it has: FILE?num_heads=N")
    if heads is None and family == "timm" and width == 384 and _sin_cos(position):
        raise UserError(f"{where}: 12 attention heads (MoCo v3) or 6 (others)? Shapes cannot tell; say which: FILE?num_heads=N")

    scaled = "blocks.0.ls1.gamma" in weights
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    distilled = "dist_token" in weights
    has_cls = "cls_token" in weights
    candidates = [f"vit_{size}_patch{patch}_224", f"vit_{size}_patch16_224", "vit_tiny_patch16_224"]
    if distilled:
        candidates.insert(0, f"deit_{size}_distilled_patch{patch}_224")
    if scaled:
        candidates.insert(0, f"vit_{size}_patch{patch}_{'reg4_' if registers == 4 else ''}dinov2")
    arch = next(name for name in candidates if timm.is_model(name))
    dinov2 = arch.endswith("dinov2")

    options: dict[str, Any] = {}
    if arch.startswith("vit_tiny") and size != "tiny":
        options |= {"embed_dim": width, "depth": depth, "num_heads": heads or usual_heads}
    elif heads is not None and heads != usual_heads:
        options["num_heads"] = heads
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in weights else 4 * width
    if hidden != 4 * width and not (dinov2 and size == "giant"):
        options["mlp_ratio"] = hidden / width
    if scaled and not dinov2:
        options["init_values"] = 1e-5
    if registers and "reg4" not in arch:
        options["reg_tokens"] = registers
    if "blocks.0.attn.qkv.bias" not in weights:
        options["qkv_bias"] = False
    if "norm_pre.weight" in weights:
        options["pre_norm"] = True
    if not has_cls:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": "fc_norm.weight" in weights}
    elif "fc_norm.weight" in weights:  # fine-tuned on the mean of the patch tokens
        options["global_pool"] = "avg"

    image_size: int | tuple[int, int] = 224
    if position is not None:
        prefix = has_cls + distilled + registers
        image_size, without_prefix = _table_size(position.shape[1], prefix, patch, wanted, where)
        if prefix and without_prefix and "reg4" not in arch:
            options["no_embed_class"] = True
    named = re.search(r"_patch(\d+)_", arch)
    patch_size = None if named and int(named[1]) == patch else patch
    resize = "timm" if registers else _RESIZES.get(family, "timm")
    return EncoderSpec(arch=arch, image_size=image_size, patch_size=patch_size, options=options, resize_positions=resize)


def _table_size(count: int, prefix: int, patch: int, wanted: Any, where: str) -> tuple[int | tuple[int, int], bool]:
    """Which image size a table of ``count`` positions is for, and whether its ``prefix`` tokens have none.

    A table of a square is recognised; of another, only ``wanted`` (height and width) can say how its rows are to be cut.
    """
    for patches in (count, count - prefix):
        if math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches) * patch, patches == count
    if isinstance(wanted, list | tuple) and len(wanted) == 2 and all(isinstance(side, int) for side in wanted):
        height, width = wanted
        for patches in (count, count - prefix):
            if height % patch == width % patch == 0 and (height // patch) * (width // patch) == patches:
                return (height, width), patches == count
    raise UserError(
        f"{where}: a position table for {count - prefix} patches of {patch} pixels, which are no square; say which image size it "
        "is for: FILE?image_size=[HEIGHT,WIDTH]"
    )


def _swin_spec(weights: Weights, norm_eps: float | None) -> EncoderSpec:
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    stages = _count(weights, r"layers\.(\d+)\.")
    depths = tuple(_count(weights, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))
    tables = [weights[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"].shape for stage in range(stages)]
    windows = [(math.isqrt(offsets) + 1) // 2 for offsets, _ in tables]
    window = windows[0]
    # the last stage is as large as the window, or the first whose window had to be smaller says how large it is
    last = next((stage for stage in range(stages) if windows[stage] < window), stages - 1)
    image_size = windows[last] * patch * 2**last
    size = _SWINS.get((width, depths))
    arch = f"swin_{size or 'tiny'}_patch4_window{window}_{32 * window}"
    options: dict[str, Any] = {}
    if size is None:
        options = {"embed_dim": width, "depths": list(depths), "num_heads": [heads for _, heads in tables]}
    if not timm.is_model(arch):
        arch = f"swin_{size or 'tiny'}_patch4_window7_224"
        options["window_size"] = window
    patch_size = None if patch == 4 else patch
    return EncoderSpec(arch=arch, image_size=image_size, patch_size=patch_size, options=options, norm_eps=norm_eps)


def _count(weights: Weights, pattern: str) -> int:
    """One more than the largest number that ``pattern`` finds at the start of the names."""
    return 1 + max((int(match[1]) for name in weights if (match := re.match(pattern, name))), default=-1)


def first_few(names: Iterable[object], count: int = 4) -> str:
    """``names`` for an error message: the first and how many more."""
    found = [str(name) for name in names]
    more = f" and {len(found) - count} more" if len(found) > count else ""
    return ", ".join(found[:count]) + more or "nothing"
