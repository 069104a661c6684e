"""Auxiliary tokens and heads against plain references: pooling by correlation, stacked heads, prototypes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from mte_bench.encoders.correlation import correlate, weighted_pooling
from mte_bench.encoders.encoder import Encoder, EncoderSpec
from mte_bench.encoders.heads import Fusion, Prototypes, StackedMLP
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.encoders.tokens import AdaptivePooling, AuxiliarySettings, AuxiliaryTokens, MultiToken
from mte_bench.errors import UserError
from tiny import random, shaken

VIT = EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"embed_dim": 24, "depth": 2, "num_heads": 3})
SWIN = EncoderSpec(
    arch="swin_tiny_patch4_window7_224",
    image_size=32,
    options={"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
)


def vit_with(**settings: Any) -> tuple[Encoder, AuxiliaryTokens]:
    encoder = fresh_encoder(VIT, 0).eval()
    return encoder, shaken(AuxiliaryTokens(encoder, AuxiliarySettings(**settings)))


def test_ten_in_its_place():
    """After the last block, on patch tokens before the final norm, then the auxiliary norm; off, the norm alone."""
    encoder, with_ten = vit_with(pooled=0)
    images = random(2, 3, 32, 32)
    with torch.no_grad():
        tokens, auxiliary = with_ten.encode(encoder, images)
        assert tokens.auxiliary is not None
        assert torch.equal(auxiliary, with_ten.cls_norm(with_ten.ten[0](tokens.auxiliary, tokens.raw_patches)))
        without = AuxiliaryTokens(encoder, AuxiliarySettings(pooled=0, ten=False))
        without.load_state_dict({k: v for k, v in with_ten.state_dict().items() if not k.startswith("ten.")}, strict=True)
        assert torch.equal(without.encode(encoder, images)[1], without.cls_norm(tokens.auxiliary))


@pytest.mark.parametrize("kernel", [1, 4, 5, 11])
@pytest.mark.parametrize("grid", [(7, 7), (4, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_pooling_by_correlation_equals_pooling_by_weights(kernel: int, grid: tuple[int, int], bias: bool):
    """Values and every gradient, in double; kernels larger than the map and even ones included."""
    results = []
    for by_weights in (False, True):
        settings = AuxiliarySettings(pooled=3, kernel=kernel, pool_bias=bias)
        torch.manual_seed(0)
        pool = AdaptivePooling(6, settings).double()
        patches = random(2, grid[0] * grid[1], 6, dtype=torch.float64).requires_grad_()
        if by_weights:
            feature_map = patches.transpose(1, 2).unflatten(2, grid)
            out = (pool.weights(feature_map) * feature_map.unsqueeze(1)).mean((3, 4))
        else:
            out = pool(patches, grid)
        (out * random(2, 3, 6, seed=5, dtype=torch.float64)).sum().backward()
        results.append([out, patches.grad, *(parameter.grad for parameter in pool.parameters())])
    for fast, slow in zip(*results, strict=True):
        assert torch.allclose(fast, slow, rtol=1e-10, atol=1e-13)


def test_correlation_by_its_definition():
    x, g, size = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1), 3
    expected = torch.zeros(2, 3, size, size)
    for dy in range(size):
        for dx in range(size):
            for y in range(4):
                for column in range(5):
                    row, at = y + dy - 1, column + dx - 1
                    if 0 <= row < 4 and 0 <= at < 5:
                        expected[:, :, dy, dx] += x[:, :, y, column] * g[:, :, row, at]
    assert torch.allclose(correlate(x, g, size), expected, atol=1e-5)


@pytest.mark.parametrize("size", [3, 4])
def test_gradients_of_pooling(size: int):
    x = random(2, 2, 3, 4, dtype=torch.float64).requires_grad_()
    g = random(2, 2, 3, 4, seed=1, dtype=torch.float64).requires_grad_()
    kernels = random(4, 1, size, size, seed=2, dtype=torch.float64).requires_grad_()
    bias = random(4, seed=3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(weighted_pooling, (x, g, kernels, bias))


def test_pooling_in_mixed_precision():
    settings = AuxiliarySettings(pooled=4)
    torch.manual_seed(0)
    pool, patches = AdaptivePooling(16, settings), random(2, 49, 16)
    exact = pool(patches, (7, 7))
    with torch.autocast("cpu", torch.bfloat16):
        rough = pool(patches, (7, 7))
        rough.float().square().sum().backward()
    assert F.cosine_similarity(rough.float().flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("pooling", ["shared-pointwise", "independent", "scalar"])
@pytest.mark.parametrize("normalise", ["none", "sigmoid", "softmax"])
@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_pooling_token_by_token(pooling: Any, normalise: Any, activation: Any):
    """Each design written out for one token at a time, with plain convolutions on that token's kernels."""
    c, t, k = 4, 3, 3
    settings = AuxiliarySettings(pooled=t, kernel=k, pooling=pooling, pool_normalise=normalise, pool_activation=activation)
    pool = AdaptivePooling(c, settings)
    patches, grid = random(2, 20, c), (4, 5)
    feature_map = patches.transpose(1, 2).unflatten(2, grid)
    act = F.gelu if activation == "gelu" else nn.Identity()
    first, second = pool.pointwise, pool.depthwise
    assert first is not None
    assert second is not None
    with torch.no_grad():
        tokens = pool(patches, grid)
        for token in range(t):
            if pooling == "shared-pointwise":
                mine = slice(token, None, t)
                maps = F.conv2d(act(first(feature_map)), second.weight[mine], second.bias[mine], padding=1, groups=c)
            elif pooling == "independent":
                mine = slice(token * c, (token + 1) * c)
                hidden = F.conv2d(feature_map, first.weight[mine], first.bias[mine])
                maps = F.conv2d(act(hidden), second.weight[mine], second.bias[mine], padding=1, groups=c)
            else:
                mine = slice(token, None, t)
                hidden = F.conv2d(feature_map, second.weight[mine], second.bias[mine], padding=1, groups=c)
                maps = F.conv2d(act(hidden), first.weight[token : token + 1], first.bias[token : token + 1])
            if normalise == "sigmoid":
                maps = maps.sigmoid()
            if normalise == "softmax":
                maps = maps.flatten(2).softmax(-1).view_as(maps)
            weighted = (maps * feature_map).sum((2, 3))
            expected = weighted if normalise == "softmax" else weighted / 20
            assert torch.allclose(tokens[:, token], expected, atol=1e-6)


