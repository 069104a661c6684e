"""Every project's layout of a checkpoint gives timm's features."""

import argparse
import pathlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from layouts import SMALL, agrees, as_original_swin, dino_head, features, plain, prefixed, save, swin, tiny
from mte_bench.encoders.checkpoint import open_checkpoint, weights_hash
from mte_bench.encoders.commands import export, inspect
from mte_bench.encoders.families import read_foreign
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.errors import UserError


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
