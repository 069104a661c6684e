"""The encoder inside OpenMMLab's models: the same maps as timm's, and a learning rate of its own for each parameter."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from downstream.dense.adapter import Backbone, parameter_groups
from downstream.dense.operators import Operators
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.errors import UserError
from tests.tiny import random

VIT = EncoderSpec(arch="vit_tiny_patch16_224", image_size=64, options={"depth": 4, "embed_dim": 48})
SWIN = EncoderSpec(arch="swin_tiny_patch4_window7_224", image_size=64, options={"embed_dim": 24, "depths": [1, 1, 2, 1]})
TAPS = (0, 1, 2, 3)


def padded(images: torch.Tensor, multiple: int) -> torch.Tensor:
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (70, 90)])
def test_taps_of_a_vit_are_those_of_timm(size: tuple[int, int], norm: bool) -> None:
    encoder = fresh_encoder(VIT)
    peer = timm.create_model(VIT.arch, num_classes=0, img_size=64, depth=4, embed_dim=48, dynamic_img_size=True).eval()
    peer.load_state_dict(encoder.model.state_dict())
    images = random(2, 3, *size)
    maps = Backbone(encoder, taps=TAPS, tap_norm=norm, adapt=False).eval()(images)
    expected = peer.forward_intermediates(padded(images, 16), indices=TAPS, norm=norm, intermediates_only=True)
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_maps_of_a_swin_are_the_stages_of_timm_after_a_norm(size: tuple[int, int]) -> None:
    encoder = fresh_encoder(SWIN).eval()
    backbone = Backbone(encoder, taps=TAPS).eval()
    images = random(2, 3, *size)
    expected = encoder.model.forward_intermediates(padded(images, 32), intermediates_only=True)  # type: ignore[operator]
    assert backbone.widths == (24, 48, 96, 192)
    for found, wanted in zip(backbone(images), expected, strict=True):
        normed = F.layer_norm(wanted.permute(0, 2, 3, 1), wanted.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, normed, rtol=0, atol=1e-5)


def test_the_table_of_positions_is_resized_once_to_the_images_it_is_trained_on_and_then_to_each_image() -> None:
    encoder = fresh_encoder(VIT)
    table: torch.Tensor = encoder.model.pos_embed.detach()  # type: ignore[union-attr, assignment, operator]
    backbone = Backbone(encoder, taps=TAPS, adapt=False, position_size=(80, 118))
    trained: Any = backbone.encoder.model.pos_embed
    torch.testing.assert_close(trained, resample_abs_pos_embed(table, [5, 7], [4, 4]), rtol=0, atol=1e-6)
    embedded = torch.zeros(1, 3, 8, 48)
    added = backbone.encoder.model._pos_embed(embedded)[:, 1:]  # type: ignore[operator]
    torch.testing.assert_close(added, resample_abs_pos_embed(trained, [3, 8], [5, 7])[:, 1:], rtol=0, atol=1e-6)
    assert table.shape == encoder.model.pos_embed.shape  # type: ignore[union-attr]


def test_the_adaptors_give_strides_4_8_16_32() -> None:
    backbone = Backbone(fresh_encoder(VIT), taps=TAPS).eval()
    plain = Backbone(fresh_encoder(VIT), taps=TAPS, adapt=False).eval()(random(1, 3, 64, 96))
    maps = backbone(random(1, 3, 64, 96))
    assert [tuple(one.shape) for one in maps] == [(1, 48, 16, 24), (1, 48, 8, 12), (1, 48, 4, 6), (1, 48, 2, 3)]
    assert torch.equal(maps[2], plain[2])
    assert torch.equal(maps[3], plain[3].unflatten(3, (3, 2)).unflatten(2, (2, 2)).amax((3, 5)))


def test_a_frozen_encoder_learns_nothing_and_drops_nothing() -> None:
    backbone = Backbone(fresh_encoder(VIT), taps=TAPS, adapt=False, frozen=True, drop_path=0.9).train()
    images = random(2, 3, 64, 64)
    assert torch.equal(backbone(images)[3], backbone(images)[3])
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_stochastic_depth_acts_in_training_only_and_recomputed_activations_have_the_same_gradients() -> None:
    images = random(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        backbone = Backbone(fresh_encoder(VIT), taps=TAPS, adapt=False, drop_path=0.5, checkpointing=checkpointing)
        assert torch.equal(backbone.eval()(images)[2], backbone(images)[2])
        torch.manual_seed(3)
        first = backbone.train()(images)
        assert not torch.equal(first[2], backbone(images)[2])
        torch.manual_seed(3)
        sum(one.square().mean() for one in backbone(images)).backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(("spec", "options", "words"), [
    (VIT, {"taps": (0, 1, 2, 4)}, "0 to 3"),
    (VIT, {"taps": (0, 2, 1, 3)}, "rising"),
    (VIT.model_copy(update={"patch_size": 8}), {"taps": TAPS}, "patches of 8 pixels"),
])  # fmt: skip
def test_what_has_no_four_maps_is_refused(spec: EncoderSpec, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Backbone(build_encoder(spec), **options)


@pytest.mark.parametrize("decay", [0.75, 0.9])
def test_every_parameter_of_vit_b_has_the_rate_and_weight_decay_of_the_sheet(decay: float) -> None:
    with torch.device("meta"):
        model = torch.nn.Module()
        model.backbone = Backbone(build_encoder(EncoderSpec(arch="vit_base_patch16_224")), taps=(3, 5, 7, 11), tap_norm=True)
        model.neck = torch.nn.Conv2d(768, 256, 1)
    groups = parameter_groups(model, 12, 1e-4, 0.05, decay, "vectors")
    settings = {name: group for group in groups for name in group["names"]}
    assert settings.keys() == {name for name, _ in model.named_parameters()}
    place = "backbone.encoder.model."
    for name, parameter in model.named_parameters():
        if name.startswith((f"{place}pos_embed", f"{place}cls_token", f"{place}patch_embed")):
            power = 13
        elif name.startswith(f"{place}blocks."):
            power = 12 - int(name.removeprefix(f"{place}blocks.").partition(".")[0])
        else:
            power = 0
        assert settings[name]["lr"] == pytest.approx(1e-4 * decay**power), name
        spared = parameter.ndim == 1
        assert settings[name]["weight_decay"] == (0 if spared else 0.05), name
    assert settings[f"{place}pos_embed"]["weight_decay"] == settings[f"{place}cls_token"]["weight_decay"] == 0.05
    assert settings[f"{place}blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(1e-4 * decay**12)
    assert settings[f"{place}blocks.11.mlp.fc2.weight"]["lr"] == pytest.approx(1e-4 * decay)


def test_weight_decay_of_a_swin_spares_norms_and_relative_positions_but_no_other_biases() -> None:
    model = torch.nn.Module()
    model.backbone = Backbone(build_encoder(SWIN), taps=TAPS)
    groups = parameter_groups(model, 5, 1e-4, 0.05, 1.0, ["relative_position_bias_table", "norm"])
    decayed = {name: group["weight_decay"] > 0 for group in groups for name in group["names"]}
    for name, acts in decayed.items():
        assert acts == ("norm" not in name and "relative_position" not in name), name
    assert any(name.endswith("qkv.bias") and acts for name, acts in decayed.items())


# --- mmcv's operators from torchvision ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_a_plain_loop_keeps(offset: int) -> None:
    generator = np.random.default_rng(offset)
    corners = generator.integers(0, 30, (60, 2))
    boxes = np.concatenate([corners, corners + generator.integers(1, 20, (60, 2))], axis=1).astype(np.float32)
    scores = generator.permutation(60).astype(np.float32)
    kept: list[int] = []
    for index in np.argsort(-scores):
        x1, y1 = np.maximum(boxes[index, :2], boxes[kept, :2]).T if kept else (np.zeros(0), np.zeros(0))
        x2, y2 = np.minimum(boxes[index, 2:], boxes[kept, 2:]).T if kept else (np.zeros(0), np.zeros(0))
        shared = np.maximum(x2 - x1 + offset, 0) * np.maximum(y2 - y1 + offset, 0)
        area = np.prod(boxes[:, 2:] - boxes[:, :2] + offset, axis=1)
        if not (shared / (area[index] + area[kept] - shared) > 0.4).any():
            kept.append(int(index))
    found = Operators("x").nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.4, offset)
    assert found.tolist() == kept


def roi_align(features: torch.Tensor, rois: torch.Tensor, sampling: int) -> torch.Tensor:
    output = features.new_zeros(len(rois), features.shape[1], 3, 2)
    empty = features.new_zeros(0)
    Operators("x").roi_align_forward(features, rois, output, empty, empty, 3, 2, 0.5, sampling, 1, True)
    return output


@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_of_a_plane_is_its_value_at_the_middle_of_each_cell(sampling: int) -> None:
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(24.0), indexing="ij")
    features = (2 * x - 3 * y + 1)[None, None]
    rois = torch.tensor([[0, 4.0, 6.0, 36.0, 30.0], [0, 10.0, 12.0, 21.0, 25.0]])
    found = roi_align(features, rois, sampling)
    for roi, cells in zip(rois, found, strict=True):
        left, top, right, bottom = (roi[1:] * 0.5 - 0.5).tolist()  # pixels have their values at their middle
        middle_x = left + (right - left) * (torch.arange(2) + 0.5) / 2
        middle_y = top + (bottom - top) * (torch.arange(3) + 0.5) / 3
        torch.testing.assert_close(cells[0], 2 * middle_x[None] - 3 * middle_y[:, None] + 1)


@pytest.mark.parametrize("sampling", [0, 2])
def test_the_gradient_of_roi_align_is_its_transpose(sampling: int) -> None:
    features, rois = random(2, 3, 12, 14), torch.tensor([[0, 1.0, 2.0, 19.0, 21.0], [1, 5.5, 3.0, 26.0, 22.0]])
    output = roi_align(features, rois, sampling)
    gradient, back, empty = random(*output.shape, seed=1), torch.zeros_like(features), features.new_zeros(0)
    Operators("x").roi_align_backward(gradient, rois, empty, empty, back, 3, 2, 0.5, sampling, 1, True)
    assert (gradient * output).sum().item() == pytest.approx((back * features).sum().item(), rel=1e-5)


def test_other_operators_are_there_by_name_and_say_what_they_lack() -> None:
    with pytest.raises(NotImplementedError, match="deform_conv_forward"):
        Operators("x").deform_conv_forward(1, 2)
