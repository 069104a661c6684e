"""Several kinds of feature in one k-NN evaluation: each is what it is alone, from one pass, with a picture."""

import pytest
from PIL import Image

from mte_bench.cli import run
from mte_bench.errors import UserError

ENCODER = "random:vit_tiny_patch16_224?image_size=32&patch_size=8&depth=2&embed_dim=24&num_heads=3"
DATA = ["--data", "scenes?train=60&val=40&size=32", "--device", "cpu", "--workers", "0"]


def test_kinds_side_by_side_are_each_alone(tmp_path, capsys):
    record = run(["knn", ENCODER, *DATA, "--protocol", "patches", "--set", "k=[3]", "--out", str(tmp_path / "all")])
    err = capsys.readouterr().err
    assert err.count("features of train: 60/60") == 1
    assert "left out, as images have fewer patches: patches-top56, patches-top112, patches-top196" in err
    kinds = ["global", "patch-mean", *(f"patches-{end}{count}" for end in ("top", "bottom") for count in (1, 7, 14))]
    assert [name for name in record.metrics if name.startswith("top1")] == [f"top1_k3_{kind}" for kind in kinds]
    for kind in ("patch-mean", "patches-bottom7"):
        alone = run(["knn", ENCODER, *DATA, "--set", f"feature={kind}", "--set", "k=[3]", "--out", str(tmp_path / kind)])
        assert alone.metrics["top1_k3"] == record.metrics[f"top1_k3_{kind}"]
    with Image.open(tmp_path / "all" / record.files["picture"]) as picture:
        assert min(picture.size) > 400


def test_all_patches_are_the_mean_patch(tmp_path):
    options = [*DATA, "--set", "k=[3]", "--set", "feature=patch-mean, patches-top16", "--out", str(tmp_path / "all")]
    metrics = run(["knn", ENCODER, *options]).metrics
    assert metrics["top1_k3_patch-mean"] == metrics["top1_k3_patches-top16"]


def test_a_kind_by_itself_that_takes_too_many_patches_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'patches-top17': an image of 32 pixels has only 16 patches; choose fewer"):
        run(["knn", ENCODER, *DATA, "--set", "feature=patches-top17", "--set", "k=[3]", "--out", str(tmp_path)])


def test_the_analysis_of_that_name_is_knn_under_that_protocol(tmp_path):
    options = [ENCODER, *DATA, "--set", "k=[3]"]
    knn = run(["knn", *options, "--protocol", "knn-patches", "--out", str(tmp_path / "a"), "--cache", str(tmp_path / "a")])
    same = run(["analyze", "patch-knn", *options, "--out", str(tmp_path / "b"), "--cache", str(tmp_path / "b")])
    assert (same.task, same.protocol, same.metrics) == (knn.task, knn.protocol, knn.metrics)
    swin = "random:swin_tiny_patch4_window7_224?image_size=32&window_size=4&embed_dim=12&depths=[1,1,1,1]&num_heads=[1,1,2,2]"
    kinds = ["--set", "feature=global,patch-mean", "--set", "k=[3]", "--out", str(tmp_path / "swin")]
    assert set(run(["analyze", "patch-knn", swin, *DATA, *kinds]).metrics) >= {"top1_k3_global", "top1_k3_patch-mean"}
