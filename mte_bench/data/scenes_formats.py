"""The embedded data on disk, in the layouts that the real data sets have."""

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mte_bench.data.scenes import CLASSES, KINDS, MOST, Drawing, Kind, Masks, draw, draw_many
from mte_bench.errors import UserError, did_you_mean
from mte_bench.files import write_text

QUALITY = 92
_MANY_SIZE = 160  # shorter side of images with several things
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Plan:
    """How many images of what size (shorter side, pixels) from which seed, and how many things there may be in one."""

    train: int = 4000
    val: int = 1000
    size: int = 64
    seed: int = 0
    things: int = MOST

    def count(self, split: str) -> int:
        return self.train if split == "train" else self.val

    def single(self, split: str) -> Iterator[Drawing]:
        """Square images of one thing, the same as those of the source ``scenes``."""
        return (draw(self.seed, split, index, self.size) for index in range(self.count(split)))

    def many(self, split: str) -> Iterator[Drawing]:
        """Images of up to ``things`` things, 4 : 3; of one they are those of ``single``, where it is large."""
        if self.things == 1:
            return self.single(split)
        shape = self.size, round(self.size * 4 / 3)
        return (draw_many(self.seed, split, i, *shape, most=self.things) for i in range(self.count(split)))


def write_scenes(
    folder: str | Path,
    layout: str,
    train: int = 4000,
    val: int = 1000,
    size: int | None = None,
    seed: int = 0,
    things: int | None = None,
) -> Path:
    """Draw scenes into ``folder``, a new or empty one, as ``layout`` (a name in ``LAYOUTS``); returns the folder.

    ``size`` is the shorter side in pixels: 64 for the layouts with one thing per image, 160 for those with several,
    of which an image has at most ``things`` (6).
    The folder appears under its name when it is complete. Raises ``UserError`` if it is not empty or cannot be written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--format {layout}: unknown layout{did_you_mean(layout, LAYOUTS)}")
    for option, number, least in (
        ("train", train, 1),
        ("val", val, 1),
        ("size", size or 64, 16),
        ("seed", seed, 0),
        ("things", MOST if things is None else things, 1),
    ):
        if number < least:
            raise UserError(f"--{option} {number}: at least {least}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there and not empty; remove it or choose another --out")
    write, usual_size = LAYOUTS[layout]
    if things is not None and usual_size != _MANY_SIZE:
        raise UserError(f"--things {things}: images of {layout} have one thing each; it is for coco and ade20k")
    unfinished: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        write(unfinished, Plan(train, val, size or usual_size, seed, MOST if things is None else things))
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o777 & ~mask)
        unfinished.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); free space or choose another --out") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _save(drawing: Drawing, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawing.image).save(path, quality=QUALITY)


# --- class folders --------------------------------------------------------------------------------------------------


def _imagefolder(root: Path, plan: Plan) -> None:
    """``train/<class>/*.jpg``, ``val/<class>/*.jpg``."""
    for split in SPLITS:
        for index, drawing in enumerate(plan.single(split)):
            _save(drawing, root / split / CLASSES[drawing.things[0].label] / f"{split}_{index:06d}.jpg")


# --- iNaturalist 2018 -----------------------------------------------------------------------------------------------

_ORDERS: dict[str, dict[str, tuple[str, ...]]] = {
    "Rotundales": {"Orbidae": ("disc", "ring"), "Lunidae": ("crescent", "dome")},
    "Angulales": {"Quadratidae": ("square", "bar"), "Trigonidae": ("triangle",)},
    "Radiales": {"Stellidae": ("star", "cross"), "Folidae": ("clover",)},
}
_GENERA = {
    "disc": "Orbiola", "ring": "Annula", "square": "Quadra", "bar": "Virga", "cross": "Crucia",
    "triangle": "Trigona", "star": "Stella", "crescent": "Luna", "clover": "Trifolia", "dome": "Tholia",
}  # fmt: skip
_EPITHETS = {
    "dotted": "punctata", "striped": "lineata", "ringed": "annulata", "zigzag": "serrata", "checked": "tessellata",
    "latticed": "reticulata", "wavy": "undulata", "spiral": "cochleata", "spoked": "radiata", "bricked": "lateritia",
}  # fmt: skip
_PATTERN_GROUPS = {"Lineae": ("striped", "zigzag", "wavy"), "Centrae": ("ringed", "spiral", "spoked")}


def taxonomy(kind: Kind) -> dict[str, str]:
    """The made-up ranks of a class: phylum and class by its pattern, order to genus by its shape."""
    order, family = next(
        (order, family) for order, families in _ORDERS.items() for family, shapes in families.items() if kind.shape in shapes
    )
    group = next((name for name, patterns in _PATTERN_GROUPS.items() if kind.pattern in patterns), "Reticulae")
    genus, epithet = _GENERA[kind.shape], _EPITHETS[kind.pattern]
    return {
        "name": f"{genus} {epithet}",
        "common_name": kind.name.replace("_", " "),
        "supercategory": group,
        "kingdom": "Scenae",
        "phylum": "Centrata" if group == "Centrae" else "Planata",
        "class": group,
        "order": order,
        "family": family,
        "genus": genus,
        "specific_epithet": epithet,
    }


def _inat(root: Path, plan: Plan) -> None:
    """``train2018.json``, ``val2018.json``, ``categories.json``, ``train_val2018/<supercategory>/<category>/*.jpg``."""
    categories = [{"id": label, **taxonomy(kind)} for label, kind in enumerate(KINDS)]
    for category in categories:
        category["image_dir_name"] = f"{category['supercategory']}/{category['id']}"
    number = 0
    for split in SPLITS:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, int]] = []
        for drawing in plan.single(split):
            number += 1
            label = drawing.things[0].label
            name = f"train_val2018/{categories[label]['image_dir_name']}/{number:032x}.jpg"
            _save(drawing, root / name)
            images.append({"id": number, "file_name": name, **_extent(drawing), "license": 1, "rights_holder": "none"})
            annotations.append({"id": number, "image_id": number, "category_id": label})
        content = {**_head(2018), "images": images, "categories": categories, "annotations": annotations}
        _write_listing(root / f"{split}2018.json", content)
    _write_listing(root / "categories.json", categories)


# --- COCO 2017 ------------------------------------------------------------------------------------------------------


def _coco(root: Path, plan: Plan) -> None:
    """``annotations/instances_{train,val}2017.json`` with boxes and exact masks, ``{train,val}2017/*.jpg``.

    Masks are run lengths (not polygons, which cannot follow pixels), with ``iscrowd`` 0. Category ids start at 1.
    """
    categories = [{"supercategory": taxonomy(kind)["order"], "id": i, "name": kind.name} for i, kind in enumerate(KINDS, 1)]
    number = annotation = 0
    for split in SPLITS:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for drawing in plan.many(split):
            number += 1
            name = f"{number:012d}.jpg"
            _save(drawing, root / f"{split}2017" / name)
            images.append({"license": 1, "file_name": name, **_extent(drawing), "id": number})
            for thing in drawing.things:
                annotation += 1
                annotations.append(
                    {
                        "segmentation": {"counts": run_lengths(thing.mask), "size": list(thing.mask.shape)},
                        "area": float(thing.mask.sum()),
                        "iscrowd": 0,
                        "image_id": number,
                        "bbox": bounding_box(thing.mask),
                        "category_id": thing.label + 1,
                        "id": annotation,
                    }
                )
        content = {**_head(2017), "images": images, "annotations": annotations, "categories": categories}
        _write_listing(root / "annotations" / f"instances_{split}2017.json", content)


def run_lengths(mask: Masks) -> list[int]:
    """COCO's uncompressed run lengths of a mask (h w): down the columns, beginning with a run of 0 (perhaps empty)."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(run) for run in np.diff([0, *starts, mask.size])]


def bounding_box(mask: Masks) -> list[float]:
    """COCO's box of a mask: left, top, width, height in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)]


# --- ADE20K ---------------------------------------------------------------------------------------------------------

_GROUND = len(CLASSES) + 1
_ADE_SPLITS = {"train": "training", "val": "validation"}


def _ade20k(root: Path, plan: Plan) -> None:
    """``images/{training,validation}/*.jpg``, ``annotations/.../*.png``, ``objectInfo11.csv``.

    In the PNGs 0 is unlabelled (clutter), 1 to 10 the classes, 11 the ground.
    """
    pixels, seen = np.zeros(_GROUND + 1), {split: np.zeros(_GROUND + 1, np.int64) for split in SPLITS}
    for split in SPLITS:
        folder = _ADE_SPLITS[split]
        (root / "annotations" / folder).mkdir(parents=True)
        for index, drawing in enumerate(plan.many(split), 1):
            name = f"ADE_{split}_{index:08d}"
            labels = np.full(drawing.clutter.shape, _GROUND, np.uint8)
            labels[drawing.clutter] = 0
            for thing in drawing.things:
                labels[thing.mask] = thing.label + 1
            _save(drawing, root / "images" / folder / f"{name}.jpg")
            Image.fromarray(labels).save(root / "annotations" / folder / f"{name}.png")
            counts = np.bincount(labels.ravel(), minlength=_GROUND + 1)
            pixels += counts
            seen[split] += counts > 0
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("Idx", "Ratio", "Train", "Val", "Stuff", "Name"))
    for index, name in enumerate((*CLASSES, "ground"), 1):
        ratio = f"{pixels[index] / pixels.sum():.4f}"
        rows.writerow((index, ratio, seen["train"][index], seen["val"][index], int(index == _GROUND), name))
    write_text(root / f"objectInfo{_GROUND}.csv", table.getvalue())


def _write_listing(path: Path, content: Any) -> None:
    """On one line, as the real ones are: indented, run lengths would take a line each."""
    write_text(path, json.dumps(content))


def _extent(drawing: Drawing) -> dict[str, int]:
    return {"height": drawing.image.shape[0], "width": drawing.image.shape[1]}


def _head(year: int) -> dict[str, Any]:
    info = {"description": "mte-bench scenes: drawn by code", "version": "1.0", "year": year, "contributor": "mte-bench"}
    licence = {"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
    return {"info": info, "licenses": [licence]}


LAYOUTS: dict[str, tuple[Callable[[Path, Plan], None], int]] = {
    "imagefolder": (_imagefolder, 64),
    "inat": (_inat, 64),
    "coco": (_coco, _MANY_SIZE),
    "ade20k": (_ade20k, _MANY_SIZE),
}
"""Layout name -> what writes it, and the usual shorter side in pixels."""
