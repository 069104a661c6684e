"""How many auxiliary tokens of each kind are enough: what runs are worth against their numbers of tokens (MTE, Fig. 15).

Read from the evaluations of the runs, which must differ in nothing but these numbers and the seed.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mte_bench.errors import UserError
from mte_bench.naming import data_title, flat
from mte_bench.plotting import COLOURS, picture
from mte_bench.records import Metric, Record
from reports.collect import Collection, Entry, images_key, protocol_text
from reports.joint import conclude, pretrained, show
from reports.topics import HEADLINES, headline

Counts = tuple[int, int]
"""Auxiliary CLS tokens and adaptively pooled ones."""

AXES = ("auxiliary CLS tokens", "adaptively pooled tokens")
FREE = ("description", "paper_row", "knn_every", "snapshot_every", "mte.auxiliary_cls", "mte.pooled")
"""Settings that may differ."""
OF_CLS = ("mte.ten", "mte.cls_std", "mte.sight", "mte.cut_attention")
OF_POOLED = ("mte.pool", "mte.kernel")
"""How the names of settings begin that mean nothing where there are no tokens of the kind."""


class Measured(NamedTuple):
    """One evaluation of the runs."""

    title: str
    metric: str
    images: int
    values: dict[Counts, list[float]]
    """In percent, one for each run."""


def token_counts(runs: Sequence[str], out: str | None, json: bool) -> Record:
    """Put ``runs`` in order by their numbers of tokens, write the record with its picture, and show the table."""
    began = time.monotonic()
    collection, entries = pretrained(runs)
    refuse_other_differences(entries)
    measured = evaluations(entries, collection)
    counts = sorted(measured[0].values)
    if len(counts) < 2:
        raise UserError(f"all runs have {counts[0][0]} {AXES[0]} and {counts[0][1]} {AXES[1]}; give runs with other numbers")
    title = f"{entries[0].title.removesuffix('+MTE')} on {data_title(entries[0].record.data.source)}"
    metrics = {
        f"{slugged}_cls{pair[0]}_pooled{pair[1]}": Metric(value=float(np.mean(one.values[pair])), n=one.images)
        for slugged, one in ((one.title.replace(" ", "_").lower(), one) for one in measured)
        for pair in counts
    }
    folder, record = conclude(
        "token-counts",
        entries,
        metrics,
        {one.title: [{"counts": pair, "values": one.values[pair]} for pair in counts] for one in measured},
        partial(draw, measured=measured, title=title),
        {"counts": "auxiliary CLS tokens, adaptively pooled tokens", "metrics": {one.title: one.metric for one in measured}},
        began,
        out,
    )
    columns = [*AXES, "runs"]
    for one in measured:
        columns += [f"{one.title}, %", "over seeds"]
    rows: list[list[object]] = [[*pair, len(measured[0].values[pair])] for pair in counts]
    for row, pair in zip(rows, counts, strict=True):
        for one in measured:
            row += _cells(one.values[pair])
    show(folder, record, f"{title}: top-1 by the number of tokens", columns, rows, json)
    return record


def counts_of(entry: Entry) -> Counts:
    """How many tokens of each kind a run has; a plain one has none."""
    settings: Mapping[str, Any] = entry.record.protocol.settings.get("mte") or {}
    return int(settings.get("auxiliary_cls", 0)), int(settings.get("pooled", 0))


def refuse_other_differences(entries: Sequence[Entry]) -> None:
    """Raise ``UserError`` if two runs differ in a setting that is not a number of tokens, naming runs and settings.

    What is set for a kind of token says nothing about a run that has none of it.
    """
    seen: dict[str, tuple[Entry, Any]] = {}
    for entry in entries:
        for key, value in _settings(entry).items():
            other, known = seen.setdefault(key, (entry, value))
            if known != value:
                raise UserError(
                    f"{entry.folder}: {key} is {value}, and {known} in {other.folder}; "
                    "give runs that differ in mte.auxiliary_cls, mte.pooled and the seed alone"
                )


def _settings(entry: Entry) -> dict[str, Any]:
    cls, pooled = counts_of(entry)
    idle = (() if cls else OF_CLS) + (() if pooled else OF_POOLED) + (() if cls or pooled else ("mte",))
    settings = flat(entry.record.protocol.settings) | {"--precision": entry.record.details.get("precision")}
    return {key: value for key, value in settings.items() if key not in FREE and not key.startswith(idle)}


def evaluations(entries: Sequence[Entry], collection: Collection) -> list[Measured]:
    """The evaluations that all runs have, by the same protocol on the same images. Raises ``UserError`` if there is none."""
    runs = {entry.record.subject.sha256: entry for entry in entries}
    found: dict[tuple[object, ...], dict[str, Record]] = {}
    for entry in collection.evaluations:
        record = entry.record
        if record.subject.sha256 in runs:
            key = (record.task, protocol_text(record), *images_key(record.data))
            found.setdefault(key, {})[record.subject.sha256] = record
    shared = {key: own for key, own in found.items() if len(own) == len(runs)}
    if not shared:
        lacking = {sha for sha in runs if not any(sha in own for own in found.values())}
        named = next((str(runs[sha].folder) for sha in lacking), "")
        reason = f"{named} has no evaluation" if named else "no evaluation (protocol and images) is there of every run"
        raise UserError(f"{reason}; evaluate all of them alike: mte-bench run frozen RUN ... --data SOURCE")
    tasks = [str(key[0]) for key in shared]
    measured = []
    for (task, protocol, *_), own in sorted(shared.items(), key=str):
        values: dict[Counts, list[float]] = {}
        for sha, record in own.items():
            values.setdefault(counts_of(runs[sha]), []).append(record.metrics[headline(record)].value)
        some = next(iter(own.values()))
        name = HEADLINES.get(str(task), ("", str(task)))[1]
        title = f"{name} ({protocol})" if tasks.count(str(task)) > 1 else name
        measured.append(Measured(title, headline(some), some.metrics[headline(some)].n, values))
    return measured


def _cells(values: Sequence[float]) -> list[object]:
    return [float(np.mean(values)), f"± {np.std(values, ddof=1):.2f}" if len(values) > 1 else None]


def draw(path: Path, measured: Sequence[Measured], title: str) -> None:
    """A row for each evaluation, a column for each kind of token; a line for each number of the other kind."""
    counts = sorted(measured[0].values)
    sides = [side for side in (0, 1) if len({pair[side] for pair in counts}) > 1]
    with picture(path, 4.4 * len(sides) + 1.2, 2.7 * len(measured) + 0.9) as figure:
        panels = figure.subplots(len(measured), len(sides), squeeze=False, sharey="row")
        for row, one in zip(panels, measured, strict=True):
            for axes, side in zip(row, sides, strict=True):
                for colour, fixed in zip(COLOURS * len(counts), sorted({pair[1 - side] for pair in counts}), strict=False):
                    line = {pair[side]: one.values[pair] for pair in counts if pair[1 - side] == fixed}
                    for number, values in line.items():
                        axes.plot([number] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.45)
                    means = [float(np.mean(values)) for values in line.values()]
                    axes.plot(list(line), means, color=colour, marker="D", markersize=5.5, linewidth=2, label=str(fixed))
                axes.set_xticks(sorted({pair[side] for pair in counts}))
                axes.set_xlabel(AXES[side])
                axes.legend(title=AXES[1 - side], fontsize=9, title_fontsize=9)
            row[0].set_ylabel(f"{one.title} {'top-1' if one.metric.startswith('top1') else one.metric} (%)")
        figure.suptitle(f"{title}: how many tokens\ndiamonds are means, dots runs", x=0.01, ha="left", fontsize=10)
