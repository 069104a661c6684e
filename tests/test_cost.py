"""Multiply-accumulates: closed forms of single layers, and the paper's figures for iBOT with and without MTE."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mte_bench.encoders.cost import count_macs, count_parameters
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.encoders.heads import Fusion, Prototypes, StackedMLP
from mte_bench.encoders.tokens import AuxiliarySettings, AuxiliaryTokens

IMAGE = (1, 3, 224, 224)
GIGA = 1e9


def test_layers_against_closed_forms():
    assert count_macs(nn.Linear(5, 7), (3, 11, 5)).total == 3 * 11 * 5 * 7
    assert count_macs(nn.Conv2d(6, 10, 3, padding=1), (2, 6, 8, 9)).total == 2 * 8 * 9 * 10 * 6 * 9
    depthwise = nn.Conv2d(4, 12, 11, padding="same", groups=4)
    assert count_macs(depthwise, (2, 4, 8, 9)).total == 2 * 8 * 9 * 12 * 11 * 11
    grouped = nn.Conv2d(6, 4, 1, groups=2)
    assert count_macs(grouped, (1, 6, 5, 5)).total == 25 * 4 * 3
    queries, keys = (2, 3, 4, 16), (2, 3, 9, 16)
    assert count_macs(F.scaled_dot_product_attention, queries, keys, keys).total == 2 * (2 * 3 * 4 * 9 * 16)
    stacked = StackedMLP(10, [8, 32, 4])
    assert count_macs(stacked, (10, 3, 8)).total == 10 * 3 * (8 * 32 + 32 * 4)


def test_backward_is_counted_where_it_is_called():
    with torch.device("meta"):
        layer = nn.Linear(5, 7)
    x = (3, 5)
    assert count_macs(lambda x: layer(x.requires_grad_()).sum().backward(), x).total == 3 * (3 * 5 * 7)


def test_nothing_is_computed_and_weights_stay_where_they_are():
    encoder = build_encoder(EncoderSpec(arch="vit_tiny_patch16_224", options={"depth": 1}))
    before = encoder.model.norm.weight
    count_macs(encoder, IMAGE)
    assert encoder.model.norm.weight is before
    assert before.device.type == "cpu"


def test_modules_contain_their_children():
    macs = count_macs(build_encoder(EncoderSpec(arch="vit_tiny_patch16_224", options={"depth": 2})), IMAGE)
    block = macs.modules["model.blocks.1"]
    assert block == macs.modules["model.blocks.1.attn"] + macs.modules["model.blocks.1.mlp"]
    assert macs.total == 2 * block + macs.modules["model.patch_embed"]


def test_swin_tiny():
    """4.5 G: the Swin paper's figure (Table 1 a), which counts what is counted here."""
    with torch.device("meta"):
        encoder = build_encoder(EncoderSpec(arch="swin_tiny_patch4_window7_224"))
    assert count_macs(encoder, IMAGE).total / GIGA == pytest.approx(4.5, abs=0.05)
    assert count_parameters(encoder) / 1e6 == pytest.approx(27.5, abs=0.05)  # the paper's 28.3 M with its 0.77 M classifier


class IBOT(nn.Module):
    """One network of iBOT, ViT-S/16: the head (MLP and shared prototypes) on every token; with MTE, its extras."""

    def __init__(self, settings: AuxiliarySettings | None = None):
        super().__init__()
        self.encoder = build_encoder(EncoderSpec(arch="vit_small_patch16_224"))
        sizes = [self.encoder.width, 2048, 2048, 256]
        self.head, self.prototypes = StackedMLP(1, sizes), Prototypes(256, 8192, frozen_norm=False)
        self.auxiliary = None
        if settings:
            self.auxiliary = AuxiliaryTokens(self.encoder, settings)
            self.heads, self.fusion = StackedMLP(settings.count, sizes), Fusion("mean", settings.count, 256)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        fused = None
        if self.auxiliary is None:
            tokens = self.encoder(images)
        else:
            tokens, auxiliary = self.auxiliary.encode(self.encoder, images)
            fused = self.prototypes(self.fusion(self.heads(auxiliary.transpose(0, 1))))
        everything = torch.cat([tokens.global_token.unsqueeze(1), tokens.patches], dim=1).flatten(0, 1)
        return self.prototypes(self.head(everything.unsqueeze(0)).squeeze(0)), fused


def ibot(settings: AuxiliarySettings | None = None) -> IBOT:
    with torch.device("meta"):
        return IBOT(settings)


def test_exported_encoder():
    encoder = ibot(AuxiliarySettings()).encoder
    assert count_macs(encoder, IMAGE).total / GIGA == pytest.approx(4.60, abs=0.005)
    assert count_parameters(encoder) / 1e6 == pytest.approx(21.67, abs=0.005)


def test_ibot_is_the_papers_6_1_and_with_mte_its_6_4():
    """Pooling as the convolutions that define it; the two closed forms are protocols' item by item."""
    plain = count_macs(ibot(), IMAGE).total
    assert plain / GIGA == pytest.approx(6.096, abs=0.001)
    network = ibot(AuxiliarySettings())
    assert network.auxiliary is not None
    pool = network.auxiliary.pool

    def by_weights(patches: Tensor, grid: tuple[int, int]) -> Tensor:
        feature_map = patches.transpose(1, 2).unflatten(2, grid)
        return (pool.weights(feature_map) * feature_map.unsqueeze(1)).mean((3, 4))

    pool.forward = by_weights  # type: ignore[method-assign]
    macs = count_macs(network, IMAGE)
    assert 6.39 <= macs.total / GIGA <= 6.41
    assert macs.total / GIGA == pytest.approx(6.393, abs=0.001)
    n, c = 196, 384
    blocks = 12 * (12 * 4 * c * c + 2 * 4 * (n + 1 + 4) * c)  # projections and MLP, then attention over all tokens
    ten = 2 * n * c * c + 4 * (2 + 8) * c * c + 2 * 4 * n * c
    pooling = n * c * c + n * c * 6 * 11 * 11
    heads = 10 * (c * 2048 + 2048 * 2048 + 2048 * 256) + 256 * 8192
    assert macs.total - plain == blocks + ten + pooling + heads


def test_pooling_by_correlation_executes_less():
    executed = count_macs(ibot(AuxiliarySettings()), IMAGE)
    assert executed.total / GIGA == pytest.approx(6.348, abs=0.001)
    n, c = 196, 384
    assert executed.modules["auxiliary.pool"] == n * c * c + n * c * 11 * 11 + 6 * c * 11 * 11  # one correlation serves six


def test_split_attention_costs_less_than_dense():
    """Dense attention over the joined sequence would be 6.40 G: kept queries then meet four more keys."""
    split = count_macs(ibot(AuxiliarySettings()), IMAGE).total
    dense = count_macs(ibot(AuxiliarySettings(cut_attention=False)), IMAGE).total
    assert dense - split == 12 * 2 * 197 * 4 * 384
