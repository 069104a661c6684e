"""``classify``: what a checkpoint's own classifier says of every image, and which class of the data each of its outputs means."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import timm
import torch
from test_evaluate import CLASSES, draw
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.formulas import SMALL
from downstream import commands
from downstream.classify import match
from downstream.features import Pass
from downstream.ranking import ranked_classes
from mte_bench import cli
from mte_bench.data.sources import open_source
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.encoders.classifier import Trained, trained_classifier
from mte_bench.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD
from mte_bench.encoders.tokens import MultiToken
from mte_bench.errors import UserError
from mte_bench.records import Record, read_record
from pretrain.trainer import Trainer
from tiny import make

SHAPE: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
ARCH = "vit_tiny_patch16_224"
SUPERVISED: dict[str, Any] = {
    "method": "supervised",
    "method_settings": {},
    "views": {"global1": {"size": 32}, "global2": None},
    "mte": None,
    "epochs": 2,
}
MTE = {"auxiliary_cls": 1, "pooled": 2, "kernel": 3}
RESIZED = 37  # 256/224 of 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of coloured squares."""
    return draw(tmp_path_factory.mktemp("coloured") / "data")


def trained(images: Path, out: Path, **changes: Any) -> Trainer:
    trainer = make(images, out, **{**SUPERVISED, **changes})
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    trained(images, out)
    return out


def classify(checkpoint: object, data: object, out: Path, *changes: str, **options: Any) -> Record:
    given = {"workers": 0, "device": "cpu", "batch_size": 16, **options}
    return commands.classify(str(checkpoint), str(data), out=str(out), set_=list(changes), **given)


def predicted(out: Path, metric: str = "top1") -> list[int]:
    return pyarrow.parquet.read_table(out / "predictions.parquet")[f"prediction:{metric}"].to_pylist()


def by_torch(model: torch.nn.Module, images: Path, side: int = 32, resize: int = RESIZED) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and labels of val as DeiT's own loop has them: torchvision's images, the whole model."""
    seen = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    batches = list(DataLoader(ImageFolder(str(images / "val"), seen), batch_size=16))
    with torch.inference_mode():
        return torch.cat([model.eval()(batch) for batch, _ in batches]), torch.cat([labels for _, labels in batches])


def in_timm(run: Path, **options: Any) -> torch.nn.Module:
    """timm's own model with all that the run left: encoder and classifier."""
    weights = {}
    for name in ("encoder", "classifier"):
        weights |= safetensors.torch.load_file(run / f"{name}.safetensors")
    model = timm.create_model(ARCH, num_classes=len(CLASSES), img_size=32, patch_size=8, **SHAPE, **options)
    model.load_state_dict(weights)
    return model


def test_it_is_a_plain_loop_over_timms_model_to_the_last_image(images: Path, plain: Path, tmp_path: Path) -> None:
    record = classify(plain, images, tmp_path)
    scores, labels = by_torch(in_timm(plain), images)
    assert predicted(tmp_path) == scores.argmax(1).tolist()
    hit = (scores.topk(5).indices == labels[:, None]).any(1)
    assert record.metrics["top1"].value == pytest.approx(100 * (scores.argmax(1) == labels).double().mean().item())
    assert record.metrics["top5"].value == pytest.approx(100 * hit.double().mean().item())
    assert [metric.n for metric in record.metrics.values()] == [len(labels)] * 2
    assert (torch.tensor(predicted(tmp_path, "top5")) == labels).tolist() == hit.tolist()
    assert (record.task, record.data.images, record.data.classes) == ("classify", {"val": len(labels)}, len(CLASSES))
    assert record.details["classes_matched"] == "by name, in the same order"
    assert read_record(tmp_path / "record.json") == record
    assert record.metrics["top1"].value > 20  # of seven classes: it has learnt something


