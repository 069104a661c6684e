"""UperNet and the linear head on small scenes: one record, its PNGs, going on after a stop, and mistakes in the data."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix

from downstream.dense import ade20k
from downstream.dense.pairs import VOID, LabelSettings
from downstream.dense.runner import Runner
from downstream.dense.segmentation_metrics import counts_of, segmentation_metrics
from downstream.evaluate import Request
from downstream.job import Opened
from mte_bench import cli
from mte_bench.data.scenes import CLASSES
from mte_bench.data.scenes_formats import write_scenes
from mte_bench.dense.files import read_images
from mte_bench.dense.resampling import stated
from mte_bench.dense.segmentation import SegmentedImages
from mte_bench.files import sha256_file
from mte_bench.records import Record, read_record
from tests.tiny import Killed

ENCODER = "random:vit_tiny_patch16_224?image_size=64&depth=4&embed_dim=48"
SMALL = [
    "joining.taps=[0,1,2,3]", "head.channels=16", "head.auxiliary.channels=8", "batch_size=4", "steps=3",
    "augmentation.crop=64", "augmentation.scale=[256,64]", "test.scale=[256,64]", "test.crop=64", "test.stride=43",
]  # fmt: skip


def words(data: Path, out: Path, *changes: str, encoder: str = ENCODER, protocol: str = "tiny") -> list[str]:
    sets = [word for change in (*SMALL, *changes) for word in ("--set", change)]
    line = ["ade20k", encoder, "--data", f"ade20k:{data}", "--out", str(out), "--protocol", protocol, "--workers", "0"]
    return [*line, "--pictures", "2", *sets]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "ade", "ade20k", train=8, val=3, size=64)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    out = tmp_path_factory.mktemp("run")
    return out, cli.run(words(data, out))


def label_maps(folder: Path) -> dict[str, Any]:
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_the_record_says_what_the_pngs_say(run: tuple[Path, Record], data: Path) -> None:
    out, record = run
    truth = label_maps(data / "annotations" / "validation")
    found = label_maps(out / record.files["predictions"])
    assert truth.keys() == found.keys()
    counted = {name: labels != 0 for name, labels in truth.items()}  # 0 is unlabelled
    true = np.concatenate([truth[name][counted[name]] for name in truth])
    predicted = np.concatenate([found[name][counted[name]] for name in truth])
    matrix = confusion_matrix(true, predicted, labels=range(1, len(CLASSES) + 2)).astype(np.float64)
    both, rows, columns = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):
        expected = {
            "mIoU": 100 * np.nanmean(both / (rows + columns - both)),
            "mAcc": 100 * np.nanmean(both / rows),
            "aAcc": 100 * both.sum() / matrix.sum(),
        }
        ious = 100 * both / (rows + columns - both)
    assert {name: metric.value for name, metric in record.metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert all(m.n == 3 and m.ci95 and m.ci95[0] <= m.value + 1e-9 for m in record.metrics.values())
    table = record.details["per_class"]
    assert [row["class"] for row in table] == [*CLASSES, "ground"]
    for row, iou, pixels in zip(table, ious, rows, strict=True):
        assert row["pixels"] == pixels
        assert row["IoU"] is None if np.isnan(iou) else row["IoU"] == pytest.approx(iou, abs=1e-6)


def test_one_folder_holds_everything(run: tuple[Path, Record]) -> None:
    out, record = run
    assert {path.name for path in out.iterdir()} == {
        "curves.jsonl", "images.parquet", "model.safetensors", "predictions", "protocol.yaml", "record.json", "segmentations.png",
        "tensorboard", "training.pt",
    }  # fmt: skip
    assert read_record(out / "record.json") == record
    assert record.data.images == {"train": 8, "val": 3}
    assert record.details["trained"]["steps"] == 3
    assert Image.open(out / record.files["picture"]).size[0] > 500
    assert json.loads((out / "curves.jsonl").read_text().splitlines()[-1])["step"] == 3
    images = read_images(out / (record.predictions or ""))
    assert stated(images).overall["mIoU"][0] == record.metrics["mIoU"].value
    assert record.details["interval"]["images"] == 3


def test_a_suite_knows_that_it_is_done(run: tuple[Path, Record], data: Path) -> None:
    request = Request(ENCODER, f"ade20k:{data}", "tiny", set=tuple(SMALL), out=str(run[0]), workers=0)
    assert ade20k.ADE20K.job(request, Opened()).found() == run[1]
    assert ade20k.ADE20K.job(replace(request, set=(*SMALL, "seed=1")), Opened()).found() is None


def test_after_a_kill_it_goes_on_and_ends_the_same(
    run: tuple[Path, Record], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Runner.save

    def die_after(runner: Runner) -> None:
        save(runner)
        if runner.step == 2:
            raise Killed

    monkeypatch.setattr(Runner, "save", die_after)
    with pytest.raises(Killed):
        cli.run([*words(data, tmp_path), "--save-minutes", "0"])
    assert not (tmp_path / "record.json").exists()
    monkeypatch.setattr(Runner, "save", save)
    record = cli.run(words(data, tmp_path))
    assert record.details["trained"]["resumed"] == 1
    assert record.metrics == run[1].metrics
    assert (tmp_path / "model.safetensors").read_bytes() == (run[0] / "model.safetensors").read_bytes()


def process(rank: int, line: list[str], folder: Path) -> None:
    """Of one of two processes: what its steps returned, and the losses that its own images gave."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    steps, own = [], []
    take_step, losses = Runner.take_step, Runner.losses

    def watched(runner: Runner, *arguments: Any) -> dict[str, float]:
        steps.append(take_step(runner, *arguments))
        return steps[-1]

    def seen(runner: Runner, *arguments: Any) -> dict[str, Any]:
        found = losses(runner, *arguments)
        own.append({name: float(value.mean()) for name, value in found.items()})
        return found

    Runner.take_step, Runner.losses = watched, seen  # type: ignore[method-assign]
    cli.run(line)
    (folder / f"{rank}.json").write_text(json.dumps([steps, own]))


