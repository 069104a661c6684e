"""Class by class: where B is right more often than A, and on which images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reports.collect import Entry
from reports.predictions import Answers, Predictions

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


@dataclass(frozen=True)
class Classes:
    """Every class that has images, in the order of their names' list."""

    every: tuple[ClassChange, ...]

    def winners(self, most: int) -> list[ClassChange]:
        """The classes that gain most, at most so many."""
        gaining = [change for change in self.every if change.difference > 0]
        return sorted(gaining, key=lambda change: -change.difference)[:most]

    def losers(self, most: int) -> list[ClassChange]:
        """The classes that lose most, at most so many."""
        losing = [change for change in self.every if change.difference < 0]
        return sorted(losing, key=lambda change: change.difference)[:most]

    def values(self) -> list[dict[str, Any]]:
        """As plain values."""
        return [
            {
                "class": change.name,
                "images": change.images,
                "a": change.a,
                "b": change.b,
                "difference": change.difference,
                "gained": change.gained,
                "lost": change.lost,
                "examples_gained": [example.name for example in change.winning],
                "examples_lost": [example.name for example in change.losing],
            }
            for change in self.every
        ]


def class_changes(a: Sequence[Entry], b: Sequence[Entry], metric: str, predictions: Predictions) -> Classes | None:
    """Each class under the encoders of ``a`` and of ``b``, means over each; None unless all were asked the same images."""
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
        lost=float(-change[change < 0].sum()),
        winning=examples(change),
        losing=examples(-change),
    )


def _named(label: int, answers: Answers) -> str | None:
    if label < 0:
        return None
    return answers.classes[label] if label < len(answers.classes) else str(label)
