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
