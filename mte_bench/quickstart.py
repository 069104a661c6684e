"""The ``quickstart`` verb: from nothing to a report that compares DINO with DINO+MTE, on data that the program draws."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mte_bench.records import Metric, Record

RECIPE = "dino_tiny_scenes"
DATA, FEW = "scenes", "scenes?train=160&val=160"


def quickstart(
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of runs and report (default: quickstart).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of both pre-trainings.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    smoke: Annotated[bool, typer.Option("--smoke", help="Two batches of everything, to see that it runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the records of k-NN and linear as JSON.")] = False,
) -> None:
    """Pre-train DINO with and without MTE on embedded data, evaluate both, write a report.

    Every part is an ordinary command, which is shown. The same command again goes on where this one stopped.
    """
    from pathlib import Path

    from mte_bench.console import log, show_json, show_table

    folder = Path(out or ("quickstart-smoke" if smoke else "quickstart"))
    plain, enhanced, data = str(folder / "dino"), str(folder / "dino-mte"), FEW if smoke else DATA
    common = ["--device", device, *(["--smoke"] if smoke else [])]

    def pretrain(run: str, *settings: str) -> list[str]:
        return ["pretrain", RECIPE, "--data", data, "--out", run, "--seed", str(seed), *settings, *common]

    def evaluate(subject: str, *verb: str) -> list[str]:
        return [*verb, subject, "--data", data, *common]

    def of_random(verb: str) -> list[str]:
        return [*evaluate(f"random:{plain}", verb), "--out", str(folder / "random" / verb)]

    # fmt: off
    results = _do_all([
        ("pre-train DINO", pretrain(plain)),
        ("pre-train DINO+MTE", pretrain(enhanced, "--set", "mte=true")),
        ("k-NN, random encoder", of_random("knn")),
        ("k-NN, DINO", evaluate(plain, "knn")),
        ("k-NN, DINO+MTE", evaluate(enhanced, "knn")),
        ("linear, random encoder", of_random("linear")),
        ("linear, DINO", evaluate(plain, "linear")),
        ("linear, DINO+MTE", evaluate(enhanced, "linear")),
        ("CKA between tokens, DINO+MTE", evaluate(enhanced, "analyze", "cka")),
        ("what the pooled tokens look at, DINO+MTE", evaluate(enhanced, "analyze", "pooling")),
        ("attention, DINO", evaluate(plain, "analyze", "attention")),
        ("attention, DINO+MTE", evaluate(enhanced, "analyze", "attention")),
        ("report", ["report", str(folder), "--out", str(folder / "report")]),
    ])
    # fmt: on
    measured = {title: record for title, record in results.items() if title.startswith(("k-NN", "linear"))}
    if json:
        show_json(list(measured.values()))
    else:
        rows = [
            [name, _interval(measured[f"k-NN, {name}"], "top1_k10"), _interval(measured[f"linear, {name}"], "top1")]
            for name in ("random encoder", "DINO", "DINO+MTE")
        ]
        show_table("top-1 accuracy in % on 'scenes' [95 % interval over images]", ["encoder", "k-NN", "linear"], rows)
    log(f"the report: {folder / 'report' / 'report.md'}, and as one page {folder / 'report' / 'report.html'}")
    log("it shows that everything runs, not what MTE is worth: for that see docs/small-runs.md")


def _do_all(parts: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """Run each command as if typed, its output on stderr; what each returned, by title."""
    import shlex
    import sys
    from contextlib import redirect_stdout

    from mte_bench.cli import run
    from mte_bench.console import log
    from mte_bench.records import as_if_typed

    results = {}
    for number, (title, arguments) in enumerate(parts, start=1):
        log(f"\n{number}/{len(parts)}  {title}:  mte-bench {shlex.join(arguments)}")
        with as_if_typed(arguments), redirect_stdout(sys.stderr):
            results[title] = run(arguments)
    return results


def _interval(record: "Record", metric: str) -> str:
    found: Metric = record.metrics[metric]
    low, high = found.ci95 or (found.value, found.value)
    return f"{found.value:.1f} [{low:.1f}, {high:.1f}]"
