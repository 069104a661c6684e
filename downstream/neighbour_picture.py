"""Queries and their nearest images as one picture: a row per query, neighbours from left to right, right ones marked."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.plotting import BLUE, ORANGE, picture, shortened, title_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL, GAP, MARGIN, HEAD, CAPTION = 1.0, 0.12, 0.12, 0.89, 0.34  # inches: an image, between them, the border, title, text


class Answers(NamedTuple):
    """What was found for each of ``q`` queries: their ``k`` neighbours, nearest first."""

    neighbours: NDArray[np.int64]
    """``q k``, places in the bank."""
    similarities: NDArray[np.float64]
    """``q k``."""
    right: NDArray[np.bool_]
    """``q k``: of the query's class."""


def draw_neighbours(
    path: Path,
    queries: ImageSet,
    bank: ImageSet,
    answers: Answers,
    transform: EvaluationTransform,
    title: str,
    rows: int,
    neighbours: int,
) -> None:
    """Write the picture of so many ``rows`` of ``queries``, spread evenly over the classes, and the first ``neighbours`` of each.

    A neighbour of the query's class has a solid blue frame and a check mark, another a dashed orange one and a cross, so
    that colour is not needed to tell them apart. The images are what the encoder saw. ``title`` has three lines.
    """
    by_class = np.argsort(queries.labels, kind="stable")
    shown = by_class[np.linspace(0, len(by_class) - 1, min(rows, len(by_class))).round().astype(np.int64)]
    neighbours = min(neighbours, answers.neighbours.shape[1])
    first = MARGIN + CELL + 3 * GAP  # where the neighbours begin
    tall = CELL + CAPTION + GAP
    width = max(first + neighbours * (CELL + GAP) + MARGIN, title_width(title))
    height = MARGIN + HEAD + len(shown) * tall + MARGIN
    letters = int(17 * CELL)  # of a caption of 7 points under an image
    with picture(path, width, height) as figure:
        figure.set_layout_engine("none")
        page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)  # inches from the top left
        page.axis("off")
        page.text(MARGIN, MARGIN, title, va="top", fontsize=10)
        page.text(MARGIN, MARGIN + HEAD - 0.08, "query", va="bottom", fontsize=8, weight="bold")
        page.text(first, MARGIN + HEAD - 0.08, "nearest first   ", va="bottom", fontsize=8, weight="bold")
        legend = "✓ solid frame: the query's class     ✗ dashed frame: another class"
        page.text(first + 1.0, MARGIN + HEAD - 0.08, legend, va="bottom", fontsize=8)
        for line, row in enumerate(shown):
            top = MARGIN + HEAD + line * tall
            _tile(page, transform.seen(queries.image(int(row))), MARGIN, top)
            _caption(page, MARGIN, top, shortened(queries.classes[queries.labels[row]], letters))
            for place in range(neighbours):
                left = first + place * (CELL + GAP)
                index, right = int(answers.neighbours[row, place]), bool(answers.right[row, place])
                _tile(page, transform.seen(bank.image(index)), left, top)
                _frame(page, left, top, right)
                mark = f"{'✓' if right else '✗'} {answers.similarities[row, place]:.3f}"
                _caption(page, left, top, f"{mark}\n{shortened(bank.classes[bank.labels[index]], letters)}")


def _tile(page: "Axes", pixels: NDArray[np.floating], left: float, top: float) -> None:
    page.imshow(pixels, extent=(left, left + CELL, top + CELL, top), aspect="auto", interpolation="nearest", vmin=0, vmax=1)


def _frame(page: "Axes", left: float, top: float, right: bool) -> None:
    from matplotlib.patches import Rectangle

    colour, style = (BLUE, "solid") if right else (ORANGE, (0, (2.5, 1.5)))
    page.add_patch(Rectangle((left, top), CELL, CELL, fill=False, edgecolor=colour, linewidth=2.5, linestyle=style))


def _caption(page: "Axes", left: float, top: float, text: str) -> None:
    page.text(left + CELL / 2, top + CELL + 0.05, text, ha="center", va="top", fontsize=7)
