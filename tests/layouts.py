"""Small checkpoints in the layouts that projects write, and whether what is opened is what was written."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mte_bench.encoders.checkpoint import Checkpoint, save_auxiliary, save_encoder
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.encoders.heads import Prototypes, StackedMLP
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.encoders.tokens import AuxiliarySettings, AuxiliaryTokens

SMALL = EncoderSpec(
    arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"embed_dim": 48, "depth": 2, "num_heads": 3}
)
METADATA = {
    "method": "dino",
    "mte": True,
    "recipe": "dino_tiny_scenes",
    "recipe_hash": "0123456789ab",
    "epoch": 2.5,
    "epochs": 10,
    "seed": 3,
    "data": "scenes?train=100",
    "note": None,
}
Weights = dict[str, Tensor]


def plain(arch: str, seed: int = 0, **arguments: Any) -> nn.Module:
    """timm's own model with weights that are not at their initial values."""
    torch.manual_seed(seed)
    model = timm.create_model(arch, num_classes=0, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def features(model: nn.Module, size: int) -> Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model(images)
        return tokens if isinstance(tokens, Tensor) else tokens.global_token


def agrees(opened: Checkpoint, model: nn.Module) -> bool:
    size = opened.encoder.spec.image_size
    return (
        not opened.missing and not opened.encoder.training and torch.equal(features(opened.encoder, size), features(model, size))
    )


def save(content: Any, path: Path, **options: Any) -> str:
    torch.save(content, path, **options)
    return str(path)


def tiny(seed: int = 0) -> nn.Module:
    return plain("vit_tiny_patch16_224", seed, img_size=64)


def dino_head(width: int) -> Weights:
    return {
        "head.mlp.0.weight": torch.randn(8, width),
        "head.last_layer.weight_g": torch.ones(4, 1),
        "head.last_layer.weight_v": torch.randn(4, 8),
    }


def swin() -> nn.Module:
    arguments = {"embed_dim": 24, "depths": (1, 2, 1), "num_heads": (2, 4, 8), "img_size": 112}
    return plain("swin_tiny_patch4_window7_224", **arguments)


def as_original_swin(model: nn.Module) -> Weights:
    """The original code merges patches at the end of a stage, and keeps its buffers in the file."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for stage in (1, 2):
            name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        weights[name] = tensor
        if name.endswith("relative_position_bias_table"):
            weights[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return weights | {"layers.0.blocks.1.attn_mask": torch.zeros(16, 49, 49)}


def run_folder(folder: Path, metadata: dict[str, Any] = METADATA) -> tuple[Any, AuxiliaryTokens]:
    encoder = fresh_encoder(SMALL, 1).eval()
    torch.manual_seed(5)
    auxiliary = AuxiliaryTokens(encoder, AuxiliarySettings(auxiliary_cls=2, pooled=3, kernel=3))
    save_encoder(folder / "encoder.safetensors", encoder, metadata)
    heads = {"auxiliary": StackedMLP(5, [48, 16, 8]), "tail": Prototypes(8, 6, frozen_norm=False)}
    save_auxiliary(folder / "auxiliary.safetensors", auxiliary, heads, metadata)
    return encoder, auxiliary
