"""What a suite shows: a table of checkpoints x metrics, what failed, and what a dry run would do."""

from collections.abc import Sequence
from typing import Any

from downstream.job import Opened
from downstream.suites.cells import Cell
from downstream.suites.work import ERROR_NAME, Result, pass_key
from mte_bench.console import log, show_json, show_table
from mte_bench.errors import UserError, did_you_mean


def show_results(results: Sequence[Result], as_json: bool) -> None:
    """The table, or every cell with its record as JSON, on stdout; what failed on stderr."""
    if as_json:
        show_json([_plain(result) for result in results])
    else:
        _show_table(results)
    failed = [result for result in results if result.status == "failed"]
    if failed:
        log(f"{len(failed)} of {len(results)} cells failed; the same command tries them again:")
    alike: dict[tuple[str, str | None], list[str]] = {}
    for result in failed:
        alike.setdefault((result.cell.checkpoint, result.error), []).append(result.cell.task)
    for (checkpoint, error), tasks in alike.items():
        log(f"  {checkpoint}, {', '.join(tasks)}: error: {error}")


def _plain(result: Result) -> dict[str, Any]:
    return {
        "checkpoint": result.cell.checkpoint,
        "task": result.cell.task,
        "status": result.status,
        "folder": str(result.cell.folder),
        "error": result.error,
        "record": result.record and result.record.model_dump(mode="json"),
    }


def _show_table(results: Sequence[Result]) -> None:
    tasks: dict[str, list[Result]] = {}
    for result in results:
        tasks.setdefault(result.cell.task, []).append(result)
    columns = [(task, metric) for task, own in tasks.items() for metric in _metrics(own)]
    rows = []
    for checkpoint in dict.fromkeys(result.cell.checkpoint for result in results):
        cells = {result.cell.task: result for result in results if result.cell.checkpoint == checkpoint}
        rows.append([checkpoint, *(_value(cells.get(task), metric) for task, metric in columns)])
    show_table("", ["checkpoint", *(f"{task} {metric}".strip() for task, metric in columns)], rows)


def _metrics(results: Sequence[Result]) -> Sequence[str]:
    """Of one task: the metrics that the suite names, else the first of the records; nothing if there is no record."""
    wanted = results[0].cell.metrics
    known = list(dict.fromkeys(metric for result in results if result.record for metric in result.record.metrics))
    for metric in wanted:
        if known and metric not in known:
            log(f"{results[0].cell.task}: there is no metric '{metric}'{did_you_mean(metric, known)}")
    return wanted or known[:1] or [""]


def _value(result: Result | None, metric: str) -> float | str | None:
    if result is None:
        return None
    if result.record is None:
        return result.status
    found = result.record.metrics.get(metric)
    return None if found is None else found.value


def show_dry_run(cells: Sequence[Cell], as_json: bool) -> None:
    """Which cells are done and, measured on a few images of this machine, what the others would take. Writes nothing.

    A pass over the images that several cells share counts once in the sum.
    """
    opened, rows, passes = Opened(), [], dict[str, float]()
    for index, cell in enumerate(cells):
        if index and cell.checkpoint != cells[index - 1].checkpoint:
            opened.forget_checkpoints()
        row: dict[str, Any] = {"checkpoint": cell.checkpoint, "task": cell.task, "status": "to do"}
        try:
            job = cell.offer.job(cell.request, opened)
            if job.found() is not None:
                row["status"] = "done"
            else:
                plan = job.plan()
                row |= {"feature_seconds": plan.get("feature_seconds", 0.0), "task_seconds": plan["task_seconds"]}
                key = "".join(pass_key(wanted) for wanted in job.wanted)
                passes[key] = max(passes.get(key, 0.0), row["feature_seconds"])
                if (cell.folder / ERROR_NAME).exists():
                    row["status"] = "to do (failed before)"
        except UserError as error:
            row |= {"status": "would fail", "error": str(error)}
        rows.append(row | {"folder": str(cell.folder)})
    seconds = sum(passes.values()) + sum(row.get("task_seconds", 0.0) for row in rows)
    if as_json:
        show_json({"cells": rows, "seconds": seconds})
        return
    columns = ("checkpoint", "task", "status", "feature_seconds", "task_seconds", "folder")
    titles = ["checkpoint", "task", "status", "features, s", "task, s", "folder"]
    show_table("nothing done: this is what would be", titles, [[row.get(column) for column in columns] for row in rows])
    for row in rows:
        if "error" in row:
            log(f"{row['checkpoint']}, {row['task']}: error: {row['error']}")
    todo = [row for row in rows if row["status"].startswith("to do")]
    log(f"{len(todo)} of {len(rows)} cells to do, about {seconds:.0f} s in one process; a shared pass counts once")
