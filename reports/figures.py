"""The pictures of a report: curves that are drawn here, and pictures of runs and analyses that are copied in."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mte_bench.files import atomic
from mte_bench.plotting import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, picture
from mte_bench.records import Record
from reports.collect import Collection, Entry, Unusable
from reports.naming import architecture_title, data_title, method_key, method_title, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = NDArray[np.float64]

FOLDER = "figures"
COLOURS = {"dino": BLUE, "ibot": RED, "byol": GREEN, "mocov3": PINK, "moby": ORANGE, "hssl": SKY}
"""The colour of a method is the same in every report; with MTE the line is solid, without it dashed."""

FINEST = 20  # points of a loss curve that is shorter than so many epochs; longer ones have one per epoch
MARKED = 10  # points up to which each is marked on its line
GAP = 0.062  # between two labels at the ends of lines, as a share of the axis
MOST_LINES = 16  # in one picture; more labels would not fit beside its axes


@dataclass(frozen=True)
class Figure:
    """A picture in the report's folder and what to say of it."""

    file: str
    """Relative to the report."""
    title: str
    remark: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of picture that is copied in: the record's task, its key in ``files``, and two lines for the reader."""

    task: str
    key: str
    title: str
    shows: str
    look: str
    paper: str = ""
    """The paper's figure that shows the same."""
    of_images: bool = True
    """Whether it shows the images of the data."""


KINDS = (
    Kind(
        "pretrain",
        "views",
        "Views of an image",
        "An image, and the views that it is turned into, as the student and the teacher see them; each epoch draws new ones.",
        "something of the object in every view. Where a view has lost it, the two networks are asked to agree on nothing.",
    ),
    Kind(
        "attention",
        "picture",
        "CLS attention",
        "Where the CLS token of the last block looks: its attention over the patches, head by head, on images of the val split.",
        "heads that settle on the object instead of the ground, and heads that differ. An even map has learnt nothing.",
    ),
    Kind(
        "pooling",
        "picture",
        "Pooling maps",
        "The weights with which each adaptively pooled token adds up the patch tokens; a help in pre-training, then dropped.",
        "maps that differ from token to token and follow the image. Equal maps would be one token several times.",
        "Figure 6",
    ),
    Kind(
        "cka",
        "picture",
        "CKA between tokens",
        "Linear CKA between the tokens over images of the val split: 1 where two say the same of which images are alike.",
        "low values off the diagonal. Tokens that are alike have nothing to add to each other when they are fused.",
        "Figure 7",
        of_images=False,
    ),
    Kind(
        "per-class",
        "picture",
        "Tokens class by class",
        "k-NN accuracy of each token in each class, and in how many classes each is the best.",
        "tokens that are best in some classes though not on the whole: they know what the global token does not.",
        "Figure 8",
        of_images=False,
    ),
    Kind(
        "pairs",
        "picture",
        "Pairs of tokens",
        "What two tokens side by side know beyond the better of them.",
        "gains away from the diagonal, larger where CKA is low.",
        "Figure 9",
        of_images=False,
    ),
    Kind(
        "pseudo-labels",
        "picture",
        "Pseudo-labels",
        "How well the prototypes that tokens choose, alone, in pairs and fused, agree with the classes.",
        "pairs that agree better than their tokens do, and the fused vector better than all.",
        "Figures 10 and 11",
        of_images=False,
    ),
)

PREFIXES = tuple(f"{name}-" for name in ("curves", "views", *(kind.task for kind in KINDS)))
"""How the names of a report's pictures begin; what begins so in its folder is the report's own."""


@dataclass(frozen=True)
class Curves:
    """One run's curves: ``n 2`` points of (epoch, value)."""

    loss: Points
    knn: Points


@dataclass(frozen=True)
class Line:
    """A method's runs over their seeds."""

    label: str
    method: str
    mte: bool
    runs: tuple[Curves, ...]


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
        every = _lines(members)
        for start in range(0, len(every), MOST_LINES):
            lines = every[start : start + MOST_LINES]
            file = _unused(figures, f"curves-{slug(data)}", ".png")
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


def _lines(members: Sequence[tuple[Entry, Curves]]) -> list[Line]:
    """The runs of each recipe together; a label says no more than is needed to tell the lines apart."""
    kinds: dict[tuple[object, ...], list[tuple[Record, Curves]]] = {}
    for entry, curves in members:
        subject = entry.record.subject
        key = (method_title(subject), subject.epochs or 0, subject.recipe_hash or subject.recipe or "")
        kinds.setdefault(key, []).append((entry.record, curves))
    titles = [key[0] for key in kinds]
    with_epochs = [key[:2] for key in kinds]
    lines = []
    for (title, epochs, recipe), runs in sorted(kinds.items(), key=lambda item: tuple(map(str, item[0]))):
        label = str(title)
        if titles.count(title) > 1:
            label += f", {epochs:g} epochs"
        if with_epochs.count((title, epochs)) > 1:
            label += f", {str(recipe)[:6]}"
        subject = runs[0][0].subject
        lines.append(Line(label, method_key(subject.method or ""), subject.mte, tuple(curves for _, curves in runs)))
    return lines


