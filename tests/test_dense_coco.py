"""Cascade Mask R-CNN on small scenes: COCO's numbers from its JSON, going on after a stop, and mistakes in the data."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from downstream.dense.batches import ShapedSteps
from downstream.dense.detection_metrics import detection_metrics
from downstream.dense.instances import Instances
from downstream.dense.pictures import decoded_mask
from downstream.dense.runner import Runner
from mte_bench import cli
from mte_bench.data.scenes_formats import write_scenes
from mte_bench.data.sources import open_source
from mte_bench.dense.detection import NAMES
from mte_bench.dense.files import read_images
from mte_bench.dense.resampling import intervals, stated
from mte_bench.errors import UserError
from mte_bench.records import Record
from tests.tiny import Killed

ENCODER = "random:vit_tiny_patch16_224?image_size=64&depth=4&embed_dim=48"
SMALL = [
    "joining.taps=[0,1,2,3]", "pyramid=16", "heads.channels=16", "heads.hidden=32", "heads.samples=16", "rpn.train_proposals=20",
    "rpn.test_proposals=20", "batch_size=4", "epochs=1", "optimiser.milestones=[]", "optimiser.warmup=1", "test.score=0",
    "augmentation.shorts=[64]", "augmentation.crop_shorts=[64,80]", "augmentation.crop=[48,64]", "test.scale=[128,64]",
]  # fmt: skip


def words(data: Path, out: Path, *changes: str, encoder: str = ENCODER) -> list[str]:
    sets = [word for change in (*SMALL, *changes) for word in ("--set", change)]
    line = ["coco", encoder, "--data", f"coco:{data}", "--out", str(out), "--protocol", "tiny", "--workers", "0"]
    return [*line, "--pictures", "2", *sets]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_scenes(tmp_path_factory.mktemp("data") / "coco", "coco", train=8, val=3, size=64)
    for split in ("train", "val"):
        change(folder, split, two_classes)
    return folder


def two_classes(content: dict[str, Any]) -> None:
    """Of ten, so that each is in one of the eight images."""
    content["categories"] = content["categories"][:2]
    for entry in content["annotations"]:
        entry["category_id"] = 1 + entry["category_id"] % 2


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    out = tmp_path_factory.mktemp("run")
    return out, cli.run(words(data, out))


def change(folder: Path, split: str, how: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def numbers_of(truth: Path, results: Path, kind: str) -> list[float]:
    """COCO's twelve numbers from the two files, as its own tools print them."""
    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO(str(truth))
        evaluation = COCOeval(real, real.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_record_says_what_coco_says_of_its_json(run: tuple[Path, Record], data: Path, kind: str) -> None:
    out, record = run
    results = out / record.files[f"predictions_{kind}"]
    expected = numbers_of(data / "annotations" / "instances_val2017.json", results, kind)
    assert json.loads(results.read_text())
    for name, value in zip(NAMES, expected, strict=True):
        if value < 0:
            assert f"{kind}_{name}" in record.details["without_truth"]
        else:
            assert record.metrics[f"{kind}_{name}"].value == pytest.approx(100 * value, abs=1e-6), name
    assert len([name for name in record.metrics if name.startswith(kind)]) == sum(value >= 0 for value in expected)


def test_one_folder_holds_everything(run: tuple[Path, Record]) -> None:
    out, record = run
    assert {path.name for path in out.iterdir()} == {
        "curves.jsonl", "detections.png", "images.parquet", "model.safetensors", "predictions.bbox.json", "predictions.segm.json",
        "protocol.yaml", "record.json", "tensorboard", "training.pt",
    }  # fmt: skip
    assert record.data.images == {"train": 8, "val": 3}
    assert (record.details["trained"]["steps"], record.data.classes) == (2, 2)
    images = read_images(out / (record.predictions or ""))
    assert {name: value[0] for name, value in stated(images).overall.items()} == pytest.approx(
        {name: metric.value for name, metric in record.metrics.items()}
    )
    assert {name: metric.ci95 for name, metric in record.metrics.items()} == intervals(images)
    assert record.details["interval"]["resamples"] == 1000
    assert Image.open(out / record.files["picture"]).size[0] > 500


def test_after_a_kill_it_goes_on_and_ends_the_same(
    run: tuple[Path, Record], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Runner.save

    def die(runner: Runner) -> None:
        save(runner)
        raise Killed

    monkeypatch.setattr(Runner, "save", die)
    with pytest.raises(Killed):
        cli.run([*words(data, tmp_path), "--save-minutes", "0"])
    monkeypatch.setattr(Runner, "save", save)
    record = cli.run(words(data, tmp_path))
    assert record.details["trained"]["resumed"] == 1
    assert record.metrics == run[1].metrics
    assert (tmp_path / "model.safetensors").read_bytes() == (run[0] / "model.safetensors").read_bytes()


def test_a_finished_detector_is_tested_without_training(
    run: tuple[Path, Record], data: Path, tmp_path: Path, error_line: Callable[..., str]
) -> None:
    line = ["coco", str(run[0]), "--data", f"coco:{data}", "--out", str(tmp_path), "--workers", "0", "--pictures", "0"]
    record = cli.run(line)
    assert record.metrics == run[1].metrics
    assert "steps" not in record.details["trained"]
    assert "only settings of test" in error_line(*line, "--set", "heads.hidden=64")
    assert "mte-bench coco" in error_line("ade20k", str(run[0]), "--data", f"ade20k:{data}")


def test_a_swin_can_be_the_encoder(data: Path, tmp_path: Path, error_line: Callable[..., str]) -> None:
    swin = "random:swin_tiny_patch4_window7_224?image_size=64&embed_dim=24&depths=[1,1,1,1]&num_heads=[1,2,2,2]"
    line = words(data, tmp_path, encoder=swin)
    assert "optimiser.layer_decay=1" in error_line(*line)
    record = cli.run([*line, "--set", "optimiser.layer_decay=1"])
    assert record.subject.arch == "swin_tiny_patch4_window7_224"


# --- the numbers ----------------------------------------------------------------------------------------------------


def detections(truth: Instances, kind: str, shift: float = 0.0) -> list[dict[str, Any]]:
    """The truth as detections, all surely found, moved to the right."""
    found = []
    for index in range(len(truth.images)):
        for number, entry in enumerate(truth.annotations(index)):
            x, y, w, h = entry["bbox"]
            what = {"bbox": [x + shift * w, y, w, h]} if kind == "bbox" else {"segmentation": compressed(entry["segmentation"])}
            image = {"image_id": truth.image_id(index), "category_id": entry["category_id"]}
            found.append({**image, **what, "score": 1 - 0.001 * number})
    return found


def compressed(mask: dict[str, Any]) -> dict[str, Any]:
    from pycocotools import mask as rle

    packed = rle.frPyObjects(mask, *mask["size"])
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def test_what_is_found_exactly_has_100_percent_and_what_is_not_found_0(data: Path) -> None:
    truth = Instances(f"coco:{data}", "val", open_source(f"coco:{data}", "val"))
    everything = list(range(len(truth.images)))
    for kind in ("bbox", "segm"):
        found = detection_metrics(truth, everything, detections(truth, kind), kind)  # type: ignore[arg-type]
        assert found.metrics[f"{kind}_mAP"].value == pytest.approx(100)
        nothing = detection_metrics(truth, everything, [], kind)  # type: ignore[arg-type]
        assert {metric.value for metric in nothing.metrics.values()} == {0.0}
        assert found.metrics.keys() == nothing.metrics.keys()


def test_a_box_moved_by_a_fifth_is_found_at_the_iou_it_has(data: Path) -> None:
    truth = Instances(f"coco:{data}", "val", open_source(f"coco:{data}", "val"))
    found = detection_metrics(truth, list(range(3)), detections(truth, "bbox", 0.2), "bbox").metrics
    assert found["bbox_mAP"].value == pytest.approx(40)  # 0.8 / 1.2 = 0.667: IoU .50, .55, .60 and .65 of ten
    assert (found["bbox_mAP_50"].value, found["bbox_mAP_75"].value) == pytest.approx((100, 0))


def test_masks_in_all_of_cocos_formats_are_the_same() -> None:
    polygon = [[2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]]
    from_polygon = decoded_mask(polygon, 6, 8)
    flat = from_polygon.ravel(order="F")
    runs = np.diff(np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1], [True]]))).tolist()
    assert np.array_equal(decoded_mask({"counts": runs, "size": [6, 8]}, 6, 8), from_polygon)
    assert np.array_equal(decoded_mask(compressed({"counts": runs, "size": [6, 8]}), 6, 8), from_polygon)
    assert from_polygon.sum() == 12


