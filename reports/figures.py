"""The pictures of runs and analyses that are copied into a report, and which of them may be shown to anyone."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mte_bench.files import atomic
from mte_bench.naming import architecture_title, data_title, is_embedded, method_title, peculiarity, slug
from mte_bench.plotting import picture
from mte_bench.records import Record
from reports.collect import Collection, Entry, Unusable
from reports.curves import Curves, Line, draw_line, label_ends, lines_of, mean_of, read_curves
from reports.markdown import plain_text

FOLDER = "figures"
SHORT = 16  # letters of a label that fit beside a panel of the usual width
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
    variant: str = ""
    """Which of several analyses under one task; see ``_variant``."""

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return self.key if self.key == "views" else "-".join(filter(None, (self.task, self.variant)))


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
        "cka",
        "picture",
        "CKA between layers",
        "Linear CKA between the global token after each block, over images of the val split.",
        "how fast values fall away from the diagonal: blocks that are alike change little of what the global token says.",
        of_images=False,
        variant="layers",
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
        "What two tokens side by side know beyond the better of them, by k-NN and by a linear probe.",
        "gains away from the diagonal, larger where CKA is low.",
        "Figure 9",
        of_images=False,
    ),
    Kind(
        "token-quality",
        "picture",
        "Tokens along pre-training",
        "k-NN and linear probe of the global token, of the auxiliary ones by kind and of all of them together, along the run.",
        "a global token that rises with the auxiliary ones where they teach it, and falls behind where nothing is distilled.",
        "Figures 12 and 13",
        of_images=False,
    ),
    Kind(
        "convergence",
        "picture",
        "Convergence",
        "The metric that was monitored against epochs and against training time, thin for single seeds.",
        "the ring: where a run with MTE is as good as the plain one ends. It must lie to the left in time too to save any.",
        "Figure 2",
        of_images=False,
    ),
    Kind(
        "token-counts",
        "picture",
        "Numbers of tokens",
        "What runs are worth that differ in nothing but their numbers of auxiliary CLS tokens and adaptively pooled tokens.",
        "where a line stops rising, and whether seeds lie farther apart than its points.",
        "Figure 15",
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
    Kind(
        "knn",
        "picture",
        "k-NN on patch tokens",
        "k-NN accuracy of the mean of some patch tokens, those that CLS attends to most or least, beside the global token.",
        "how many patches it takes to reach the global token, and whether the attended ones know more than the others.",
        "Figure 14",
        of_images=False,
    ),
)

PICTURES = (".png", ".jpg", ".jpeg", ".svg")
"""Endings of pictures' names."""

PREFIXES = tuple(f"{name}-" for name in ("curves", *dict.fromkeys(kind.stem for kind in KINDS)))
"""How the names of a report's pictures begin; what begins so in its folder is the report's own."""


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
        every = lines_of(members)
        for start in range(0, len(every), MOST_LINES):
            lines = every[start : start + MOST_LINES]
            file = unused(figures, f"curves-{slug(data)}", ".png")
            _draw_curves(out / file, lines)
            remark = ", ".join(f"{line.label}: {len(line.runs)} run{'s' * (len(line.runs) > 1)}" for line in lines)
            figures.append(Figure(file, f"{data}, {architecture}", remark))
    return figures


def _draw_curves(path: Path, lines: list[Line[Curves]]) -> None:
    panels = [("loss", "training loss"), ("knn", "k-NN top-1 while training (%)")]
    panels = [(name, title) for name, title in panels if any(len(getattr(run, name)) for line in lines for run in line.runs)]
    long = max(0, max(len(line.label) for line in lines) - SHORT)
    with picture(path, (4.6 + 0.085 * long) * len(panels) + 0.4, 3.4) as figure:
        for (name, title), axes in zip(panels, np.ravel(figure.subplots(1, len(panels))), strict=True):
            ends = []
            for line in lines:
                runs = [points for run in line.runs if len(points := getattr(run, name))]
                if runs:
                    ends.append((*draw_line(axes, line, runs, mean_of(runs)), line))
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_xlabel("epoch")
            axes.set_xlim(left=0)
            axes.margins(y=0.08)
            label_ends(axes, ends)


def may_be_shown(record: Record, key: str) -> bool:
    """Whether the picture ``key`` of a record shows no image of the data, or only of the embedded data, drawn by code.

    A picture of a kind that is not known counts as one of images.
    """
    of_images = [kind.of_images for kind in KINDS if (kind.task, kind.key) == (record.task, key)]
    return is_embedded(record.data.source) or not any(of_images or [True])


def copy_pictures(collection: Collection, out: Path, of_images: bool = True) -> dict[Kind, list[Figure]]:
    """Copy the pictures that the records name into the report's folder, of each kind of encoder its first seed's.

    With ``of_images`` false, what ``may_be_shown`` refuses is left out. A picture that is not there is not an error:
    records may be kept without.
    """
    result: dict[Kind, list[Figure]] = {}
    taken: list[Figure] = []
    for kind in KINDS:
        shown: dict[tuple[object, ...], tuple[Entry, Path]] = {}
        for entry in collection.of(kind.task):
            if _variant(entry.record) != kind.variant or not (of_images or may_be_shown(entry.record, kind.key)):
                continue
            key = _shown_once(kind, entry, collection)
            if key not in shown and (source := _picture(entry, kind.key, collection.unusable)) is not None:
                shown[key] = entry, source
        for entry, source in shown.values():
            figure = _copy(kind, entry, source, out, taken, _differing(entry, [other for other, _ in shown.values()], collection))
            taken.append(figure)
            result.setdefault(kind, []).append(figure)
    return result


def _variant(record: Record) -> str:
    """What a task's records are told apart by, beyond the task: CKA is between tokens or between layers."""
    return "layers" if record.details.get("between") == "layers" else ""


def _differing(entry: Entry, shown: Sequence[Entry], collection: Collection) -> str:
    """The settings in which the entry's recipe differs from those of other pictures with its title; "" if it has none."""
    title, data = method_title(entry.record.subject), entry.record.data.fingerprint
    alike = [e for e in shown if (method_title(e.record.subject), e.record.data.fingerprint) == (title, data)]
    recipes = [collection.recipe(other.record.subject) for other in alike]
    return peculiarity(collection.recipe(entry.record.subject), recipes)


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


def _copy(kind: Kind, entry: Entry, source: Path, out: Path, taken: list[Figure], differing: str) -> Figure:
    subject, data = entry.record.subject, data_title(entry.record.data.source)
    if kind.key == "views":
        figure = Figure(unused(taken, f"{kind.stem}-{slug(data)}", source.suffix), data)
    else:
        title = method_title(subject)
        file = unused(taken, f"{kind.stem}-{slug(f'{data} {title}')}", source.suffix)
        seed = "" if subject.seed is None else f"seed {subject.seed}"
        figure = Figure(file, f"{title} on {data}", ", ".join(filter(None, (plain_text(differing), seed))))
    with atomic(out / figure.file) as temporary:
        shutil.copyfile(source, temporary)
    return figure


def unused(taken: Sequence[Figure], stem: str, suffix: str) -> str:
    """``figures/<stem><suffix>``, numbered if a figure has that name."""
    names = {figure.file for figure in taken}
    numbered = [f"{FOLDER}/{stem}{suffix}", *(f"{FOLDER}/{stem}-{number}{suffix}" for number in range(2, len(names) + 3))]
    return next(name for name in numbered if name not in names)
