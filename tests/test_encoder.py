"""The encoder: the same as timm's model, untouched by auxiliary tokens, and right at every size."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from mte_bench.encoders.encoder import Encoder, EncoderSpec, Sight, Tokens, build_encoder
from mte_bench.encoders.initial import dino_init, fresh_encoder
from mte_bench.errors import UserError

VIT = EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"embed_dim": 48, "depth": 3, "num_heads": 3})
REGISTERS = EncoderSpec(
    arch="vit_small_patch14_reg4_dinov2", image_size=56, options={"embed_dim": 48, "depth": 3, "num_heads": 3}
)
SWIN = EncoderSpec(
    arch="swin_tiny_patch4_window7_224",
    image_size=64,
    options={"embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4},
)


def encoder(spec: EncoderSpec = VIT, drop_path: float = 0.0) -> Encoder:
    """With weights large enough that attention is far from uniform and a leak between streams would show."""
    made = fresh_encoder(spec, 0, drop_path).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return made


def images(count: int = 2, height: int = 32, width: int | None = None) -> Tensor:
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(2))


def auxiliary(count: int = 4) -> Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("spec", [VIT, REGISTERS, SWIN], ids=["vit", "registers", "swin"])
def test_state_dict_loads_strictly_into_timm_and_outputs_are_equal(spec: EncoderSpec):
    ours = encoder(spec)
    theirs = timm.create_model(spec.arch, **spec.timm_arguments).eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    x = images(3, spec.image_size)
    with torch.no_grad():
        tokens, features = ours(x), theirs.forward_features(x)
        assert torch.equal(tokens.global_token, theirs(x))
    patches = features[:, theirs.num_prefix_tokens :] if ours.is_vit else features.flatten(1, 2)
    assert torch.equal(tokens.patches, patches)
    assert tokens.patches.shape == (3, tokens.grid[0] * tokens.grid[1], ours.width)


@pytest.mark.parametrize("spec", [VIT, REGISTERS], ids=["vit", "registers"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 56, 56), (2, 16, 48), (5, 112, 32)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_kept_tokens_are_bit_identical_with_auxiliary_tokens(
    spec: EncoderSpec, shape: tuple[int, int, int], precision: torch.dtype
):
    if spec is REGISTERS:
        shape = (shape[0], 14 * (shape[1] // 8), 14 * (shape[2] // 8))
    model, x = encoder(spec), images(*shape)
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        without = model(x, blocks=(0, -1), attention=True)
        for count in (1, 4):
            same(without, model(x, auxiliary=auxiliary(count), blocks=(0, -1), attention=True))


def test_kept_tokens_and_their_gradients_are_bit_identical_in_training():
    """With the same draws of stochastic depth; the loss is on kept tokens only, so auxiliary tokens get no gradient."""
    model = encoder(drop_path=0.5).train()
    x = images(8)
    draws = model.draw_drop_path(8, torch.Generator().manual_seed(4))
    assert draws is not None
    model.use_drop_path(draws)
    tokens, gradients = [], []
    aux = auxiliary().requires_grad_()
    for extra in (None, aux):
        model.zero_grad()
        tokens.append(model(x, auxiliary=extra))
        (tokens[-1].global_token.square().sum() + tokens[-1].patches.square().sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    same(*tokens)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert aux.grad is None or not aux.grad.any()
    model.use_drop_path(None)
    assert not torch.equal(model(x).global_token, tokens[0].global_token)  # the draws did something


def same(a: Tokens, b: Tokens) -> None:
    assert torch.equal(a.global_token, b.global_token)
    assert torch.equal(a.patches, b.patches)
    assert torch.equal(a.raw_patches, b.raw_patches)
    for (global_a, patches_a), (global_b, patches_b) in zip(a.blocks, b.blocks, strict=True):
        assert torch.equal(global_a, global_b)
        assert torch.equal(patches_a, patches_b)
    if a.attention is not None:
        assert b.attention is not None
        assert torch.equal(a.attention, b.attention)


def masked_reference(model: Encoder, x: Tensor, aux: Tensor, seen: Callable[[int, int, int], Tensor]) -> tuple[Tensor, Tensor]:
    """One dense attention over the joined sequence with a boolean mask, in double: final kept tokens, auxiliary tokens.

    ``seen(prefix, kept, auxiliary)`` is the mask's rows of the auxiliary queries.
    """
    timm_model = model.model
    embedded = timm_model.norm_pre(timm_model._pos_embed(timm_model.patch_embed(x)))
    prefix, kept, extra = timm_model.num_prefix_tokens, embedded.shape[1], len(aux)
    h = torch.cat([embedded, aux.expand(len(x), -1, -1)], dim=1)
    mask = torch.cat([torch.cat([torch.ones(kept, kept), torch.zeros(kept, extra)], dim=1), seen(prefix, kept, extra)]).bool()
    for block in timm_model.blocks:
        normed, heads = block.norm1(h), block.attn.num_heads
        q, k, v = block.attn.qkv(normed).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        h = h + block.ls1(block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        h = h + block.ls2(block.mlp(block.norm2(h)))
    return timm_model.norm(h[:, :kept]), h[:, kept:]


def everything(prefix: int, kept: int, extra: int) -> Tensor:
    return torch.ones(extra, kept + extra)


def not_global(prefix: int, kept: int, extra: int) -> Tensor:
    rows = torch.ones(extra, kept + extra)
    rows[:, :prefix] = 0
    return rows


def not_each_other(prefix: int, kept: int, extra: int) -> Tensor:
    return torch.cat([torch.ones(extra, kept), torch.eye(extra)], dim=1)


def patches_and_self(prefix: int, kept: int, extra: int) -> Tensor:
    return not_global(prefix, kept, extra) * not_each_other(prefix, kept, extra)


@pytest.mark.parametrize("spec", [VIT, REGISTERS], ids=["vit", "registers"])
@pytest.mark.parametrize(
    ("sight", "seen"),
    [
        ("everything", everything),
        ("not-global", not_global),
        ("not-each-other", not_each_other),
        ("patches-and-self", patches_and_self),
    ],
)
def test_split_attention_equals_masked_dense_attention(spec: EncoderSpec, sight: Sight, seen: Callable[[int, int, int], Tensor]):
    model, x, aux = encoder(spec), images(2, spec.image_size), auxiliary()
    with torch.no_grad():
        tokens = model(x, auxiliary=aux, sight=sight)
        kept, extra = masked_reference(model.double(), x.double(), aux.double(), seen)
    assert tokens.auxiliary is not None
    prefix = model.model.num_prefix_tokens
    assert (tokens.global_token - kept[:, 0]).abs().max() < 1e-5
    assert (tokens.patches - kept[:, prefix:]).abs().max() < 1e-5
    assert ((tokens.auxiliary - extra).abs() / (1 + extra.abs())).max() < 1e-5


def test_joined_attention_lets_kept_tokens_see_auxiliary_tokens():
    """Table 16's other row: the reference is timm's own blocks on the joined sequence, the kept tokens change."""
    model, x, aux = encoder(), images(), auxiliary()
    with torch.no_grad():
        joined = model(x, auxiliary=aux, cut_attention=False, attention=True)
        h = model.model._pos_embed(model.model.patch_embed(x))
        h = model.model.blocks(torch.cat([h, aux.expand(2, -1, -1)], dim=1))
    assert joined.auxiliary is not None
    assert torch.equal(joined.auxiliary, h[:, 17:])
    assert torch.allclose(joined.patches, model.model.norm(h)[:, 1:17], atol=1e-6)
    assert joined.patches.shape[1] == 16
    assert joined.attention is not None
    assert joined.attention.shape == (2, 3, 16)
    assert not torch.allclose(joined.global_token, model(x).global_token, atol=1e-3)


@pytest.mark.parametrize("spec", [VIT, SWIN], ids=["vit", "swin"])
def test_other_and_non_square_sizes(spec: EncoderSpec):
    """Position tables are interpolated as timm does: the plain model built to take other sizes gives the same."""
    ours = encoder(spec)
    flexible = {"dynamic_img_size": True} if ours.is_vit else {"strict_img_size": False}
    theirs = timm.create_model(spec.arch, **spec.timm_arguments, **flexible).eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    for height, width in ((64, 64), (96, 64), (64, 128)):
        with torch.no_grad():
            tokens, expected = ours(images(2, height, width)), theirs(images(2, height, width))
        assert torch.equal(tokens.global_token, expected)
        stride = 8 if ours.is_vit else 16
        assert tokens.grid == (height // stride, width // stride)
        assert tokens.patches.shape[1] == tokens.grid[0] * tokens.grid[1]


def test_patches_are_in_row_major_order():
    """A mark in the lower left corner of a wide image moves the embedding of that patch and no other."""
    model = encoder()
    model.model.blocks = torch.nn.Sequential(torch.nn.Identity())  # tokens as they are embedded
    marked = torch.zeros(1, 3, 16, 32)
    marked[:, :, 8:, :8] = 1
    with torch.no_grad():
        moved = model(marked).raw_patches - model(torch.zeros_like(marked)).raw_patches
    assert moved.abs().sum(-1).nonzero()[:, 1].tolist() == [4]  # second row of a 2 x 4 grid


@pytest.mark.parametrize("spec", [VIT, SWIN], ids=["vit", "swin"])
def test_tokens_of_blocks(spec: EncoderSpec):
    """Against timm's own intermediates; the order is the one asked for, negative counts from the end."""
    model, x = encoder(spec), images(2, spec.image_size)
    captured = []
    for block in model.block_list:
        block.register_forward_hook(lambda module, args, out: captured.append(out))
    with torch.no_grad():
        tokens = model(x, blocks=(-1, 0))
    last, first = captured[-1], captured[0]
    if model.is_vit:
        expected = [(last[:, 0], last[:, 1:]), (first[:, 0], first[:, 1:])]
    else:
        expected = [(block.mean((1, 2)), block.flatten(1, 2)) for block in (last, first)]
    for (found_global, found_patches), (global_token, patches) in zip(tokens.blocks, expected, strict=True):
        assert torch.equal(found_global, global_token)
        assert torch.equal(found_patches, patches)
    assert torch.equal(tokens.blocks[0][1], tokens.raw_patches)


