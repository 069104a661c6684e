"""Features: right, computed once, and never wrong whatever happens to the process or the files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from downstream import feature_store
from downstream.features import extract
from drawn import SPEC, TRANSFORM, Drawn, decoded, encoder, how
from mte_bench.data.sources import open_source
from mte_bench.encoders.encoder import build_encoder
from mte_bench.errors import CorruptImage, UserError


@pytest.fixture
def whole(tmp_path):
    """The features of an undisturbed pass."""
    return np.array(extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path / "whole")).arrays["global"])


def test_features_are_what_the_encoder_gives(whole):
    images = torch.stack([TRANSFORM(Drawn().image(index)) for index in range(40)])
    with torch.inference_mode():
        expected = torch.cat([encoder()(batch).global_token for batch in images.split(8)])
    assert np.array_equal(whole, expected.numpy())


def test_kinds_share_one_pass_and_only_what_is_missing_is_computed(tmp_path):
    log = tmp_path / "log"
    images, model = Drawn(log=log), encoder()
    found = extract(model, "w", images, TRANSFORM, ["global", "patch-mean"], how(tmp_path))
    assert decoded(log) == list(range(40))
    batch = torch.stack([TRANSFORM(images.image(index)) for index in range(8)])
    log.unlink()
    with torch.inference_mode():
        tokens = model(batch)
    assert np.array_equal(found.arrays["patch-mean"][:8], tokens.raw_patches.mean(1).numpy())
    again = extract(model, "w", images, TRANSFORM, ["patch-mean", "global"], how(tmp_path))
    assert again.cached and not decoded(log)
    third = extract(model, "w", images, TRANSFORM, ["patch-mean-normed", "global"], how(tmp_path))
    assert decoded(log) == list(range(40))
    assert np.array_equal(third.arrays["patch-mean-normed"][:8], tokens.patches.mean(1).numpy())
    assert np.array_equal(third.arrays["global"], found.arrays["global"])


def test_kinds_of_one_pass_get_what_each_needs(tmp_path):
    """Blocks and attention that one kind asks for do not reach another."""
    kinds = ["cls-last1", "patches-top2", "cls-last2", "patches", "global"]
    together = extract(encoder(), "w", Drawn(), TRANSFORM, kinds, how(tmp_path / "together")).arrays
    for kind in kinds:
        alone = extract(encoder(), "w", Drawn(), TRANSFORM, [kind], how(tmp_path / "alone")).arrays
        assert np.array_equal(together[kind], alone[kind])
    assert together["cls-last2"].shape == (40, 64) and together["patches"].shape == (40, 4 * 32)
    assert np.array_equal(together["cls-last2"][:, 32:], together["cls-last1"])


def test_reduced_decoding_is_features_of_smaller_jpegs(tmp_path):
    """The half that libjpeg gives, taken by torchvision's transforms; the other setting takes the whole."""
    folder = tmp_path / "data" / "val"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(9, 12, 3), dtype=np.uint8)
    photograph = Image.fromarray(pixels).resize((60, 46), Image.Resampling.BICUBIC)
    photograph.save(folder / "a.jpg", quality=95)
    images, model = open_source(str(tmp_path / "data"), "val"), encoder()
    found = {
        decode: extract(model, "w", images, TRANSFORM.model_copy(update={"decode": decode}), how=how(tmp_path / "cache")).arrays[
            "global"
        ]
        for decode in ("full", "reduced")
    }
    for decode, size in (("full", (60, 46)), ("reduced", (30, 23))):
        with Image.open(folder / "a.jpg") as image:
            if decode == "reduced":
                image.draft(None, size)
            assert image.size == size
            seen = F.center_crop(F.resize(image, TRANSFORM.resize, F.InterpolationMode.BICUBIC), TRANSFORM.crop)
        batch = F.normalize(F.to_tensor(seen), SPEC.mean, SPEC.std).unsqueeze(0)
        with torch.inference_mode():
            assert np.array_equal(found[decode], model(batch).global_token.numpy())
    assert 0 < np.abs(found["full"] - found["reduced"]).max() < 0.5


def test_workers_change_nothing(tmp_path, whole):
    found = extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path, workers=2))
    assert np.array_equal(found.arrays["global"], whole)
    assert 0 <= found.waiting <= 1 and found.images_per_second > 0


