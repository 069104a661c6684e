"""The analyses: what CKA must be for known features, and what each command writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.analysis.attention import attention_entropy
from downstream.analysis.cka import linear_cka, mean_between, minibatch_cka, refuse_constant, unbiased_hsic
from downstream.analysis.maps import draw_maps, relative
from downstream.analysis.pooling import POOLING, map_correlation, map_variation, mean_over_pairs, pooling_kernels
from downstream.analysis.study import AnalysisProtocol, Gallery, Prepared, Seen
from mte_bench import plotting
from mte_bench.cli import run
from mte_bench.encoders.checkpoint import AUXILIARY_NAME, ENCODER_NAME, save_auxiliary, save_encoder
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.encoders.tokens import AuxiliarySettings, AuxiliaryTokens, MultiToken
from mte_bench.errors import CorruptImage, UserError
from mte_bench.records import read_record


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
    np.testing.assert_allclose(attention_entropy(np.stack([even, single]).reshape(1, 2, 4, 4)), [[np.log(16), 0]], atol=1e-12)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes, 12 images in val."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 4)):
        for label, name in enumerate(("ash", "birch", "cedar")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 200, (40, 40, 3)) + 20 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pretrain`` with MTE leaves, but untrained."""
    folder = tmp_path_factory.mktemp("runs") / "dino-mte"
    torch.manual_seed(0)
    model = tiny_model(auxiliary_cls=2, pooled=3, kernel=5)
    metadata = {"recipe_hash": "0", "seed": 0, "epoch": 1}
    save_encoder(folder / ENCODER_NAME, model.encoder, metadata)
    save_auxiliary(folder / AUXILIARY_NAME, model.auxiliary, {}, metadata)
    return folder


def analyse(*arguments: object) -> Any:
    return run(["analyze", *map(str, arguments), "--workers", "0", "--device", "cpu"])


TOKENS = ["global", "CLS 1", "CLS 2", "pooled 1", "pooled 2", "pooled 3"]


@pytest.mark.parametrize("name", ["cka", "pooling", "attention"])
def test_each_analysis_leaves_a_record_with_picture_and_values(name: str, run_folder: Path, photos: Path) -> None:
    arguments = (name, run_folder, "--data", photos, *(() if name == "cka" else ("--images", 2)))
    record = analyse(*arguments)
    folder = run_folder / "evaluations" / f"{name}-{photos.name}"
    assert read_record(folder / "record.json") == record
    assert (record.task, record.data.images, record.subject.family) == (name, {"val": 12}, "mte-bench")
    assert all(np.isfinite(metric.value) and metric.n == 12 for metric in record.metrics.values())
    with Image.open(folder / record.files["picture"]) as image:
        assert image.format == "PNG" and min(image.size) > 300
    json.loads((folder / record.files["values"]).read_text())
    picture = (folder / record.files["picture"]).read_bytes()
    again = analyse(*arguments, "--batch-size", 5)
    for metric, value in record.metrics.items():
        assert again.metrics[metric].value == pytest.approx(value.value, rel=1e-3), metric
    assert analyse(*arguments).metrics == record.metrics
    assert (folder / record.files["picture"]).read_bytes() == picture


