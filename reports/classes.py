"""Class by class: where B is right more often than A and on which images, or where its IoU or average precision is higher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mte_bench.dense.resampling import interval_of
from reports.collect import Entry
from reports.predictions import Answers, Predictions
from reports.resamples import is_dense

MOST_EXAMPLES = 6


@dataclass(frozen=True)
class Example:
    """An image on which A and B differ most, and the class that each first encoder says; None is no class."""

    name: str
    said: tuple[str | None, str | None]


@dataclass(frozen=True)
class ClassChange:
    """One class of the val split: accuracies in percent; ``gained`` and ``lost`` count images, averaged over seeds."""

    name: str
    images: int
    a: float
    b: float
    gained: float
    """Images that only B has right."""
    lost: float
    """Images that only A has right."""
    winning: tuple[Example, ...]
    losing: tuple[Example, ...]

    @property
    def difference(self) -> float:
        """``b - a`` in percentage points."""
        return 100 * (self.gained - self.lost) / self.images

    def values(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "class": self.name,
            "images": self.images,
            "a": self.a,
            "b": self.b,
            "difference": self.difference,
            "gained": self.gained,
            "lost": self.lost,
            "examples_gained": [example.name for example in self.winning],
            "examples_lost": [example.name for example in self.losing],
        }


@dataclass(frozen=True)
class DenseChange:
    """One class of a dense task: its IoU, accuracy or average precision in percent; ``images`` hold it."""

    name: str
    images: int
    a: float
    b: float
    interval: tuple[float, float] | None
    """Of the difference, 95 % over images, paired."""

    @property
    def difference(self) -> float:
        """``b - a`` in percentage points."""
        return self.b - self.a

    def values(self) -> dict[str, Any]:
        """As plain values."""
        values = {"class": self.name, "images": self.images, "a": self.a, "b": self.b}
        return {**values, "difference": self.difference, "ci95": self.interval}


C = TypeVar("C", ClassChange, DenseChange)


@dataclass(frozen=True)
class Classes(Generic[C]):
    """Every class that has images, in the order of their names' list."""

    every: tuple[C, ...]

    def winners(self, most: int) -> list[C]:
        """The classes that gain most, at most so many."""
        gaining = [change for change in self.every if change.difference > 0]
        return sorted(gaining, key=lambda change: -change.difference)[:most]

    def losers(self, most: int) -> list[C]:
        """The classes that lose most, at most so many."""
        losing = [change for change in self.every if change.difference < 0]
        return sorted(losing, key=lambda change: change.difference)[:most]


AnyClasses = Classes[ClassChange] | Classes[DenseChange]


def class_changes(a: Sequence[Entry], b: Sequence[Entry], metric: str, predictions: Predictions) -> AnyClasses | None:
    """Each class under the encoders of ``a`` and of ``b``, means over each; None unless all were asked the same images."""
    if all(is_dense(entry.record) for entry in (*a, *b)):
        return _dense_changes(a, b, metric, predictions)
    found: list[list[Answers]] = []
    for entries in (a, b):
        answers = [read.by_name() for entry in entries if (read := predictions.answers(entry, metric)) is not None]
        if len(answers) < len(entries):
            return None
        found.append(answers)
    first = found[0][0]
    if not all(_same_questions(answers, first) for side in found for answers in side):
        return None
    mean_a, mean_b = (np.mean([answers.right for answers in side], axis=0) for side in found)
    said = found[0][0].predicted, found[1][0].predicted
    labels = np.unique(first.labels[first.labels >= 0])
    return Classes(tuple(_class(int(label), first, mean_a, mean_b, said) for label in labels))


def _dense_changes(a: Sequence[Entry], b: Sequence[Entry], metric: str, predictions: Predictions) -> Classes[DenseChange] | None:
    """None also for a metric that is no mean over classes."""
    found = predictions.resamples.together([*a, *b])
    if found is None or metric not in found[0].class_values:
        return None
    sides = found[: len(a)], found[len(a) :]
    before, after = (np.mean([item.class_values[metric] for item in side], axis=0) for side in sides)
    drawn_a, drawn_b = (np.mean([item.class_draws[metric] for item in side], axis=0) for side in sides)
    changes = []
    for k in np.flatnonzero((found[0].holding > 0) & np.isfinite(before) & np.isfinite(after)):
        ends = interval_of(drawn_b[k] - drawn_a[k], float(after[k] - before[k]))
        name, images = found[0].classes[k], int(found[0].holding[k])
        changes.append(DenseChange(name, images, float(before[k]), float(after[k]), ends))
    return Classes(tuple(changes))


def _same_questions(answers: Answers, first: Answers) -> bool:
    return bool(
        answers.names.equals(first.names) and np.array_equal(answers.labels, first.labels) and answers.classes == first.classes
    )


def _class(
    label: int, first: Answers, a: NDArray[np.float64], b: NDArray[np.float64], said: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> ClassChange:
    rows = np.flatnonzero(first.labels == label)
    change = b[rows] - a[rows]

    def examples(gain: NDArray[np.float64]) -> tuple[Example, ...]:
        order = np.argsort(-gain, kind="stable")[:MOST_EXAMPLES]
        chosen = [rows[index] for index in order if gain[index] > 0]
        return tuple(
            Example(first.names[int(row)].as_py(), (_named(said[0][row], first), _named(said[1][row], first))) for row in chosen
        )

    return ClassChange(
        name=_named(label, first) or str(label),
        images=len(rows),
        a=100 * float(a[rows].mean()),
        b=100 * float(b[rows].mean()),
        gained=float(change[change > 0].sum()),
        lost=float((-change[change < 0]).sum()),  # 0, not -0, where there are none
        winning=examples(change),
        losing=examples(-change),
    )


def _named(label: int, answers: Answers) -> str | None:
    if label < 0:
        return None
    return answers.classes[label] if label < len(answers.classes) else str(label)
