"""What each image adds to mIoU, mAcc and aAcc: for every class the pixels of prediction, of truth, and of both."""

import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mte_bench.dense.columns import flat, lists, same_rows
from mte_bench.dense.resampling import Floats, Measured, Weights

Counts = NDArray[np.int64]
"""``... 3 k``: for each of k classes the pixels that are both, those of the prediction, those of the truth."""
COLUMNS = ("both", "predicted", "true")


@dataclass(frozen=True)
class SegmentedImages:
    """The counts (``n 3 k``) of n images. Where the truth counts nothing, neither prediction nor truth is counted."""

    names: tuple[str, ...]
    classes: tuple[str, ...]
    counts: Counts

    def measure(self, weights: Weights) -> Measured:
        """mIoU, mAcc and aAcc of the images drawn so often: sums over images, then a ratio per class, then their mean."""
        n, _, k = self.counts.shape
        sums = (weights.astype(np.float64) @ self.counts.reshape(n, 3 * k)).reshape(len(weights), 3, k)
        ious, accuracies, overall = class_values(sums)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a resample in which nothing has a class
            means = {"mIoU": np.nanmean(ious, axis=-1), "mAcc": np.nanmean(accuracies, axis=-1), "aAcc": overall}
        return Measured(means, {"mIoU": ious.T, "mAcc": accuracies.T})

    def holding(self) -> NDArray[np.int64]:
        """``k``: how many images have each class in their truth."""
        return (self.counts[:, 2] > 0).sum(axis=0)

    def table(self) -> Any:
        """As a pyarrow table: a row per image with lists ``class``, ``both``, ``predicted`` and ``true`` of what occurs."""
        import pyarrow as pa

        rows, labels = np.nonzero(self.counts.any(axis=1))
        columns = {"name": pa.array(self.names, pa.string()), "class": lists(rows, len(self.names), labels.astype(np.int16))}
        for place, name in enumerate(COLUMNS):
            columns[name] = lists(rows, len(self.names), self.counts[rows, place, labels].astype(np.int32))
        return pa.table(columns)

    @classmethod
    def of_table(cls, table: Any, names: tuple[str, ...], classes: tuple[str, ...]) -> Self:
        """What ``table`` made a table of; raises ``ValueError`` for another one."""
        rows, labels = flat(table, "class", np.int64)
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(classes)):
            raise ValueError(f"holds classes that are none of its {len(classes)}")
        counts = np.zeros((len(names), 3, len(classes)), np.int64)
        for place, name in enumerate(COLUMNS):
            own, values = flat(table, name, np.int64)
            same_rows(name, own, rows)
            counts[rows, place, labels] = values
        return cls(names, classes, counts)


def class_values(counts: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """IoU and accuracy of each class (``... k``, NaN for one that does not occur) and of all pixels (``...``), in percent."""
    both, predicted, true = (100.0 * counts[..., 0, :], counts[..., 1, :], counts[..., 2, :])
    with np.errstate(divide="ignore", invalid="ignore"):
        return both / (predicted + true - both / 100), both / true, both.sum(-1) / true.sum(-1)
