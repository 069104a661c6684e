"""How fast runs get better: the metric that was monitored against epochs and against training time (MTE, Fig. 2).

Read from the curves of the runs. Seeds of a recipe are one line, with each seed thin beside it; a run with MTE is compared with
the plain run of the same recipe: when does it reach what that one ends with?
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mte_bench.console import log
from mte_bench.errors import UserError, did_you_mean
from mte_bench.naming import architecture_title, data_title, slug
from mte_bench.plotting import picture
from mte_bench.records import Metric, Record
from reports.collect import Collection, Entry, plain_hash
from reports.curves import Line, Points, curve_lines, draw_line, label_ends, lines_of, mean_of
from reports.joint import conclude, pretrained, show
from reports.runs import device, duration

NAMES = {"knn_top1": "k-NN top-1 while training (%)", "classifier_top1": "top-1 of the classifier while training (%)"}
MEASURED, SPREAD = "measured", "record's, even over epochs"


@dataclass(frozen=True)
class Monitored:
    """A run's metric along training."""

    entry: Entry
    points: Points
    """``n 3``: epochs, seconds of training, value."""
    timed: bool
    """Whether the curves tell the seconds; otherwise the run's whole time, pauses too, is spread evenly over its epochs."""


@dataclass(frozen=True)
class Reached:
    """When a line with MTE reaches what the plain line of the same recipe ends with."""

    plain: Line[Monitored]
    target: float
    mean: tuple[float, float] | None
    """Epoch and seconds, between two looks on a straight line; None if it never does."""
    seeds: tuple[tuple[float, float], ...]
    """The same of each seed that does."""


def convergence(runs: Sequence[str], metric: str, out: str | None, json: bool) -> Record:
    """Compare ``runs`` by the ``metric`` of their curves, write the record with its picture, and show the table."""
    if metric not in NAMES:
        raise UserError(f"--metric {metric}: unknown{did_you_mean(metric, NAMES)}")
    began = time.monotonic()
    collection, entries = pretrained(runs)
    lines = lines_of([(entry, monitored(entry, metric, collection)) for entry in entries])
    for item in collection.unusable:
        log(f"left out: {item.path}: {item.reason}")
    found = [reached(line, lines) for line in lines]
    machines = list(dict.fromkeys(device(entry.record) for entry in entries))
    if len(machines) > 1:
        log(f"times are of different devices and do not compare: {'; '.join(machines)}")
    data = entries[0].record.data
    title = f"{data_title(data.source)}, {architecture_title(entries[0].record.subject)}"
    folder, record = conclude(
        "convergence",
        entries,
        _metrics(metric, lines, found),
        {"metric": metric, "lines": [_values(line, one) for line, one in zip(lines, found, strict=True)]},
        partial(draw, lines=lines, found=found, label=NAMES[metric], title=f"Convergence on {title}"),
        {"metric": metric, "n": "of every metric counts runs", "devices": machines},
        began,
        out,
    )
    columns = ["method", "runs", "epochs", "ends with", "over seeds", "time", "time is", "reaches plain's end", "after", "by"]
    show(folder, record, f"{title}: {metric}", columns, [_row(*both) for both in zip(lines, found, strict=True)], json)
    return record


def monitored(entry: Entry, metric: str, collection: Collection) -> Monitored:
    """The curve of ``metric`` in a run. Raises ``UserError`` for a run that has none."""
    lines = list(curve_lines(entry, collection.unusable))
    looks = [line for line in lines if np.isfinite(line.get(metric, np.nan))]
    if not looks:
        raise UserError(f"{entry.folder}: its curves have no {metric}; pre-train with --set knn_every=1")
    timed = all("seconds" in line for line in looks)
    whole = entry.record.cost.seconds / (entry.record.subject.epochs or lines[-1]["epoch"])
    points = {line["epoch"]: (line["epoch"], line["seconds"] if timed else whole * line["epoch"], line[metric]) for line in looks}
    return Monitored(entry, np.array([points[epoch] for epoch in sorted(points)]), timed)


def crossing(points: Points, target: float) -> tuple[float, float] | None:
    """Epoch and seconds at which ``points`` (``n 3``) first reach ``target``, on the straight line from the look before.

    None if they never do.
    """
    at_least = np.flatnonzero(points[:, 2] >= target)
    if not len(at_least):
        return None
    last = int(at_least[0])
    if last == 0:
        return float(points[0, 0]), float(points[0, 1])
    before, after = points[last - 1], points[last]
    epoch, seconds, _ = before + (target - before[2]) / (after[2] - before[2]) * (after - before)
    return float(epoch), float(seconds)


def reached(line: Line[Monitored], lines: Sequence[Line[Monitored]]) -> Reached | None:
    """When ``line`` reaches what its plain one among ``lines`` ends with; None where there is no such pair."""
    if not line.mte:
        return None
    plain = next((other for other in lines if not other.mte and _recipe(other) == _recipe(line)), None)
    if plain is None:
        return None
    target = float(np.mean([run.points[-1, 2] for run in plain.runs]))
    seeds = [crossing(run.points, target) for run in line.runs]
    return Reached(plain, target, crossing(mean_points(line), target), tuple(one for one in seeds if one is not None))