def test_it_agrees_with_what_training_measured(images: Path, tmp_path: Path) -> None:
    val = open_source(str(images), "val")
    trained(images, tmp_path / "run", knn_every=1, held_out=val, mte=MTE)
    lines = [json.loads(line) for line in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()]
    measured = [line["classifier_top1"] for line in lines if "classifier_top1" in line]
    assert classify(tmp_path / "run", images, tmp_path / "out").metrics["top1"].value == pytest.approx(measured[-1], rel=1e-5)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_a_fine_tuned_classifier_gives_the_predictions_of_its_own_record(
    images: Path, plain: Path, tmp_path: Path, pool: str
) -> None:
    changes = ["epochs=2", "batch_size=16", f"pool={pool}", "image_size=16"]
    tuned = commands.finetune(
        str(plain), str(images), out=str(tmp_path / "tuned"), protocol="tiny", workers=0, device="cpu", set_=changes
    )
    record = classify(
        tmp_path / "tuned", images, tmp_path / "out", f"interpolation={tuned.details['transform']['interpolation']}"
    )
    assert predicted(tmp_path / "out") == predicted(tmp_path / "tuned")
    assert record.metrics == tuned.metrics and record.subject.sha256 != tuned.subject.sha256


@pytest.mark.parametrize(
    "changes",
    [{}, {"heads": "shared"}, {"fusion": "concat"}, {"fusion": "normalised-mean", "fuse_global": True}, {"tails": "each"}],
)
def test_with_mte_the_fused_classifiers_are_measured_too(images: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run = tmp_path / "run"
    branch = trained(images, run, mte={**MTE, **changes}, epochs=1).student
    record = classify(run, images, tmp_path / "out")
    scores, labels = by_torch(in_timm(run), images)
    assert predicted(tmp_path / "out") == scores.argmax(1).tolist()
    branch.eval().encoder.use_drop_path(None)

    class Fused(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return branch([batch.unsqueeze(0)]).of_fused[0]

    fused, _ = by_torch(Fused(), images)
    assert predicted(tmp_path / "out", "top1_fused") == fused.argmax(1).tolist()
    assert record.metrics["top1_fused"].value == pytest.approx(100 * (fused.argmax(1) == labels).double().mean().item())
    assert set(record.metrics) == {"top1", "top5", "top1_fused", "top5_fused"}


def test_the_global_classifier_does_without_auxiliary_tokens_that_it_saw(images: Path, tmp_path: Path) -> None:
    """Table 16: they are away when the encoder is used, here too."""
    trained(images, tmp_path / "run", mte={**MTE, "cut_attention": False}, epochs=1)
    found = trained_classifier(open_checkpoint(str(tmp_path / "run")))
    batch = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = in_timm(tmp_path / "run").eval()(batch)
        torch.testing.assert_close(found.model(batch)[0], expected, rtol=1e-5, atol=1e-6)
        multi = found.model.tokens
        assert isinstance(multi, MultiToken)
        assert (found.model.own.scores(multi(batch)[0]) - expected).abs().max() > 1e-3


# Other projects' weights ------------------------------------------------------------------------------------------------


def weights_of(arch: str, classes: int = len(CLASSES), **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=classes, img_size=32, **options)
    for parameter in model.parameters():  # timm's fresh heads are 0
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def sampled(images: Path, tmp_path: Path, count: int) -> Path:
    """The first images of some classes alone."""
    for name in sorted(CLASSES)[:count]:
        for split in ("train", "val"):
            place = tmp_path / "some" / split / name
            place.mkdir(parents=True)
            for path in sorted((images / split / name).iterdir())[:2]:
                (place / path.name).symlink_to(path)
    return tmp_path / "some"


@pytest.mark.parametrize(
    ("arch", "options", "container"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 16}, "model"),
        ("vit_tiny_patch16_224", {"patch_size": 16, "global_pool": "avg"}, "model"),
        ("deit_tiny_distilled_patch16_224", {}, "model"),
        (
            "swin_tiny_patch4_window7_224",
            {"window_size": 4, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)},
            "",
        ),
    ],
)
def test_weights_with_a_head_are_classified_as_by_their_own_model(
    images: Path, tmp_path: Path, arch: str, options: dict[str, Any], container: str
) -> None:
    model, some = weights_of(arch, **options), sampled(images, tmp_path, len(CLASSES))
    state = model.state_dict()
    torch.save({container: state} if container else state, tmp_path / "w.pth")
    record = classify(tmp_path / "w.pth", some, tmp_path / "out")
    scores, labels = by_torch(model, some)
    assert predicted(tmp_path / "out") == scores.argmax(1).tolist()
    ours, _ = by_torch(trained_classifier(open_checkpoint(str(tmp_path / "w.pth"))).model, some)
    torch.testing.assert_close(ours, scores, rtol=1e-5, atol=1e-5)
    assert scores.std(0).min() > 1e-4 and len(scores) == len(labels) == 14
    assert record.details["classes_matched"] == "by number: the classifier names no classes"


