"""Checkpoints: every layout gives timm's features, what is written is plain timm, and nothing unsafe or broken passes."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from mte_bench.encoders.checkpoint import (
    Checkpoint,
    open_checkpoint,
    save_auxiliary,
    save_encoder,
    weights_hash,
)
from mte_bench.encoders.commands import export, inspect
from mte_bench.encoders.encoder import EncoderSpec, fresh_encoder
from mte_bench.encoders.families import read_foreign
from mte_bench.encoders.heads import Prototypes, StackedMLP
from mte_bench.encoders.tokens import AuxiliarySettings, AuxiliaryTokens, MultiToken
from mte_bench.encoders.weight_files import read_metadata
from mte_bench.errors import UserError

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


def test_dino(tmp_path: Path):
    """Student wrapped twice, teacher once, with everything else that the training leaves in the file."""
    teacher, student = tiny(0), tiny(1)
    content = {
        "student": prefixed("module.backbone.", student.state_dict()) | prefixed("module.", dino_head(192)),
        "teacher": prefixed("backbone.", teacher.state_dict()) | dino_head(192),
        "optimizer": torch.optim.AdamW(student.parameters()).state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", output_dir=pathlib.PurePosixPath("x").name, lr=np.float64(0.1).item()),
        "dino_loss": OrderedDict(center=torch.zeros(1, 4)),
        "fp16_scaler": {"scale": 65536.0},
    }
    file = save(content, tmp_path / "checkpoint.pth")
    opened = open_checkpoint(file)
    assert agrees(opened, teacher)
    assert agrees(open_checkpoint(f"{file}#student"), student)
    assert agrees(open_checkpoint(f"{file}#teacher"), teacher)
    assert opened.subject.model_dump(include={"family", "method", "arch", "epochs", "image_size", "mte", "checkpoint"}) == {
        "checkpoint": file,
        "family": "dino",
        "method": "dino",
        "arch": "vit_tiny_patch16_224",
        "epochs": 100,
        "image_size": 64,
        "mte": False,
    }
    assert sorted(opened.dropped) == sorted(dino_head(192))
    assert len(opened.matched) == len(teacher.state_dict())
    with pytest.raises(UserError, match=r"no part 'studnt'.*did you mean 'student'"):
        open_checkpoint(f"{file}#studnt")
    with pytest.raises(UserError, match="no part 'momentum_encoder'"):
        open_checkpoint(f"{file}#momentum_encoder")


def test_ibot(tmp_path: Path):
    teacher, student = tiny(0), tiny(1)
    head = dino_head(192) | {"head.last_layer2.weight_g": torch.ones(4, 1), "head.last_layer2.weight_v": torch.randn(4, 8)}
    mask = {"module.backbone.masked_embed": torch.zeros(1, 192)}
    content = {
        "student": prefixed("module.backbone.", student.state_dict()) | mask | prefixed("module.", head),
        "teacher": prefixed("backbone.", teacher.state_dict()) | head,
        "epoch": 800,
        "ibot_loss": OrderedDict(center=torch.zeros(1, 4), center2=torch.zeros(1, 1, 4)),
    }
    file = save(content, tmp_path / "checkpoint.pth")
    opened = open_checkpoint(file)
    assert (opened.family, opened.subject.epochs) == ("ibot", 800)
    assert agrees(opened, teacher)
    student_too = open_checkpoint(f"{file}#student")
    assert agrees(student_too, student)
    assert "masked_embed" in student_too.dropped
    extracted = save({"state_dict": teacher.state_dict()}, tmp_path / "checkpoint_teacher.pth")
    assert agrees(open_checkpoint(extracted), teacher)


def test_mocov3_has_twelve_heads(tmp_path: Path):
    base = plain("vit_small_patch16_224", img_size=32, num_heads=12)
    base.pos_embed.data = sin_cos(384, 2)
    momentum = dict(base.state_dict()) | {"cls_token": torch.ones(1, 1, 384)}
    content = {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": prefixed("module.base_encoder.", {**base.state_dict(), "head.0.weight": torch.ones(3, 384)})
        | prefixed("module.momentum_encoder.", momentum)
        | {"module.predictor.0.weight": torch.ones(2, 2)},
        "optimizer": {},
    }
    file = save(content, tmp_path / "vit-s-300ep.pth.tar")
    opened = open_checkpoint(file)
    assert agrees(opened, base)
    assert (opened.family, opened.encoder.num_heads) == ("mocov3", 12)
    assert {"base_encoder.head.0.weight", "predictor.0.weight", "momentum_encoder.cls_token"} <= set(opened.dropped)
    other = open_checkpoint(f"{file}#momentum_encoder")
    assert torch.equal(other.encoder.model.cls_token, momentum["cls_token"])  # type: ignore[arg-type]
    # the same weights without their prefix: nothing says how many heads they have, so nothing is assumed
    bare = save(dict(base.state_dict()), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"FILE\?num_heads=N"):
        open_checkpoint(bare)
    assert agrees(open_checkpoint(f"{bare}?num_heads=12"), base)
    assert open_checkpoint(f"{bare}?num_heads=12").sha256 == opened.sha256
    assert open_checkpoint(f"{bare}?num_heads=6").sha256 != opened.sha256


def sin_cos(width: int, grid: int) -> Tensor:
    """The fixed table of MoCo v3 and MAE: zeros for CLS; sine and cosine of columns, then of rows."""
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    parts = [function(place.flatten()[:, None] * frequencies) for place in (columns, rows) for function in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(1, width), torch.cat(parts, dim=1)]).unsqueeze(0)


def test_mae(tmp_path: Path):
    model = tiny()
    model.pos_embed.data = sin_cos(192, 4)
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 5, 8),
        "decoder_embed.weight": torch.zeros(8, 192),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "decoder_norm.weight": torch.zeros(8),
        "decoder_pred.weight": torch.zeros(8, 8),
    }
    training = save(
        {"model": model.state_dict() | decoder, "epoch": 799, "args": argparse.Namespace(lr=1)}, tmp_path / "checkpoint-799.pth"
    )
    opened = open_checkpoint(training)
    assert agrees(opened, model)
    assert sorted(opened.dropped) == sorted(decoder)
    released = open_checkpoint(save({"model": model.state_dict()}, tmp_path / "mae_pretrain_vit.pth"))
    assert agrees(released, model)
    assert opened.family == released.family == "mae"
    tuned = plain("vit_tiny_patch16_224", img_size=64, global_pool="avg")
    file = save({"model": tuned.state_dict() | {"head.weight": torch.zeros(5, 192)}}, tmp_path / "finetuned.pth")
    assert agrees(open_checkpoint(file), tuned)  # fine-tuned on the mean of the patch tokens: fc_norm


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


def test_moby(tmp_path: Path):
    model = swin()
    encoder = as_original_swin(model)
    target = encoder | {"norm.bias": torch.ones(96)}
    content = {
        "model": prefixed("encoder.", encoder)
        | prefixed("encoder_k.", target)
        | {"projector.linear1.weight": torch.zeros(3, 3), "queue1": torch.zeros(4, 4), "queue_ptr": torch.zeros(1)},
        "optimizer": {},
        "epoch": 299,
        "max_accuracy": 0.0,
    }
    file = save(content, tmp_path / "moby_swin_t.pth")
    opened = open_checkpoint(file)
    assert agrees(opened, model)
    assert opened.family == "moby"
    assert opened.encoder.spec.image_size == 112
    assert {"queue1", "encoder_k.norm.bias", "encoder.layers.0.blocks.1.attn_mask"} <= set(opened.dropped)
    assert torch.equal(open_checkpoint(f"{file}#encoder_k").encoder.model.norm.bias, torch.ones(96))  # type: ignore[union-attr]


def test_swin_in_ibots_and_timms_layout(tmp_path: Path):
    model = swin()
    original = save({"teacher": prefixed("backbone.", as_original_swin(model)) | dino_head(96)}, tmp_path / "ibot.pth")
    assert agrees(open_checkpoint(original), model)
    timms = save(model.state_dict() | {"head.fc.weight": torch.zeros(5, 96)}, tmp_path / "timm.pth")
    assert agrees(open_checkpoint(timms), model)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(tmp_path: Path, registers: int):
    """Layer scale, patch 14, a mask token; registers move CLS's position into the token, as in timm's models."""
    model = plain(f"vit_small_patch14_{'reg4_' if registers else ''}dinov2", img_size=56)
    weights = dict(model.state_dict()) | {"mask_token": torch.zeros(1, 384)}
    if registers:
        position = torch.randn(1, 1, 384)
        weights["register_tokens"] = weights.pop("reg_token")
        weights["cls_token"] = weights["cls_token"] - position
        weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], dim=1)
    opened = open_checkpoint(save(weights, tmp_path / "dinov2_vits14_pretrain.pth"))
    assert (opened.family, opened.encoder.spec.image_size, opened.encoder.spec.options) == ("dinov2", 56, {})
    assert opened.dropped == ["mask_token"]
    assert torch.allclose(features(opened.encoder, 56), features(model, 56), atol=1e-5)
    if not registers:
        chunked = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in weights.items()}
        training = {"teacher": prefixed("backbone.", chunked) | {"dino_head.mlp.0.weight": torch.zeros(2, 384)}}
        assert agrees(open_checkpoint(save(training, tmp_path / "teacher_checkpoint.pth")), model)


def test_deit(tmp_path: Path):
    model = tiny()
    file = save(
        {"model": model.state_dict() | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}}, tmp_path / "deit.pth"
    )
    opened = open_checkpoint(file)
    assert agrees(opened, model)
    assert opened.dropped == ["head.weight", "head.bias"]
    distilled = plain("deit_tiny_distilled_patch16_224", img_size=64)
    opened = open_checkpoint(save({"model": distilled.state_dict()}, tmp_path / "distilled.pth"))
    assert agrees(opened, distilled)
    assert opened.family == "deit"
    third = plain("deit3_small_patch16_224", img_size=64)
    weights = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in third.state_dict().items()}
    assert agrees(open_checkpoint(save({"model": weights}, tmp_path / "deit_3.pth")), third)


def test_plain_timm_in_every_container(tmp_path: Path):
    """One hash for the same weights, whatever they lie in; half precision is another one."""
    model = tiny()
    weights = dict(model.state_dict())
    files = [
        save(weights, tmp_path / "new.pth"),
        save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False),
        save({"state_dict": prefixed("module.", weights), "epoch": 3}, tmp_path / "wrapped.pt"),
        str(tmp_path / "plain.safetensors"),
    ]
    safetensors.torch.save_file(weights, files[-1])
    opened = [open_checkpoint(file) for file in files]
    assert all(agrees(one, model) for one in opened)
    assert len({one.sha256 for one in opened}) == 1
    assert all(one.family == "timm" and one.subject.method is None and one.folder is None for one in opened)
    half = save({name: tensor.half() for name, tensor in weights.items()}, tmp_path / "half.pth")
    assert open_checkpoint(half).sha256 != opened[0].sha256
    assert torch.allclose(features(open_checkpoint(half).encoder, 64), features(model, 64), atol=0.05)


SHAPES = [
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    *("vit_small_patch8_224", "vit_base_patch8_224", "vit_small_patch32_224", "vit_huge_patch14_224"),
    *(f"vit_{size}_patch14_{reg}dinov2" for size in ("small", "base", "large") for reg in ("", "reg4_")),
    *("vit_giant_patch14_dinov2", "deit_small_distilled_patch16_224"),
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")),
    "swin_base_patch4_window12_384",
]


@pytest.mark.parametrize("arch", SHAPES)
def test_architecture_from_shapes(arch: str):
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=0)
    weights = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    if "pos_embed" in weights:
        weights["pos_embed"] = torch.ones(1, *weights["pos_embed"].shape[1:]).expand_as(weights["pos_embed"])
    spec = read_foreign(weights, "FILE").spec
    size = timm.get_pretrained_cfg(arch).input_size[-1]
    assert (spec.arch, spec.image_size, spec.patch_size, spec.options) == (arch, size, None, {})


def test_vit_patch_sizes_without_a_name_of_their_own(tmp_path: Path):
    model = plain("vit_tiny_patch16_224", img_size=32, patch_size=8)
    opened = open_checkpoint(save(model.state_dict(), tmp_path / "x.pth"))
    assert agrees(opened, model)
    assert opened.encoder.spec.patch_size == 8


def test_odd_shapes_need_the_number_of_heads(tmp_path: Path):
    encoder = fresh_encoder(SMALL, 1)
    file = save(encoder.model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"width 48, depth 2.*num_heads"):
        open_checkpoint(file)
    opened = open_checkpoint(f"{file}?num_heads=3")
    assert agrees(opened, encoder.model.eval())
    assert opened.sha256 == weights_hash(encoder)


def run_folder(folder: Path, metadata: dict[str, Any] = METADATA) -> tuple[Any, AuxiliaryTokens]:
    encoder = fresh_encoder(SMALL, 1).eval()
    torch.manual_seed(5)
    auxiliary = AuxiliaryTokens(encoder, AuxiliarySettings(auxiliary_cls=2, pooled=3, kernel=3))
    save_encoder(folder / "encoder.safetensors", encoder, metadata)
    heads = {"auxiliary": StackedMLP(5, [48, 16, 8]), "tail": Prototypes(8, 6, frozen_norm=False)}
    save_auxiliary(folder / "auxiliary.safetensors", auxiliary, heads, metadata)
    return encoder, auxiliary


def test_run_folder(tmp_path: Path):
    encoder, auxiliary = run_folder(tmp_path)
    opened = open_checkpoint(str(tmp_path))
    assert opened.folder == tmp_path
    assert agrees(opened, encoder.model)
    assert opened.encoder.spec == SMALL
    assert opened.subject.model_dump() == {
        "checkpoint": str(tmp_path),
        "sha256": weights_hash(encoder),
        "family": "mte-bench",
        "arch": SMALL.arch,
        "image_size": 32,
        "patch_size": 8,
        "arch_options": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "method": "dino",
        "mte": True,
        "epochs": 2.5,
        "seed": 3,
        "recipe": "dino_tiny_scenes",
        "recipe_hash": "0123456789ab",
        "pretrain_data": "scenes?train=100",
        "parts": (),
    }
    multi = opened.multi_token()
    assert multi is not None
    assert multi.names == ("CLS 1", "CLS 2", "pooled 1", "pooled 2", "pooled 3")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(multi(images)[1], MultiToken(encoder, auxiliary).eval()(images)[1])
    names = safetensors.torch.load_file(tmp_path / "auxiliary.safetensors")
    assert {"tokens.cls", "heads.auxiliary.layers.0.weight", "heads.tail.weight_v"} <= set(names)
    direct = open_checkpoint(str(tmp_path / "encoder.safetensors"))
    assert direct.folder is None
    assert direct.multi_token() is not None
    (tmp_path / "auxiliary.safetensors").unlink()
    assert open_checkpoint(str(tmp_path)).multi_token() is None


def test_auxiliary_part_of_another_moment_is_refused(tmp_path: Path):
    encoder, _ = run_folder(tmp_path)
    save_encoder(tmp_path / "encoder.safetensors", encoder, METADATA | {"epoch": 3.0})  # a kill between the two files
    with pytest.raises(UserError, match="another epoch"):
        open_checkpoint(str(tmp_path)).multi_token()


def test_written_bytes_are_the_same_every_time(tmp_path: Path):
    encoder, _ = run_folder(tmp_path / "a")
    first = (tmp_path / "a" / "encoder.safetensors").read_bytes()
    for _ in range(5):  # the library's own order of ten metadata keys would change with near certainty
        save_encoder(tmp_path / "b", encoder, dict(reversed(METADATA.items())))
        assert (tmp_path / "b").read_bytes() == first
    metadata = read_metadata(tmp_path / "b")
    assert metadata["format"] == "mte-bench-encoder/1"
    assert json.loads(metadata["spec"]) == SMALL.model_dump(mode="json")
    assert (metadata["mte"], metadata["epoch"], metadata["method"]) == ("true", "2.5", "dino")
    assert "note" not in metadata


def test_format_of_another_version(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"format": "mte-bench-encoder/2"})
    with pytest.raises(UserError, match="mte-bench-encoder/2, this version reads mte-bench-encoder/1"):
        open_checkpoint(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("layout", ["ours", "dino", "swin"])
def test_other_image_size(tmp_path: Path, layout: str):
    """Built for another size it gives what the encoder gives that meets this size on the way."""
    if layout == "ours":
        run_folder(tmp_path)
        text = str(tmp_path)
    else:
        weights = tiny().state_dict() if layout == "dino" else swin().state_dict()
        text = save(weights, tmp_path / "x.pth")
    own = open_checkpoint(text)
    size = 2 * own.encoder.spec.image_size
    resized = open_checkpoint(text, image_size=size)
    assert resized.subject.image_size == resized.encoder.spec.image_size == size
    assert torch.allclose(features(resized.encoder, size), features(own.encoder, size), atol=1e-5)
    same = open_checkpoint(f"{text}?image_size={size}")
    assert same.sha256 == resized.sha256
    if layout != "swin":
        assert resized.sha256 != own.sha256
        exported = timm.create_model(resized.encoder.spec.arch, **resized.encoder.spec.timm_arguments).eval()
        exported.load_state_dict(resized.encoder.model.state_dict(), strict=True)
        assert agrees(resized, exported)
    with pytest.raises(UserError, match="multiple of"):
        open_checkpoint(text, image_size=33)


def test_positions_are_resized_as_each_project_does(tmp_path: Path):
    """Against the projects' formulas; at the trained size none of them touches the table."""
    model = tiny()
    table = model.pos_embed.detach()
    square = table[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    interpolate = torch.nn.functional.interpolate
    resized = {  # to 3 rows and 7 columns
        "dino": interpolate(square, scale_factor=(3.1 / 4, 7.1 / 4), mode="bicubic"),
        "mae": interpolate(square, size=(3, 7), mode="bicubic", align_corners=False),
        "timm": interpolate(square, size=(3, 7), mode="bicubic", antialias=True),
    }
    contents = {
        "dino": {"teacher": prefixed("backbone.", model.state_dict()) | dino_head(192)},
        "mae": {"model": model.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}},
        "timm": model.state_dict(),
    }
    images = torch.randn(2, 3, 48, 112)
    for family, patches in resized.items():
        file = save(contents[family], tmp_path / f"{family}.pth")
        own, built = open_checkpoint(file), open_checkpoint(f"{file}?image_size=[48,112]")
        assert own.family == family
        expected = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(built.encoder.model.pos_embed, expected)
        assert torch.equal(own.encoder.model.pos_embed, table)  # type: ignore[arg-type]
        with torch.no_grad():
            reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(48, 112)).eval()
            reference.load_state_dict({**model.state_dict(), "pos_embed": expected})
            for opened in (own, built):
                tokens = opened.encoder(images)
                torch.testing.assert_close(tokens.global_token, reference(images), rtol=0, atol=1e-5)
                assert tokens.grid == (3, 7)
    bare = open_checkpoint(f"{tmp_path}/timm.pth?resize_positions=dino", image_size=80)
    assert torch.equal(
        bare.encoder.model.pos_embed, open_checkpoint(f"{tmp_path}/dino.pth", image_size=80).encoder.model.pos_embed
    )  # type: ignore[arg-type]
    with pytest.raises(UserError, match="resize_positions"):
        open_checkpoint(f"{tmp_path}/timm.pth?resize_positions=nearest")