# --- the data -------------------------------------------------------------------------------------------------------


def test_images_of_a_batch_are_all_upright_or_all_lying_but_for_the_rest() -> None:
    upright = [index % 3 == 0 for index in range(40)]
    steps = ShapedSteps(upright, 4, 8, 2, seed=5)
    for epoch in (0, 1):
        order = steps.order(epoch)
        assert sorted(order) == list(range(40))
        groups = [{upright[place] for place in order[start : start + 4]} for start in range(0, 40, 4)]
        assert sum(len(kinds) > 1 for kinds in groups) <= 1
    assert steps.order(0) != steps.order(1)
    assert [[key[1] for key in step] for step in steps][:5] == np.reshape(steps.order(0), (5, 8)).tolist()


def test_images_without_annotations_are_tested_but_not_trained_on(data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "some"))
    for split in ("train", "val"):
        first = json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())["images"][0]["id"]
        change(root, split, lambda c, first=first: c.update(annotations=[a for a in c["annotations"] if a["image_id"] != first]))
    opened = {split: Instances(f"coco:{root}", split, open_source(f"coco:{root}", split)) for split in ("train", "val")}  # type: ignore[arg-type]
    assert {split: len(truth.images) for split, truth in opened.items()} == {"train": 7, "val": 3}
    with pytest.raises(UserError, match="no image of train"):
        Instances(f"coco:{root}", "train", open_source(f"coco:{root}", "train"), least_side=65)


