"""Maps over images as one picture: a row per image, a column per map; blended with the image, and the map by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mte_bench.plotting import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Floats = NDArray[np.floating]

MAP_COLOURS = "viridis"  # perceptually even and distinct for every common kind of colour vision
SIGNED_COLOURS = "PuOr"
CELL, GAP, MARGIN, HEAD = 1.05, 0.09, 0.12, 0.65  # inches: a map, the space between groups, the border, title and names


def relative(maps: Floats) -> Floats:
    """Each map (``... rows columns``) divided by its own mean: 1 is what an even map has everywhere."""
    mean = maps.mean(axis=(-2, -1), keepdims=True)
    return maps / np.where(mean > 0, mean, 1)


def draw_maps(
    path: str | Path,
    captions: Sequence[str],
    images: Floats,
    maps: Floats,
    columns: Sequence[str],
    title: str,
    label: str,
    kernels: Floats | None = None,
) -> None:
    """Write the picture of the ``maps`` (``i t rows columns``, not negative) of ``images`` (``i h w 3`` in [0, 1]).

    ``captions`` name the images, ``columns`` the maps; ``title`` has two lines; ``label`` says what the colours mean.
    Maps are shown relative to their own mean on one scale for all, cut at the 1st and 99th percentile but never
    narrower than 0.9 to 1.1, so that an even map looks even. ``kernels`` (``t k k``), one per column, are drawn on top
    on a scale of their own around 0.
    """
    maps = relative(maps)
    count, tokens = maps.shape[:2]
    low, high = np.percentile(maps, (1, 99))
    low, high = min(float(low), 0.9), max(float(high), 1.1)
    cell = CELL if tokens <= 8 else 0.8 * CELL
    start = MARGIN + HEAD + (0 if kernels is None else cell + 3 * GAP)  # inches from the top to the first image
    width = 2 * cell + tokens * cell + 2 * GAP + 1.1
    height = start + count * (2 * cell + 3 * GAP) + MARGIN
    with picture(path, width, height) as figure:
        figure.set_layout_engine("none")

        def axes(left: float, top: float, wide: float, high: float) -> "Axes":
            """Axes at a place given in inches from the top left corner."""
            return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

        def bare(left: float, top: float, size: float = cell) -> "Axes":
            place = axes(left, top, size - GAP / 3, size - GAP / 3)
            place.set(xticks=[], yticks=[])
            place.grid(False)
            place.spines[:].set_visible(False)
            return place

        lefts = [MARGIN + 2 * cell + GAP + index * cell for index in range(tokens)]
        bar = lefts[-1] + cell + GAP
        figure.text(MARGIN / width, 1 - MARGIN / height, title, ha="left", va="top", fontsize=10)
        for left, name in zip(lefts, columns, strict=True):
            centre = (left + (cell - GAP / 3) / 2) / width
            figure.text(centre, 1 - (MARGIN + HEAD - 0.06) / height, name, ha="center", va="bottom", fontsize=8)
        if kernels is not None:
            reach = float(np.abs(kernels).max()) or 1.0
            for left, kernel in zip(lefts, kernels, strict=True):
                drawn = bare(left, MARGIN + HEAD).imshow(kernel, cmap=SIGNED_COLOURS, vmin=-reach, vmax=reach)
            _bar(figure, drawn, axes(bar, MARGIN + HEAD, 0.12, cell - GAP / 3), "kernel weight", "neither")
            figure.text(
                (lefts[0] - GAP) / width, 1 - (MARGIN + HEAD + cell / 2) / height,
                "kernels, mean\nover channels", ha="right", va="center", fontsize=8,
            )  # fmt: skip
        for index, image in enumerate(images):
            top = start + index * (2 * cell + 3 * GAP)
            original = bare(MARGIN, top, 2 * cell)
            original.imshow(image)
            original.set_xlabel(_short(captions[index]), fontsize=7, labelpad=2)
            extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
            for left, values in zip(lefts, maps[index], strict=True):
                blended = bare(left, top)
                blended.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
                blended.imshow(
                    values, cmap=MAP_COLOURS, vmin=low, vmax=high, alpha=0.6, interpolation="bicubic", extent=extent
                )  # fmt: skip
                drawn = bare(left, top + cell).imshow(values, cmap=MAP_COLOURS, vmin=low, vmax=high)
        _bar(figure, drawn, axes(bar, start, 0.12, min(count * (2 * cell + 3 * GAP) - 3 * GAP, 4 * cell)), label, "both")


def _bar(figure: "Figure", drawn: "AxesImage", place: "Axes", label: str, extend: str) -> None:
    bar = figure.colorbar(drawn, cax=place, extend=extend)
    bar.set_label(label, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)


def _short(text: str, length: int = 38) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"
