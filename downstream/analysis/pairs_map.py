"""Heat maps over pairs of tokens."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mte_bench.plotting import picture, title_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

PRINTED = 16  # up to so many tokens, the value is printed in each cell


def draw_pairs(
    path: str | Path,
    matrices: Mapping[str, NDArray[np.floating]],
    names: Sequence[str],
    title: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    digits: int = 2,
    diverging: bool = False,
) -> None:
    """Write heat maps of (t, t) ``matrices`` over tokens, one beside the other, each with its key above it.

    White lines part kinds of tokens (names alike but for their number). ``unit`` labels the colours, which are the same for all
    and span ``limits`` (default: the smallest to the largest value; ``diverging`` puts 0 in the middle). NaN stays white.
    """
    count = len(names)
    cell = 0.52 if count <= PRINTED else max(0.2, 8 / count)
    side = max(2.6, cell * count)
    every = np.stack(list(matrices.values()))
    low, high = limits or (float(np.nanmin(every)), float(np.nanmax(every)))
    if diverging:
        high = max(abs(low), abs(high), 1e-9)
        low = -high
    with picture(path, max(len(matrices) * (side + 0.6) + 1.8, title_width(title)), side + 1.5 + 0.2 * any(matrices)) as figure:
        panels = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
        for axes, (heading, matrix) in zip(panels, matrices.items(), strict=True):
            axes.grid(False)
            axes.spines[:].set_visible(False)
            image = axes.imshow(matrix, cmap="PuOr" if diverging else "viridis", vmin=low, vmax=high)
            axes.set_title(heading, fontsize=10)
            axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), names)
            axes.tick_params(length=0)
            for border in _borders(names):
                axes.axhline(border, color="white", linewidth=2)
                axes.axvline(border, color="white", linewidth=2)
            if count <= PRINTED:
                _print_values(axes, image, matrix, f"{'+' if diverging else ''}.{digits}f")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.colorbar(image, ax=panels, label=unit, shrink=0.8)


def _print_values(axes: "Axes", image: "AxesImage", matrix: NDArray[np.floating], form: str) -> None:
    for row, column in np.argwhere(np.isfinite(matrix)):
        value = float(matrix[row, column])
        red, green, blue, _ = image.to_rgba(np.asarray(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(column, row, f"{value:{form}}", ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _borders(names: Sequence[str]) -> list[float]:
    sizes = [len(list(group)) for _, group in groupby(names, key=lambda name: re.sub(r"[\s_]*\d+$", "", name))]
    return [float(edge) - 0.5 for edge in np.cumsum(sizes)[:-1]]