@pytest.mark.parametrize("layout", ["reg4", "no position for CLS", "distilled"])
def test_tokens_besides_the_patches_keep_their_positions(tmp_path: Path, layout: str):
    """Whatever tokens there are, images of another size get the same from the encoder that meets them and one built for them."""
    options: dict[str, Any] = {
        "reg4": {"reg_tokens": 4},
        "no position for CLS": {"no_embed_class": True},
        "distilled": {},
    }[layout]
    arch = "deit_tiny_distilled_patch16_224" if layout == "distilled" else "vit_tiny_patch16_224"
    spec = EncoderSpec(arch=arch, image_size=64, options=options, resize_positions="deit")
    encoder = fresh_encoder(spec, 1).eval()
    save_encoder(tmp_path / "x.safetensors", encoder, {})
    built = open_checkpoint(str(tmp_path / "x.safetensors"), image_size=96)
    assert built.encoder.model.pos_embed.shape[1] - encoder.model.pos_embed.shape[1] == 36 - 16  # type: ignore[union-attr, index, operator]
    torch.testing.assert_close(features(built.encoder, 96), features(encoder, 96))
    antialiased = open_checkpoint(f"{tmp_path}/x.safetensors?resize_positions=timm", image_size=96)
    assert not torch.allclose(features(antialiased.encoder, 96), features(encoder, 96), atol=1e-5)


