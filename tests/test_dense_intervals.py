"""Intervals of mAP and mIoU: what is computed of resampled images is what the references say of data sets that hold them."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from downstream.dense.detection_metrics import KINDS, Kind, detected_images, detection_metrics
from downstream.dense.instances import Instances
from mte_bench.data.sources import open_source
from mte_bench.dense.average_precision import _thresholds_reached
from mte_bench.dense.detection import NAMES, DetectedImages
from mte_bench.dense.files import read_images, write_images
from mte_bench.dense.resampling import digest, draw_weights, how_made, interval_of, intervals, percent_interval, stated
from mte_bench.dense.segmentation import SegmentedImages

IMAGES, CLASSES, SIDE = 24, 4, 300
Json = dict[str, Any]


def made_up(seed: int = 0) -> tuple[Json, list[Json]]:
    """Objects of all sizes, crowds among them, and detections that lie well, badly, twice or nowhere; class 4 is rare."""
    rng = np.random.default_rng(seed)
    images = [{"id": 10 * i + 3, "file_name": f"{IMAGES - i:03}.png", "width": SIDE, "height": SIDE} for i in range(IMAGES)]
    annotations: list[Json] = []
    found: list[Json] = []
    for image in images[1:]:  # the first has neither objects nor detections
        for _ in range(rng.integers(0, 7)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(180), 2))
            x, y = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
            label = int(rng.choice(CLASSES, p=[0.5, 0.3, 0.15, 0.05])) + 1
            crowd = int(rng.random() < 0.1)
            entry = {"image_id": image["id"], "category_id": label, "bbox": [x, y, w, h], "area": 0.9 * w * h, "iscrowd": crowd}
            annotations.append({**entry, "id": len(annotations) + 1, "segmentation": rectangle(x, y, w, h)})
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = rng.normal(0, 0.12, 4) * (w, h, w, h)
                guess = [x + dx, y + dy, max(2, w + dw), max(2, h + dh)]
                found.append({"image_id": image["id"], "category_id": label, "bbox": guess, "score": float(rng.random())})
        for _ in range(rng.integers(0, 9)):
            x, y, w, h = rng.uniform(1, SIDE / 2, 4)
            label = int(rng.integers(1, CLASSES + 1))
            found.append({"image_id": image["id"], "category_id": label, "bbox": [x, y, w, h], "score": float(rng.random() ** 2)})
    for entry in found:
        entry["segmentation"] = rectangle(*entry["bbox"])
    categories = [{"id": label, "name": f"class {label}"} for label in range(1, CLASSES + 1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, found


def rectangle(x: float, y: float, w: float, h: float) -> Json:
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[round(y) : round(y + h), round(x) : round(x + w)] = 1
    packed = rle.encode(mask)
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def of_kind(found: list[Json], kind: Kind) -> list[Json]:
    unused = "segmentation" if kind == "bbox" else "bbox"
    return [{key: value for key, value in entry.items() if key != unused} for entry in found]


def by_coco(truth: Json, found: list[Json], kind: Kind, copies: list[int] | None = None) -> dict[str, float]:
    """COCO's twelve numbers, by its own tools, of a data set that holds the images so often; in percent, -100 for none."""
    images, annotations, results = [], [], []
    for image, times in zip(truth["images"], copies or [1] * len(truth["images"]), strict=True):
        for copy in range(times):
            number = 100 * image["id"] + copy
            images.append({**image, "id": number})
            for entry in truth["annotations"]:
                if entry["image_id"] == image["id"]:
                    annotations.append({**entry, "id": len(annotations) + 1, "image_id": number})
            results += [{**entry, "image_id": number} for entry in of_kind(found, kind) if entry["image_id"] == image["id"]]
    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO()
        real.dataset = {**truth, "images": images, "annotations": annotations}
        real.createIndex()
        evaluation = COCOeval(real, real.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {f"{kind}_{name}": 100 * float(value) for name, value in zip(NAMES, evaluation.stats, strict=True)}


def kept(truth: Json, found: list[Json], root: Path) -> DetectedImages:
    """What the program keeps of a data set and the detections in it."""
    (root / "val2017").mkdir(parents=True)
    for image in truth["images"]:
        Image.new("L", (2, 2)).save(root / "val2017" / image["file_name"])
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
    val = Instances(f"coco:{root}", "val", open_source(f"coco:{root}", "val"))
    everything = list(range(len(val.images)))
    matched = {kind: detection_metrics(val, everything, of_kind(found, kind), kind).matched for kind in KINDS}
    return detected_images(val, everything, found, matched)


def values(images: DetectedImages) -> dict[str, float]:
    return {name: float(value[0]) for name, value in stated(images).overall.items()}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, list[Json], DetectedImages]:
    """Truth, detections, and what is kept of them."""
    truth, found = made_up()
    return truth, found, kept(truth, found, tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="module")