@pytest.mark.slow
def test_the_losses_of_two_processes_are_the_means_of_their_own(data: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (words(data, tmp_path / "out"), tmp_path), nprocs=2)
    (steps, own), (of_other, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert steps == of_other and len(steps) == len(own) == len(others) == 3
    for step, here, there in zip(steps, own, others, strict=True):
        assert here != there
        for name in here:
            assert step[name] == pytest.approx((here[name] + there[name]) / 2, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "curves.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] == pytest.approx(np.mean([step["loss"] for step in steps]), rel=1e-5)


def test_a_finished_model_is_tested_without_training(run: tuple[Path, Record], data: Path, tmp_path: Path) -> None:
    line = ["ade20k", str(run[0]), "--data", f"ade20k:{data}", "--workers", "0", "--pictures", "0"]
    again = cli.run([*line, "--out", str(tmp_path / "again")])
    assert again.details["trained"]["sha256"] == sha256_file(run[0] / "model.safetensors")
    assert again.metrics == run[1].metrics
    assert again.subject == run[1].subject
    assert "trained" in again.details and "steps" not in again.details["trained"]
    assert not (tmp_path / "again" / "training.pt").exists()
    several = cli.run([*line, "--out", str(tmp_path / "ms"), "--set", "test.ratios=[1.0,1.5]", "--set", "test.flip=true"])
    assert several.protocol.settings["test"]["flip"] is True
    assert several.metrics != run[1].metrics


def test_a_frozen_encoder_comes_out_as_it_went_in(data: Path, tmp_path: Path) -> None:
    changes = [change for change in SMALL if not change.startswith("head.")]
    sets = [word for change in changes for word in ("--set", change)]
    line = ["ade20k", ENCODER, "--data", f"ade20k:{data}", "--out", str(tmp_path), "--protocol", "linear", "--workers", "0"]
    record = cli.run([*line, "--pictures", "0", *sets, "--set", "joining.position_size=null"])
    from mte_bench.encoders.checkpoint import open_checkpoint

    start = open_checkpoint(ENCODER).encoder.model.state_dict()
    end = load_file(tmp_path / "model.safetensors")
    for name, tensor in start.items():
        assert torch.equal(end[f"backbone.encoder.model.{name}"], tensor), name
    assert record.metrics["mIoU"].n == 3


def test_a_dry_run_does_nothing(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*words(data, tmp_path / "out"), "--dry-run", "--json"]) is None
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["classes"], plan["settings"]["head"]["channels"]) == (3, 11, 16)
    assert not (tmp_path / "out").exists()


def test_several_sizes_never_have_a_side_below_the_window() -> None:
    test = ade20k.Test(scale=(2048, 512), mode="slide", crop=64, stride=43, ratios=(0.1, 0.25), flip=True)
    views = ade20k.Views(test)(Image.new("RGB", (100, 50), (10, 20, 30)))
    assert [tuple(view.pixels.shape) for view in views] == [(3, 64, 128)] * 2 + [(3, 128, 256)] * 2
    assert [view.flip for view in views] == [False, True] * 2
    assert views[0].pixels[:, 0, 0].tolist() == [30, 20, 10]  # blue first
    one = ade20k.Test(scale=(200, 100), mode="slide", crop=64, stride=43)
    assert ade20k.Views(one)(Image.new("RGB", (100, 20)))[0].pixels.shape == (3, 40, 200)