def test_of_chosen_classes_alone_there_is_truth(data: Path, tmp_path: Path, error_line: Callable[..., str]) -> None:
    spec = f"coco:{data}"
    whole, (first, second) = {split: Instances(spec, split, open_source(spec, split)) for split in ("train", "val")}, (1, 2)  # type: ignore[arg-type]
    name = whole["val"].classes[1]
    spec += f"?classes={name}"
    some = {split: Instances(spec, split, open_source(spec, split)) for split in ("train", "val")}  # type: ignore[arg-type]
    for split, truth in some.items():
        assert (truth.classes, truth.category_ids) == ((name,), [second])
        of = {whole[split].images.name(index): whole[split].annotations(index) for index in range(len(whole[split].images))}
        expected = {image: [entry for entry in entries if entry["category_id"] != first] for image, entries in of.items()}
        if split == "train":
            expected = {image: entries for image, entries in expected.items() if entries}
        assert {truth.images.name(index): truth.annotations(index) for index in range(len(truth.images))} == expected
        assert truth.fingerprint != whole[split].fingerprint
        truth.check(trained=split == "train")
        assert {box["bbox_label"] for index in range(len(truth.images)) for box in truth.results(index)["instances"]} == {0}
    line = error_line(*words(data, tmp_path / "out"), "--data", f"{spec},{name[:-1]}")
    assert "instances_train2017.json" in line and f"no category '{name[:-1]}' (did you mean '{name}'?)" in line