def test_timms_weights_bring_their_head(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_checkpoint import offline

    offline(monkeypatch, tmp_path)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(ARCH, num_classes=1000)
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    place = tmp_path / f"models--timm--{name}"
    (place / "snapshots" / "0").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0")
    safetensors.torch.save_file(model.state_dict(), place / "snapshots" / "0" / "model.safetensors")
    found = trained_classifier(open_checkpoint(f"timm:{name}"))
    batch = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(found.model(batch), model.eval()(batch), rtol=1e-5, atol=1e-5)
    assert (found.classes, found.outputs, found.suffixes) == (None, 1000, ("",))


# Classes ----------------------------------------------------------------------------------------------------------------


def named(*names: str, outputs: int | None = None) -> Trained:
    return Trained(torch.nn.Identity(), ("",), names or None, outputs or len(names))


def test_classes_are_matched_by_name() -> None:
    same = match(named("a", "b", "c"), ("a", "b", "c"), "run", "data")
    assert same.classes.tolist() == [0, 1, 2] and same.by == "by name, in the same order"
    other = match(named("c", "a", "b"), ("a", "b", "c"), "run", "data")
    assert other.classes.tolist() == [2, 0, 1] and other.by == "by name, in another order"
    fewer = match(named("c", "x", "a", "b"), ("a", "b", "c"), "run", "data")
    assert fewer.classes.tolist() == [2, -1, 0, 1] and fewer.by == "by name, 3 of the classifier's 4"
    with pytest.raises(UserError, match="data: the classifier of run does not know y, z; it knows a, b, c: give data with"):
        match(named("a", "b", "c"), ("a", "y", "z"), "run", "data")


def test_without_names_the_number_decides_and_synsets_are_imagenets() -> None:
    assert match(named(outputs=2), ("x", "y"), "f.pth", "data").classes.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"f.pth: its classifier tells 3 classes apart, which have no names, and data has 2"):
        match(named(outputs=3), ("x", "y"), "f.pth", "data")
    synsets = ("n01440764", "n02102040", "n02979186")
    found = match(named(outputs=1000), synsets, "f.pth", "imagenette")
    assert np.flatnonzero(found.classes >= 0).tolist() == [0, 217, 482]  # tench, English springer, cassette player
    assert found.classes[[0, 217, 482]].tolist() == [0, 1, 2] and found.by == "by ImageNet's synsets, 3 of the classifier's 1000"
    every = tuple(sorted(ImageNetInfo("imagenet-1k").label_names()))
    assert match(named(outputs=1000), every, "f.pth", "imagenet").classes.tolist() == list(range(1000))


def renamed(images: Path, place: Path, names: dict[str, str]) -> Path:
    for split in ("train", "val"):
        (place / split).mkdir(parents=True)
        for old, new in names.items():
            (place / split / new).symlink_to(images / split / old)
    return place


