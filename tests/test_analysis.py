"""The analyses: what CKA must be for known features, and what each command writes."""

from typing import Any

import numpy as np
import pytest
import torch

from downstream.analysis.attention import attention_entropy
from downstream.analysis.cka import linear_cka, mean_between, minibatch_cka, refuse_constant, unbiased_hsic
from downstream.analysis.maps import relative
from downstream.analysis.pooling import map_correlation, map_variation, mean_over_pairs, pooling_kernels
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.encoders.tokens import AuxiliarySettings, AuxiliaryTokens, MultiToken
from mte_bench.errors import UserError


def related(n: int, widths: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Feature sets that share part of what they say: noisy views of a common latent, far from the origin."""
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=(n, 5))
    return [
        (latent @ generator.normal(size=(5, width)) + generator.normal(size=(n, width)) + 3).astype(np.float32)
        for width in widths
    ]


def gram_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, with n x n Gram matrices and the centring matrix H: tr(KHLH) / (n - 1)^2."""
    x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)
    centring = np.eye(n) - np.full((n, n), 1 / n)
    return float(np.trace(x @ x.T @ centring @ y @ y.T @ centring)) / (n - 1) ** 2


def four_point_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased HSIC as the mean over ordered tuples of different images of K_ij (L_ij + L_kl - 2 L_ik)."""
    k, m, n = x @ x.T, y @ y.T, len(x)
    terms = [
        k[i, j] * (m[i, j] + m[p, q] - 2 * m[i, p])
        for i in range(n)
        for j in range(n)
        for p in range(n)
        for q in range(n)
        if len({i, j, p, q}) == 4
    ]
    return float(np.mean(terms))


def test_exact_cka_is_the_gram_definition_for_every_pair() -> None:
    features = related(60, (7, 7, 12, 3))
    expected = [
        [gram_hsic(x, y) / np.sqrt(gram_hsic(x, x) * gram_hsic(y, y)) for y in features] for x in features
    ]  # fmt: skip
    np.testing.assert_allclose(linear_cka(features), expected, rtol=1e-10)


def test_cka_is_one_for_rotated_and_scaled_features_and_less_for_stretched_ones() -> None:
    (x,) = related(300, (8,))
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    stretched = x * np.array([20, *[1] * 7])
    for estimate in (linear_cka, minibatch_cka):
        matrix = estimate([x.astype(np.float64), 3 * x.astype(np.float64) @ rotation + 5, stretched])
        np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-12)
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-12)
        assert matrix[0, 1] == pytest.approx(1, abs=1e-9)
        assert matrix[0, 2] < 0.95


def test_unbiased_hsic_is_the_mean_over_four_different_images() -> None:
    x, y = related(8, (3, 4))
    assert unbiased_hsic([x, y])[0, 1] == pytest.approx(four_point_hsic(x, y), rel=1e-4)


def test_minibatch_estimator_is_unbiased_where_the_exact_one_is_not() -> None:
    """Independent features of width c over n images: exact CKA is about c / (n + c), HSIC_1 is 0 on average."""
    generator = np.random.default_rng(0)
    n, width = 64, 32
    draws = [[generator.normal(size=(n, width)) for _ in range(2)] for _ in range(300)]
    hsic = np.array([unbiased_hsic(pair)[0, 1] for pair in draws])
    assert abs(hsic.mean()) < 4 * hsic.std() / np.sqrt(len(hsic))
    exact = np.mean([linear_cka(pair)[0, 1] for pair in draws[:20]])
    assert exact == pytest.approx(width / (n + width), abs=0.03)
    large = [generator.normal(size=(2048, width)) for _ in range(2)]
    assert abs(minibatch_cka(large, batch=64)[0, 1]) < 0.01


def test_estimators_agree_when_images_are_many_and_widths_small() -> None:
    features = related(4000, (6, 6, 6))
    assert np.abs(linear_cka(features) - minibatch_cka(features, batch=128)).max() < 5e-3


def test_minibatch_cka_of_few_images_uses_them_all_and_of_too_few_is_refused() -> None:
    features = related(40, (4, 4))
    hsic = unbiased_hsic(features)
    expected = hsic[0, 1] / np.sqrt(hsic[0, 0] * hsic[1, 1])
    assert minibatch_cka(features, batch=256)[0, 1] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="needs 4"):
        minibatch_cka([x[:3] for x in features])


def test_a_token_that_never_changes_is_named() -> None:
    moving, still = related(20, (4, 4))
    still[:] = still[0]
    with pytest.raises(UserError, match="token 'pooled 2'"):
        refuse_constant([moving, still], ["global", "pooled 2"])


def test_mean_between_leaves_the_diagonal_out() -> None:
    matrix = np.array([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]])
    assert mean_between(matrix, [0, 1, 2]) == pytest.approx(0.4)
    assert mean_between(matrix, [0], [1, 2]) == pytest.approx(0.3)


def tiny_model(**settings: Any) -> MultiToken:
    """An untrained ViT of two blocks with auxiliary tokens, for 32 x 32 images in a 4 x 4 grid."""
    options = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    encoder = build_encoder(EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options=options))
    return MultiToken(encoder, AuxiliaryTokens(encoder, AuxiliarySettings(**settings))).eval()


@pytest.mark.parametrize("pooling", ["shared-pointwise", "independent", "scalar"])
def test_pooling_kernels_are_what_an_impulse_comes_back_as(pooling: str) -> None:
    """With a 1x1 convolution that changes nothing, the weights of an impulse are the kernel, turned by 180 degrees."""
    model = tiny_model(pooled=2, pooling=pooling, kernel=5, pool_activation="none", pool_bias=False)
    pool = model.auxiliary.pool
    assert pool.pointwise is not None
    with torch.no_grad():
        same = torch.eye(24) if pooling != "scalar" else torch.full((1, 24), 1 / 24)
        pool.pointwise.weight.copy_(same.repeat(1 if pooling == "shared-pointwise" else 2, 1)[:, :, None, None])
        impulse = torch.zeros(1, 24, 5, 5)
        impulse[:, :, 2, 2] = 1
        answer = pool.weights(impulse).mean(2)[0].flip(1, 2)
    np.testing.assert_allclose(pooling_kernels(model), answer.numpy(), atol=1e-6)


@pytest.mark.parametrize(("settings", "reason"), [({"pooled": 0}, "no pooled tokens"), ({"pooling": "average"}, "'average'")])
def test_a_model_without_pooling_weights_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        pooling_kernels(tiny_model(**settings))


def test_map_statistics_are_those_of_numpy_and_right_for_even_maps() -> None:
    maps = np.random.default_rng(0).random((3, 4, 5, 6))
    expected = [np.corrcoef(image.reshape(4, -1)) for image in maps]
    np.testing.assert_allclose(map_correlation(maps), expected, atol=1e-12)
    pairs = [np.mean([matrix[i, j] for i in range(4) for j in range(i)]) for matrix in expected]
    np.testing.assert_allclose(mean_over_pairs(map_correlation(maps)), pairs)
    even = np.full((1, 2, 3, 3), 0.5)
    assert map_variation(even).max() == 0
    assert map_correlation(even).max() == 0
    np.testing.assert_array_equal(relative(even), 1)
    assert map_variation(np.array([[[[0.0, 2.0]]]])) == pytest.approx(1)


def test_entropy_of_attention_is_log_n_when_even_and_nothing_when_on_one_patch() -> None:
    even, single = np.full(16, 0.05), np.eye(16)[3] * 0.4  # what goes to the CLS token itself is not counted
    np.testing.assert_allclose(attention_entropy(np.stack([even, single])[None]), [[np.log(16), 0]], atol=1e-12)