@pytest.mark.parametrize(("mistake", "said"), [
    ("image", ("instances_train2017.json", "lists 1 images that are not there", ".jpg")),
    ("box", ("instances_train2017.json", "annotation 3", "outside its image")),
    ("category", ("instances_val2017.json", "category 99", "not listed")),
    ("empty", ("instances_train2017.json", "category 7 (nothing)", "no image")),
    ("mask", ("instances_train2017.json", "annotation 1", "no mask")),
    ("format", ("instances_train2017.json", "not in COCO's format", "bbox")),
    ("classes", ("train has other classes than val has", "nothing")),
])  # fmt: skip
def test_mistakes_in_the_data_are_named_before_training(
    data: Path, tmp_path: Path, error_line: Callable[..., str], mistake: str, said: tuple[str, ...]
) -> None:
    root = Path(shutil.copytree(data, tmp_path / "broken"))
    if mistake == "image":
        next((root / "train2017").glob("*.jpg")).unlink()
    elif mistake == "box":
        change(root, "train", lambda content: content["annotations"][2].update(bbox=[60, 10, 40, 10]))
    elif mistake == "category":
        change(root, "val", lambda content: content["annotations"][0].update(category_id=99))
    elif mistake == "empty":
        for split in ("train", "val"):
            change(root, split, lambda content: content["categories"].append({"id": 7, "name": "nothing"}))
    elif mistake == "classes":
        change(root, "train", lambda content: content["categories"].append({"id": 7, "name": "nothing"}))
    elif mistake == "mask":
        change(root, "train", lambda content: content["annotations"][0].pop("segmentation"))
    else:
        change(root, "train", lambda content: content["annotations"][0].pop("bbox"))
    line = error_line(*words(root, tmp_path / "out"))
    assert all(word in line for word in said), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value", "said"), [
    ("bbox", [1, 2, 3], "no box of four numbers"),
    ("bbox", [float("nan"), 2, 3, 4], "no box of four numbers"),
    ("bbox", ["1", 2, 3, 4], "no box of four numbers"),
    ("segmentation", [["a"] * 6], "not lists of numbers"),
    ("segmentation", [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]], "three corners"),
    ("segmentation", {"size": [64, 85]}, "neither polygons nor run lengths"),
    ("segmentation", {"size": [10, 10], "counts": [100]}, "height and width [10, 10], its image [64, 85]"),
    ("segmentation", {"size": [64, 85], "counts": [10, 20]}, "do not add up to its 5440 pixels"),
    ("segmentation", {"size": [64, 85], "counts": [-10, 5450]}, "do not add up"),
    ("segmentation", "RLE", "neither polygons nor run lengths"),
])  # fmt: skip
def test_a_box_or_mask_that_is_none_is_named(data: Path, tmp_path: Path, key: str, value: Any, said: str) -> None:
    root = Path(shutil.copytree(data, tmp_path / "broken"))
    change(root, "train", lambda content: content["annotations"][2].update({key: value}))
    with pytest.raises(UserError, match=r"instances_train2017.json: annotation 3 ") as error:
        train_truth(root).check(trained=True)
    assert said in str(error.value)


@pytest.mark.parametrize(("kind", "said"), [
    ("categories", "two categories have the id 1"), ("images", "two images have the id 1"), ("names", "have the file_name 0000"),
])  # fmt: skip
def test_what_is_listed_twice_is_named(data: Path, tmp_path: Path, kind: str, said: str) -> None:
    def twice(content: dict[str, Any]) -> None:
        listed = content["categories" if kind == "categories" else "images"]
        listed.append({**listed[0], "id": 1000} if kind == "names" else {**listed[0], "file_name": "other.jpg"})

    root = Path(shutil.copytree(data, tmp_path / "broken"))
    change(root, "train", twice)
    with pytest.raises(UserError, match=said):
        train_truth(root)


def test_polygons_and_compressed_run_lengths_are_masks(data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "fine"))

    def others(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = [[1, 2, 3.5, 4, 5, 6], [1, 2]]
        content["annotations"][1]["segmentation"] = compressed(content["annotations"][1]["segmentation"])

    change(root, "train", others)
    train_truth(root).check(trained=True)


def train_truth(root: Path) -> Instances:
    return Instances(f"coco:{root}", "train", open_source(f"coco:{root}", "train"))


def test_another_kind_of_source_is_refused(tmp_path: Path, error_line: Callable[..., str]) -> None:
    assert "coco:PATH" in error_line("coco", ENCODER, "--data", "scenes", "--out", str(tmp_path / "out"))


@pytest.mark.slow
def test_eight_images_can_be_learnt_by_heart(data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "same"))
    shutil.rmtree(root / "val2017")
    shutil.copytree(root / "train2017", root / "val2017")
    shutil.copy(root / "annotations" / "instances_train2017.json", root / "annotations" / "instances_val2017.json")
    changes = [
        "epochs=300", "batch_size=8", "optimiser.lr=2e-3", "optimiser.layer_decay=1.0", "optimiser.milestones=[250]",
        "optimiser.warmup=20", "joining.drop_path=0", "pyramid=32", "heads.channels=32", "heads.hidden=64", "heads.samples=32",
        "rpn.train_proposals=100", "rpn.test_proposals=100", "augmentation.crop_shorts=[64]", "augmentation.crop=[64,128]",
        "test.score=0.05",
    ]  # fmt: skip
    record = cli.run(words(root, tmp_path / "out", *changes))
    assert record.metrics["bbox_mAP_50"].value > 90
    assert record.metrics["segm_mAP_50"].value > 90