def test_cka_record_is_of_the_tokens_that_the_model_gives(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    from mte_bench.data.sources import open_source
    from mte_bench.data.transforms import EvaluationTransform
    from mte_bench.encoders.checkpoint import open_checkpoint

    record = analyse("cka", run_folder, "--data", photos, "--out", tmp_path)
    values = json.loads((tmp_path / "cka.json").read_text())
    assert values["names"] == TOKENS
    model, images = open_checkpoint(str(run_folder)).multi_token(), open_source(str(photos), "val")
    assert model is not None
    spec = model.encoder.spec
    transform = EvaluationTransform.for_size(32, spec.mean, spec.std)
    with torch.no_grad():
        tokens, auxiliary = model(torch.stack([transform(images.image(index)) for index in range(12)]))
    features = [tokens.global_token.numpy(), *auxiliary.numpy().transpose(1, 0, 2)]
    expected = [
        [gram_hsic(x, y) / np.sqrt(gram_hsic(x, x) * gram_hsic(y, y)) for y in features] for x in features
    ]  # fmt: skip
    np.testing.assert_allclose(values["exact"], expected, atol=2e-4)
    pooled = [expected[3][4], expected[3][5], expected[4][5]]
    assert record.metrics["cka_pooled"].value == pytest.approx(np.mean(pooled), abs=2e-4)
    largest = np.abs(np.array(values["exact"]) - values["minibatch"]).max()
    assert record.details["estimators_max_abs_difference"] == pytest.approx(largest, abs=1e-4)


def test_layers_are_compared_where_there_are_no_auxiliary_tokens_or_on_request(
    run_folder: Path, photos: Path, tmp_path: Path
) -> None:
    layers = ["block 1", "block 2", "final norm"]
    record = analyse("cka", f"random:{run_folder}", "--data", photos, "--out", tmp_path / "random")
    assert json.loads((tmp_path / "random" / "cka.json").read_text())["names"] == layers
    assert list(record.metrics) == ["cka_layers", "cka_layers_minibatch"]
    record = analyse("cka", run_folder, "--data", photos, "--between", "layers", "--out", tmp_path / "asked")
    assert record.details["between"] == "layers"
    with pytest.raises(UserError, match=r"no auxiliary tokens.*--between layers"):
        analyse("cka", f"random:{run_folder}", "--data", photos, "--between", "tokens")


def test_layers_of_a_swin_have_different_widths(photos: Path, tmp_path: Path) -> None:
    swin = "random:swin_tiny_patch4_window7_224?image_size=32&window_size=4&embed_dim=12&depths=[1,1,1,1]&num_heads=[1,1,2,2]"
    analyse("cka", swin, "--data", photos, "--out", tmp_path)
    assert len(json.loads((tmp_path / "cka.json").read_text())["exact"]) == 5
    with pytest.raises(UserError, match="no CLS token"):
        analyse("attention", swin, "--data", photos, "--out", tmp_path / "attention")


def test_pictures_show_images_of_every_class_and_as_many_as_asked(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    for name, columns in (("pooling", TOKENS[3:]), ("attention", ["mean of heads", "head 1", "head 2", "head 3"])):
        analyse(name, run_folder, "--data", photos, "--images", 3, "--count", 9, "--out", tmp_path / name)
        values = json.loads((tmp_path / name / f"{name}.json").read_text())
        assert [caption.partition(":")[0] for caption in values["images"]] == ["ash", "birch", "cedar"]
        assert values["names"] == columns
        assert np.shape(values["maps"]) == (3, len(columns), 4, 4)
    share = np.sum(values["maps"], axis=(2, 3))
    assert ((share > 0.5) & (share < 1)).all()  # the rest of the attention is on the CLS token itself


def test_maps_over_images_have_few_colours_and_look_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    light = np.linspace(0, 0.6, 64)[:, None, None] * generator.random((3, 1, 1, 3))
    images, maps = light + 0.4 * generator.random((3, 64, 64, 3)), generator.random((3, 6, 4, 4))
    texts = (["a", "b", "c"], [f"token {index}" for index in range(6)], "one\ntwo\nthree", "weight")

    def drawn(name: str) -> Image.Image:
        captions, columns, title, label = texts
        draw_maps(tmp_path / name, captions, images, maps, columns, title, label)
        return Image.open(tmp_path / name)

    few, again = drawn("few.png"), drawn("again.png")
    monkeypatch.setattr(plotting, "use_few_colours", lambda path: None)
    whole = drawn("whole.png")
    assert few.mode == "P" and few.size == whole.size
    assert (tmp_path / "few.png").read_bytes() == (tmp_path / "again.png").read_bytes() and again.mode == "P"
    assert (tmp_path / "few.png").stat().st_size < (tmp_path / "whole.png").stat().st_size / 3
    apart = np.abs(np.asarray(few.convert("RGB")).astype(int) - np.asarray(whole.convert("RGB")))
    assert apart.mean() < 3 and np.percentile(apart, 99) < 20


def test_centred_map_correlation_does_not_see_what_all_images_share() -> None:
    """Maps of independent noise on one and the same border are alike; without the border they are not."""
    model, count = tiny_model(auxiliary_cls=0, pooled=3, kernel=5), 200
    generator = np.random.default_rng(0)
    maps = 1 + 0.1 * generator.random((count, 3, 8, 8))
    maps[:, :, [0, -1]] -= 0.5
    gallery = Gallery(np.array([0]), ["a"], np.zeros((1, 32, 32, 3)))
    prepared = Prepared(model, lambda images: [images], ("pooled 1", "pooled 2", "pooled 3"))
    protocol = AnalysisProtocol(task="pooling", version=1, image_size=None, resize=None, count=count)
    seen = Seen([maps], np.zeros(count, np.int64), ("thing",), gallery)
    metrics = POOLING.measure(protocol, prepared, seen).metrics
    assert metrics["map_correlation"].value > 0.9
    assert abs(metrics["map_correlation_centred"].value) < 0.02


def test_pooling_of_a_checkpoint_without_auxiliary_tokens_is_refused(run_folder: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="no pooled tokens"):
        analyse("pooling", f"random:{run_folder}", "--data", photos)


def test_count_limits_the_images_and_a_dry_run_writes_nothing(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    record = analyse("attention", run_folder, "--data", photos, "--count", 6, "--images", 1, "--out", tmp_path / "six")
    assert (record.data.images, record.data.subset) == ({"val": 6}, "images=6")
    assert record.protocol.settings["count"] == 6
    assert analyse("attention", run_folder, "--data", photos, "--dry-run", "--out", tmp_path / "dry") is None
    assert not (tmp_path / "dry").exists()
    assert analyse("cka", run_folder, "--data", photos, "--smoke", "--batch-size", 4).data.images == {"val": 8}


def test_corrupt_images_are_left_out_when_allowed(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(photos, damaged)
    whole = analyse("attention", run_folder, "--data", photos, "--images", 12, "--out", tmp_path / "whole")
    path = damaged / "val" / "birch" / "2.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptImage, match=r"2\.png"):
        analyse("attention", run_folder, "--data", damaged, "--images", 1, "--out", tmp_path / "none")
    allowed = ("--allow-corrupt", 1, "--batch-size", 4)  # the damaged image is in the second batch
    record = analyse("attention", run_folder, "--data", damaged, "--images", 12, *allowed, "--out", tmp_path / "one")
    assert record.data.images == {"val": 11}
    assert [Path(name).name for name in record.data.corrupt] == ["2.png"]
    before, after = (json.loads((tmp_path / name / "attention.json").read_text()) for name in ("whole", "one"))
    kept = [maps for caption, maps in zip(before["images"], before["maps"], strict=True) if caption != "birch: 2.png"]
    np.testing.assert_allclose(after["maps"], kept, rtol=1e-3)
    assert whole.metrics["attention_entropy"].n == 12
