"""Maps over images as one picture: a row per image, a column per map; blended with the image, and the map by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mte_bench.plotting import picture, shortened, title_width

if TYPE_CHECKING:
    from matplotlib.image import AxesImage

Floats = NDArray[np.floating]

MAP_COLOURS = "viridis"  # perceptually even and distinct for every common kind of colour vision
SIGNED_COLOURS = "PuOr"
CELL, GAP, MARGIN, HEAD = 1.05, 0.09, 0.12, 0.85  # inches: a map, the space between groups, the border, title and names


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

    ``captions`` name the images, ``columns`` the maps; ``title`` has three lines; ``label`` says what the colours mean.
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
    width = max(2 * cell + tokens * cell + 2 * GAP + 1.1, title_width(title))
    height = start + count * (2 * cell + 3 * GAP) + MARGIN
    with picture(path, width, height, few_colours=True) as figure:
        figure.set_layout_engine("none")
        page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)  # inches from the top left
        page.axis("off")

        def tile(values: Floats, left: float, top: float, side: float = cell, **look: Any) -> "AxesImage":
            side -= GAP / 3
            return page.imshow(values, extent=(left, left + side, top + side, top), aspect="auto", **look)

        def bar(drawn: "AxesImage", top: float, tall: float, text: str, extend: str) -> None:
            place = figure.add_axes(((lefts[-1] + cell + GAP) / width, 1 - (top + tall) / height, 0.12 / width, tall / height))
            colours = figure.colorbar(drawn, cax=place, extend=extend)
            colours.set_label(text, fontsize=8)
            colours.outline.set_visible(False)
            place.tick_params(labelsize=7)

        lefts = [MARGIN + 2 * cell + GAP + index * cell for index in range(tokens)]
        page.text(MARGIN, MARGIN, title, va="top", fontsize=10)
        for left, name in zip(lefts, columns, strict=True):
            page.text(left + cell / 2, MARGIN + HEAD - 0.06, name, ha="center", va="bottom", fontsize=8)
        if kernels is not None:
            reach = float(np.abs(kernels).max()) or 1.0
            for left, kernel in zip(lefts, kernels, strict=True):
                drawn = tile(kernel, left, MARGIN + HEAD, cmap=SIGNED_COLOURS, vmin=-reach, vmax=reach)
            bar(drawn, MARGIN + HEAD, cell - GAP / 3, "kernel weight", "neither")
            middle = MARGIN + HEAD + cell / 2
            page.text(lefts[0] - GAP, middle, "kernels, mean\nover channels", ha="right", va="center", fontsize=8)
        look: dict[str, Any] = {"cmap": MAP_COLOURS, "vmin": low, "vmax": high}
        for index, image in enumerate(images):
            top = start + index * (2 * cell + 3 * GAP)
            tile(image, MARGIN, top, 2 * cell)
            caption = shortened(captions[index], int(32 * cell))
            page.text(MARGIN + cell, top + 2 * cell, caption, ha="center", va="top", fontsize=7)
            for left, values in zip(lefts, maps[index], strict=True):
                tile(image.mean(-1), left, top, cmap="gray", vmin=0, vmax=1)
                tile(values, left, top, alpha=0.6, interpolation="bicubic", **look)
                drawn = tile(values, left, top + cell, **look)
        bar(drawn, start, min(count * (2 * cell + 3 * GAP) - 3 * GAP, 4 * cell), label, "both")