def test_whatever_determines_a_feature_is_part_of_its_key(tmp_path):
    def cached(weights="w", images=None, transform=TRANSFORM, kind="global", spec=SPEC, **options):
        model = build_encoder(spec).eval()
        return extract(model, weights, images or Drawn(8), transform, [kind], how(tmp_path, **options)).cached

    assert not cached() and cached()
    assert not cached(weights="other")
    assert not cached(images=Drawn(8, fingerprint="other"))
    assert not cached(transform=TRANSFORM.model_copy(update={"resize": 16}))
    assert not cached(transform=TRANSFORM.model_copy(update={"decode": "reduced"}))
    assert not cached(precision=torch.bfloat16)
    assert not cached(feature_dtype="float16")
    assert not cached(feature_dtype="float32", precision=torch.bfloat16)
    assert not cached(kind="patch-mean")
    assert not cached(spec=SPEC.model_copy(update={"options": {**SPEC.options, "num_heads": 4}}))
    assert not cached(spec=SPEC.model_copy(update={"resize_positions": "dino"}))
    assert cached() and cached(batch_size=4, workers=1, rank=1, processes=2, feature_dtype="float32")


def test_a_pass_in_16_bits_is_kept_in_16_bits(tmp_path, whole):
    found = extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path, precision=torch.bfloat16)).arrays["global"]
    assert found.dtype == np.float16
    assert 0 < np.abs(found - whole).max() < 0.1


def test_features_are_kept_in_the_type_that_is_asked_for(tmp_path, whole):
    half = extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path, feature_dtype="float16")).arrays["global"]
    assert half.dtype == np.float16 and np.array_equal(half, whole.astype(np.float16))
    wide = how(tmp_path, feature_dtype="float32", precision=torch.bfloat16)
    assert extract(encoder(), "w", Drawn(), TRANSFORM, how=wide).arrays["global"].dtype == np.float32


def test_features_too_large_for_16_bits_are_refused(tmp_path):
    model = encoder()
    with torch.no_grad():
        model.model.norm.bias[0] = 1e5
    with pytest.raises(UserError, match=r"global feature of 0\.png is not finite.*--feature-dtype float32"):
        extract(model, "w", Drawn(), TRANSFORM, how=how(tmp_path, feature_dtype="float16"))


def test_what_is_kept_is_read_through_once(tmp_path, monkeypatch):
    """A bank of millions of images is gigabytes: its checksums are compared once per extraction, not more."""
    extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path))
    read, checksum = [], feature_store.zlib.crc32
    monkeypatch.setattr(feature_store.zlib, "crc32", lambda data, start: read.append(len(data)) or checksum(data, start))
    assert extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path)).cached
    assert sum(read) == 40 * 32 * 4


def test_finished_features_open_as_an_ordinary_npy_file(tmp_path, whole):
    extract(encoder(), "w", Drawn(), TRANSFORM, how=how(tmp_path))
    (path,) = tmp_path.glob("*/features.npy")
    assert np.array_equal(np.load(path, mmap_mode="r"), whole)


def test_corrupt_images_stop_the_pass_unless_allowed_and_then_have_no_row(tmp_path, whole):
    images = Drawn(corrupt=(3, 17), fingerprint="corrupt")
    with pytest.raises(CorruptImage, match=r"/data/3\.png.*truncated.*--allow-corrupt"):
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))
    with pytest.raises(CorruptImage, match=r"/data/17\.png"):
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path, allow_corrupt=1))
    found = extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path, allow_corrupt=2, workers=1))
    assert found.corrupt == ["3.png", "17.png"]
    assert list(found.kept) == [index for index in range(40) if index not in (3, 17)]
    assert np.array_equal(found.arrays["global"], whole[found.kept])
    with pytest.raises(CorruptImage, match=r"/data/3\.png"):  # also where the features are already there
        extract(encoder(), "w", images, TRANSFORM, how=how(tmp_path))


def test_features_that_are_not_finite_are_refused_by_image_name(tmp_path):
    model = encoder()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"global feature of 0\.png is not finite"):
        extract(model, "w", Drawn(), TRANSFORM, how=how(tmp_path))


def test_an_unknown_kind_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match="did you mean 'global'"):
        extract(encoder(), "w", Drawn(), TRANSFORM, ["globl"], how(tmp_path))
