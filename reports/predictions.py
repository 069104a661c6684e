"""What an encoder said of each image, from the file beside its record."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mte_bench.dense.resampling import Floats
from mte_bench.records import PREDICTIONS_NAME, Metric
from reports.collect import Entry, Unusable
from reports.resamples import Resamples, is_dense

NO_SHARE = ("top1_mean_over_classes",)
"""Metrics with a column in tables that are no share of right images: no file has predictions of them."""

Counts = NDArray[np.int64]
"""Of images: how many encoders are right. Whole numbers, so that no rounding enters a bootstrap."""


@dataclass(frozen=True)
class Right:
    """Who is right on which image."""

    names: Any
    """A pyarrow array of ``n`` image names."""
    digest: bytes
    """Of the names in their order: equal digests mean the same images in the same order."""
    right: NDArray[np.bool_]
    """``n``: whether the prediction is the label."""

    def by_name(self) -> "Right":
        """The same in the order of the names."""
        import pyarrow.compute as pc

        order = pc.sort_indices(self.names)
        names = self.names.take(order)
        return Right(names, _digest(names), self.right[order.to_numpy()])

    @property
    def images_hash(self) -> str:
        """16 hex digits of the SHA-256 of the names, in their order."""
        return hashlib.sha256("\n".join(self.names.to_pylist()).encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Answers:
    """All of a file: labels and predictions are indices of ``classes``; -1 is no class."""

    names: Any
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    classes: tuple[str, ...]

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """``n``."""
        return self.labels == self.predicted

    def by_name(self) -> "Answers":
        """The same in the order of the names."""
        import pyarrow.compute as pc

        order = pc.sort_indices(self.names)
        rows = order.to_numpy()
        return replace(self, names=self.names.take(order), labels=self.labels[rows], predicted=self.predicted[rows])


class Predictions:
    """Who was right on which image, read once from each file beside a record; of dense records the resampled numbers.

    What is wrong with a file goes to ``unusable``; a record that names no file, or whose file is not there, just has none.
    Kept is a byte per image and record: names are shared by the records that have the same.
    """

    def __init__(self, unusable: list[Unusable]):
        self.unusable = unusable
        self.known: dict[tuple[Path, str], Right | None] = {}
        self.names: dict[bytes, Any] = {}
        self.resamples = Resamples(unusable)

    def stacked(self, entries: Sequence[Entry], metric: str) -> Counts | None:
        """``entries n``: each entry on the same images; None if one has no predictions or other images."""
        found = [right for entry in entries if (right := self.of(entry, metric)) is not None]
        if not found or len(found) < len(entries):
            return None
        if not _same_images(found):
            found = [right.by_name() for right in found]
        return np.stack([item.right for item in found]).astype(np.int64) if _same_images(found) else None

    def resampled(self, entries: Sequence[Entry], metric: str) -> Floats | None:
        """``entries b``: a dense metric on the same resamples of images, in percent; None as for ``stacked``."""
        found = self.resamples.together(list(entries))
        if found is None or any(metric not in item.overall for item in found):
            return None
        return np.stack([item.overall[metric] for item in found])

    def of(self, entry: Entry, metric: str) -> Right | None:
        """Who is right by ``entry``; None if there is no usable file."""
        key = (_path(entry), metric)
        if key not in self.known:
            answers = self.answers(entry, metric)
            if answers is None:
                self.known[key] = None
            else:
                digest = _digest(answers.names)
                self.known[key] = Right(self.names.setdefault(digest, answers.names), digest, answers.right)
        return self.known[key]

    def answers(self, entry: Entry, metric: str) -> Answers | None:
        """All of the file of ``entry``, which is not kept; None if there is no usable one."""
        path = _path(entry)
        if is_dense(entry.record) or not path.is_file() or metric in NO_SHARE:
            return None
        try:
            return _read(path, metric, entry.record.metrics[metric])
        except ValueError as error:
            wrong = Unusable(path, str(error).splitlines()[0])
            if wrong not in self.unusable:
                self.unusable.append(wrong)
            return None


def _path(entry: Entry) -> Path:
    return entry.folder / (entry.record.predictions or PREDICTIONS_NAME)


def _read(path: Path, metric: str, stated: Metric) -> Answers:
    """The predictions in a file; raises ``ValueError`` if they cannot be read or are not those of the ``stated`` value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["name", "label", f"prediction:{metric}"]
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=columns, use_threads=False).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error
    if table.column_names != columns:
        raise ValueError(f"lacks one of the columns {', '.join(columns)}")
    if not len(table):
        raise ValueError("holds no images")
    labels, predicted = (table[column].to_numpy() for column in columns[1:])
    classes = json.loads((table.schema.metadata or {}).get(b"classes", b"[]"))
    answers = Answers(_single(table["name"]), labels, predicted, tuple(classes))
    if len(labels) != stated.n or abs(100 * answers.right.mean() - stated.value) > 0.01:
        found = f"{100 * answers.right.mean():.2f} % of {len(labels)} images"
        raise ValueError(f"gives {found}, its record says {stated.value:.2f} % of {stated.n}")
    return answers


def _single(column: Any) -> Any:
    """A column of names as one array of strings."""
    import pyarrow as pa

    return pa.concat_arrays([chunk.cast(pa.string()) for chunk in column.chunks])


def _digest(names: Any) -> bytes:
    """Of an array of strings: its characters and where each string ends."""
    _, ends, characters = names.buffers()
    ends = np.frombuffer(ends, np.int32)[names.offset : names.offset + len(names) + 1]
    found = hashlib.blake2b((ends - ends[0]).tobytes(), digest_size=16)
    found.update(memoryview(characters)[ends[0] : ends[-1]])
    return found.digest()


def _same_images(found: Sequence[Right]) -> bool:
    return all(item.digest == found[0].digest for item in found)
