"""COCO's numbers: average precision and recall of boxes and masks, by pycocotools."""

import contextlib
import io
from typing import Any, Literal, NamedTuple

import numpy as np

from downstream.dense.instances import Instances
from mte_bench.records import Metric

Kind = Literal["bbox", "segm"]
KINDS: tuple[Kind, ...] = ("bbox", "segm")
NAMES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "AR_1", "AR_10", "AR_100", "AR_s", "AR_m", "AR_l")
"""Of COCOeval's twelve numbers, in its order: at IoU .50:.95, .50, .75; objects below 32^2, 96^2 pixels, and above; recall
with at most 1, 10 and 100 detections per image."""


class Found(NamedTuple):
    """Numbers of one kind."""

    metrics: dict[str, Metric]
    """In percent; without those that have no truth, such as ``mAP_l`` where no object is large."""
    per_class: dict[str, float | None]
    """mAP of each class; None for a class that does not occur."""
    without_truth: list[str]


def detection_metrics(truth: Instances, indices: list[int], detections: list[dict[str, Any]], kind: Kind) -> Found:
    """COCO's numbers of ``detections`` (entries of COCO's result format) on the images of ``truth`` at ``indices``.

    Masks are compared where ``kind`` is ``segm``: entries must then have no ``bbox``, or objects would be small, medium or
    large by their boxes. With no detections all numbers are 0 that have any truth. No interval: mAP is no mean over images.
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
    return Found(metrics, per_class, [f"{kind}_{name}" for name, value in stats.items() if value < 0])


def coco_json(truth: Instances, indices: list[int]) -> dict[str, Any]:
    """The images of ``truth`` at ``indices`` with their annotations, in COCO's format."""
    images, annotations = [], []
    for index in indices:
        width, height, number = truth.sizes[index]
        images.append({"id": number, "width": width, "height": height})
        annotations += [{**entry, "image_id": number} for entry in truth.annotations(index)]
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