def mean_points(line: Line[Monitored]) -> Points:
    """The mean over the seeds of ``line`` at the epochs that all have, ``n 3``."""
    return mean_of([run.points for run in line.runs])


def _recipe(line: Line[Monitored]) -> str | None:
    return plain_hash(line.runs[0].entry.record.protocol.settings)


def _ends(line: Line[Monitored]) -> list[float]:
    return [float(run.points[-1, 2]) for run in line.runs]


def _spread(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _metrics(metric: str, lines: Sequence[Line[Monitored]], found: Sequence[Reached | None]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for line, one in zip(lines, found, strict=True):
        name, n = slug(line.label), len(line.runs)
        if one is not None and one.mean is not None:
            epochs, seconds = one.mean
            metrics[f"epochs_to_plain_{name}"] = Metric(value=epochs, n=n)
            metrics[f"hours_to_plain_{name}"] = Metric(value=seconds / 3600, n=n)
    return metrics | {
        f"{metric}_{slug(line.label)}": Metric(value=float(np.mean(_ends(line))), n=len(line.runs)) for line in lines
    }


def _values(line: Line[Monitored], one: Reached | None) -> dict[str, Any]:
    return {
        "label": line.label,
        "runs": [
            {
                "checkpoint": run.entry.record.subject.checkpoint,
                "seed": run.entry.record.subject.seed,
                "seconds": MEASURED if run.timed else SPREAD,
                "epoch_seconds_value": run.points.tolist(),
            }
            for run in line.runs
        ],
        "reaches_plain": one
        and {"plain": one.plain.label, "value": one.target, "epoch_seconds": one.mean, "of_each_seed": one.seeds},
    }


def _row(line: Line[Monitored], one: Reached | None) -> list[object]:
    ends, spread = _ends(line), _spread(_ends(line))
    seconds = float(np.mean([run.points[-1, 1] for run in line.runs]))
    row: list[object] = [
        line.label,
        len(line.runs),
        f"{line.runs[0].points[-1, 0]:g}",
        float(np.mean(ends)),
        None if spread is None else f"± {spread:.2f}",
        duration(seconds),
        MEASURED if all(run.timed for run in line.runs) else SPREAD,
    ]
    if one is None:
        return [*row, None, None, None]
    if one.mean is None:
        return [*row, "never", None, f"{len(one.seeds)} of {len(line.runs)} runs"]
    epoch, after = one.mean
    several = f" (seeds {min(one.seeds)[0]:.1f} to {max(one.seeds)[0]:.1f})" if len(one.seeds) > 1 else ""
    return [*row, f"epoch {epoch:.1f}{several}", duration(after), f"{len(one.seeds)} of {len(line.runs)} runs"]


def draw(path: Path, lines: Sequence[Line[Monitored]], found: Sequence[Reached | None], label: str, title: str) -> None:
    """Left against epochs, right against time; a ring where a line with MTE is as good as its plain one ends."""
    longest = max(float(run.points[-1, 1]) for line in lines for run in line.runs)
    unit, size = ("hours", 3600) if longest >= 7200 else ("minutes", 60) if longest >= 120 else ("seconds", 1)
    even = not all(run.timed for line in lines for run in line.runs)
    names = ("epoch", f"training time ({unit}{'; ' + SPREAD if even else ''})")
    with picture(path, 8.6 + 0.08 * max(len(line.label) for line in lines), 3.7) as figure:
        for side, axes in enumerate(figure.subplots(1, 2, sharey=True)):
            scale, ends, rings = (size if side else 1), [], 0
            for line, one in zip(lines, found, strict=True):
                runs = [run.points[:, [side, 2]] / (scale, 1) for run in line.runs]
                ends.append((*draw_line(axes, line, runs, mean_points(line)[:, [side, 2]] / (scale, 1)), line))
                if one is not None and one.mean is not None:
                    x, end = one.mean[side] / scale, np.mean([run.points[-1, side] for run in one.plain.runs]) / scale
                    axes.plot([x, end], [one.target] * 2, color="0.5", linewidth=1)
                    axes.plot(x, one.target, "o", markersize=11, markerfacecolor="none", markeredgecolor="black")
                    below = (6, -14 - 11 * rings)  # of several, one under the other
                    axes.annotate(f"{x:.3g}", (x, one.target), below, textcoords="offset points", fontsize=9, color=line.colour)
                    rings += 1
            axes.set_xlabel(names[side])
            axes.set_xlim(left=0)
            axes.xaxis.get_major_locator().set_params(integer=not side)
            axes.margins(y=0.08)
            if side:
                label_ends(axes, ends)
            else:
                axes.set_ylabel(label)
        figure.suptitle(f"{title}\nthin: single seeds; ring: as good as the plain run ends", x=0.01, ha="left", fontsize=10)