def test_encoders_of_images_that_are_no_squares(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The table alone does not say how it is cut; with the size it runs, resizes, inspects, exports and is hashed as any."""
    model = plain("vit_tiny_patch16_224", img_size=(96, 32))
    file = save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"12 patches of 16 pixels, which are no square.*FILE\?image_size=\[HEIGHT,WIDTH\]"):
        open_checkpoint(file)
    with pytest.raises(UserError, match="no square"):
        open_checkpoint(f"{file}?image_size=[96,48]")
    opened = open_checkpoint(f"{file}?image_size=[96,32]")
    images = torch.randn(2, 3, 96, 32)
    with torch.no_grad():
        assert torch.equal(opened.encoder(images).global_token, model(images))
    assert opened.subject.image_size is None and opened.subject.arch_options == {"image_size": [96, 32]}
    with pytest.raises(UserError, match=r"images of 96 x 32 pixels.*choose their side, image_size=N"):
        _ = opened.encoder.spec.side
    square = open_checkpoint(f"{file}?image_size=[96,32]", image_size=64)  # what a protocol's image_size does
    assert square.subject.image_size == 64
    torch.testing.assert_close(features(square.encoder, 64), features(opened.encoder, 64))
    turned = open_checkpoint(f"{file}?image_size=[96,32]", image_size=64).encoder.model.pos_embed
    assert turned.shape == (1, 17, 192)  # type: ignore[comparison-overlap]
    inspect(f"{file}?image_size=[96,32]")
    assert "96 x 32" in capsys.readouterr().out
    export(f"{file}?image_size=[96,32]", tmp_path / "out.safetensors")
    line = capsys.readouterr().out.strip()
    with torch.no_grad():
        assert torch.equal(eval(line, {"timm": timm}).eval()(images), model(images))
    again = open_checkpoint(str(tmp_path / "out.safetensors"))
    assert again.sha256 == opened.sha256 and again.encoder.spec.size == (96, 32)
    swapped = open_checkpoint(f"{tmp_path}/out.safetensors?image_size=[32,96]")  # as many patches, lying otherwise
    with torch.no_grad():
        images = images.transpose(2, 3)
        torch.testing.assert_close(swapped.encoder(images).global_token, again.encoder(images).global_token)


def test_ibots_swin_has_an_eps_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = swin()
    file = save({"teacher": prefixed("backbone.", as_original_swin(model)) | dino_head(96), "ibot_loss": {}}, tmp_path / "x.pth")
    opened = open_checkpoint(file)
    assert opened.family == "ibot"
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5
            module.eps = 1e-6
    assert agrees(opened, model)
    inspect(file)
    assert "norm_eps 1e-06" in capsys.readouterr().out
    export(file, tmp_path / "out.safetensors")
    assert "another eps" in capsys.readouterr().err
    assert agrees(open_checkpoint(str(tmp_path / "out.safetensors")), model)


def test_partial_match(tmp_path: Path):
    weights = tiny().state_dict()
    file = save(
        {name: tensor for name, tensor in weights.items() if "blocks.3." not in name} | {"adapter.weight": torch.ones(2)},
        tmp_path / "x.pth",
    )
    with pytest.raises(
        UserError, match=r"missing blocks\.3\.norm1\.weight.* and 8 more; not expected adapter\.weight.*--allow-partial"
    ):
        open_checkpoint(file)
    opened = open_checkpoint(file, allow_partial=True)
    assert len(opened.missing) == 12
    assert opened.dropped == ["adapter.weight"]
    start = fresh_encoder(opened.encoder.spec, 0).model.state_dict()
    found = opened.encoder.model.state_dict()
    assert all(torch.equal(found[name], start[name] if name in opened.missing else weights[name]) for name in found)
    surplus = save(weights | {"adapter.weight": torch.ones(2)}, tmp_path / "surplus.pth")
    with pytest.raises(UserError, match=r"missing nothing; not expected adapter\.weight"):
        open_checkpoint(surplus)
    wrong = save(weights | {"norm.bias": torch.zeros(7)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"norm\.bias of shape 7, not 192"):
        open_checkpoint(wrong)


class Malice:
    """Unpickling it would create a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, zipped: bool):
    content = {"model": dict(tiny().state_dict()), "args": Malice(tmp_path / "victim")}
    file = save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"would run \w+\.mkdir, which is refused"):
        open_checkpoint(file)
    assert not (tmp_path / "victim").exists()