def _draw_curves(path: Path, lines: list[Line]) -> None:
    panels = [("loss", "training loss"), ("knn", "k-NN top-1 while training (%)")]
    panels = [(name, title) for name, title in panels if any(len(getattr(run, name)) for line in lines for run in line.runs)]
    with picture(path, 4.6 * len(panels) + 0.4, 3.4) as figure:
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
            _label_ends(axes, ends)


def _draw_line(axes: "Axes", line: Line, runs: list[Points]) -> tuple[float, float]:
    """Seeds thin, their mean thick over the epochs that all have; returns where it ends."""
    from matplotlib.collections import LineCollection

    colour, style = COLOURS.get(line.method, BLACK), "-" if line.mte else (0, (4, 1.6))
    if len(runs) > 1:  # one artist for all: many seeds would take a second a picture
        axes.add_collection(LineCollection(runs, colors=colour, linestyles=[style], linewidths=0.8, alpha=0.4))
        axes.autoscale_view()
    common = sorted(set.intersection(*({round(x, 6) for x in points[:, 0]} for points in runs)))
    if not common:
        return float(runs[0][-1, 0]), float(runs[0][-1, 1])
    mean = np.mean([points[np.isin(np.round(points[:, 0], 6), common), 1] for points in runs], axis=0)
    marker = "o" if len(common) <= MARKED else None
    axes.plot(common, mean, color=colour, linestyle=style, linewidth=2.2, marker=marker, markersize=3.5)
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
            color=COLOURS.get(line.method, BLACK),
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


def copy_pictures(collection: Collection, out: Path, of_images: bool = True) -> dict[Kind, list[Figure]]:
    """Copy the pictures that the records name into the report's folder, of each kind of encoder its first seed's.

    With ``of_images`` false, kinds that show the images of the data are left out. A picture that is not there is not an
    error: records may be kept without.
    """
    result: dict[Kind, list[Figure]] = {}
    taken: list[Figure] = []
    for kind in KINDS:
        if kind.of_images and not of_images:
            continue
        shown: dict[tuple[object, ...], Figure] = {}
        for entry in collection.of(kind.task):
            key = _shown_once(kind, entry, collection)
            if key in shown or (source := _picture(entry, kind.key, collection.unusable)) is None:
                continue
            figure = _copy(kind, entry, source, out, taken)
            taken.append(figure)
            shown[key] = figure
        if shown:
            result[kind] = list(shown.values())
    return result


def _shown_once(kind: Kind, entry: Entry, collection: Collection) -> tuple[object, ...]:
    """Pictures with the same key would show the same: views depend on the recipe's views, the rest on all but the seed."""
    subject, data = entry.record.subject, entry.record.data
    if kind.key == "views":
        return (data.fingerprint, json.dumps(collection.recipe(subject).get("views"), sort_keys=True))
    recipe = subject.recipe_hash or subject.sha256
    return (data.fingerprint, data.subset, method_title(subject), subject.arch, subject.epochs, recipe)


def _picture(entry: Entry, key: str, unusable: list[Unusable]) -> Path | None:
    from PIL import Image

    name = entry.record.files.get(key)
    path = (entry.folder / name).resolve() if name else None
    if path is None or not path.is_file():
        return None
    if not path.is_relative_to(entry.folder.resolve()):
        unusable.append(Unusable(path, "lies outside its record's folder"))
        return None
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # Pillow raises many kinds for a broken file
        unusable.append(Unusable(path, f"not a readable picture ({error})"))
        return None
    return path


def _copy(kind: Kind, entry: Entry, source: Path, out: Path, taken: list[Figure]) -> Figure:
    subject, data = entry.record.subject, data_title(entry.record.data.source)
    if kind.key == "views":
        file = _unused(taken, f"views-{slug(data)}", source.suffix)
        figure = Figure(file, data)
    else:
        title = method_title(subject)
        file = _unused(taken, f"{kind.task}-{slug(f'{data} {title}')}", source.suffix)
        seed = "" if subject.seed is None else f"seed {subject.seed}"
        figure = Figure(file, f"{title} on {data}", seed)
    with atomic(out / file) as temporary:
        shutil.copyfile(source, temporary)
    return figure


def _unused(taken: Sequence[Figure], stem: str, suffix: str) -> str:
    """``figures/<stem><suffix>``, numbered if a figure has that name."""
    names = {figure.file for figure in taken}
    numbered = [f"{FOLDER}/{stem}{suffix}", *(f"{FOLDER}/{stem}-{number}{suffix}" for number in range(2, len(names) + 3))]
    return next(name for name in numbered if name not in names)