def test_cls_attention():
    """It is the last block's probabilities: with CLS's own share they sum to one, and they weigh its values."""
    model, x = encoder(), images()
    inputs = []
    model.block_list[-1].attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        attention = model(x, attention=True).attention
        assert attention is not None
        q, k, _ = model.block_list[-1].attn.qkv(inputs[0]).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        full = F.softmax(q @ k.transpose(-2, -1) / 4, dim=-1)
    assert attention.shape == (2, 3, 16)
    assert torch.allclose(attention, full[:, :, 0, 1:], atol=1e-6)
    assert (attention.sum(-1) < 1).all()
    assert attention.std() > 0.01  # far from uniform, so that a wrong row would show


@pytest.mark.parametrize("spec", [VIT, SWIN], ids=["vit", "swin"])
def test_stochastic_depth_drops_whole_images_and_keeps_the_mean(spec: EncoderSpec):
    """Every path drawn as dropped leaves the embedding alone; nothing drawn is the identity, also in training."""
    model = encoder(spec, drop_path=0.3)
    x = images(2, spec.image_size)
    with torch.no_grad():
        plain = model(x).global_token
        assert torch.equal(model.train()(x).global_token, plain)
        draws = model.draw_drop_path(2, torch.Generator().manual_seed(0))
        assert draws is not None
        mixed = torch.ones_like(draws)
        mixed[:, 1] = 0
        model.use_drop_path(mixed)
        out = model(x).global_token
        assert torch.allclose(out[0], plain[0], atol=1e-5)
        assert not torch.allclose(out[1], plain[1], atol=1e-2)
        assert torch.equal(model.eval()(x).global_token, plain)
    many = model.draw_drop_path(20_000, torch.Generator().manual_seed(0))
    assert many is not None
    assert torch.allclose(many.mean(1), torch.ones(len(many)), atol=0.03)
    rates = [path.rate for path in model.drop_paths]
    assert max(rates) == pytest.approx(0.3)
    assert torch.allclose((many == 0).float().mean(1), torch.tensor(rates), atol=0.02)