def test_what_training_scripts_leave_behind_is_ignored(tmp_path: Path):
    """Arguments with paths and NumPy numbers: harmless, and never made into live objects."""
    model = tiny()
    arguments = argparse.Namespace(lr=np.float64(0.1), output=tmp_path, nested={"a": argparse.Namespace(b=1)})
    opened = open_checkpoint(save({"model": model.state_dict(), "args": arguments, "best": np.float32(3)}, tmp_path / "x.pth"))
    assert agrees(opened, model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoints(tmp_path: Path, suffix: str):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        save(tiny().state_dict(), whole)
    else:
        run_folder(tmp_path)
        whole = tmp_path / "encoder.safetensors"
    data = whole.read_bytes()
    generator = np.random.default_rng(0)
    broken = [b"", b"PK\x03\x04", b"\x80\x02", b"hello, I am a text file\n" * 100, data[:100], data[: len(data) // 2], data[:-1]]
    broken += [generator.bytes(1000) for _ in range(20)]
    for index, content in enumerate(broken):
        file = tmp_path / f"{index}{suffix}"
        file.write_bytes(content)
        with pytest.raises(UserError, match=str(file)) as caught:
            open_checkpoint(str(file))
        assert "\n" not in str(caught.value)
        assert "refused" not in str(caught.value)


def test_texts_that_are_no_checkpoints(tmp_path: Path):
    for text, says in [
        ("nowhere/at/all", "no such checkpoint"),
        ("vit_tiny_patch16_224", "did you mean timm:vit_tiny_patch16_224 or random:vit_tiny_patch16_224"),
        (str(tmp_path), "no encoder.safetensors"),
        ("random:vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'"),
        ("random:vit_tiny_patch16_224?seed=x", "seed must be a whole number"),
        ("random:vit_tiny_patch16_224?seed", "must be option=value"),
        ("random:vit_tiny_patch16_224?dept=2", "an option it does not have"),
        ("random:vit_tiny_patch16_224?image_size=big", "image_size"),
        ("timm:resnet18", "not a ViT or Swin"),
        ("timm:vit_tiny_patch16_224.nope", "Invalid pretrained tag"),
        ("timm:vit_small_patch8_224.nope", "Invalid pretrained tag"),
        (save([1, 2], tmp_path / "list.pth"), "holds a list"),
        (save({"a": 1}, tmp_path / "empty.pth"), r"no weights.*\(it has a\)"),
        (save({"conv1.weight": torch.ones(2, 2)}, tmp_path / "cnn.pth"), "holds no ViT or Swin"),
    ]:
        with pytest.raises(UserError, match=says):
            open_checkpoint(text)


def test_random_encoders(tmp_path: Path):
    text = "random:vit_tiny_patch16_224?image_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=3"
    opened = open_checkpoint(text)
    assert opened.encoder.spec == SMALL
    assert opened.sha256 == weights_hash(fresh_encoder(SMALL, 0)) == open_checkpoint(text).sha256
    assert (opened.family, opened.subject.seed, opened.subject.method, opened.folder) == ("random", 0, None, None)
    other = open_checkpoint(f"{text}&seed=7")
    assert other.sha256 == weights_hash(fresh_encoder(SMALL, 7)) != opened.sha256
    run_folder(tmp_path)
    assert open_checkpoint(f"random:{tmp_path}?seed=7").sha256 == other.sha256
    assert open_checkpoint(f"random:{tmp_path}/encoder.safetensors").sha256 == opened.sha256
    grey = open_checkpoint(f"{text}&mean=[0.5,0.5,0.5]&std=[0.5,0.5,0.5]")
    assert grey.encoder.spec.mean == (0.5, 0.5, 0.5)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_pretrained_weights_from_timms_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offline(monkeypatch, tmp_path)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = plain("vit_tiny_patch16_224")
    repository = tmp_path / f"models--timm--{name}"
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    head = {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    safetensors.torch.save_file(model.state_dict() | head, snapshot / "model.safetensors")
    opened = open_checkpoint(f"timm:{name}")
    assert agrees(opened, model)
    assert (opened.family, opened.subject.arch) == ("timm", "vit_tiny_patch16_224")
    assert opened.encoder.spec.mean == (0.5, 0.5, 0.5)  # these weights want other images than ImageNet's mean
    assert open_checkpoint(f"timm:{name}", image_size=64).encoder.spec.image_size == 64


def test_weights_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    offline(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"timm:vit_tiny_patch16_224: the weights could not be had \(.*\); connect"):
        open_checkpoint("timm:vit_tiny_patch16_224")


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder(tmp_path)
    inspect(str(tmp_path))
    shown = capsys.readouterr().out
    for word in ("mte-bench", SMALL.arch, "embed_dim 48", "0.07 M", "CLS 1", "pooled 3", "dino_tiny_scenes"):
        assert word in shown
    weights = tiny().state_dict()
    file = save({name: tensor for name, tensor in weights.items() if name != "norm.bias"} | dino_head(192), tmp_path / "x.pth")
    inspect(file, all_names=True)
    shown = capsys.readouterr().out
    assert "norm.bias" in shown
    assert "head.last_layer.weight_g" in shown
    inspect(file, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["norm.bias"]
    assert found["subject"]["family"] == "dino"
    assert found["macs"] == pytest.approx(12 * (12 * 17 * 192**2 + 2 * 17**2 * 192) + 16 * 192 * 768)


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    """The printed line loads the file into plain timm, with the same features."""
    encoder, _ = run_folder(tmp_path / "run")
    out = tmp_path / "deep" / name
    export(str(tmp_path / "run"), out)
    line = capsys.readouterr().out.strip()
    assert line.startswith("timm.create_model(")
    loaded = eval(line, {"timm": timm}).eval()
    assert torch.equal(features(loaded, 32), features(encoder, 32))
    again = open_checkpoint(str(out) if name.endswith("safetensors") else f"{out}?num_heads=3")
    assert again.sha256 == open_checkpoint(str(tmp_path / "run")).sha256
    if name.endswith("safetensors"):
        assert (again.subject.method, again.subject.recipe_hash) == ("dino", METADATA["recipe_hash"])
    with pytest.raises(UserError, match="--format h5"):
        export(str(tmp_path / "run"), tmp_path / "x", file_format="h5")


def test_commands_import_nothing_heavy():
    code = "import sys, mte_bench.encoders.commands; print({'torch', 'timm', 'numpy', 'pydantic'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
