"""Which token knows which class: k-NN accuracy of each token class by class, and where each is the best (MTE, Fig. 8)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from downstream.analysis.lookup import NeighbourProtocol, by_class, predictions, prepare_tokens, sets_of, wins
from downstream.analysis.study import Analysis, Outcome, Prepared, Seen, rounded
from downstream.evaluate import percentage
from mte_bench.plotting import BLUE, picture, title_width

if TYPE_CHECKING:
    from matplotlib.patches import Rectangle

Floats = NDArray[np.floating]

SHOWN = 30  # classes of the heat map: of more, those in which the tokens differ most
PRINTED = 16  # up to so many classes, the value is printed in each cell
CELL = 0.5  # inches that a class takes


def measure_per_class(protocol: NeighbourProtocol, prepared: Prepared, seen: Seen) -> Outcome:
    """Top-1 of every token and set of tokens, and the same class by class."""
    members = {name: [place] for place, name in enumerate(prepared.names)} | sets_of(prepared.names)
    right = {name: predictions(protocol, seen, places) == seen.labels for name, places in members.items()}
    accuracy = np.stack([by_class(hits, seen.labels, len(seen.classes)) for hits in right.values()])
    singles = len(prepared.names)
    best = wins(accuracy[:singles])
    return Outcome(
        metrics={f"top1_{name.replace(' ', '_').lower()}": percentage(hits) for name, hits in right.items()},
        values={
            "names": list(members),
            "classes": list(seen.classes),
            "images_of_class": np.bincount(seen.labels, minlength=len(seen.classes)).tolist(),
            "top1_of_class": [[None if np.isnan(value) else round(float(value), 3) for value in row] for row in accuracy],
            "classes_best": dict(zip(prepared.names, rounded(best), strict=True)),
        },
        draw=lambda path, subject: draw_per_class(
            path,
            accuracy,
            [100 * float(hits.mean()) for hits in right.values()],
            list(members),
            seen.classes,
            best,
            f"k-NN accuracy of each token by itself and of sets of tokens, class by class\n{subject}",
        ),
        details={"classes_in_which_tokens_tie_are_shared": True},
    )


def draw_per_class(
    path: str | Path,
    accuracy: Floats,
    totals: Sequence[float],
    names: Sequence[str],
    classes: Sequence[str],
    best: Floats,
    title: str,
) -> None:
    """Left: each row's accuracy in each class, relative to the mean of the single tokens there. Right: ``classes_best``.

    ``accuracy`` is ``t classes`` in percent and ``totals`` that over all images, which the rows' names state; ``best``
    belongs to the first rows, which are the single tokens. Of these a frame marks the best in each class.
    """
    singles = len(best)
    relative = accuracy - accuracy[:singles].mean(axis=0)
    spread = np.nan_to_num(np.nanmax(relative[:singles], axis=0) - np.nanmin(relative[:singles], axis=0))
    columns = np.sort(np.argsort(-spread, kind="stable")[:SHOWN])
    shown = relative[:, columns]
    height, width = 1.9 + 0.36 * len(names), 3.4 + CELL * len(columns)
    limit = max(1.0, float(np.nanmax(np.abs(shown))))
    with picture(path, max(width + 3.0, title_width(title)), height + 0.9) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[width, 2.0], sharey=True)
        left.grid(False)
        image = left.imshow(shown, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        left.set_yticks(range(len(names)), [f"{name}  {total:.1f} %" for name, total in zip(names, totals, strict=True)])
        left.set_xticks(range(len(columns)), [classes[i] for i in columns], rotation=45, ha="right", rotation_mode="anchor")
        left.tick_params(length=0)
        left.spines[:].set_visible(False)
        left.axhline(singles - 0.5, color="black", linewidth=1)
        if len(columns) <= PRINTED:
            for row, column in np.argwhere(np.isfinite(shown)):
                value = float(shown[row, column])
                colour = "white" if abs(value) > 0.6 * limit else "black"
                left.text(column, row, f"{value:+.1f}", ha="center", va="center", fontsize=7.5, color=colour)
        for row, column in np.argwhere(shown[:singles] == np.nanmax(shown[:singles], axis=0)):
            left.add_patch(_frame(column, row))
        some = f" (the {len(columns)} in which tokens differ most)" if len(columns) < len(classes) else ""
        left.set_xlabel(f"class{some}; framed: the best single token there")
        right.barh(range(singles), best, color=BLUE)
        for row, value in enumerate(best):
            right.text(value, row, f" {value:.3g}", va="center", fontsize=8)
        right.grid(False)
        right.tick_params(left=False, bottom=False, labelbottom=False)
        right.spines[:].set_visible(False)
        right.set_xlim(0, 1.25 * max(1.0, float(best.max())))
        right.set_xlabel("classes in which the\ntoken is the best")
        figure.colorbar(image, ax=[left, right], label="top-1 minus the mean of single tokens,\npercentage points", pad=0.01)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def _frame(column: int, row: int) -> "Rectangle":
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.6)


PER_CLASS = Analysis("per-class", NeighbourProtocol, prepare_tokens, measure_per_class, labelled=True)
