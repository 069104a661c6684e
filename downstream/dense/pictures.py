"""Pictures of what dense models see: label maps beside the truth, detections on the image."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from downstream.dense.pairs import VOID
from mte_bench.plotting import picture

COLUMN = 2.6
"""Inches of an image."""
_NAMED = 24
"""At most so many classes in a legend."""


class Segmented(NamedTuple):
    """One image with its label maps."""

    name: str
    image: NDArray[np.uint8]
    """``h w 3``, RGB."""
    truth: NDArray[np.uint8]
    """``h w``, classes and ``VOID``."""
    prediction: NDArray[np.uint8]
    """``h w``, classes."""


def draw_segmentations(path: Path, shown: Sequence[Segmented], classes: Sequence[str], title: str) -> None:
    """A row per image: the image, the truth and the prediction; then the colours of the classes that occur."""
    from matplotlib.patches import Patch

    colours = class_colours(len(classes))
    table = np.zeros((VOID + 1, 3))
    table[: len(classes)] = colours
    occurring = sorted({int(c) for one in shown for part in (one.truth, one.prediction) for c in np.unique(part)} - {VOID})
    ratio = float(np.mean([one.image.shape[0] / one.image.shape[1] for one in shown]))
    legend_rows = -(-min(len(occurring), _NAMED) // 4)
    with picture(path, 3 * COLUMN + 0.3, len(shown) * (COLUMN * ratio + 0.25) + 0.25 * legend_rows + 0.5) as figure:
        grid: Any = figure.subplots(len(shown), 3, squeeze=False)
        for row, one in zip(grid, shown, strict=True):
            parts = {one.name: one.image, "truth": table[one.truth], "prediction": table[one.prediction]}
            for axes, (caption, pixels) in zip(row, parts.items(), strict=True):
                axes.imshow(pixels, interpolation="nearest")
                axes.set_title(caption, fontsize=8)
                axes.axis("off")
        handles = [Patch(color=tuple(colours[c]), label=classes[c]) for c in occurring[:_NAMED]]
        if (truth_void := any((one.truth == VOID).any() for one in shown)) or handles:
            handles += [Patch(color="black", label="does not count")] * truth_void
            figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def class_colours(count: int) -> NDArray[np.float64]:
    """``count 3``: as many colours that differ as there can be, the same for the same class every time."""
    golden = 0.618033988749895
    return np.array([colorsys.hsv_to_rgb(i * golden % 1, 0.5 + 0.35 * (i % 2), 0.95 - 0.25 * (i // 2 % 3)) for i in range(count)])


Instance = tuple[int, list[float], Any, float | None]
"""Class, box (x, y, width, height), mask in one of COCO's formats, score (None of the truth)."""


class Detected(NamedTuple):
    """One image with what is in it."""

    name: str
    image: NDArray[np.uint8]
    """``h w 3``, RGB."""
    truth: list[Instance]
    found: list[Instance]
    """The surest last: it is drawn over the others."""


def draw_detections(path: Path, shown: Sequence[Detected], classes: Sequence[str], title: str) -> None:
    """A row per image: the truth and what was found, as boxes with names over coloured masks."""
    colours = class_colours(len(classes))
    ratio = float(np.mean([one.image.shape[0] / one.image.shape[1] for one in shown]))
    width = 1.5 * COLUMN
    with picture(path, 2 * width + 0.3, len(shown) * (width * ratio + 0.25) + 0.4) as figure:
        grid: Any = figure.subplots(len(shown), 2, squeeze=False)
        for row, one in zip(grid, shown, strict=True):
            for axes, instances, caption in ((row[0], one.truth, f"{one.name}: truth"), (row[1], one.found, "found")):
                axes.imshow(_tinted(one.image, instances, colours), interpolation="nearest")
                axes.set_title(caption, fontsize=8)
                axes.axis("off")
                for label, box, _, score in instances:
                    _draw_box(axes, box, colours[label], classes[label] if score is None else f"{classes[label]} {score:.2f}")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def _tinted(image: NDArray[np.uint8], instances: Sequence[Instance], colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """The image, half covered with each instance's colour where its mask is."""
    pixels = image / 255
    for label, _, mask, _ in instances:
        inside = decoded_mask(mask, *image.shape[:2])
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * colours[label]
    return pixels


def decoded_mask(mask: Any, height: int, width: int) -> NDArray[np.bool_]:
    """``height width`` from polygons, run lengths or compressed run lengths, as COCO's files have them."""
    from pycocotools import mask as rle

    if isinstance(mask, list):
        mask = rle.merge(rle.frPyObjects(mask, height, width))
    elif isinstance(mask["counts"], list):
        mask = rle.frPyObjects(mask, height, width)
    decoded: NDArray[np.bool_] = rle.decode(mask).astype(bool)
    return decoded


def _draw_box(axes: Any, box: list[float], colour: NDArray[np.float64], text: str) -> None:
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=tuple(colour), linewidth=1.2))
    axes.text(x, y, text, fontsize=5, color="black", va="bottom", clip_on=True,
              bbox={"facecolor": tuple(colour), "edgecolor": "none", "pad": 0.6, "alpha": 0.8})  # fmt: skip