def test_pooled_tokens_differ_from_each_other_and_from_the_average():
    pool = AdaptivePooling(8, AuxiliarySettings(pooled=3))
    tokens = pool(random(2, 49, 8), (7, 7))
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-3
    plain = AdaptivePooling(8, AuxiliarySettings(pooled=3, pooling="average"))
    assert torch.equal(plain(random(2, 49, 8), (7, 7)), random(2, 49, 8).mean(1, keepdim=True).expand(2, 3, 8))
    largest = AdaptivePooling(8, AuxiliarySettings(pooled=3, pooling="max"))
    assert torch.equal(largest(random(2, 49, 8), (7, 7))[:, 2], random(2, 49, 8).amax(1))
    assert not list(plain.parameters())


def test_auxiliary_tokens_in_their_order():
    encoder, auxiliary = vit_with(auxiliary_cls=2, pooled=3)
    with torch.no_grad():
        tokens, vectors = auxiliary.encode(encoder, random(2, 3, 32, 32))
        assert auxiliary.names == ("CLS 1", "CLS 2", "pooled 1", "pooled 2", "pooled 3")
        assert vectors.shape == (2, 5, 24)
        assert torch.equal(vectors[:, 2:], auxiliary.pooled_norm(auxiliary.pool(tokens.patches, tokens.grid)))
        raw = AuxiliaryTokens(encoder, AuxiliarySettings(auxiliary_cls=0, pooled=3, pool_input="raw", pooled_norm=False))
        raw.pool.load_state_dict(auxiliary.pool.state_dict())
        assert torch.equal(raw.encode(encoder, random(2, 3, 32, 32))[1], raw.pool(tokens.raw_patches, tokens.grid))


def test_auxiliary_cls_tokens_start_different():
    encoder = fresh_encoder(VIT, 0)
    cls = AuxiliaryTokens(encoder, AuxiliarySettings(auxiliary_cls=64)).cls
    assert cls is not None
    assert cls.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.pdist(cls).min() > 0.02


