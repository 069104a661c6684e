"""A heat map over pairs of tokens."""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mte_bench.plotting import picture, title_width

PRINTED = 16  # up to so many tokens, the value is printed in each cell


def draw_pairs(
    path: str | Path,
    matrix: NDArray[np.floating],
    names: Sequence[str],
    title: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    digits: int = 2,
    diverging: bool = False,
) -> None:
    """Write the heat map of a (t, t) ``matrix`` over tokens; white lines part their kinds (names alike but for their number).

    ``unit`` labels the colours, which span ``limits`` (default: the smallest to the largest value; ``diverging`` puts 0 in the
    middle). NaN stays white.
    """
    count = len(names)
    cell = 0.52 if count <= PRINTED else max(0.2, 8 / count)
    side = max(2.6, cell * count)
    low, high = limits or (float(np.nanmin(matrix)), float(np.nanmax(matrix)))
    if diverging:
        high = max(abs(low), abs(high), 1e-9)
        low = -high
    with picture(path, max(side + 2.4, title_width(title)), side + 1.5) as figure:
        axes = figure.add_subplot()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        image = axes.imshow(matrix, cmap="PuOr" if diverging else "viridis", vmin=low, vmax=high)
        axes.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names)
        axes.tick_params(length=0)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        for border in _borders(names):
            axes.axhline(border, color="white", linewidth=2)
            axes.axvline(border, color="white", linewidth=2)
        if count <= PRINTED:
            for row, column in np.argwhere(np.isfinite(matrix)):
                value = float(matrix[row, column])
                text = f"{value:+.{digits}f}" if diverging else f"{value:.{digits}f}"
                red, green, blue, _ = image.to_rgba(np.asarray(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        figure.colorbar(image, ax=axes, label=unit, shrink=0.8)


def _borders(names: Sequence[str]) -> list[float]:
    sizes = [len(list(group)) for _, group in groupby(names, key=lambda name: re.sub(r"[\s_]*\d+$", "", name))]
    return [float(edge) - 0.5 for edge in np.cumsum(sizes)[:-1]]