def segmented() -> SegmentedImages:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (30, 12, 12))
    truth[:29][truth[:29] == 4] = 3  # the last class is in the last image alone
    found = np.where(rng.random(truth.shape) < rng.random((30, 1, 1)), truth, rng.integers(0, 5, truth.shape))
    count = [[np.bincount(x[x == y], minlength=6), np.bincount(x.ravel(), minlength=6), np.bincount(y.ravel(), minlength=6)]
             for x, y in zip(found, truth, strict=True)]  # fmt: skip
    return SegmentedImages(tuple(f"{29 - i:03}.png" for i in range(30)), tuple("abcdef"), np.array(count, np.int64))


def test_the_images_as_they_are_give_cocos_own_numbers(coco: tuple[Json, list[Json], DetectedImages]) -> None:
    truth, found, images = coco
    expected = by_coco(truth, found, "bbox") | by_coco(truth, found, "segm")
    assert min(expected.values()) > 0 and 20 < expected["bbox_mAP_50"] < 90  # all sizes occur, and it is no trivial case
    assert values(images) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_resampled_images_give_cocos_numbers_of_a_data_set_that_holds_them_so_often(
    coco: tuple[Json, list[Json], DetectedImages], seed: int
) -> None:
    truth, found, images = coco
    weights = draw_weights(images.names, 3, seed)
    ours = images.measure(weights).overall
    for draw in (0, 2):
        for kind in KINDS:
            expected = by_coco(truth, found, kind, weights[draw].tolist())
            for name, value in expected.items():
                assert ours[name][draw] == pytest.approx(value, rel=1e-12) or (value == -100 and np.isnan(ours[name][draw])), name


def test_precision_is_read_where_coco_reads_it_to_the_last_bit() -> None:
    recalls = np.concatenate([np.arange(n + 1) / n for n in range(1, 700)])
    assert np.array_equal(_thresholds_reached(recalls), np.searchsorted(np.linspace(0, 1, 101), recalls, side="right"))


def test_of_more_than_a_hundred_detections_those_that_count_are_kept(
    coco: tuple[Json, list[Json], DetectedImages], tmp_path: Path
) -> None:
    truth, found, _ = coco
    box = {"image_id": truth["images"][1]["id"], "category_id": 1, "bbox": [5.0, 5.0, 50.0, 50.0]}
    box["segmentation"] = rectangle(5, 5, 50, 50)
    many = [*found, *({**box, "score": float(score)} for score in np.random.default_rng(1).random(120))]
    images = kept(truth, many, tmp_path / "data")
    assert len(images.scores) < len(many)
    assert values(images) == pytest.approx(by_coco(truth, many, "bbox") | by_coco(truth, many, "segm"), rel=1e-12)


def test_an_annotation_of_number_0_is_found_like_any_other(tmp_path: Path) -> None:
    truth, _ = made_up()
    annotations = [{**entry, "id": entry["id"] - 1, "iscrowd": 0} for entry in truth["annotations"]]
    same = ("image_id", "category_id", "bbox", "segmentation")
    found = [{**{key: entry[key] for key in same}, "score": 1 - 0.001 * place} for place, entry in enumerate(annotations)]
    images = kept({**truth, "annotations": annotations}, found, tmp_path / "data")
    assert values(images)["bbox_mAP"] == pytest.approx(100)


def test_nothing_found_is_0_and_certain(tmp_path: Path) -> None:
    images = kept(made_up()[0], [], tmp_path / "data")
    assert set(values(images).values()) == {0.0} and set(intervals(images).values()) == {(0.0, 0.0)}
    write_images(tmp_path / "images.parquet", images)
    again = read_images(tmp_path / "images.parquet")
    assert isinstance(again, DetectedImages) and values(again) == values(images)


def test_what_is_written_is_what_is_read(
    coco: tuple[Json, list[Json], DetectedImages], segmented: SegmentedImages, tmp_path: Path
) -> None:
    for images in (coco[2], segmented):
        write_images(tmp_path / "images.parquet", images)
        again = read_images(tmp_path / "images.parquet")
        assert (again.names, again.classes) == (images.names, images.classes)
        weights = draw_weights(images.names, 5, 1)
        ours, theirs = images.measure(weights), again.measure(weights)
        for name, values in ours.overall.items():
            assert np.array_equal(theirs.overall[name], values, equal_nan=True)
        assert np.array_equal(again.holding(), images.holding())
        assert pq.read_metadata(tmp_path / "images.parquet").num_rows == len(images.names)


