"""Dense records on resampled images: what lies beside them is read and measured once, on the same resamples for all."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mte_bench.dense.files import read_images
from mte_bench.dense.resampling import IMAGES_NAME, Floats, digest, draw_weights, stated
from mte_bench.records import Record
from reports.collect import Entry, Unusable

APART = 0.01
"""Percentage points by which a file's number may differ from its record's."""


class Resampled(NamedTuple):
    """The metrics of one record, in percent."""

    digest: str
    """Equal where the same images were drawn as often."""
    classes: tuple[str, ...]
    holding: NDArray[np.int64]
    """``k``: images that hold each class."""
    overall: dict[str, Floats]
    """``b`` for each metric: one number per resample."""
    class_values: dict[str, Floats]
    """``k``: of each class."""
    class_draws: dict[str, NDArray[np.float32]]
    """``k b``: of each class and resample."""


def is_dense(record: Record) -> bool:
    """Whether a record has what its images add to sums in place of predictions that are right or wrong."""
    return record.predictions == IMAGES_NAME


class Resamples:
    """What lies beside dense records, each read once; what is wrong with a file goes to ``unusable``."""

    def __init__(self, unusable: list[Unusable]):
        self.unusable = unusable
        self.known: dict[Path, Resampled | None] = {}

    def of(self, entry: Entry) -> Resampled | None:
        """The metrics of ``entry`` on resampled images; None if it is not dense or has no usable file."""
        path = entry.folder / IMAGES_NAME
        if not is_dense(entry.record) or not path.is_file():
            return None
        if path not in self.known:
            try:
                self.known[path] = _read(path, entry.record)
            except ValueError as error:
                self.known[path] = None
                self.unusable.append(Unusable(path, str(error).splitlines()[0]))
        return self.known[path]

    def together(self, entries: list[Entry]) -> list[Resampled] | None:
        """Of all ``entries``; None if one has none or was measured on other images."""
        found = [item for entry in entries if (item := self.of(entry)) is not None]
        same = len(found) == len(entries) and len({(item.digest, item.classes) for item in found}) == 1
        return found if same else None


def _read(path: Path, record: Record) -> Resampled:
    """Raises ``ValueError`` if the file cannot be read or gives other numbers than its record."""
    images = read_images(path)
    whole = stated(images)
    for name, metric in record.metrics.items():
        value = float(whole.overall[name][0]) if name in whole.overall else float("nan")
        if len(images.names) != metric.n or not abs(value - metric.value) <= APART:
            found = f"gives {name} {value:.2f} of {len(images.names)} images"
            raise ValueError(f"{found}, its record says {metric.value:.2f} of {metric.n}")
    weights = draw_weights(images.names)
    drawn = images.measure(weights)
    return Resampled(
        digest(images.names, weights),
        images.classes,
        images.holding(),
        drawn.overall,
        {name: values[:, 0] for name, values in whole.classes.items()},
        {name: values.astype(np.float32) for name, values in drawn.classes.items()},
    )
