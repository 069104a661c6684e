"""The verbs ``report``, ``compare`` and ``check``, and the analyses of several runs."""

from typing import Annotated, Any

import typer

Runs = Annotated[list[str], typer.Argument(help="Folders (or record.json files); every record below them is read.")]
PretrainingRuns = Annotated[
    list[str], typer.Argument(metavar="RUN", help="Run folders of pretrain, or folders of such; every record below is read.")
]
JointOut = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the record (default: under runs/).")]
NoPictures = Annotated[
    bool,
    typer.Option(
        "--no-pictures-of-images", help="Leave out pictures that show images of the data, except of scenes, which code draws."
    ),
]


def report(
    runs: Runs,
    out: Annotated[str, typer.Option(help="Folder for report.md, .html and .json and for figures/; may be one of RUNS.")],
    no_pictures_of_images: NoPictures = False,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Copy the records with curves, predictions and plots into DIR first, without weights, pictures of images and "
            "paths of this machine, and report on everything in DIR.",
        ),
    ] = False,
    refresh: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="Write it again when records change, until Ctrl-C; the HTML reloads itself."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the summary of all cells as JSON on stdout.")] = False,
) -> Any:
    """Write a report (markdown, HTML and pictures) from the records of runs."""
    from mte_bench.console import log, show_json, show_table
    from mte_bench.errors import UserError
    from mte_bench.naming import data_title
    from reports.live import keep_writing
    from reports.publish import publish_runs
    from reports.report import write_report

    pictures = not (no_pictures_of_images or publish)
    if refresh is not None and publish:
        raise UserError("--publish: a published report is written once; leave out --refresh")
    if refresh is not None:
        keep_writing(runs, out, pictures, refresh)
    if publish:
        log(f"{len(publish_runs(runs, out))} records copied into {out}")
        runs = [out]
    written = write_report(runs, out, pictures)
    for line in written.unusable:
        log(f"left out: {line}")
    if json:
        show_json(written.summary)
    else:
        for part in written.sections:
            columns = ["method", "architecture", "epochs", *(column.title for column in part.columns)]
            rows = [
                [row.title, row.architecture, row.epochs, *(cell.value and cell.value.value for cell in cells)]
                for row, cells in part.cells
            ]
            show_table(f"{data_title(part.data.record.data.source)}, {part.unit.lower()}", columns, rows)
    count = f", {len(written.unusable)} files left out" if written.unusable else ""
    log(f"{written.page} and {written.page.with_suffix('.html').name} ({written.summary['records']} records{count})")
    return written


def convergence(
    runs: PretrainingRuns,
    metric: Annotated[str, typer.Option(help="Of the curves: knn_top1, or classifier_top1 of supervised runs.")] = "knn_top1",
    out: JointOut = None,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")] = False,
) -> Any:
    """How fast runs get better: the monitored metric against epochs and time, and when +MTE reaches plain's end."""
    from reports.convergence import convergence

    return convergence(runs, metric, out, json)


def token_counts(
    runs: PretrainingRuns,
    out: JointOut = None,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")] = False,
) -> Any:
    """How many auxiliary tokens are enough: the runs' evaluations against their numbers of tokens of each kind."""
    from reports.token_counts import token_counts

    return token_counts(runs, out, json)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run folder, a record.json, or a folder with several records.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; differences are B minus A.")],
    metric: Annotated[str | None, typer.Option(help="Compare this metric (top5, ...) instead of each task's main one.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for compare.md, .html and .json with every class and pictures.")] = None,
    no_pictures_of_images: NoPictures = False,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on stdout.")] = False,
) -> Any:
    """Compare what was measured twice, image by image: what differs, how surely, and in which classes."""
    from mte_bench.console import log, show_json
    from mte_bench.files import require_writable
    from reports.comparison import show, write
    from reports.pairs import as_values, pair

    if out is not None:
        require_writable(out)
    pairs = pair([a], [b], metric)
    if json:
        show_json(as_values(pairs))
    else:
        show(pairs, a, b)
    if out is not None:
        log(str(write(pairs, a, b, out, not no_pictures_of_images)))
    return pairs


def check(
    runs: Runs,
    baseline: Annotated[str, typer.Option(metavar="FILE", help="The baseline, a JSON file that --update writes.")],
    update: Annotated[
        bool, typer.Option("--update", help="Make RUNS the baseline and show what that changes; exit code 0.")
    ] = False,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POINTS|TASK=POINTS", help="How far a cell may fall, instead of what the baseline says; repeatable."
        ),
    ] = None,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result as JUnit XML.")] = None,
    summary: Annotated[
        str | None, typer.Option(metavar="FILE", envvar="GITHUB_STEP_SUMMARY", help="Append the table as markdown.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON on stdout.")] = False,
) -> int:
    """Compare records with a baseline; exit code 1 if a cell fell, is missing or cannot be compared.

    A cell fell if it lost more than the tolerance and McNemar's test finds the loss significant (p < 0.05); mIoU and mAP, if
    the 95 % interval of their change lies below 0.
    """
    from pathlib import Path

    from mte_bench.console import log, show_json
    from reports import gate, gate_output
    from reports.baseline import Baseline, measure, read_baseline, with_tolerances, write_baseline
    from reports.collect import collect

    known = read_baseline(baseline) if not update or Path(baseline).exists() else Baseline()
    collection = collect(runs)
    measured = measure(collection)
    known = with_tolerances(known, tolerance or [], {cell.task for cell in (*known.cells, *measured.cells)})
    for line in (*measured.left_out, *(f"{item.path}: {item.reason}" for item in collection.unusable)):
        log(f"left out: {line}")
    if left_out := len(measured.left_out) + len(collection.unusable):
        log(f"{left_out} file{'s' * (left_out > 1)} left out")
    verdicts = gate.check(known, measured.cells)
    if json:
        show_json(gate_output.values(verdicts))
    else:
        gate_output.show(verdicts, f"{baseline} (percent and percentage points)")
    if junit is not None:
        gate_output.write_junit(junit, verdicts)
    if summary:
        gate_output.append_summary(summary, verdicts)
    if update:
        write_baseline(baseline, known.model_copy(update={"cells": measured.cells}))
        log(f"{baseline}: {len(measured.cells)} cells, {len(known.cells)} before")
        return 0
    log(gate_output.outcome(verdicts))
    return int(any(verdict.status.failed for verdict in verdicts))
