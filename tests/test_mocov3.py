"""MoCo v3 beyond what ``test_equality.py`` compares: how encoders start, and what of them never moves."""

import math
from pathlib import Path

import pytest
import torch

from mte_bench.encoders.encoder import Encoder, EncoderSpec, build_encoder
from mte_bench.errors import UserError
from pretrain.methods.mocov3 import MoCoV3
from tiny import make


def started(arch: str, image_size: int = 64, **options: object) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSpec(arch=arch, image_size=image_size, options=options))
    MoCoV3(MoCoV3.Settings()).init_encoder(encoder)
    return encoder


def test_linear_weights_are_xaviers_with_queries_keys_and_values_apart() -> None:
    model = started("vit_small_patch16_224", 224, depth=2).model
    bounds = {
        "blocks.0.attn.qkv": math.sqrt(6 / (384 + 384)),
        "blocks.0.attn.proj": math.sqrt(6 / (384 + 384)),
        "blocks.1.mlp.fc1": math.sqrt(6 / (384 + 1536)),
        "patch_embed.proj": math.sqrt(6 / (3 * 16 * 16 + 384)),
    }
    for name, bound in bounds.items():
        module = model.get_submodule(name)
        assert 0.999 * bound < module.weight.abs().max().item() <= bound
        assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert not module.bias.any()
    assert model.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)


def test_positions_are_sines_and_cosines_of_row_and_column() -> None:
    model = started("vit_small_patch16_224", 64, embed_dim=16, depth=1, num_heads=2).model
    table = model.pos_embed
    assert table.shape == (1, 17, 16) and not table.requires_grad
    assert not table[0, 0].any()
    for row in range(4):
        for column in range(4):
            expected = [
                wave(place * 10_000 ** (-index / 4))
                for place in (row, column)
                for wave in (math.sin, math.cos)
                for index in range(4)
            ]
            torch.testing.assert_close(table[0, 1 + 4 * row + column], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_what_an_architecture_does_not_have_is_left_out() -> None:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    no_cls = started("vit_tiny_patch16_224", class_token=False, global_pool="avg", **small).model
    assert (
        no_cls.pos_embed.shape == (1, 16, 16) and no_cls.pos_embed[0, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [1.0] * 4
    )
    registers = started("vit_tiny_patch16_224", reg_tokens=2, **small).model
    assert registers.pos_embed.shape == (1, 19, 16) and not registers.pos_embed[0, :3].any()
    assert 0 < registers.reg_token.abs().max().item() < 1e-5
    swin = started("swin_tiny_patch4_window7_224", embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4).model
    frozen = [name for name, parameter in swin.named_parameters() if not parameter.requires_grad]
    assert frozen == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    with pytest.raises(UserError, match=r"embed_dim 18: must be a multiple of 4"):
        started("vit_tiny_patch16_224", embed_dim=18, depth=1, num_heads=2)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_parts_have_no_gradient_and_do_not_move(folder: Path, tmp_path: Path, freeze: bool) -> None:
    settings = {"hidden": 32, "output": 16, "freeze_patch_embedding": freeze}
    trainer = make(folder, tmp_path, method="mocov3", method_settings=settings, epochs=1)
    frozen = ["pos_embed", *(["patch_embed.proj.weight", "patch_embed.proj.bias"] if freeze else [])]
    start = {name: parameter.detach().clone() for name, parameter in trainer.student.encoder.model.named_parameters()}
    trainer.run()
    for branch in (trainer.student, trainer.teacher):
        now = dict(branch.encoder.model.named_parameters())
        assert [name for name in now if torch.equal(now[name], start[name])] == frozen
    optimised = {id(parameter) for group in trainer.optimiser.param_groups for parameter in group["params"]}
    assert not optimised & {id(trainer.student.encoder.model.get_parameter(name)) for name in frozen}


def test_no_layer_has_a_bias_and_the_last_norms_have_no_weights() -> None:
    method = MoCoV3(MoCoV3.Settings())
    projection = {name: tuple(p.shape) for name, p in method.head(384, 1).named_parameters() if "norm" not in name}
    assert projection == {
        "layers.0.weight": (1, 4096, 384),
        "layers.1.weight": (1, 4096, 4096),
        "layers.2.weight": (1, 256, 4096),
    }
    predictor = method.tail(student=True)
    assert sum(p.numel() for name, p in predictor.named_parameters() if "norm" not in name) == 2 * 4096 * 256
    assert "last_norm.weight" not in predictor.state_dict() and "last_norm.running_mean" in predictor.state_dict()
