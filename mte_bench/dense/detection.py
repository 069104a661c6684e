"""What each image adds to mAP: its objects, its detections with their scores, and which of them match at which IoU."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mte_bench.dense.average_precision import average_precision
from mte_bench.dense.columns import flat, lists, same_rows
from mte_bench.dense.resampling import Floats, Measured, Weights

SIZES = ("all", "small", "medium", "large")
"""COCOeval's ranges of area, in its order."""
IOUS = 10
"""COCOeval's thresholds: .50, .55, ... .95."""
MOST = (1, 10, 100)
"""Detections per image and class that recall is measured with."""
NAMES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "AR_1", "AR_10", "AR_100", "AR_s", "AR_m", "AR_l")
"""Of COCOeval's twelve numbers, in its order: at IoU .50:.95, .50, .75; objects below 32^2, 96^2 pixels, and above; recall
with at most 1, 10 and 100 detections per image and class."""
_AT_75 = 5
_CELLS = 1_000_000  # weights of a class that are worked on at a time: what stays in a processor's cache


class Matches(NamedTuple):
    """Of d detections what they match: bit ``10 * size + threshold`` of each number, after ``SIZES`` and ``IOUS``."""

    found: NDArray[np.int64]
    """Matches an object that counts or one that does not."""
    ignored: NDArray[np.int64]
    """Is neither right nor wrong: matches what does not count, or matches nothing and is of another size."""


class Objects(NamedTuple):
    """What there is to be found."""

    rows: NDArray[np.int64]
    """``g``: the image of each."""
    labels: NDArray[np.int64]
    """``g``: its class."""
    counted: NDArray[np.int64]
    """``g``: bit s is set if it counts among those of size s."""


