"""Which token knows which class: k-NN accuracy of each token class by class, and where each is the best (MTE, Fig. 8)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from downstream.analysis.lookup import NeighbourProtocol, by_class, predictions, prepare_tokens, sets_of, wins
from downstream.analysis.study import Analysis, Outcome, Prepared, Seen, rounded
from downstream.evaluate import percentage
from mte_bench.plotting import BLUE, picture, title_width

Floats = NDArray[np.floating]

SHOWN = 30  # classes of the heat map: of more, those in which the tokens differ most


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
            path, accuracy, list(members), seen.classes, best, f"Which token knows which class\n{subject}"
        ),
        details={"classes_in_which_tokens_tie_are_shared": True},
    )


def draw_per_class(
    path: str | Path, accuracy: Floats, names: Sequence[str], classes: Sequence[str], best: Floats, title: str
) -> None:
    """Left: each row's accuracy in each class, relative to the mean of the single tokens there. Right: ``classes_best``.

    ``accuracy`` is ``t classes`` in percent, ``best`` belongs to the first rows, which are the single tokens.
    """
    singles = len(best)
    relative = accuracy - accuracy[:singles].mean(axis=0)
    spread = np.nan_to_num(np.nanmax(relative[:singles], axis=0) - np.nanmin(relative[:singles], axis=0))
    columns = np.sort(np.argsort(-spread, kind="stable")[:SHOWN])
    height, width = 1.9 + 0.36 * len(names), 3.6 + 0.42 * len(columns)
    limit = max(1.0, float(np.nanmax(np.abs(relative[:, columns]))))
    with picture(path, max(width + 2.4, title_width(title)), height + 0.9) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[width, 2.4], sharey=True)
        left.grid(False)
        image = left.imshow(relative[:, columns], cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        left.set_yticks(range(len(names)), names)
        left.set_xticks(range(len(columns)), [classes[i] for i in columns], rotation=45, ha="right", rotation_mode="anchor")
        left.tick_params(length=0)
        left.axhline(singles - 0.5, color="black", linewidth=1)
        some = f" (the {len(columns)} in which tokens differ most)" if len(columns) < len(classes) else ""
        left.set_xlabel(f"class{some}")
        figure.colorbar(image, ax=left, label="top-1 minus the tokens' mean,\npercentage points", location="left", pad=0.01)
        right.barh(range(singles), best, color=BLUE)
        for row, value in enumerate(best):
            right.text(value, row, f" {value:.3g}", va="center", fontsize=8)
        right.set_xlim(0, 1.25 * max(1.0, float(best.max())))
        right.set_xlabel("classes in which the\ntoken is the best")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)


PER_CLASS = Analysis("per-class", NeighbourProtocol, prepare_tokens, measure_per_class, labelled=True)
