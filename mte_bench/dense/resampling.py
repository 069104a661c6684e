"""How sure a dense number is: the same measure on resampled images.

mIoU and mAP are no means over images: they are ratios of sums, or worse. So what each image adds to the sums is kept
(``images.parquet`` beside the record), images are drawn with replacement, and the measure is taken of what was drawn. Which
images a resample holds depends on their names and the seed alone: two encoders on the same images see the same resamples,
so that the difference of their resampled numbers is a paired one.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mte_bench.statistics import LEVEL

Floats = NDArray[np.float64]
Weights = NDArray[np.int32]
"""``b n``: how often each of n images is in each of b resamples."""

IMAGES_NAME = "images.parquet"
DRAWS = 1000
SEED = 0


class Measured(NamedTuple):
    """Metrics of b resamples, in percent; NaN where a resample has nothing to measure."""

    overall: dict[str, Floats]
    """``b`` for each metric."""
    classes: dict[str, Floats]
    """``k b`` for each metric that is a mean over classes."""


class MeasuredImages(Protocol):
    """What n images add to the numbers of a dense task with k classes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""

    def measure(self, weights: Weights) -> Measured:
        """The task's metrics on images that are there so often; a row of ones gives the numbers of the record."""

    def holding(self) -> NDArray[np.int64]:
        """``k``: how many images hold each class, by the truth."""


def draw_weights(names: Sequence[str], draws: int = DRAWS, seed: int = SEED) -> Weights:
    """``draws`` resamples of the images with these names, each as many images as there are, drawn with replacement."""
    n = len(names)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.int32)
    weights = np.empty_like(drawn)
    weights[:, np.argsort(np.array(names, object), kind="stable")] = drawn  # of names in order, however they lie here
    return weights


def digest(names: Sequence[str], weights: Weights) -> str:
    """16 hex digits that are equal where the same images were drawn as often, in whatever order they lie."""
    order = np.argsort(np.array(names, object), kind="stable")
    found = hashlib.sha256("\n".join(names[row] for row in order).encode("utf-8", "surrogateescape"))
    found.update(np.ascontiguousarray(weights[:, order], "<i4").tobytes())
    return found.hexdigest()[:16]


def stated(images: MeasuredImages) -> Measured:
    """The metrics of the images as they are: a single column."""
    return images.measure(np.ones((1, len(images.names)), np.int32))


def interval_of(drawn: Floats, value: float) -> tuple[float, float] | None:
    """The 95 % interval of ``value`` from what it is in each resample, in its unit; None if no resample has a number.

    The quantiles of the resamples, moved by as much as their mean differs from ``value``: a resample holds fewer different
    images than the data, which raises mAP, and without this ``value`` could lie outside its own interval.
    """
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return None
    low, high = value + np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) - known.mean()
    return float(low), float(high)


def percent_interval(drawn: Floats, value: float) -> tuple[float, float] | None:
    """``interval_of`` what cannot be below 0 or above 100; None where it is."""
    ends = interval_of(drawn, value)
    return ends and (max(0.0, ends[0]), min(100.0, ends[1]))


def intervals(images: MeasuredImages, draws: int = DRAWS, seed: int = SEED) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each metric over the images, in percent."""
    values, drawn = stated(images).overall, images.measure(draw_weights(images.names, draws, seed)).overall
    found = {name: percent_interval(drawn[name], float(value[0])) for name, value in values.items()}
    return {name: ends for name, ends in found.items() if ends is not None}


def how_made(images: MeasuredImages, draws: int = DRAWS, seed: int = SEED) -> dict[str, Any]:
    """How intervals of these images were made, for a record's details."""
    return {
        "method": "bootstrap over images: percentiles, moved so that their mean is the value",
        "level": LEVEL,
        "images": len(images.names),
        "resamples": draws,
        "seed": seed,
    }