def test_auxiliary_loss_reaches_every_auxiliary_weight_and_the_encoder():
    encoder, auxiliary = vit_with()
    auxiliary.encode(encoder, random(2, 3, 32, 32))[1].square().mul(random(10, 24)).sum().backward()
    for name, parameter in auxiliary.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    untouched = {name for name, p in encoder.model.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == set()


def test_swin_has_pooled_tokens_only():
    encoder = fresh_encoder(SWIN, 0).eval()
    auxiliary = AuxiliaryTokens(encoder, AuxiliarySettings(auxiliary_cls=0))
    tokens, vectors = auxiliary.encode(encoder, random(2, 3, 32, 32))
    assert vectors.shape == (2, 6, 24)
    assert tokens.grid == (4, 4)
    with pytest.raises(UserError, match="no CLS token"):
        AuxiliaryTokens(encoder, AuxiliarySettings()).encode(encoder, random(2, 3, 32, 32))


def test_pooling_maps():
    encoder, auxiliary = vit_with(cut_attention=False)
    images = random(2, 3, 32, 40)
    model = MultiToken(encoder, auxiliary)
    with torch.no_grad():
        maps = model.pooling_maps(images)
        tokens, _ = model(images)
        feature_map = tokens.patches.transpose(1, 2).unflatten(2, (4, 5))
        assert torch.equal(maps, auxiliary.pool.weights(feature_map).abs().mean(2))
    assert maps.shape == (2, 6, 4, 5)
    encoder, none = vit_with(pooled=0)
    with pytest.raises(UserError, match="pooled"):
        MultiToken(encoder, none).pooling_maps(images)


def test_settings_that_make_no_sense_are_refused():
    encoder = fresh_encoder(VIT, 0)
    with pytest.raises(UserError, match="ten_heads 5"):
        AuxiliaryTokens(encoder, AuxiliarySettings(ten_heads=5))
    with pytest.raises(ValidationError):
        AuxiliarySettings(pooled=-1)


def test_stacked_heads_equal_a_loop_over_independent_ones():
    """Values and gradients; one copy takes another path and must agree, too."""
    for copies in (1, 5):
        stacked = shaken(StackedMLP(copies, [6, 8, 8, 4]))
        x = random(copies, 7, 6).requires_grad_()
        loss_weights = random(copies, 7, 4, seed=1)
        (stacked(x) * loss_weights).sum().backward()
        for copy in range(copies):
            single = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
            for layer, mine in zip(single[::2], stacked.layers, strict=True):
                layer.load_state_dict({"weight": mine.weight[copy], "bias": mine.bias[copy]})
            rows = x.detach()[copy].requires_grad_()
            out = single(rows)
            (out * loss_weights[copy]).sum().backward()
            assert torch.allclose(stacked(x)[copy], out, atol=1e-6)
            assert x.grad is not None
            assert torch.allclose(x.grad[copy], rows.grad, atol=1e-6)
            for layer, mine in zip(single[::2], stacked.layers, strict=True):
                assert torch.allclose(mine.weight.grad[copy], layer.weight.grad, atol=1e-5)
                assert torch.allclose(mine.bias.grad[copy], layer.bias.grad, atol=1e-5)


def test_independent_heads_start_different():
    stacked = StackedMLP(4, [16, 32, 8])
    weights = stacked.layers[0].weight.flatten(1)
    assert torch.pdist(weights).min() > 0.1
    assert weights.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("trainable", [True, False])
def test_prototypes_equal_weight_norm(trainable: bool):
    prototypes = Prototypes(5, 9, frozen_norm=False)
    with torch.no_grad():
        prototypes.weight_g.copy_(random(9, 1).abs() + 0.5)
    prototypes.requires_grad_(trainable)  # a teacher takes no gradient, and its learnt lengths count all the same
    peer = weight_norm(nn.Linear(5, 9, bias=False))
    peer.parametrizations.weight.original0.data.copy_(prototypes.weight_g)
    peer.parametrizations.weight.original1.data.copy_(prototypes.weight_v)
    x = random(4, 5)
    assert torch.allclose(prototypes(x), peer(F.normalize(x, dim=1)), atol=1e-6)


def test_frozen_prototypes_have_length_one():
    prototypes = Prototypes(5, 9, frozen_norm=True)
    assert not prototypes.weight_g.requires_grad
    scores = prototypes(F.normalize(prototypes.weight_v, dim=1))
    assert torch.allclose(scores.diagonal(), torch.ones(9), atol=1e-6)


def test_fusion():
    projections = random(3, 2, 4)
    assert torch.allclose(Fusion("mean", 3, 4)(projections), sum(projections) / 3, atol=1e-6)
    assert torch.allclose(Fusion("sum", 3, 4)(projections), sum(projections), atol=1e-6)
    unit = [projection / projection.norm(dim=1, keepdim=True) for projection in projections]
    assert torch.allclose(Fusion("normalised-mean", 3, 4)(projections), sum(unit) / 3, atol=1e-6)
    concat = Fusion("concat", 3, 4)
    assert concat.linear is not None
    assert torch.allclose(concat(projections), concat.linear(torch.cat(list(projections), dim=1)), atol=1e-6)
