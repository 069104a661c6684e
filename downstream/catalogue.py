"""What this package offers to ``mte-bench list``: tasks and protocols."""

from pathlib import Path
from typing import Any

PROTOCOLS = Path(__file__).parent / "protocols"


def tasks() -> list[dict[str, Any]]:
    """The evaluations and analyses, and the command of each."""
    from downstream import commands
    from downstream.analysis.commands import analyze

    analyses = [command.callback for command in analyze.registered_commands if command.callback]
    offered = [("", commands.knn), ("", commands.linear), *(("analyze ", function) for function in analyses)]
    named = [(group, function.__name__.replace("_", "-"), function) for group, function in offered]
    return [
        {"name": name, "command": f"mte-bench {group}{name}", "about": _first_line(function.__doc__)}
        for group, name, function in named
    ]


def protocols() -> list[dict[str, Any]]:
    """The protocols that come with the program; ``about`` is the first line of each file's opening comment."""
    from mte_bench.settings import load_yaml, names_in

    rows = []
    for name in names_in(PROTOCOLS):
        values = load_yaml(name, PROTOCOLS, "protocol")
        with open(PROTOCOLS / f"{name}.yaml", encoding="utf-8") as file:
            about = file.readline().removeprefix("#").strip()
        rows.append({"name": name, "task": values["task"], "version": values["version"], "about": about})
    return rows


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
