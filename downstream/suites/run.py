"""The verb ``run``: a suite from its file to its table, here, beside others under ``torchrun``, or sent to SLURM."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from downstream.folders import slug
from downstream.suites.cells import cells_of, load_suite
from downstream.suites.show import show_dry_run, show_results
from downstream.suites.work import work
from mte_bench.device import Place, refuse_shared
from mte_bench.errors import UserError


def run_suite(
    suite: str,
    *,
    checkpoints: Sequence[str] | None = None,
    data: str | None = None,
    out: str | None = None,
    slurm: Sequence[str] | None = None,
    json: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> bool:
    """Do a suite, or show or submit it; returns whether a cell failed. ``options`` are fields of ``Request``.

    Under ``torchrun`` the processes take cells side by side; the first waits for the others and shows the table, and it
    alone reports failures, since the launcher ends all processes when one does.
    """
    refuse_shared(options.get("device", "auto"))
    loaded = load_suite(suite, checkpoints or (), data)
    folder = Path(out or Path("runs") / (slug(Path(suite).stem) + ("-smoke" if options.get("smoke") else "")))
    share = Place.of_this_process()
    for name in ("RANK", "WORLD_SIZE"):  # within its cells a process is alone: nothing there waits for the others
        os.environ.pop(name, None)
    cells = cells_of(loaded, suite, folder, options)
    if slurm:
        if dry_run or json or share.processes > 1:
            raise UserError("--slurm submits and shows nothing: leave out --dry-run, --json and torchrun")
        from downstream.suites.submit import submit

        submit(loaded, suite, folder, options, slurm)
        return False
    first = share.rank == 0
    if dry_run:
        if first:
            show_dry_run(cells, json)
        return False
    results = work(cells, share, wait=first)
    if first:
        show_results(results, json)
    return first and any(result.status == "failed" for result in results)