def test_another_order_and_fewer_classes_change_nothing_that_is_known(images: Path, plain: Path, tmp_path: Path) -> None:
    """The header's order is not the data's, or the data lack classes: each image is still judged by its class's name."""
    classify(plain, images, tmp_path / "whole")
    table = pyarrow.parquet.read_table(tmp_path / "whole" / "predictions.parquet")
    whole = dict(zip(table["name"].to_pylist(), table["prediction:top1"].to_pylist(), strict=True))
    classes = sorted(CLASSES)

    run = tmp_path / "turned"
    run.mkdir()
    (run / "encoder.safetensors").symlink_to(plain / "encoder.safetensors")
    with safetensors.safe_open(plain / "classifier.safetensors", "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    turn = [3, 0, 6, 1, 2, 5, 4]
    header["classes"] = json.dumps([classes[place] for place in turn])
    turned = {name: tensor[turn].contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(turned, run / "classifier.safetensors", header)
    record = classify(run, images, tmp_path / "again")
    assert predicted(tmp_path / "again") == list(whole.values())
    assert record.details["classes_matched"] == "by name, in another order"

    few = renamed(images, tmp_path / "few", {name: name for name in classes[1:4]})
    record = classify(plain, few, tmp_path / "all")
    table = pyarrow.parquet.read_table(tmp_path / "all" / "predictions.parquet")
    expected = [place - 1 if 1 <= (place := whole[name]) < 4 else -1 for name in table["name"].to_pylist()]
    assert table["prediction:top1"].to_pylist() == expected and -1 in expected
    assert record.data.classes == 3 and record.details["classes_of_the_classifier"] == 7 and "top5" in record.metrics

    record = classify(plain, few, tmp_path / "data", "candidates=data")
    scores, _ = by_torch(in_timm(plain), few)
    assert predicted(tmp_path / "data") == scores[:, 1:4].argmax(1).tolist() and set(record.metrics) == {"top1"}


# What cannot be done ----------------------------------------------------------------------------------------------------


def test_what_has_no_classifier_or_another_is_one_clear_error(images: Path, plain: Path, tmp_path: Path, error_line: Any) -> None:
    def line(checkpoint: object, data: object = images, *more: str) -> str:
        return error_line(
            "classify", str(checkpoint), "--data", str(data), "--device", "cpu", "--out", str(tmp_path / "o"), *more
        )

    dino = make(images, tmp_path / "dino", epochs=1, method_settings=SMALL)
    dino.run()
    assert "brings no classifier; give a supervised or fine-tuned run" in line(tmp_path / "dino")
    assert "brings no classifier" in line(f"random:{ARCH}?image_size=32")
    other = renamed(images, tmp_path / "other", dict(zip(sorted(CLASSES), [*sorted(CLASSES)[:-1], "zebra"], strict=True)))
    assert "does not know zebra; it knows" in line(plain, other)
    assert "ensemble" not in line(plain, images, "--protocol", "knn") and not (tmp_path / "o").exists()
    assert "candidates" in line(plain, images, "--set", "candidates=some")

    model = weights_of(ARCH, 5)
    torch.save(model.state_dict(), tmp_path / "five.pth")
    assert "tells 5 classes apart, which have no names, and" in line(tmp_path / "five.pth")
    torch.save({name: tensor for name, tensor in model.state_dict().items() if name != "head.bias"}, tmp_path / "half.pth")
    assert "its classifier (head.weight 5x192) does not fit vit_tiny" in line(tmp_path / "half.pth")
    torch.save({**model.state_dict(), "pre_logits.fc.weight": torch.zeros(192, 192)}, tmp_path / "deep.pth")
    assert "a layer before the linear one" in line(tmp_path / "deep.pth")

    run = tmp_path / "mixed"
    run.mkdir()
    for name, text in (("encoder", "1.0"), ("classifier", "2.0")):
        with safetensors.safe_open(plain / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            safetensors.torch.save_file(tensors, run / f"{name}.safetensors", {**file.metadata(), "epoch": text})
    assert "is of another epoch than the encoder beside it" in line(run)
    (run / "classifier.safetensors").write_bytes(b"short")
    assert "not a readable safetensors file" in line(run)


def test_unreadable_images_are_left_out_as_far_as_allowed(images: Path, plain: Path, tmp_path: Path) -> None:
    some = sampled(images, tmp_path, len(CLASSES))
    before = classify(plain, some, tmp_path / "before")
    expected = predicted(tmp_path / "before")
    victim = sorted((some / "val" / sorted(CLASSES)[2]).iterdir())[1]
    victim.unlink()
    victim.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{victim.name}.*not readable"):
        classify(plain, some, tmp_path / "refused")
    record = classify(plain, some, tmp_path / "after", allow_corrupt=1)
    assert record.data.corrupt == [f"val/{sorted(CLASSES)[2]}/{victim.name}"]
    assert record.data.images == {"val": before.data.images["val"] - 1}
    assert predicted(tmp_path / "after") == expected[:5] + expected[6:]


def test_scores_that_are_no_numbers_are_refused(images: Path, plain: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "encoder.safetensors").symlink_to(plain / "encoder.safetensors")
    with safetensors.safe_open(plain / "classifier.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        tensors["head.bias"][3] = torch.nan
        safetensors.torch.save_file(tensors, run / "classifier.safetensors", file.metadata())
    with pytest.raises(UserError, match=r"scores of .* are not finite"):
        classify(run, images, tmp_path / "out")


def test_a_dry_run_says_what_would_be_and_a_smoke_run_does_two_batches(
    images: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify(plain, images, tmp_path / "dry", dry_run=True, json=True) is None
    shown = json.loads(capsys.readouterr().out)
    assert shown["images"] == {"val": 28} and shown["classes_matched"].startswith("by name") and shown["task_seconds"] > 0
    assert not (tmp_path / "dry").exists()
    record = classify(plain, images, tmp_path / "smoke", smoke=True, batch_size=4)
    assert record.data.images == {"val": 8}


def test_in_a_suite_it_is_a_cell_that_is_done_once(
    images: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    enhanced = trained(images, tmp_path / "enhanced", mte=MTE, epochs=1)
    monkeypatch.chdir(tmp_path)
    suite = {
        "checkpoints": [{"name": "plain", "checkpoint": str(plain)}, {"name": "mte", "checkpoint": str(enhanced.out)}],
        "data": str(images),
        "tasks": [{"task": "knn", "set": {"k": [5]}}, {"task": "classify", "metrics": ["top1"]}],
    }
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    words = ["run", "suite.yaml", "--out", "out", "--workers", "0", "--device", "cpu", "--cache", "cache"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    alone = [classify(run, images, tmp_path / name).metrics["top1"].value for name, run in (("a", plain), ("b", enhanced.out))]
    capsys.readouterr()
    found = [read_record(tmp_path / "out" / name / "classify-data" / "record.json") for name in ("plain", "mte")]
    assert [record.metrics["top1"].value for record in found] == alone
    assert all(f"{value:.2f}" in shown for value in alone) and "classify" in shown
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("record.json"))]
    assert cli.main(words) == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").rglob("record.json"))] == times

    assert cli.main(["compare", "out/plain/classify-data", "out/mte/classify-data"]) == 0
    assert "top1" in capsys.readouterr().out
    assert cli.main(["check", "out", "--baseline", "base.json", "--update"]) == 0
    assert {cell["task"] for cell in json.loads((tmp_path / "base.json").read_text())["cells"]} == {"knn", "classify"}


def test_two_processes_answer_as_one(images: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an image that cannot be read, which is the second's; what would be sent between them is handed over here."""
    some = sampled(images, tmp_path, len(CLASSES))
    victim = sorted((some / "val" / sorted(CLASSES)[0]).iterdir())[1]
    victim.unlink()
    victim.write_bytes(b"no image")
    model, val = trained_classifier(open_checkpoint(str(plain))).model, open_source(str(some), "val")
    transform, how = EvaluationTransform.for_size(32, IMAGENET_MEAN, IMAGENET_STD), Pass(batch_size=4, allow_corrupt=1)
    alone = ranked_classes(model, val, transform, how, 5)
    sent: dict[int, np.ndarray] = {}

    def gathered(own: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        sent.update(own)
        return {rank: sent.get(rank, part) for part in own.values() for rank in (0, 1)}  # until it is there, one for both

    monkeypatch.setattr("mte_bench.distributed.gathered", gathered)
    ranked_classes(model, val, transform, how, 5, (1, 2))
    together = ranked_classes(model, val, transform, how, 5, (0, 2))
    assert np.array_equal(together, alone) and alone[1].tolist() == [-1] * 5 and alone.shape == (14, 5)
    assert (alone[[0, *range(2, 14)]] >= 0).all() and {rank: len(part) for rank, part in sent.items()} == {1: 7, 0: 7}
