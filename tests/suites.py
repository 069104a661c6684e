"""A small suite in a folder of its own, and what it leaves: for the tests of suites."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from downstream.suites.cells import Cell, cells_of, load_suite
from mte_bench.cli import main
from mte_bench.records import find_records, read_record

VIT = "random:vit_tiny_patch16_224?image_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2"
SWIN = "random:swin_tiny_patch4_window7_224?image_size=32&window_size=4&embed_dim=12&depths=[1,1,1,1]&num_heads=[1,1,2,2]"
TASKS: list[Any] = [
    {"task": "knn", "set": {"k": [5, 10]}},
    {"task": "linear", "set": {"epochs": 2, "feature": "patch-mean"}},
    {"task": "retrieval", "metrics": ["map", "recall_1"]},
]
CKA = {"task": "cka", "set": {"count": 8}}


def suite_folder(place: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``place``, to work in, with a suite of two checkpoints on the images of ``source``."""
    monkeypatch.chdir(place)
    write(place, source)
    return place


def write(place: Path, source: Path, **changes: Any) -> None:
    suite = {"checkpoints": [{"name": "A", "checkpoint": VIT}, f"{VIT}&seed=1"], "data": str(source), "tasks": TASKS}
    (place / "suite.yaml").write_text(yaml.safe_dump({**suite, **changes}))


def options(place: Path) -> dict[str, Any]:
    return {"workers": 0, "device": "cpu", "cache": str(place / "cache")}


def do(place: Path, *arguments: str) -> int:
    given = [word for key, value in options(place).items() for word in (f"--{key}", str(value))]
    return main(["run", str(place / "suite.yaml"), "--out", str(place / "out"), *given, *arguments])


def cells(place: Path, out: str = "out") -> list[Cell]:
    name = str(place / "suite.yaml")
    return cells_of(load_suite(name), name, place / out, options(place))


def facts(place: Path, out: str = "out") -> dict[str, Any]:
    """Of each record, by the place of its cell, all that does not tell when and how fast it was made."""
    found = {}
    for path in find_records([place / out]):
        values = read_record(path).model_dump(mode="json", exclude={"cost", "created", "command", "environment"})
        for key in ("features_cached", "data_wait"):
            values["details"].pop(key, None)
        found[path.parent.relative_to(place / out).as_posix()] = values
    return found


def stamps(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (place / "out").rglob("record.json")}