@dataclass(frozen=True)
class DetectedImages:
    """The detections in n images, in the order in which COCOeval reads them: by image, then as they were given.

    ``rows``, ``labels`` and ``scores`` (each ``d``) are image, class and score; ``matches`` are those of each kind: boxes, masks.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    objects: Objects
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: Floats
    matches: Mapping[str, Matches]

    def measure(self, weights: Weights) -> Measured:
        """COCO's twelve numbers of each kind on the images drawn so often; metrics that have no truth are left out."""
        overall, classes = {}, {}
        for kind in self.matches:
            values = np.full((len(NAMES), len(self.classes), len(weights)), np.nan)
            for label in range(len(self.classes)):
                chosen = self._order[self._ends[label] : self._ends[label + 1]]
                step = max(1, _CELLS // (len(chosen) + 1))
                for first in range(0, len(weights), step):
                    values[:, label, first : first + step] = self._class(kind, label, chosen, weights[first : first + step])
            for name, value in zip(NAMES, values, strict=True):
                if np.isfinite(value).any():
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", RuntimeWarning)  # a resample without any object of this size
                        overall[f"{kind}_{name}"] = np.nanmean(value, axis=0)
                    classes[f"{kind}_{name}"] = value
        return Measured(overall, classes)

    def holding(self) -> NDArray[np.int64]:
        """``k``: how many images have an object of each class that counts."""
        counting = self.objects.counted & 1 > 0
        places = np.unique(self.objects.rows[counting] * len(self.classes) + self.objects.labels[counting])
        return np.bincount(places % len(self.classes), minlength=len(self.classes))

    def _class(self, kind: str, label: int, chosen: NDArray[np.int64], weights: Weights) -> Floats:
        """``12 b``: the numbers of one class, whose detections are ``chosen``, best first; in percent."""
        drawn = np.take(weights, self.rows[chosen], axis=1)
        own = self.objects.labels == label
        rows, counted = self.objects.rows[own], self.objects.counted[own]
        numbers: dict[str, Floats] = {}
        for size, suffix in enumerate(SIZES):
            objects = np.take(weights, rows[counted >> size & 1 > 0], axis=1).sum(axis=1, dtype=np.int64)
            found, ignored = (_bits(bits[chosen], size) for bits in self.matches[kind])
            right = found & ~ignored
            relevant = np.flatnonzero(~ignored.all(axis=0))
            part = drawn if len(relevant) == len(chosen) else np.take(drawn, relevant, axis=1)
            precision, recall = average_precision(right[:, relevant], ~ignored[:, relevant], part, objects)
            if size == 0:
                numbers |= {"mAP": precision.mean(axis=0), "mAP_50": precision[0], "mAP_75": precision[_AT_75]}
                numbers |= {f"AR_{most}": self._recall(right, chosen, drawn, objects, most) for most in MOST[:-1]}
                numbers[f"AR_{MOST[-1]}"] = recall.mean(axis=0)
            else:
                numbers |= {f"mAP_{suffix[0]}": precision.mean(axis=0), f"AR_{suffix[0]}": recall.mean(axis=0)}
        return 100 * np.stack([numbers[name] for name in NAMES])

    def _recall(
        self, right: NDArray[np.bool_], chosen: NDArray[np.int64], drawn: Weights, objects: NDArray[np.int64], most: int
    ) -> Floats:
        """``b``: the mean over the thresholds, with at most so many detections of each image."""
        hits = (right & (self._ranks[chosen] < most)).sum(axis=0)
        known = np.flatnonzero(hits)
        with np.errstate(invalid="ignore"):
            recall: Floats = drawn[:, known] @ hits[known] / (IOUS * objects)
        return recall

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """Detections by class, then by falling score; equal scores as they lie."""
        return np.lexsort((-self.scores, self.labels))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where each class begins in ``_order``, and the end."""
        return np.searchsorted(self.labels[self._order], np.arange(len(self.classes) + 1))

    @cached_property
    def _ranks(self) -> NDArray[np.int64]:
        """Which of the detections of its image and class each is, from 0 for the best."""
        order = np.lexsort((-self.scores, self.labels, self.rows))
        group = self.rows[order] * len(self.classes) + self.labels[order]
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order)) - np.searchsorted(group, group)
        return ranks

    def table(self) -> Any:
        """As a pyarrow table: a row per image, with lists of its objects and of its detections."""
        import pyarrow as pa

        n = len(self.names)
        columns = {
            "name": pa.array(self.names, pa.string()),
            "object_class": lists(self.objects.rows, n, self.objects.labels.astype(np.int16)),
            "object_counted": lists(self.objects.rows, n, self.objects.counted.astype(np.int8)),
            "class": lists(self.rows, n, self.labels.astype(np.int16)),
            "score": lists(self.rows, n, self.scores),
        }
        for kind, matches in self.matches.items():
            for what, bits in matches._asdict().items():
                columns[f"{kind}_{what}"] = lists(self.rows, n, bits)
        return pa.table(columns)

    @classmethod
    def of_table(cls, table: Any, names: tuple[str, ...], classes: tuple[str, ...]) -> Self:
        """What ``table`` made a table of; raises ``ValueError`` for another one."""
        object_rows, object_labels = flat(table, "object_class", np.int64)
        other_rows, counted = flat(table, "object_counted", np.int64)
        same_rows("object_counted", other_rows, object_rows)
        rows, labels = flat(table, "class", np.int64)
        score_rows, scores = flat(table, "score", np.float64)
        same_rows("score", score_rows, rows)
        for found in (object_labels, labels):
            if len(found) and not (found.min() >= 0 and found.max() < len(classes)):
                raise ValueError(f"holds classes that are none of its {len(classes)}")
        kinds = [name.removesuffix("_found") for name in table.column_names if name.endswith("_found")]
        if not kinds:
            raise ValueError("lacks columns that say what matches")
        matches = {}
        for kind in kinds:
            read = [flat(table, f"{kind}_{what}", np.int64) for what in Matches._fields]
            for what, (own, _) in zip(Matches._fields, read, strict=True):
                same_rows(f"{kind}_{what}", own, rows)
            matches[kind] = Matches(*(values for _, values in read))
        images = cls(names, classes, Objects(object_rows, object_labels, counted), rows, labels, scores, matches)
        images._check()
        return images

    def _check(self) -> None:
        """Raise ``ValueError`` if more is found of a class in an image than there is."""
        k, size = len(self.classes), len(self.names) * len(self.classes)
        places = self.rows * k + self.labels
        for bit, (kind, matches) in product(range(IOUS * len(SIZES)), self.matches.items()):
            objects = self.objects.counted >> bit // IOUS & 1 > 0
            there = np.bincount((self.objects.rows * k + self.objects.labels)[objects], minlength=size)
            right = (matches.found & ~matches.ignored) >> bit & 1 > 0
            if (np.bincount(places[right], minlength=size) > there).any():
                raise ValueError(f"the column {kind}_found says that more is found than there is")


def _bits(bits: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """``t d``: those of one size."""
    return (bits >> (IOUS * size + np.arange(IOUS))[:, None] & 1).astype(bool)