def test_gradient_checkpointing_changes_nothing():
    results = []
    for on in (False, True):
        model = encoder().train()
        model.gradient_checkpointing = on
        tokens = model(images(), auxiliary=auxiliary())
        assert tokens.auxiliary is not None
        (tokens.global_token.sum() + tokens.auxiliary.square().sum()).backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_initialisation_is_dinos():
    model = fresh_encoder(EncoderSpec(arch="vit_small_patch16_224", options={"depth": 2}), seed=3)
    state = model.model.state_dict()
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embed") or (name.endswith("weight") and "norm" not in name and "patch_embed" not in name):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name
            assert tensor.abs().max() < 0.15
        elif "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight"))))
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not tensor.any(), name
    bound = (3 * 16 * 16) ** -0.5  # PyTorch's own for a convolution
    assert state["patch_embed.proj.weight"].abs().max() <= bound
    assert state["patch_embed.proj.weight"].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_fresh_encoders_depend_on_the_seed_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, again, other = (fresh_encoder(VIT, seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    torch.manual_seed(1)  # how a pre-training with seed 1 begins
    started = build_encoder(VIT, drop_path=0.1)
    dino_init(started)
    assert all(torch.equal(tensor, other[name]) for name, tensor in started.model.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (EncoderSpec(arch="vit_smal_patch16_224"), "did you mean 'vit_small_patch16_224'"),
        (EncoderSpec(arch="resnet18"), "not a ViT or Swin"),
        (EncoderSpec(arch="vit_tiny_patch16_224", image_size=100), "multiple of 16"),
        (EncoderSpec(arch="vit_tiny_patch16_224", options={"num_heads": 5}), "vit_tiny_patch16_224"),
        (EncoderSpec(arch="vit_tiny_patch16_224", options={"heads": 3}), "an option it does not have"),
    ],
)
def test_what_cannot_be_built_is_said(spec: EncoderSpec, says: str):
    with pytest.raises(UserError, match=says):
        build_encoder(spec)


def test_without_cls_token():
    swin = encoder(SWIN)
    pooled = encoder(VIT.model_copy(update={"options": VIT.options | {"class_token": False, "global_pool": "avg"}}))
    for model, size in ((swin, 64), (pooled, 32)):
        assert not model.has_cls
        with pytest.raises(UserError, match="no CLS token"):
            model(images(1, size), auxiliary=torch.zeros(1, model.width))
        with pytest.raises(UserError, match="no CLS token"):
            model(images(1, size), attention=True)
