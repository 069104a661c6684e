"""The curves of a report: loss and k-NN over epochs, seeds thin and their mean thick."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mte_bench.naming import architecture_title, data_title, method_key, method_title, slug
from mte_bench.plotting import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, picture
from mte_bench.records import Record
from reports.collect import Collection, Entry, Unusable
from reports.figures import Figure, unused
from reports.settings import differing_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Points = NDArray[np.float64]

COLOURS = {"dino": BLUE, "ibot": RED, "byol": GREEN, "mocov3": PINK, "moby": ORANGE, "hssl": SKY}
"""The colour of a method is the same in every report; with MTE the line is solid, without it dashed."""
OTHERS = (BLACK, GREEN, ORANGE, BLUE, SKY, RED, PINK)
"""Colours of further lines that would look alike: other recipes with the same title."""

FINEST = 20  # points of a loss curve that is shorter than so many epochs; longer ones have one per epoch
MARKED = 10  # points up to which each is marked on its line
GAP = 0.062  # between two labels at the ends of lines, as a share of the axis
MOST_LINES = 16  # in one picture; more labels would not fit beside its axes
LONGEST = 24  # letters of a label at the end of a line; longer ones go into a legend below


@dataclass(frozen=True)
class Curves:
    """One run's curves: ``n 2`` points of (epoch, value)."""

    loss: Points
    knn: Points


@dataclass(frozen=True)
class Line:
    """A method's runs over their seeds."""

    label: str
    title: str
    mte: bool
    runs: tuple[Curves, ...]
    colour: str


def draw_curves(collection: Collection, out: Path) -> list[Figure]:
    """One picture of loss and k-NN over epochs per data and architecture, from the curves of the pre-training runs."""
    groups: dict[tuple[str, str, str], list[tuple[Entry, Curves]]] = {}
    for entry in collection.of("pretrain"):
        curves = read_curves(entry, collection.unusable)
        if curves is not None:
            record = entry.record
            architecture = architecture_title(record.subject)
            key = (data_title(record.data.source), record.data.fingerprint, architecture)
            groups.setdefault(key, []).append((entry, curves))
    figures: list[Figure] = []
    for (data, _, architecture), members in groups.items():
        every = recipe_lines(members, collection)
        for start in range(0, len(every), MOST_LINES):
            lines = every[start : start + MOST_LINES]
            file = unused(figures, f"curves-{slug(data)}", ".png")
            _draw_curves(out / file, lines)
            remark = ", ".join(f"{line.label}: {len(line.runs)} run{'s' * (len(line.runs) > 1)}" for line in lines)
            figures.append(Figure(file, f"{data}, {architecture}", remark))
    return figures


def read_curves(entry: Entry, unusable: list[Unusable]) -> Curves | None:
    """The curves of a pre-training run; lines that a stop cut in two are left out. None if there is no curve."""
    path = entry.folder / entry.record.files.get("curves", "curves.jsonl")
    if not path.is_file():
        return None
    loss: dict[float, float] = {}
    knn: dict[float, float] = {}
    broken = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            epoch = float(line["epoch"])
            for key, points in (("loss", loss), ("knn_top1", knn)):
                if key in line:
                    points[epoch] = float(line[key])
        except (ValueError, KeyError, TypeError, RecursionError):
            broken += 1
    if broken:
        unusable.append(Unusable(path, f"{broken} of its lines cannot be read and are not drawn"))
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


def recipe_lines(members: Sequence[tuple[Entry, Curves]], collection: Collection) -> list[Line]:
    """The runs of each recipe together; a label says no more than is needed to tell the lines apart."""
    kinds: dict[tuple[str, float, str], list[tuple[Record, Curves]]] = {}
    for entry, curves in members:
        subject = entry.record.subject
        key = (method_title(subject), subject.epochs or 0, subject.recipe_hash or subject.recipe or "")
        kinds.setdefault(key, []).append((entry.record, curves))
    lines: list[Line] = []
    for (title, epochs, recipe), runs in sorted(kinds.items()):
        alike = [other for other in kinds if other[0] == title]
        label = title + (f", {epochs:g} epochs" if len({other[1] for other in alike}) > 1 else "")
        same_length = [kinds[other][0][0].subject for other in alike if other[1] == epochs]
        if len(same_length) > 1:
            recipes = [collection.recipe(subject) for subject in same_length]
            label += f", {differing_settings(collection.recipe(runs[0][0].subject), recipes) or recipe[:6]}"
        subject = runs[0][0].subject
        own = COLOURS.get(method_key(subject.method or ""), BLACK)
        taken = [line.colour for line in lines if line.title == title]
        colour = next((colour for colour in (own, *OTHERS) if colour not in taken), own)
        lines.append(Line(label, title, subject.mte, tuple(curves for _, curves in runs), colour))
    return lines


def _draw_curves(path: Path, lines: list[Line]) -> None:
    panels = [("loss", "training loss"), ("knn", "k-NN top-1 while training (%)")]
    panels = [(name, title) for name, title in panels if any(len(getattr(run, name)) for line in lines for run in line.runs)]
    legend = max(len(line.label) for line in lines) > LONGEST
    with picture(path, 4.6 * len(panels) + 0.4, 3.4 + 0.2 * legend * len(lines)) as figure:
        for (name, title), axes in zip(panels, np.ravel(figure.subplots(1, len(panels))), strict=True):
            ends = []
            for line in lines:
                runs = [points for run in line.runs if len(points := getattr(run, name))]
                if runs:
                    ends.append((*_draw_line(axes, line, runs), line))
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("epoch")
            axes.set_xlim(left=0)
            axes.margins(y=0.08)
            if not legend:
                _label_ends(axes, ends)
        if legend:
            figure.legend(_handles(lines), [line.label for line in lines], loc="outside lower left", handlelength=3)


def _handles(lines: Sequence[Line]) -> list["Line2D"]:
    """What a legend shows for each line."""
    from matplotlib.lines import Line2D

    return [Line2D([], [], marker="o", **_look(line)) for line in lines]


def _look(line: Line) -> dict[str, Any]:
    """Solid and filled with MTE, dashed and hollow without."""
    dashes, filling = ("-", line.colour) if line.mte else ((0, (4, 1.6)), "white")
    return {"color": line.colour, "linestyle": dashes, "markerfacecolor": filling, "linewidth": 2.2, "markersize": 4}


def _draw_line(axes: "Axes", line: Line, runs: list[Points]) -> tuple[float, float]:
    """Seeds thin, their mean thick over the epochs that all have; returns where it ends."""
    from matplotlib.collections import LineCollection

    look = _look(line)
    if len(runs) > 1:  # one artist for all: many seeds would take a second a picture
        axes.add_collection(LineCollection(runs, colors=line.colour, linestyles=[look["linestyle"]], linewidths=0.8, alpha=0.4))
        axes.autoscale_view()
    common = sorted(set.intersection(*({round(x, 6) for x in points[:, 0]} for points in runs)))
    if not common:
        return float(runs[0][-1, 0]), float(runs[0][-1, 1])
    mean = np.mean([points[np.isin(np.round(points[:, 0], 6), common), 1] for points in runs], axis=0)
    marker = "o" if len(common) <= MARKED else None
    axes.plot(common, mean, marker=marker, **look)
    return common[-1], float(mean[-1])


def _label_ends(axes: "Axes", ends: list[tuple[float, float, Line]]) -> None:
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
