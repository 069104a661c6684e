"""Lines along training: a column for each run, a row for each measure, a line for each kind of token."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mte_bench.plotting import BLUE, GREEN, ORANGE, PINK, picture, title_width

LOOKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PINK, "D"))
MARKED = 20  # points up to which each is marked on its line
MOST_COLUMNS = 4  # then a new row begins
COLUMN, ROW = 2.6, 2.1  # inches


class Track(NamedTuple):
    """A run: its epochs, and by ``MEASURE_KIND`` a value in percent at each of them."""

    epochs: tuple[float, ...]
    top1: dict[str, list[float]]


def draw_tracks(
    path: str | Path, tracks: Mapping[str, Track], measures: Mapping[str, str], kinds: Mapping[str, str], title: str
) -> None:
    """Write the picture of ``tracks``, by the name of their run; ``measures`` and ``kinds`` give keys their labels.

    A measure has one scale for all runs. From the second run on, the first kind's line of the first run is drawn again,
    dotted and grey, to compare with.
    """
    blocks = -(-len(tracks) // MOST_COLUMNS)
    across = -(-len(tracks) // blocks)
    rows = blocks * len(measures)
    first = next(iter(tracks))
    base = next(iter(kinds))
    width = max(COLUMN * across + 0.8, title_width(title), 5.6)
    with picture(path, width, ROW * rows + 0.9 + 0.4 * blocks) as figure:
        panels = figure.subplots(rows, across, squeeze=False)
        for row, (measure, label) in enumerate([*measures.items()] * blocks):
            values = [value for track in tracks.values() for key in kinds for value in track.top1.get(f"{measure}_{key}", [])]
            margin = 0.06 * (max(values) - min(values)) or 1.0
            for column, axes in enumerate(panels[row]):
                place = (row // len(measures)) * across + column
                if place >= len(tracks):
                    axes.set_axis_off()
                    continue
                run, track = list(tracks.items())[place]
                if place > 0:
                    other = tracks[first]
                    look: dict[str, Any] = {"color": "0.45", "linestyle": ":", "linewidth": 1.6}
                    axes.plot(other.epochs, other.top1[f"{measure}_{base}"], label=f"{kinds[base]} of {first}", **look)
                for (key, name), (colour, marker) in zip(kinds.items(), LOOKS, strict=True):
                    if (own := track.top1.get(f"{measure}_{key}")) is not None:
                        shown = marker if len(own) <= MARKED else None
                        axes.plot(track.epochs, own, color=colour, marker=shown, markersize=4.5, label=name)
                axes.set_ylim(min(values) - margin, max(values) + margin)
                axes.tick_params(labelleft=column == 0)
                if column == 0:
                    axes.set_ylabel(label)
                if row % len(measures) == 0:
                    axes.set_title(run, fontsize=10, loc="left")
                if row % len(measures) == len(measures) - 1:
                    axes.set_xlabel("epoch")
        lines = {text: line for axes in panels.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(list(lines.values()), list(lines), loc="outside lower left", ncols=2 if width > 5.6 else 1, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
