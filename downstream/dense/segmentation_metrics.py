"""How well predicted label maps agree with the truth: IoU and accuracy, over the pixels of all images together.

Source: mmsegmentation ``IoUMetric``: sums over the images first, then one ratio per class, then the mean over the classes
that occur (in truth or prediction for IoU, in the truth for accuracy).
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from downstream.dense.pairs import VOID
from mte_bench.records import Metric

Counts = NDArray[np.int64]
"""``... 3 k``: for each of k classes the pixels that are both, those of the prediction, those of the truth."""
DRAWS = 1000


def counts_of(prediction: NDArray[np.integer], truth: NDArray[np.uint8], classes: int) -> Counts:
    """``3 k`` from two maps ``h w`` of classes; where ``truth`` is ``VOID`` nothing counts."""
    counted = truth != VOID
    predicted, true = prediction[counted], truth[counted]
    both = np.bincount(true[predicted == true], minlength=classes)
    return np.stack([both, np.bincount(predicted, minlength=classes), np.bincount(true, minlength=classes)])


def class_values(counts: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """IoU and accuracy of each class (``... k``, NaN for one that does not occur) and of all pixels (``...``), in percent."""
    both, predicted, true = (100.0 * counts[..., 0, :], counts[..., 1, :], counts[..., 2, :])
    with np.errstate(divide="ignore", invalid="ignore"):
        return both / (predicted + true - both / 100), both / true, both.sum(-1) / true.sum(-1)


def segmentation_metrics(counts: Counts, seed: int = 0) -> dict[str, Metric]:
    """mIoU, mAcc and aAcc in percent from the counts of each image (``n 3 k``), with intervals by a bootstrap over images."""
    n = len(counts)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    drawn = (weights.astype(np.float64) @ counts.reshape(n, -1)).reshape(DRAWS, *counts.shape[1:])
    metrics = {}
    for name, value, spread in zip(("mIoU", "mAcc", "aAcc"), _means(counts.sum(0)), _means(drawn), strict=True):
        low, high = np.nanquantile(spread, (0.025, 0.975))
        metrics[name] = Metric(value=float(value), ci95=(float(low), float(high)), n=n)
    return metrics


def class_table(counts: Counts, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of each class its name, IoU and accuracy in percent (None for one that does not occur) and its pixels in the truth."""
    total = counts.sum(0)
    ious, accuracies, _ = class_values(total)
    values = zip(classes, ious, accuracies, total[2], strict=True)
    return [{"class": name, "IoU": _known(iou), "Acc": _known(accuracy), "pixels": int(n)} for name, iou, accuracy, n in values]


def _means(counts: NDArray[Any]) -> tuple[Any, Any, Any]:
    ious, accuracies, overall = class_values(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw in which nothing has a class
        return np.nanmean(ious, axis=-1), np.nanmean(accuracies, axis=-1), overall


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