def test_labels_mean_what_the_settings_say() -> None:
    written = np.array([[0, 1, 2, 11, 255]], np.uint8)
    ade = LabelSettings(reduce_zero_label=True)
    assert ade.truth(written).tolist() == [[VOID, 0, 1, 10, VOID]]
    camvid = LabelSettings(reduce_zero_label=False, ignore_index=11)
    assert camvid.truth(written).tolist() == [[0, 1, 2, VOID, VOID]]
    for settings in (ade, camvid):
        kept = settings.truth(written) != VOID
        assert (settings.written(settings.truth(written))[kept] == written[kept]).all()


def test_the_interval_holds_the_mean_over_many_images() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, (40, 16, 16)).astype(np.uint8)
    right = generator.random(truth.shape) < 0.7
    found = np.where(right, truth, (truth + 1) % 4)
    counts = np.stack([counts_of(f, t, 4) for f, t in zip(found, truth, strict=True)])
    metrics = segmentation_metrics(SegmentedImages(tuple(map(str, range(40))), tuple("abcd"), counts))
    low, high = metrics["aAcc"].ci95 or (0, 0)
    error = 100 * (right.mean((1, 2)).std() / 40**0.5)
    assert metrics["aAcc"].value == pytest.approx(100 * right.mean())
    assert (high - low) == pytest.approx(2 * 1.96 * error, rel=0.1)


def broken(data: Path, to: Path) -> Path:
    return Path(shutil.copytree(data, to))


@pytest.mark.parametrize(("mistake", "said"), [
    ("class", ("ADE_train_00000003.png", "number 12", "11 classes")),
    ("size", ("ADE_val_00000002.png", "64", "image")),
    ("missing", ("ADE_train_00000002.png", "no labels")),
    ("colours", ("ADE_train_00000001.png", "RGB")),
    ("names", ("classes.txt",)),
])  # fmt: skip
def test_mistakes_in_the_data_are_named_before_training(
    data: Path, tmp_path: Path, error_line: Callable[..., str], mistake: str, said: tuple[str, ...]
) -> None:
    root = broken(data, tmp_path / "broken")
    training, validation = root / "annotations" / "training", root / "annotations" / "validation"
    if mistake == "class":
        labels = np.asarray(Image.open(training / "ADE_train_00000003.png")).copy()
        labels[0, 0] = 12
        Image.fromarray(labels).save(training / "ADE_train_00000003.png")
    elif mistake == "size":
        Image.fromarray(np.ones((64, 64), np.uint8)).save(validation / "ADE_val_00000002.png")
    elif mistake == "missing":
        (training / "ADE_train_00000002.png").unlink()
    elif mistake == "colours":
        Image.new("RGB", (85, 64)).save(training / "ADE_train_00000001.png")
    else:
        (root / "objectInfo11.csv").unlink()
    line = error_line(*words(root, tmp_path / "out"))
    assert all(word in line for word in said), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "said"), [
    (["batch_size=9"], "batch_size 9 is more than the 8 images"),
    (["joining.taps=[0,1,2,7]"], "0 to 3"),
    (["labels.reduce_zero_label=false"], "number 11, but there are 11 classes"),  # which are then 0 to 10
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(
    data: Path, tmp_path: Path, error_line: Callable[..., str], changes: list[str], said: str
) -> None:
    assert said in error_line(*words(data, tmp_path / "out", *changes))


def test_a_run_with_other_settings_is_not_gone_on_with(
    run: tuple[Path, Record], data: Path, error_line: Callable[..., str]
) -> None:
    assert "protocol.seed: 0 there, 1 now" in error_line(*words(data, run[0], "seed=1"))


@pytest.mark.slow
def test_eight_images_can_be_learnt_by_heart(data: Path, tmp_path: Path) -> None:
    root = broken(data, tmp_path / "same")
    for kind in ("images", "annotations"):
        shutil.rmtree(root / kind / "validation")
        shutil.copytree(root / kind / "training", root / kind / "validation")
    changes = [
        "steps=400", "batch_size=8", "optimiser.lr=2e-3", "optimiser.layer_decay=1.0", "joining.drop_path=0", "head.channels=64",
        "head.dropout=0", "augmentation.ratio=[1.0,1.0]", "augmentation.photometric=false", "augmentation.flip=0",
        "augmentation.crop=96", "test.crop=96",  # more than the images have: nothing is cut off
    ]  # fmt: skip
    record = cli.run(words(root, tmp_path / "out", *changes))
    assert record.metrics["mIoU"].value > 90