def test_resampled_label_maps_give_the_ratios_of_the_sums(segmented: SegmentedImages) -> None:
    weights = draw_weights(segmented.names, 3, 0)
    measured = segmented.measure(weights)
    for draw, row in enumerate(weights):
        both, predicted, true = np.repeat(segmented.counts, row, axis=0).sum(axis=0).astype(np.float64)
        ious = [b / (p + t - b) for b, p, t in zip(both, predicted, true, strict=True) if p + t]
        accuracies = [b / t for b, t in zip(both, true, strict=True) if t]
        assert measured.overall["mIoU"][draw] == pytest.approx(100 * np.mean(ious), rel=1e-12)
        assert measured.overall["mAcc"][draw] == pytest.approx(100 * np.mean(accuracies), rel=1e-12)
        assert measured.overall["aAcc"][draw] == pytest.approx(100 * both.sum() / true.sum(), rel=1e-12)
        assert np.isnan(measured.classes["mIoU"][5, draw])  # a class that never occurs
    assert segmented.holding().tolist() == [30, 30, 30, 30, 1, 0]


def test_resamples_are_of_the_names_wherever_they_lie(segmented: SegmentedImages) -> None:
    order = np.random.default_rng(3).permutation(len(segmented.names))
    turned = SegmentedImages(tuple(segmented.names[i] for i in order), segmented.classes, segmented.counts[order])
    weights, others = draw_weights(segmented.names), draw_weights(turned.names)
    assert (weights.sum(axis=1) == len(segmented.names)).all()
    assert np.array_equal(weights[:, order], others)
    assert intervals(segmented) == intervals(turned)
    assert digest(segmented.names, weights) == digest(turned.names, others)
    assert digest(segmented.names, weights) != digest(segmented.names, draw_weights(segmented.names, seed=1))


def test_a_value_lies_in_its_interval(coco: tuple[Json, list[Json], DetectedImages]) -> None:
    ends = intervals(coco[2])
    for name, value in values(coco[2]).items():
        assert ends[name][0] < value < ends[name][1]


def test_more_found_than_there_is_is_refused(coco: tuple[Json, list[Json], DetectedImages], tmp_path: Path) -> None:
    images = coco[2]
    fewer = replace(images, objects=images.objects._replace(counted=0 * images.objects.counted))
    write_images(tmp_path / "images.parquet", fewer)
    with pytest.raises(ValueError, match="more is found than there is"):
        read_images(tmp_path / "images.parquet")


@pytest.mark.parametrize(("mistake", "said"), [
    ("text", "not a parquet file|magic"),
    ("other", "is not what a dense task writes"),
    ("twice", "holds an image twice"),
    ("class", "none of its"),
    ("column", "lacks the column"),
    ("lengths", "not as many values"),
    ("words", "does not hold"),
])  # fmt: skip
def test_a_file_that_holds_something_else_is_refused(
    segmented: SegmentedImages, coco: tuple[Json, list[Json], DetectedImages], tmp_path: Path, mistake: str, said: str
) -> None:
    for images, column in ((segmented, "both"), (coco[2], "score")):
        path = tmp_path / f"{column}.parquet"
        write_images(path, images)
        table = pq.read_table(path)
        place = table.column_names.index(column)
        if mistake == "text":
            path.write_text("no table")
        else:
            changed: dict[str, Callable[[], pa.Table]] = {
                "other": lambda table=table: table.replace_schema_metadata({}),
                "twice": lambda table=table: pa.concat_tables([table, table.slice(0, 1)]),
                "class": lambda table=table: table.replace_schema_metadata({**table.schema.metadata, b"classes": b'["one"]'}),
                "column": lambda table=table, place=place: table.remove_column(place),
                "lengths": lambda table=table, place=place, column=column: table.set_column(
                    place, column, pa.array([[1]] * len(table), table.schema.field(column).type)
                ),
                "words": lambda table=table, place=place, column=column: table.set_column(
                    place, column, pa.array(["x"] * len(table))
                ),
            }
            pq.write_table(changed[mistake](), path)
        with pytest.raises(ValueError, match=rf"(?i){said}"):
            read_images(path)


def test_what_has_no_number_has_no_interval() -> None:
    assert interval_of(np.array([np.nan, np.nan]), 1.0) is None
    assert interval_of(np.array([np.nan, 2.0, 2.0]), 1.5) == (1.5, 1.5)
    assert percent_interval(np.array([0.0, 4.0]), 1.0) == pytest.approx((0.0, 2.9))
    nothing = SegmentedImages(("a", "b"), ("x",), np.zeros((2, 3, 1), np.int64))
    assert intervals(nothing) == {}
    assert how_made(nothing) | {"resamples": 1000, "images": 2} == how_made(nothing)
