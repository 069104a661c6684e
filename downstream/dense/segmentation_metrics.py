"""How well predicted label maps agree with the truth: IoU and accuracy, over the pixels of all images together.

Source: mmsegmentation ``IoUMetric``: sums over the images first, then one ratio per class, then the mean over the classes
that occur (in truth or prediction for IoU, in the truth for accuracy).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from downstream.dense.pairs import VOID
from mte_bench.dense.resampling import intervals, stated
from mte_bench.dense.segmentation import Counts, SegmentedImages, class_values
from mte_bench.records import Metric


def counts_of(prediction: NDArray[np.integer], truth: NDArray[np.uint8], classes: int) -> Counts:
    """``3 k`` from two maps ``h w`` of classes; where ``truth`` is ``VOID`` nothing counts."""
    counted = truth != VOID
    predicted, true = prediction[counted], truth[counted]
    both = np.bincount(true[predicted == true], minlength=classes)
    return np.stack([both, np.bincount(predicted, minlength=classes), np.bincount(true, minlength=classes)])


def segmentation_metrics(images: SegmentedImages) -> dict[str, Metric]:
    """mIoU, mAcc and aAcc in percent, with intervals by a bootstrap over images."""
    ends = intervals(images)
    n = len(images.names)
    return {name: Metric(value=float(value[0]), ci95=ends.get(name), n=n) for name, value in stated(images).overall.items()}


def class_table(images: SegmentedImages) -> list[dict[str, Any]]:
    """Of each class its name, IoU and accuracy in percent (None for one that does not occur) and its pixels in the truth."""
    total = images.counts.sum(0)
    ious, accuracies, _ = class_values(total)
    values = zip(images.classes, ious, accuracies, total[2], strict=True)
    return [{"class": name, "IoU": _known(iou), "Acc": _known(accuracy), "pixels": int(n)} for name, iou, accuracy, n in values]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
