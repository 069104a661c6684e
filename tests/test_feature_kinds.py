"""Kinds of features: each against timm's own intermediates or against what hooks saw, and clear errors where there is none."""

import pytest
import torch

from downstream.feature_kinds import KINDS, kind_of
from downstream.features import Pass, encode_batch
from mte_bench.encoders.encoder import Encoder, EncoderSpec, build_encoder
from mte_bench.errors import UserError

VIT = EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"embed_dim": 48, "depth": 5, "num_heads": 3})
REGISTERS = VIT.model_copy(update={"options": {**VIT.options, "reg_tokens": 3}})
SWIN = EncoderSpec(
    arch="swin_tiny_patch4_window7_224",
    image_size=64,
    options={"embed_dim": 16, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 4},
)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def encoder(spec: EncoderSpec) -> Encoder:
    torch.manual_seed(0)
    built = build_encoder(spec).eval()
    with torch.no_grad():
        for parameter in built.requires_grad_(False).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def features(model: Encoder, kind: str, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return torch.from_numpy(encode_batch(model, images, (kind,), Pass())[kind])


@pytest.mark.parametrize("spec", [VIT, REGISTERS], ids=["plain", "registers"])
def test_those_after_the_final_norm_are_timms_intermediates(spec: EncoderSpec):
    model = encoder(spec)
    with torch.no_grad():
        found = model.model.forward_intermediates(  # type: ignore[operator]
            IMAGES, indices=4, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
    cls, patches = [prefix[:, 0] for _, prefix in found], found[-1][0]
    expected = {
        "cls-last1": cls[-1],
        "cls-last4": torch.cat(cls, 1),
        "cls+patch-mean": torch.cat([cls[-1], patches.mean(1)], 1),
        "cls-last3+patch-mean": torch.cat([*cls[1:], patches.mean(1)], 1),
        "patch-mean-normed": patches.mean(1),
        "patches": patches.flatten(1),
        "global": cls[-1],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(features(model, kind), values)
    assert torch.equal(features(model, "patches").reshape(3, 16, 48), features(model, "patches").unflatten(1, (16, 48)))


@pytest.mark.parametrize("spec", [VIT, REGISTERS], ids=["plain", "registers"])
def test_most_and_least_attended_patches(spec: EncoderSpec):
    """Against attention written out from what reaches the last block, and its output before the final norm."""
    model, seen = encoder(spec), {}
    last, prefix = model.block_list[-1], model.model.num_prefix_tokens
    last.attn.register_forward_pre_hook(lambda module, args: seen.update(normed=args[0]))  # type: ignore[union-attr]
    last.register_forward_hook(lambda module, args, out: seen.update(out=out[:, prefix:]))  # type: ignore[index]
    top, bottom, least = (features(model, kind) for kind in ("patches-top2", "patches-bottom3", "patches-bottom16"))
    q, k, _ = last.attn.qkv(seen["normed"]).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)  # type: ignore[union-attr, operator]
    attention = (q[:, :, 0] / 4).unsqueeze(2).mul(k).sum(-1).softmax(-1).mean(1)[:, prefix:]
    for image in range(3):
        order = attention[image].argsort(descending=True)
        torch.testing.assert_close(top[image], seen["out"][image, order[:2]].mean(0))
        torch.testing.assert_close(bottom[image], seen["out"][image, order[-3:]].mean(0))
    torch.testing.assert_close(least, features(model, "patch-mean"))
    torch.testing.assert_close(least, seen["out"].mean(1))


def test_pooled_blocks_of_a_swin():
    """Of the last stage through the final norm, of the one before as they are; no block twice, none left out."""
    model, seen = encoder(SWIN), []
    for block in model.block_list:
        block.register_forward_hook(lambda module, args, out: seen.append(out.flatten(1, 2)))
    images = torch.randn(2, 3, 64, 64)
    found = features(model, "pooled-last4", images)
    norm = model.model.norm
    expected = [tokens.mean(1) for tokens in seen[2:4]] + [norm(tokens).mean(1) for tokens in seen[4:]]  # type: ignore[operator]
    assert found.shape == (2, 64 + 64 + 128 + 128)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    torch.testing.assert_close(features(model, "pooled-last1", images), features(model, "global", images))


def test_swin_t_is_2304_wide():
    with torch.device("meta"):
        model = build_encoder(EncoderSpec(arch="swin_tiny_patch4_window7_224"))
        kind = kind_of("pooled-last4", model)
        tokens = model(torch.empty(1, 3, 224, 224), blocks=kind.blocks)
        assert kind.compute(tokens).shape == (1, 2304)


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        (VIT, "cls-last", "did you mean 'cls-last4'"),
        (VIT, "cls-last0", "did you mean 'cls-last4'"),
        (VIT, "patches-topp3", "did you mean 'patches-top4'"),
        (VIT, "something", "one of: .*cls-last4.*pooled-last4"),
        (VIT, "cls-last6", "has 5 blocks; choose fewer"),
        (VIT, "cls-last6+patch-mean", "has 5 blocks"),
        (VIT, "patches-top17", "only 16 patches; choose fewer"),
        (VIT, "pooled-last4", "is a Swin's.*choose cls-last4"),
        (SWIN, "cls-last4", "no CLS token; choose global, pooled-last4 or patch-mean"),
        (SWIN, "cls+patch-mean", "no CLS token"),
        (SWIN, "patches-top4", "no CLS token"),
        (SWIN, "pooled-last7", "has 6 blocks"),
        (
            VIT.model_copy(update={"options": {**VIT.options, "class_token": False, "global_pool": "avg"}}),
            "cls-last1",
            "patch-mean",
        ),
        (VIT.model_copy(update={"arch": "eva02_tiny_patch14_224"}), "global", "not a ViT or Swin"),
    ],
)
def test_what_an_encoder_does_not_have_is_said(spec: EncoderSpec, kind: str, says: str):
    with pytest.raises(UserError, match=says):
        model = encoder(spec)
        kind_of(kind, model, model.spec.side)


def test_every_kind_is_computed_in_16_bits_too():
    for spec, images in ((VIT, IMAGES), (SWIN, torch.randn(2, 3, 64, 64))):
        model = encoder(spec)
        for pattern in KINDS:
            kind = pattern.replace("{N}", "2")
            try:
                kind_of(kind, model)
            except UserError:
                continue
            exact, half = (
                features(model, kind, images),
                encode_batch(model, images, (kind,), Pass(precision=torch.bfloat16))[kind],
            )
            assert half.dtype == "float16" and half.shape == exact.shape
            if "-top" not in kind and "-bottom" not in kind:  # near ties may fall the other way
                assert abs(torch.from_numpy(half).float() - exact).max() < 0.15
