"""What the analyses of several runs share: they read records and curves, and end as a record, a table and a picture."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mte_bench.console import log, show_json, show_table
from mte_bench.errors import UserError
from mte_bench.files import hash_of, write_json
from mte_bench.records import RECORD_NAME, Cost, Metric, Protocol, Record, Subject, make_record, require_place, write_record
from reports.collect import Collection, Entry, collect


def pretrained(runs: Sequence[str]) -> tuple[Collection, list[Entry]]:
    """Every record below ``runs``, and those of pre-training among them.

    Raises ``UserError`` for a path without a finished run below, and for runs on different images.
    """
    for run in runs:
        if not collect([run]).of("pretrain"):
            raise UserError(f"{run}: holds no record of a finished pre-training; give run folders of `pretrain`")
    collection = collect(runs)
    entries = collection.of("pretrain")
    for entry in entries[1:]:
        if entry.record.data.fingerprint != entries[0].record.data.fingerprint:
            raise UserError(
                f"{entry.folder}: was trained on other images ({entry.record.data.source}) than {entries[0].folder} "
                f"({entries[0].record.data.source}); give runs on the same ones"
            )
    return collection, entries


def conclude(
    task: str,
    entries: Sequence[Entry],
    metrics: Mapping[str, Metric],
    values: Mapping[str, Any],
    draw: Callable[[Path], None],
    details: Mapping[str, Any],
    began: float,
    out: str | None,
) -> tuple[Path, Record]:
    """Write picture, values and, last, the record of ``task`` on the runs ``entries`` into ``out`` (default: under ``runs``)."""
    subject = Subject.ensemble([entry.record.subject for entry in entries])
    folder = Path(out or Path("runs") / f"{task}-{hash_of(subject.sha256)[:6]}")
    files = {"picture": f"{task}.png", "values": f"{task}.json"}
    require_place(folder, task)
    draw(folder / files["picture"])
    write_json(folder / files["values"], values)
    record = make_record(
        task=task,
        protocol=Protocol(name=task),
        subject=subject,
        data=entries[0].record.data,
        metrics=dict(metrics),
        cost=Cost(seconds=round(time.monotonic() - began, 3)),
        files=files,
        details=dict(details),
    )
    write_record(folder, record)
    return folder, record


def show(folder: Path, record: Record, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], json: bool) -> None:
    """The record as JSON or ``rows`` as a table on stdout; where things lie on stderr."""
    if json:
        show_json(record)
    else:
        show_table(title, columns, rows)
    for key, file in record.files.items():
        log(f"{key}: {folder / file}")
    log(f"record: {folder / RECORD_NAME}")
