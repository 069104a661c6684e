"""What this package offers to ``mte-bench list``: tasks, protocols and suites."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROTOCOLS = Path(__file__).parent / "protocols"
SUITES = Path(__file__).parent / "suites"


def tasks() -> list[dict[str, Any]]:
    """The evaluations and analyses, and the command of each."""
    from downstream import commands
    from downstream.analysis.commands import analyze

    # patch-knn is the task knn under a protocol of its own.
    analyses = [command.callback for command in analyze.registered_commands if command.callback and command.name != "patch-knn"]
    own = ("knn", "linear", "classify", "finetune", "inat", "retrieval", "ade20k", "coco")
    offered = [*(("", getattr(commands, name)) for name in own), *(("analyze ", function) for function in analyses)]
    named = [(group, function.__name__.replace("_", "-"), function) for group, function in offered]
    return [
        {"name": name, "command": f"mte-bench {group}{name}", "about": _first_line(function.__doc__)}
        for group, name, function in named
    ]


def protocols() -> list[dict[str, Any]]:
    """The protocols that come with the program; ``about`` is the first line of each file's opening comment."""
    return [
        {"name": name, "task": values["task"], "version": values["version"], "about": about}
        for name, values, about in _files(PROTOCOLS, "protocol")
    ]


def suites() -> list[dict[str, Any]]:
    """The suites that come with the program."""
    return [
        {
            "name": name,
            "tasks": ", ".join(task if isinstance(task, str) else task["task"] for task in values["tasks"]),
            "checkpoints": len(values.get("checkpoints", ())) or None,
            "about": about,
        }
        for name, values, about in _files(SUITES, "suite")
    ]


def _files(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, content and opening line of every YAML file in ``folder``."""
    from mte_bench.settings import load_yaml, names_in

    for name in names_in(folder):
        with open(folder / f"{name}.yaml", encoding="utf-8") as file:
            about = file.readline().removeprefix("#").strip()
        yield name, load_yaml(name, folder, kind), about


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
