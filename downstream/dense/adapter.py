"""An encoder as the backbone of mmdet's and mmseg's models, and what the optimiser does to each of its parameters.

A ViT has one resolution; four maps at strides 4, 8, 16 and 32 are made of the patch tokens after four of its blocks, by
iBOT's adaptors. A Swin has those strides by itself: the maps are its stages' outputs, each after a LayerNorm of its own.
Source: iBOT ``evaluation/object_detection/mmcv_custom/{register_backbone,layer_decay_optimizer_constructor}.py``; for Swin
the detection code of its authors.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mte_bench.encoders.encoder import Encoder, build_encoder
from mte_bench.errors import UserError

STRIDES = (4, 8, 16, 32)
ADAPTED_PATCH = 16
"""The patch size that the adaptors are for."""
PLACE = "backbone.encoder.model."
"""Where the timm model lies in a detector or segmentor: its parameters' names begin so."""
EMBEDDINGS = ("cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed.")


class Backbone(BaseModule):
    """Images ``b 3 h w`` (normalised, of any size) to four maps ``b c rows columns``.

    Strides are 4, 8, 16 and 32 pixels, or all four that of a ViT's patches if nothing is adapted. Images are padded with
    zeros to whole patches (Swin: to multiples of 32), at the right and below; what lies there is part of the maps.

    Args:
        encoder: gives architecture and weights, which are copied.
        taps: of a ViT, the four blocks (from 0) whose patch tokens are taken; of a Swin its stages are taken anyhow.
        tap_norm: whether a ViT's final norm, the same one, goes over each tap; otherwise it is not part of the model.
        adapt: whether a ViT's taps go through the adaptors.
        frozen: whether the encoder stays as it is: no gradients, no stochastic depth.
        drop_path: rate of stochastic depth at the last block.
        position_size: height and width in pixels of the images whose table of positions is trained, before it is
            interpolated to each image; None keeps the encoder's own. A Swin has none.
        checkpointing: whether activations inside blocks are computed again in the backward pass instead of being kept.

    Raises ``UserError`` for an encoder that does not give four such maps.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        taps: Sequence[int],
        tap_norm: bool = False,
        adapt: bool = True,
        frozen: bool = False,
        drop_path: float = 0.0,
        position_size: tuple[int, int] | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        spec = encoder.spec
        if encoder.token_learning is not None:
            raise UserError(f"{spec.arch} with TokenLearner: learned tokens lie nowhere on the image; choose another checkpoint")
        self.encoder = build_encoder(spec, 0.0 if frozen else drop_path)
        self.encoder.load_state_dict(encoder.state_dict())
        self.encoder.gradient_checkpointing = checkpointing
        model: Any = self.encoder.model
        patch = model.patch_embed.patch_size[0]
        self.multiple = patch * self.encoder.reduction
        self.norms = nn.ModuleList()
        if self.encoder.is_vit:
            if adapt and patch != ADAPTED_PATCH:
                raise UserError(f"{spec.arch}: patches of {patch} pixels; the adaptors are for patches of {ADAPTED_PATCH}")
            self.taps = _checked(taps, len(model.blocks), spec.arch)
            self.widths = (self.encoder.width,) * len(taps)
            self.strides = STRIDES if adapt else (patch,) * len(taps)
            if position_size is not None:
                model.set_input_size(img_size=tuple(position_size))
        else:
            if len(model.layers) != len(STRIDES) or patch != STRIDES[0]:
                raise UserError(
                    f"{spec.arch}: {len(model.layers)} stages and patches of {patch} pixels; four stages and 4 are needed"
                )
            lengths = [len(stage.blocks) for stage in model.layers]
            self.taps = tuple(sum(lengths[: stage + 1]) - 1 for stage in range(len(lengths)))
            self.widths = tuple(stage.blocks[-1].dim for stage in model.layers)
            self.strides = STRIDES
            self.norms.extend(nn.LayerNorm(width) for width in self.widths)
        self.tap_norm = tap_norm and self.encoder.is_vit
        if not self.tap_norm:
            model.norm = nn.Identity()
        self.adaptors = adaptors(self.encoder.width) if adapt and self.encoder.is_vit else None
        self.frozen = frozen
        if frozen:
            self.encoder.requires_grad_(False)
            self.norms.requires_grad_(False)

    def init_weights(self) -> None:
        """Nothing: the encoder's weights are given, and the others drawn where they are made."""

    def train(self, mode: bool = True) -> "Backbone":
        """The usual; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The four maps; in training mode stochastic depth is drawn from torch's global generator of the CPU."""
        height, width = (-(-side // self.multiple) * self.multiple for side in images.shape[-2:])
        images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        keep = self.encoder.draw_drop_path(len(images), torch.default_generator) if self.training and not self.frozen else None
        self.encoder.use_drop_path(None if keep is None else keep.to(images.device))
        tapped = [patches for _, patches in self.encoder(images, blocks=self.taps).blocks]
        if self.tap_norm:
            tapped = [self.encoder.model.norm(patches) for patches in tapped]  # type: ignore[operator]
        elif self.norms:
            tapped = [norm(patches) for norm, patches in zip(self.norms, tapped, strict=True)]
        own = [self.multiple] * len(tapped) if self.encoder.is_vit else STRIDES
        maps = tuple(
            patches.transpose(1, 2).unflatten(2, (height // stride, width // stride))
            for patches, stride in zip(tapped, own, strict=True)
        )
        return maps if self.adaptors is None else tuple(adapt(x) for adapt, x in zip(self.adaptors, maps, strict=True))


def adaptors(width: int) -> nn.ModuleList:
    """iBOT's: from maps at stride 16, all of ``width`` channels, to strides 4, 8, 16 and 32."""
    return nn.ModuleList(
        [
            nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.BatchNorm2d(width),
                nn.GELU(),
                nn.ConvTranspose2d(width, width, 2, stride=2),
            ),
            nn.ConvTranspose2d(width, width, 2, stride=2),
            nn.Identity(),
            nn.MaxPool2d(2),
        ]
    )


def rate_factor(name: str, depth: int, decay: float) -> float:
    """What the learning rate of the parameter called ``name`` is multiplied with, in a ViT of ``depth`` blocks.

    Embeddings (of patches, positions, CLS) ``decay ** (depth + 1)``, block i (from 0) ``decay ** (depth - i)``, else 1.
    """
    own = name.removeprefix(PLACE)
    if own == name:
        return 1.0
    if own.startswith(EMBEDDINGS):
        return decay ** (depth + 1)
    if own.startswith("blocks."):
        return decay ** (depth - int(own.split(".")[1]))
    return 1.0


def decays(name: str, parameter: Tensor, spared: Literal["vectors"] | Sequence[str]) -> bool:
    """Whether weight decay acts on a parameter.

    With ``vectors`` spared, on all but vectors and biases: as in iBOT on position table and CLS too, because its list of
    exceptions names them without the ``backbone.`` that their names begin with there. Otherwise, as in Swin's code, on all
    whose names have none of ``spared`` in them.
    """
    if spared == "vectors":
        return parameter.ndim > 1 and not name.endswith(".bias")
    return not any(part in name for part in spared)


def parameter_groups(
    model: nn.Module,
    depth: int,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    spared: Literal["vectors"] | Sequence[str],
) -> list[dict[str, Any]]:
    """Groups for torch's optimisers with ``lr``, ``weight_decay`` and the ``factor`` that ``lr`` has in it already.

    Parameters without gradients are left out. ``names`` are those of ``params``.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decayed = rate_factor(name, depth, layer_decay), decays(name, parameter, spared)
        empty = {"params": [], "names": [], "factor": factor, "lr": lr * factor, "weight_decay": weight_decay * decayed}
        group = groups.setdefault((factor, decayed), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _checked(taps: Sequence[int], depth: int, arch: str) -> tuple[int, ...]:
    rising = list(taps) == sorted(set(taps))
    if len(taps) != len(STRIDES) or not rising or taps[0] < 0 or taps[-1] >= depth:
        raise UserError(f"taps {list(taps)}: give four rising numbers of blocks, 0 to {depth - 1} for {arch}")
    return tuple(taps)
