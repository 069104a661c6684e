"""COCO's numbers: average precision and recall of boxes and masks, by pycocotools, and what matches that they come from."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from downstream.dense.instances import Instances
from mte_bench.dense.detection import IOUS, NAMES, SIZES, DetectedImages, Matches, Objects
from mte_bench.records import Metric

Kind = Literal["bbox", "segm"]
KINDS: tuple[Kind, ...] = ("bbox", "segm")


class Matched(NamedTuple):
    """What COCOeval found out image by image."""

    matches: Matches
    """Of the detections, in the order in which they were given."""
    looked_at: NDArray[np.bool_]
    """False for those beyond the hundredth of an image and class, which do not count at all."""
    counted: NDArray[np.int64]
    """Of the annotations in the order of ``coco_json``: bit s is set for one that counts among those of size s."""


class Found(NamedTuple):
    """Numbers of one kind."""

    metrics: dict[str, Metric]
    """In percent; without those that have no truth, such as ``mAP_l`` where no object is large."""
    per_class: dict[str, float | None]
    """mAP of each class; None for a class that does not occur."""
    without_truth: list[str]
    matched: Matched


def detection_metrics(truth: Instances, indices: list[int], detections: list[dict[str, Any]], kind: Kind) -> Found:
    """COCO's numbers of ``detections`` (entries of COCO's result format) on the images of ``truth`` at ``indices``.

    Masks are compared where ``kind`` is ``segm``: entries must then have no ``bbox``, or objects would be small, medium or
    large by their boxes. With no detections all numbers are 0 that have any truth. No intervals: ``detected_images`` has them.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO()
        real.dataset = coco_json(truth, indices)
        real.createIndex()
        predicted = real.loadRes(detections) if detections else COCO()
        evaluation = COCOeval(real, predicted, kind)
        evaluation.params.imgIds, evaluation.params.catIds = [truth.image_id(i) for i in indices], list(truth.category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = dict(zip(NAMES, (float(value) for value in evaluation.stats), strict=True))
    metrics = {f"{kind}_{name}": Metric(value=100 * value, n=len(indices)) for name, value in stats.items() if value >= 0}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; objects of all sizes, most detections
    per_class = {}
    for place, name in enumerate(truth.classes):
        values = precision[:, :, place]
        per_class[name] = 100 * float(values[values > -1].mean()) if (values > -1).any() else None
    matched = _matched(evaluation, len(detections), len(real.dataset["annotations"]))
    return Found(metrics, per_class, [f"{kind}_{name}" for name, value in stats.items() if value < 0], matched)


def _matched(evaluation: Any, detections: int, annotations: int) -> Matched:
    """From COCOeval's ``evalImgs``, which lie by class, then size, then image; its ids count from 1."""
    result = Matched(
        Matches(np.zeros(detections, np.int64), np.zeros(detections, np.int64)),
        np.zeros(detections, bool),
        np.zeros(annotations, np.int64),
    )
    images, thresholds = len(evaluation.params.imgIds), np.arange(IOUS)[:, None]
    for size in range(len(SIZES)):
        parts = [
            part
            for first in range(size * images, len(evaluation.evalImgs), len(SIZES) * images)
            for part in evaluation.evalImgs[first : first + images]
            if part is not None
        ]
        if not parts:
            continue
        own = np.concatenate([part["dtIds"] for part in parts]).astype(np.int64) - 1
        result.looked_at[own] = True
        for name, bits in (("dtMatches", result.matches.found), ("dtIgnore", result.matches.ignored)):
            hits = np.concatenate([part[name] for part in parts], axis=1) != 0
            bits[own] |= (hits << (IOUS * size + thresholds)).sum(axis=0)
        objects = np.concatenate([part["gtIds"] for part in parts]).astype(np.int64) - 1
        counts = np.concatenate([part["gtIgnore"] for part in parts]) == 0
        result.counted[objects[counts]] |= 1 << size
    return result


def detected_images(
    truth: Instances, indices: list[int], detections: list[dict[str, Any]], matched: Mapping[Kind, Matched]
) -> DetectedImages:
    """What ``detection_metrics`` matched, of all kinds, by image: ``detections`` are those that each kind was called with."""
    indices = sorted(indices, key=truth.image_id)  # the order in which COCOeval reads images
    row = {truth.image_id(index): place for place, index in enumerate(indices)}
    label = {number: place for place, number in enumerate(truth.category_ids)}
    first = next(iter(matched.values()))
    rows = np.array([row[entry["image_id"]] for entry in detections], np.int64)
    order = np.argsort(rows, kind="stable")
    order = order[first.looked_at[order]]
    annotations = coco_json(truth, indices)["annotations"]
    objects = Objects(
        np.array([row[entry["image_id"]] for entry in annotations], np.int64),
        np.array([label[entry["category_id"]] for entry in annotations], np.int64),
        first.counted,
    )
    return DetectedImages(
        tuple(truth.images.name(index) for index in indices),
        truth.classes,
        objects,
        rows[order],
        np.array([label[entry["category_id"]] for entry in detections], np.int64)[order],
        np.array([entry["score"] for entry in detections], np.float64)[order],
        {kind: Matches(*(bits[order] for bits in found.matches)) for kind, found in matched.items()},
    )


def coco_json(truth: Instances, indices: list[int]) -> dict[str, Any]:
    """The images of ``truth`` at ``indices``, by their numbers, with their annotations, in COCO's format.

    Annotations are numbered anew from 1: COCOeval takes the number 0 for no match, and two of one number for one.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in sorted(indices, key=truth.image_id):
        width, height, number = truth.sizes[index]
        images.append({"id": number, "width": width, "height": height})
        for entry in truth.annotations(index):
            annotations.append({**entry, "id": len(annotations) + 1, "image_id": number})
    categories = [{"id": number, "name": name} for number, name in zip(truth.category_ids, truth.classes, strict=True)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def result_entries(truth: Instances, index: int, boxes: Any, scores: Any, labels: Any, masks: Any) -> list[dict[str, Any]]:
    """Detections in one image as entries of COCO's result format, with ``bbox`` and ``segmentation`` (run lengths).

    ``boxes`` ``k 4`` (x1, y1, x2, y2), ``scores`` ``k``, ``labels`` ``k``, ``masks`` ``k h w``: arrays.
    """
    from pycocotools import mask as rle

    entries = []
    for box, score, label, mask in zip(boxes, scores, labels, masks, strict=True):
        x1, y1, x2, y2 = (float(value) for value in box)
        run_lengths = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        entries.append(
            {
                "image_id": truth.image_id(index),
                "category_id": truth.category_ids[int(label)],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(score),
                "segmentation": {"size": [int(side) for side in run_lengths["size"]], "counts": run_lengths["counts"].decode()},
            }
        )
    return entries
