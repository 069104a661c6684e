"""Detection and instance segmentation: Cascade Mask R-CNN in mmdet.

Source: iBOT ``evaluation/object_detection``, and Swin's fork of mmdet; the protocol files say which number is whose.
"""

import json
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from downstream.dense.batches import bgr, tested
from downstream.dense.coco_settings import DetectionProtocol, Test, model_config, transforms
from downstream.dense.detection_metrics import KINDS, Kind, Matched, detected_images, detection_metrics, result_entries
from downstream.dense.instances import Instances
from downstream.dense.pictures import Detected, draw_detections
from downstream.dense.task import Context, DenseTask, Outcome
from downstream.features import Pass
from mte_bench import distributed
from mte_bench.data.sources import ImageSet, Split
from mte_bench.dense.files import write_images
from mte_bench.dense.resampling import IMAGES_NAME, how_made, intervals
from mte_bench.device import autocast
from mte_bench.errors import UserError
from mte_bench.files import write_text
from mte_bench.records import Metric

SHOWN_SCORE = 0.3
"""Detections in pictures have at least this score."""


class View(NamedTuple):
    """An image as the detector takes it."""

    pixels: Tensor
    """``3 h w``, bytes, BGR."""
    shape: tuple[int, int]
    """Of the image itself."""
    factor: tuple[float, float]
    """By how much it was resized in width and height."""


class Resize:
    """From an image to its ``View`` (picklable, for worker processes)."""

    def __init__(self, test: Test):
        self.test = test

    def __call__(self, image: Image.Image) -> View:
        """The image resized to fit into the test's scale."""
        import mmcv

        pixels = bgr(image)
        resized = mmcv.imrescale(pixels, self.test.scale)
        (h, w), (height, width) = pixels.shape[:2], resized.shape[:2]
        return View(torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))), (h, w), (width / w, height / h))


def detect(model: Any, view: View, how: Pass) -> dict[str, Any]:
    """What is in an image: ``boxes`` (``k 4``: x1, y1, x2, y2, its own pixels), ``scores``, ``labels``, ``masks`` (``k h w``)."""
    from mmdet.structures import DetDataSample

    shape = tuple(view.pixels.shape[1:])
    sample = DetDataSample(metainfo={"ori_shape": view.shape, "img_shape": shape, "scale_factor": view.factor})
    with torch.inference_mode(), autocast(how.device, how.precision):
        data = model.data_preprocessor({"inputs": [view.pixels], "data_samples": [sample]}, False)
        found = model(**data, mode="predict")[0].pred_instances
    names = {"boxes": "bboxes", "scores": "scores", "labels": "labels", "masks": "masks"}
    return {ours: getattr(found, theirs).cpu().numpy() for ours, theirs in names.items()}


def evaluate(model: Any, p: DetectionProtocol, val: Instances, context: Context) -> Outcome:
    """Detect in all images, write what is found in COCO's result format, and compare with the truth."""
    entries: dict[int, list[dict[str, Any]]] = {}
    lost: dict[int, str] = {}
    for index, view in tested(val.images, Resize(p.test), context.how, context.process, lost):
        entries[index] = result_entries(val, index, **detect(model, view, context.how))
    entries, lost = distributed.gathered(entries), distributed.gathered(lost)
    if context.process[0]:
        return Outcome({}, {}, {}, [])
    if not entries:
        raise UserError(f"{val.images.source}: none of the {len(val.images)} val images can be read")
    indices = sorted(entries)
    everything = [entry for index in indices for entry in entries[index]]
    files: dict[str, str] = {}
    metrics: dict[str, Metric] = {}
    matched: dict[Kind, Matched] = {}
    details: dict[str, Any] = {"detections": len(everything), "without_truth": [], "per_class": {}}
    for kind in KINDS:
        unused = "segmentation" if kind == "bbox" else "bbox"  # with its box, a mask would count as large as that
        results = [{key: value for key, value in entry.items() if key != unused} for entry in everything]
        files[f"predictions_{kind}"] = f"predictions.{kind}.json"
        write_text(context.folder / files[f"predictions_{kind}"], json.dumps(results))
        found = detection_metrics(val, indices, results, kind)
        metrics |= found.metrics
        matched[kind] = found.matched
        details["per_class"][f"{kind}_mAP"] = found.per_class
        details["without_truth"] += found.without_truth
    images = detected_images(val, indices, everything, matched)
    write_images(context.folder / IMAGES_NAME, images)
    ends = intervals(images)
    metrics = {name: metric.model_copy(update={"ci95": ends.get(name)}) for name, metric in metrics.items()}
    details["interval"] = how_made(images)
    if context.shown:
        files["picture"] = "detections.png"
        chosen = np.linspace(0, len(indices) - 1, min(context.shown, len(indices))).round().astype(int)
        shown = [_detected(val, indices[place], entries[indices[place]]) for place in chosen]
        title = f"{len(shown)} of {len(indices)} val images; detections with a score of at least {SHOWN_SCORE}"
        draw_detections(context.folder / files["picture"], shown, val.classes, title)
    return Outcome(metrics, details, files, sorted(lost.values()))


def _detected(val: Instances, index: int, entries: list[dict[str, Any]]) -> Detected:
    place = {category: label for label, category in enumerate(val.category_ids)}
    found = sorted((entry for entry in entries if entry["score"] >= SHOWN_SCORE), key=lambda entry: entry["score"])
    parts = [[(place[e["category_id"]], e["bbox"], e["segmentation"], e.get("score")) for e in each]
             for each in (val.annotations(index), found)]  # fmt: skip
    return Detected(val.images.name(index).rpartition("/")[2], np.asarray(val.images.image(index)), *parts)


def _open(p: DetectionProtocol, spec: str, split: Split, images: ImageSet) -> Instances:
    return Instances(spec, split, images, p.least_side)


COCO = DenseTask("coco", "mmdet", DetectionProtocol, "coco-vitb", _open, model_config, transforms, evaluate)
