"""TokenLearner as pooler and inside a ViT; what it saves; what is refused. Its formulas are in ``test_equality.py``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.formulas import SMALL
from benchmarks.formulas import TINY as MODEL
from mte_bench.encoders.checkpoint import open_checkpoint, save_encoder
from mte_bench.encoders.commands import export
from mte_bench.encoders.cost import count_macs
from mte_bench.encoders.encoder import Encoder, EncoderSpec, build_encoder
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.encoders.token_learner import TokenFuser, TokenLearner
from mte_bench.encoders.tokens import AdaptivePooling, AuxiliarySettings, AuxiliaryTokens, MultiToken
from mte_bench.errors import UserError
from pretrain import mte
from pretrain.methods import METHODS
from pretrain.recipe import Recipe
from tiny import random, shaken

VIT = EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"embed_dim": 24, "depth": 4, "num_heads": 3})
SWIN = {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
GIGA = 1e9


def learned(**settings: Any) -> EncoderSpec:
    return VIT.model_copy(update={"token_learner": EncoderSpec.check({"arch": "x", "token_learner": settings}, "").token_learner})


# Alone ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_weights_are_shares(version: Any) -> None:
    learner = shaken(TokenLearner(6, 3, version).double())
    weights = learner.weights(3 * random(2, 15, 6, dtype=torch.float64), (3, 5))
    assert weights.shape == (2, 3, 15) and weights.min() > 0
    if version == "v1.1":
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    else:
        assert weights.max() < 1


def test_a_fresh_fuser_adds_nothing_and_fresh_tokens_differ() -> None:
    assert not TokenFuser(6, 3)(random(2, 3, 6), random(2, 8, 6)).any()
    encoder = fresh_encoder(learned(tokens=4, after=2))
    assert encoder.token_learning is not None
    weights = encoder.token_learning.learners["2"].weights(random(2, 16, 24), (4, 4))
    assert torch.pdist(weights[0].detach()).min() > 0.02


# As poolers of MTE ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["tokenlearner", "tokenlearner-v1.1"])
def test_pooled_tokens(pooling: Any) -> None:
    pool = shaken(AdaptivePooling(6, AuxiliarySettings(pooled=3, pooling=pooling)).double())
    patches, grid = random(2, 20, 6, dtype=torch.float64), (4, 5)
    assert pool.learner is not None
    torch.testing.assert_close(pool(patches, grid), formulas.learned(pool.learner, patches, grid))
    feature_map = patches.transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close((pool.weights(feature_map) * feature_map.unsqueeze(1)).mean((3, 4)), pool(patches, grid))
    encoder = fresh_encoder(VIT).eval()
    maps = MultiToken(encoder, AuxiliaryTokens(encoder, AuxiliarySettings(pooling=pooling))).pooling_maps(random(2, 3, 32, 40))
    assert maps.shape == (2, 6, 4, 5)


def test_the_analysis_of_pooling_shows_maps_without_kernels(tmp_path: Path) -> None:
    from downstream.analysis.pooling import pooling_kernels

    encoder = fresh_encoder(VIT)
    assert pooling_kernels(MultiToken(encoder, AuxiliaryTokens(encoder, AuxiliarySettings(pooling="tokenlearner")))) is None


# Inside a ViT -----------------------------------------------------------------------------------------------------------


def by_hand(encoder: Encoder, images: Tensor, fuser: bool, after: int) -> tuple[Tensor, Tensor]:
    """CLS and patch tokens before the final norm, by timm's own blocks."""
    model: Any = encoder.model
    x = model._pos_embed(model.patch_embed(images))
    cls, patches, grid = x[:, :1], x[:, 1:], (images.shape[2] // 8, images.shape[3] // 8)
    for index, block in enumerate(model.blocks):
        if fuser and index >= after:
            x = block(torch.cat([cls, model.token_learner.learners[str(index)](patches, grid)], 1))
            cls, patches = x[:, :1], patches + model.token_learner.fusers[str(index)](x[:, 1:], patches)
            continue
        if index == after:
            patches = model.token_learner.learners[str(index)](patches, grid)
        x = block(torch.cat([cls, patches], 1))
        cls, patches = x[:, :1], x[:, 1:]
    return cls[:, 0], patches


@pytest.mark.parametrize("version", ["v1", "v1.1"])
@pytest.mark.parametrize("fuser", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_the_vit_by_hand(version: str, fuser: bool, size: tuple[int, int]) -> None:
    encoder = shaken(fresh_encoder(learned(tokens=5, after=2, version=version, fuser=fuser))).eval()
    images = random(2, 3, *size)
    with torch.no_grad():
        tokens = encoder(images, blocks=(1, -1))
        cls, patches = by_hand(encoder, images, fuser, 2)
        torch.testing.assert_close(tokens.raw_patches, patches, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens.global_token, encoder.model.norm(cls), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens.blocks[1][1], tokens.raw_patches)
    assert tokens.blocks[0][1].shape[1] == size[0] * size[1] // 64
    assert tokens.grid == ((size[0] // 8, size[1] // 8) if fuser else (1, 5))
    assert encoder.grid(32) == ((4, 4) if fuser else (1, 5))


@pytest.mark.parametrize("fuser", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_auxiliary_tokens_travel_along(fuser: bool, cut: bool) -> None:
    """Cut off, they change nothing of what is kept; joined, they come out at the end of the sequence all the same."""
    encoder = shaken(fresh_encoder(learned(tokens=5, after=2, fuser=fuser))).eval()
    auxiliary = shaken(AuxiliaryTokens(encoder, AuxiliarySettings(pooled=2, auxiliary_cls=3, cut_attention=cut)))
    images = random(2, 3, 32, 32)
    with torch.no_grad():
        tokens, vectors = auxiliary.encode(encoder, images)
        alone = encoder(images)
    assert vectors.shape == (2, 5, 24)
    assert tokens.patches.shape == (2, 16 if fuser else 5, 24)
    assert torch.equal(tokens.global_token, alone.global_token) == cut


def test_all_weights_learn() -> None:
    for fuser in (False, True):
        encoder = shaken(fresh_encoder(learned(tokens=5, after=2, fuser=fuser)))
        tokens = encoder(random(2, 3, 32, 32))
        (tokens.global_token.sum() + (tokens.patches * random(*tokens.patches.shape)).sum()).backward()
        still = [name for name, p in encoder.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-5]
        assert still == []


# What it saves ----------------------------------------------------------------------------------------------------------


def macs(**settings: Any) -> int:
    with torch.device("meta"):
        options = {"token_learner": settings} if settings else {}
        encoder = build_encoder(EncoderSpec(arch="vit_small_patch16_224", **options))
    return count_macs(encoder, (1, 3, 224, 224)).total


def test_half_the_compute_of_vit_small() -> None:
    """The sheet's 4.57 -> 2.41 and 3.49 G count neither the CLS token nor the module; with both, by the closed form."""
    n, c = 196, 384

    def block(tokens: int) -> int:
        return 12 * tokens * c * c + 2 * tokens * tokens * c

    module = n * c * 64 + n * 64 * 8 + 8 * n * c
    embed = n * 768 * c
    plain = macs()
    assert plain == embed + 12 * block(n + 1)
    for after, share in ((6, 0.526), (9, 0.764)):
        found = macs(tokens=8, after=after)
        assert found == embed + after * block(n + 1) + (12 - after) * block(9) + module
        assert found / plain == pytest.approx(share, abs=0.003)
    without_cls = embed + 6 * block(n) + 6 * block(8) + module
    assert (embed + 12 * block(n)) / GIGA == pytest.approx(4.57, abs=0.005)
    assert without_cls / GIGA == pytest.approx(2.41, abs=0.01)
    assert module / 1e6 == pytest.approx(5.5, abs=0.5)
    convolutions = 9 * n * (c * 8 + 3 * 8 * 8) + 8 * n * c
    assert macs(tokens=8, version="v1") - macs(tokens=8) == convolutions - module
    fuser = n * c * 64 + n * 64 * 8 + 8 * n * c + 8 * 8 * c
    assert macs(tokens=8, fuser=True) - macs(tokens=8) == 5 * module + 6 * fuser


# Files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuser", [False, True])
def test_checkpoints_come_back(fuser: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = shaken(fresh_encoder(learned(tokens=5, after=2, fuser=fuser))).eval()
    save_encoder(tmp_path / "encoder.safetensors", encoder, {"method": "dino"})
    opened = open_checkpoint(str(tmp_path / "encoder.safetensors"))
    assert opened.encoder.spec == encoder.spec and opened.missing == opened.dropped == []
    images = random(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(opened.encoder(images).global_token, encoder(images).global_token)
    assert opened.subject.arch_options["token_learner"] == "5 after 2" + " fuser" * fuser
    again = tmp_path / "again.safetensors"
    export(str(tmp_path / "encoder.safetensors"), again)
    assert "open_checkpoint" in capsys.readouterr().out
    assert open_checkpoint(str(again)).sha256 == opened.sha256
    with pytest.raises(UserError, match="write safetensors"):
        export(str(tmp_path / "encoder.safetensors"), tmp_path / "encoder.pth")


def test_random_encoders_and_those_of_others() -> None:
    text = "random:vit_tiny_patch16_224?image_size=32&patch_size=8&depth=3&token_learner={tokens: 3, after: 1}"
    first, second = open_checkpoint(text), open_checkpoint(text.replace("after: 1", "after: 2"))
    assert first.encoder(random(1, 3, 32, 32)).grid == (1, 3)
    assert first.sha256 != second.sha256
    with pytest.raises(UserError, match="no weights for token_learner"):
        open_checkpoint("timm:vit_tiny_patch16_224?token_learner={tokens: 3}")


# What is refused --------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    **MODEL,
    "method": "dino",
    "method_settings": SMALL,
    "arch_options": {**MODEL["arch_options"], "depth": 4},
    "views": {"global1": {"size": 32}, "global2": {"size": 32}, "local": {"size": 16}, "local_count": 2},
}


def refused(**changes: Any) -> str:
    recipe = Recipe.check({**TINY, **changes}, "recipe")
    with pytest.raises(UserError) as error:
        mte.check(recipe, METHODS[recipe.method])
    return str(error.value)


def test_what_cannot_be_is_refused_before_any_data_is_read() -> None:
    for after in (4, 9):
        assert refused(token_learner={"after": after}) == (
            f"token_learner.after {after}: vit_tiny_patch16_224 has 4 blocks; choose 1 to 3"
        )
    assert "make only 16 patches" in refused(token_learner={"tokens": 17, "after": 2})
    views = {"global1": {"size": 16}, "global2": {"size": 16}}
    assert "a global view has only 4 patches" in refused(token_learner={"tokens": 8, "after": 2}, views=views)
    swin = {"arch": "swin_tiny_patch4_window7_224", "patch_size": None, "arch_options": SWIN}
    assert "is no ViT" in refused(token_learner={"after": 1}, **swin)
    assert "other blocks" in refused(token_learner={"after": 1}, arch="vit_small_patch16_18x2_224", arch_options={"depth": 2})
    assert "iBOT needs patches" in refused(token_learner={"after": 2}, method="ibot")
    for bad in ({"after": 0}, {"tokens": 0}, {"version": "v2"}, {"token": 8}):
        with pytest.raises(UserError, match="token_learner"):
            Recipe.check({**TINY, "token_learner": bad}, "recipe")


def test_maps_on_the_image_need_patches() -> None:
    encoder = fresh_encoder(learned(tokens=5, after=2))
    with pytest.raises(UserError, match="no patches"):
        encoder(random(1, 3, 32, 32), attention=True)
    with pytest.raises(UserError, match="left no patches"):
        MultiToken(encoder, AuxiliaryTokens(encoder, AuxiliarySettings())).pooling_maps(random(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("method", "settings", "auxiliary"),
    [
        ("dino", {"tokens": 6, "after": 2}, None),
        ("dino", {"tokens": 6, "after": 2, "version": "v1"}, {}),
        ("dino", {"tokens": 6, "after": 2, "fuser": True}, {}),
        ("ibot", {"tokens": 6, "after": 2, "fuser": True}, {}),
    ],
)
def test_it_trains_with_local_views_of_another_size(method: str, settings: dict[str, Any], auxiliary: Any) -> None:
    recipe = Recipe.check({**TINY, "method": method, "token_learner": settings, "mte": auxiliary}, "recipe")
    kind = METHODS[method]
    mte.check(recipe, kind)
    chosen = kind(kind.Settings.check(recipe.method_settings, ""))
    student, teacher = mte.Branch(recipe, chosen, student=True), mte.Branch(recipe, chosen, student=False)
    groups = [random(2, 4, 3, 32, 32), random(2, 4, 3, 16, 16, seed=1)]
    masks = torch.from_numpy(np.random.default_rng(0).random((2, 4, 16)) < 0.4) if chosen.masking else None
    vectors = mte.teacher_vectors(teacher, groups, recipe, patches=masks is not None)
    loss = mte.loss(chosen, student(groups, masks=masks), mte.targets(chosen, vectors, 0, recipe), recipe, masks)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in student.encoder.parameters())
