"""A suite sent to SLURM: one array job whose workers take cells as any other process does (``work``).

submitit writes the job and reads it on the other side. Its executor for processes of this machine (``cluster=local``)
does the same without SLURM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from downstream.suites.cells import Suite, cells_of
from downstream.suites.show import show_results
from downstream.suites.work import work
from mte_bench.console import log
from mte_bench.device import Place
from mte_bench.errors import UserError, did_you_mean

GENERIC = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
"""submitit's names for what every kind of cluster has; its others belong to SLURM."""
OWN = {"workers": 1, "cluster": "slurm", "max_num_timeout": 3}
"""The project's own, and what submitit takes before all others: how often a worker that is out of time is queued again."""
LOGS = "slurm"


@dataclass(frozen=True)
class Worker:
    """What each job of the array does; pre-empted or out of time, it is queued again and goes on."""

    suite: Suite
    name: str
    out: str
    options: Mapping[str, Any]
    share: Place

    def __call__(self) -> int:
        """Do what nobody else holds and show what there is then; the number of cells that failed."""
        results = work(cells_of(self.suite, self.name, Path(self.out), self.options), self.share, wait=False)
        show_results(results, as_json=False)
        return sum(result.status == "failed" for result in results)

    def checkpoint(self) -> Any:
        """submitit asks for this before the job is killed: what is to be queued in its place."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(suite: Suite, name: str, out: Path, options: Mapping[str, Any], assignments: Sequence[str]) -> list[Any]:
    """Submit the suite's workers and say where to look; returns submitit's jobs.

    ``assignments`` are ``key=value``: those of ``OWN`` (``cluster`` is slurm or local) and what submitit calls its parameters,
    with or without the prefix ``slurm_``. Raises ``UserError`` for unknown ones and where submitit or SLURM is missing.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--slurm needs the package submitit; install it: pip install 'mte-bench[slurm]'") from error
    own, parameters = _parameters(assignments, submitit.SlurmExecutor._valid_parameters())
    logs = out / LOGS
    try:
        executor = submitit.AutoExecutor(logs, cluster=own["cluster"], slurm_max_num_timeout=own["max_num_timeout"])
        executor.update_parameters(**{"name": f"mte-bench-{out.name}", **parameters})
        workers = [Worker(suite, name, str(out), dict(options), Place(rank, own["workers"])) for rank in range(own["workers"])]
        with executor.batch():
            jobs = [executor.submit(worker) for worker in workers]
    except (RuntimeError, ValueError, NameError, AssertionError, FileNotFoundError) as error:
        raise UserError(f"--slurm: {str(error).splitlines()[0]}; --slurm cluster=local does without SLURM") from error
    log(f"submitted {len(jobs)} workers: {', '.join(job.job_id for job in jobs)}; their logs: {logs}")
    log("the same command without --slurm shows the table when they are done; with --dry-run, how far they are")
    return jobs


def _parameters(assignments: Sequence[str], of_slurm: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The project's own settings, and submitit's parameters under its names."""
    own, parameters = dict[str, Any](OWN), {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--slurm {assignment}: write it as key=value")
        value, key = yaml.safe_load(text), key.removeprefix("slurm_")
        if key in own:
            own[key] = value
        elif key in GENERIC:
            parameters[key] = value
        elif key in of_slurm:
            parameters[f"slurm_{key}"] = value
        else:
            raise UserError(f"--slurm {assignment}: unknown key '{key}'{did_you_mean(key, {*own, *GENERIC, *of_slurm})}")
    for key, least in (("workers", 1), ("max_num_timeout", 0)):
        if not isinstance(own[key], int) or isinstance(own[key], bool) or own[key] < least:
            raise UserError(f"--slurm {key}={own[key]}: a whole number from {least}")
    if own["cluster"] not in ("slurm", "local"):
        raise UserError(f"--slurm cluster={own['cluster']}: slurm or local")
    return own, parameters
