"""The curves of pre-training runs: read from their files, put together over seeds, drawn as lines with names at their ends."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mte_bench.naming import method_key, method_title, peculiarity
from mte_bench.plotting import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from mte_bench.plotting import COLOURS as PALETTE
from mte_bench.records import Record
from reports.collect import Entry, Unusable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = NDArray[np.float64]

COLOURS = {"dino": BLUE, "ibot": RED, "byol": GREEN, "mocov3": PINK, "moby": ORANGE, "hssl": SKY}
"""The colour of a method is the same in every report, but for its second recipe and further ones; with MTE the line is solid,
without it dashed."""

FINEST = 20  # points of a loss curve that is shorter than so many epochs; longer ones have one per epoch
MARKED = 10  # points up to which each is marked on its line
GAP = 0.062  # between two labels at the ends of lines, as a share of the axis


@dataclass(frozen=True)
class Curves:
    """One run's curves: ``n 2`` points of (epoch, value)."""

    loss: Points
    knn: Points


R = TypeVar("R")


@dataclass(frozen=True)
class Line(Generic[R]):
    """A method's runs over their seeds."""

    label: str
    method: str
    mte: bool
    colour: str
    runs: tuple[R, ...]


def curve_lines(entry: Entry, unusable: list[Unusable]) -> Iterator[dict[str, Any]]:
    """The lines of a pre-training run's curves, without values that are null because they were not finite.

    Lines that a stop cut in two are left out, and named as unusable.
    """
    path = entry.folder / entry.record.files.get("curves", "curves.jsonl")
    if not path.is_file():
        return
    broken = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            yield {key: float(value) for key, value in line.items() if value is not None} | {"epoch": float(line["epoch"])}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken += 1
    if broken:
        unusable.append(Unusable(path, f"{broken} of its lines cannot be read and are not drawn"))


def read_curves(entry: Entry, unusable: list[Unusable]) -> Curves | None:
    """Loss and k-NN of a pre-training run; None if there is no curve."""
    loss: dict[float, float] = {}
    knn: dict[float, float] = {}
    for line in curve_lines(entry, unusable):
        for key, points in (("loss", loss), ("knn_top1", knn)):
            if key in line:
                points[line["epoch"]] = line[key]
    return Curves(_mean_per_epoch(_points(loss)), _points(knn)) if loss or knn else None


def _points(values: dict[float, float]) -> Points:
    points = np.array(sorted(values.items()), dtype=np.float64).reshape(-1, 2)
    return points[np.isfinite(points).all(axis=1)]


def _mean_per_epoch(points: Points) -> Points:
    """Means over intervals that end at whole epochs (of a short run: at parts of epochs)."""
    if len(points) <= FINEST:
        return points
    last = points[-1, 0]
    width = 1.0 if last >= FINEST else last / FINEST
    interval = np.ceil(points[:, 0] / width - 1e-6).astype(int)
    kept, index = np.unique(interval, return_inverse=True)
    return np.stack([kept * width, np.bincount(index, points[:, 1]) / np.bincount(index)], axis=1)


def lines_of(members: Sequence[tuple[Entry, R]]) -> list[Line[R]]:
    """The runs of each recipe together; a label says no more than is needed to tell the lines apart."""
    kinds: dict[tuple[object, ...], list[tuple[Record, R]]] = {}
    for entry, run in members:
        subject = entry.record.subject
        key = (method_title(subject), subject.epochs or 0, subject.recipe_hash or subject.recipe or "")
        kinds.setdefault(key, []).append((entry.record, run))
    methods = {method_key(records[0][0].subject.method or "") for records in kinds.values()}
    further = [colour for colour in PALETTE if colour not in {COLOURS.get(method, BLACK) for method in methods}]
    lines: list[Line[R]] = []
    for (title, epochs, recipe), runs in sorted(kinds.items(), key=lambda item: tuple(map(str, item[0]))):
        label, subject = str(title), runs[0][0].subject
        alike = [(key, others[0][0].protocol.settings) for key, others in kinds.items() if key[0] == title]
        if len({key[1] for key, _ in alike}) > 1:
            label += f", {epochs:g} epochs"
        recipes = [settings for key, settings in alike if key[1] == epochs]
        if len(recipes) > 1:
            label += f", {peculiarity(runs[0][0].protocol.settings, recipes) or str(recipe)[:6]}"
        method = method_key(subject.method or "")
        before = sum(line.method == method and line.mte == subject.mte for line in lines)
        own = [COLOURS.get(method, BLACK), *further]
        lines.append(Line(label, method, subject.mte, own[before % len(own)], tuple(run for _, run in runs)))
    return lines


def mean_of(runs: Sequence[Points]) -> Points:
    """The mean over ``runs`` (each ``n c``, epochs first) at the epochs that all have."""
    common = sorted(set.intersection(*({round(x, 6) for x in points[:, 0]} for points in runs)))
    return np.mean([points[np.isin(np.round(points[:, 0], 6), common)] for points in runs], axis=0)


def draw_line(axes: "Axes", line: Line[Any], runs: Sequence[Points], mean: Points) -> tuple[float, float]:
    """The ``runs`` (``n 2``) of the line's seeds thin (dots if of one point), their ``mean`` thick; returns where it ends."""
    from matplotlib.collections import LineCollection

    style = "-" if line.mte else (0, (4, 1.6))
    if len(runs) > 1:  # one artist for all: many seeds would take a second a picture
        axes.add_collection(LineCollection(list(runs), colors=line.colour, linestyles=[style], linewidths=0.8, alpha=0.4))
        axes.autoscale_view()
        if dots := [run for run in runs if len(run) == 1]:  # a line through one point is none
            looks: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3, "alpha": 0.4}
            axes.plot(*np.concatenate(dots).T, color=line.colour, **looks)
    if not len(mean):
        return float(runs[0][-1, 0]), float(runs[0][-1, 1])
    marker = "o" if len(mean) <= MARKED else None
    axes.plot(*mean.T, color=line.colour, linestyle=style, linewidth=2.2, marker=marker, markersize=3.5)
    return float(mean[-1, 0]), float(mean[-1, 1])


def label_ends(axes: "Axes", ends: list[tuple[float, float, Line[Any]]]) -> None:
    """Each line's name beside its end, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    places = _apart([(y - low) / (high - low) for _, y, _ in ordered])
    for place, (_, _, line) in zip(places, ordered, strict=True):
        axes.annotate(
            line.label,
            (1.02, place),
            xycoords="axes fraction",
            va="center",
            color=line.colour,
            fontweight="bold" if line.mte else "normal",
            fontsize=9,
            annotation_clip=False,
        )


def _apart(places: list[float]) -> list[float]:
    """Ascending ``places``, those closer than ``GAP`` spread evenly around their mean."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _spread(groups[-1])[0] - _spread(groups[-2])[-1] < GAP:
            last = groups.pop()
            groups[-1] += last
    return [place for group in groups for place in _spread(group)]


def _spread(group: list[float]) -> list[float]:
    middle = sum(group) / len(group)
    return [middle + GAP * (index - (len(group) - 1) / 2) for index in range(len(group))]
