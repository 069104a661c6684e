"""Suites: every cell once and as by itself, whatever fails, is killed or runs beside it."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from downstream import features, job
from downstream.suites import cells as cells_module
from downstream.suites.cells import cells_of, load_suite
from mte_bench.cli import main, run
from mte_bench.records import Record, find_records, read_record
from suites import CKA, SWIN, TASKS, VIT, cells, do, facts, stamps, suite_folder, write


@pytest.fixture
def place(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return suite_folder(tmp_path, folder, monkeypatch)


def test_every_cell_is_what_its_own_command_gives(place: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place, folder, tasks=[*TASKS, CKA])
    assert do(place) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("checkpoint", "A", "seed-1", "knn top1_k5", "retrieval map", "retrieval recall_1"))
    first = facts(place)
    assert len(first) == 8
    for cell in cells(place):
        typed = read_record(cell.folder / "record.json").command
        assert (typed.startswith(f"mte-bench {cell.offer.verb} ") and "--set" in typed) or cell.task == "retrieval"
        alone = run([*cell.words, "--out", str(place / "alone" / cell.folder.relative_to(place / "out"))])
        assert f"{alone.metrics[next(iter(alone.metrics))].value:.2f}" in table
    assert facts(place, "alone") == first


def test_one_pass_gives_all_features_and_a_checkpoint_is_opened_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, opened = [], []
    encode, open_checkpoint = features._encode, job.open_checkpoint
    monkeypatch.setattr(features, "_encode", lambda stores, *rest: (passes.append(sorted(stores)), encode(stores, *rest)))
    monkeypatch.setattr(job, "open_checkpoint", lambda text, **how: (opened.append(text), open_checkpoint(text, **how))[1])
    assert do(place) == 0
    assert passes == [["global", "patch-mean"]] * 4  # two checkpoints, two splits
    assert opened == [VIT, f"{VIT}&seed=1"]


def test_what_is_done_is_not_done_again_unless_something_that_counts_has_changed(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed() -> list[str]:
        before = stamps(place)
        assert do(place) == 0
        return sorted(path.parent.name.split("-")[0] for path, stamp in stamps(place).items() if before.get(path) != stamp)

    assert len(changed()) == 6 and changed() == []
    assert "already done" in capsys.readouterr().err
    for recall in (3, 4):  # the same folder, other settings
        write(place, folder, tasks=[*TASKS, {"task": "retrieval", "set": {"recall": [1, recall]}, "name": "mine"}])
        assert changed() == ["mine"] * 2
    write(place, folder, checkpoints=[{"name": "A", "checkpoint": VIT}])
    assert changed() == []
    monkeypatch.setattr(job, "__version__", "9")
    monkeypatch.setattr("mte_bench.records.__version__", "9")
    assert changed() == ["knn", "linear", "retrieval"]
    assert do(place, "--precision", "bfloat16") == 0 and changed() == ["knn", "linear", "retrieval"]


def test_other_weights_or_data_of_the_same_name_are_measured_anew(place: Path, folder: Path) -> None:
    import shutil

    from mte_bench.encoders.checkpoint import open_checkpoint, save_encoder

    data = place / "data"
    shutil.copytree(folder, data)
    save_encoder(place / "encoder.safetensors", open_checkpoint(VIT).encoder, {})
    write(place, data, checkpoints=["encoder.safetensors"], tasks=[TASKS[0]])
    assert do(place) == 0
    (before,) = stamps(place).items()
    save_encoder(place / "encoder.safetensors", open_checkpoint(f"{VIT}&seed=1").encoder, {})
    assert do(place) == 0
    (other,) = stamps(place).items()
    assert other[0] == before[0] and other[1] != before[1]
    (data / "val" / "a" / "0.png").unlink()
    assert do(place) == 0
    assert next(iter(facts(place).values()))["data"]["images"] == {"train": 34, "val": 7}


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = [{"name": "Swin", "checkpoint": SWIN}, "no/such.pth", {"name": "A", "checkpoint": VIT}]
    write(place, folder, checkpoints=checkpoints, tasks=["attention", TASKS[0], {"task": "surprise", "name": "surprise"}])
    offer(monkeypatch, "surprise")
    assert do(place) == 1
    shown = capsys.readouterr()
    knn = cells(place)[1].folder.name
    assert sorted(facts(place)) == sorted([f"A/{knn}", f"Swin/{knn}", f"A/attention-{folder.name}"])
    assert "6 of 9 cells failed" in shown.err and "ZeroDivisionError: on purpose (a bug" in shown.err
    assert (
        "  such, attention, knn: error: no/such.pth" in shown.err
        and "Swin, attention: error: " in shown.err
        and "has no CLS token" in shown.err
    )
    assert "no/such.pth: no such checkpoint" in shown.err
    assert shown.out.count("failed") == 6
    failed = [f"{path.parent.parent.name}/{path.parent.name}" for path in (place / "out").rglob("error.txt")]
    assert len(failed) == 6 and f"Swin/attention-{folder.name}" in failed and "A/surprise" in failed
    Surprise.mended = True
    try:
        assert do(place, "--json") == 1
    finally:
        Surprise.mended = False
    results = json.loads(capsys.readouterr().out)
    assert [result["status"] for result in results] == ["failed", "found", "done", *["failed"] * 3, "found", "found", "done"]
    assert results[0]["error"].endswith("has no CLS token whose attention could be shown") and results[0]["record"] is None
    assert Record.check(results[2]["record"], "printed").task == "knn"
    assert not (Path(results[2]["folder"]) / "error.txt").exists()


class Surprise:
    """A task of another package: k-NN that divides by zero until it is mended."""

    from downstream.knn import KNN_TASK

    name, default, verb, protocol, mended = "knn", "knn", "knn", KNN_TASK.protocol, False

    def job(self, request: Any, opened: Any) -> Any:
        if not self.mended:
            raise ZeroDivisionError("on purpose")
        from dataclasses import replace

        return self.KNN_TASK.job(replace(request, set=("k=[3]",)), opened)


SURPRISE = Surprise()


def offer(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let another package offer tasks, one of which cannot be imported."""
    own = cells_module.entry_points(group=cells_module.GROUP)
    added = [EntryPoint(name, f"{__name__}:SURPRISE", cells_module.GROUP) for name in names]
    monkeypatch.setattr(
        cells_module, "entry_points", lambda group: [*own, *added, EntryPoint("broken", "no_such_module:TASK", group)]
    )


def test_an_ensemble_is_one_checkpoint_and_no_subject_of_an_analysis(
    place: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place, folder, checkpoints=[{"checkpoint": [VIT, f"{VIT}&seed=1"], "name": "both"}], tasks=[TASKS[0], CKA])
    assert do(place) == 1
    (found,) = facts(place).values()
    assert len(found["subject"]["parts"]) == 2
    assert "analyze cka: looks into one encoder, not into the 2 of an ensemble" in capsys.readouterr().err


def test_a_dry_run_says_what_is_left_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    assert do(place, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert sorted(place.rglob("*")) == before
    assert [row["status"] for row in plan["cells"]] == ["to do"] * 6
    rows = plan["cells"]
    shared = [max(row["feature_seconds"] for row in rows[start : start + 3]) for start in (0, 3)]
    assert plan["seconds"] == pytest.approx(sum(shared) + sum(row["task_seconds"] for row in rows))
    assert do(place) == 0
    capsys.readouterr()
    assert do(place, "--dry-run") == 0
    shown = capsys.readouterr()
    assert shown.out.count("done") == 7 and "0 of 6 cells to do, about 0 s" in shown.err  # once in the title


def test_a_task_can_be_for_some_checkpoints_only(place: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place, folder, tasks=[TASKS[0], {"task": "retrieval", "only": ["A"]}])
    assert do(place) == 0
    assert [name.partition("-")[0] for name in facts(place)] == ["A/knn", "A/retrieval", "random"]
    assert capsys.readouterr().out.splitlines()[-2].endswith("– │")


def test_checkpoints_and_data_of_the_command_line_replace_those_of_the_file(place: Path, folder: Path) -> None:
    write(place, Path("/no/such/data"), tasks=["retrieval"])
    assert main(["run", "suite.yaml", f"{VIT}&seed=2", "--data", str(folder), "--device", "cpu", "--workers", "0"]) == 0
    (record,) = find_records(["runs"])
    assert record.parts[:2] == ("runs", "suite") and read_record(record).subject.seed == 2
    assert main(["run", "frozen", VIT, "--data", str(folder), "--smoke", "--device", "cpu", "--workers", "0"]) == 0
    assert len(find_records(["runs/frozen-smoke"])) == 3


@pytest.mark.parametrize("name", ["frozen", "scenes-random"])
def test_the_suites_of_the_program_are_sound(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    suite = load_suite(name, () if name == "scenes-random" else (VIT,), "scenes")
    assert len(cells_of(suite, name, Path("out"), {})) == len(suite.checkpoints) * len(suite.tasks) > 2
    assert main(["list", "suites", "--json"]) == 0
    row = next(row for row in json.loads(capsys.readouterr().out) if row["name"] == name)
    assert row["about"] and row["tasks"].startswith("knn, linear, retrieval")


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    assert main(["run", "scenes-random", "--out", str(tmp_path), "--cache", str(tmp_path / "cache"), "--device", "cpu"]) == 0
    assert len(find_records([tmp_path])) == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": []}, "unknown setting 'task' (did you mean 'tasks'?)"),
        ({"tasks": []}, "tasks: "),
        ({"tasks": ["knnn"]}, "tasks.0: there is no task 'knnn' (did you mean 'knn'?)"),
        ({"tasks": ["knn", {"task": "knn", "protcol": "knn"}]}, "unknown setting 'tasks.1.protcol' (did you mean 'protocol'?)"),
        ({"tasks": ["knn", {"task": "knn", "protocol": "knm"}]}, "tasks.1: no protocol named 'knm' (did you mean 'knn'?)"),
        ({"tasks": [{"task": "knn", "set": {"temprature": 1}}]}, "tasks.0: protocol knn: unknown setting 'temprature' (did you"),
        ({"tasks": [{"task": "knn", "data": "scense:"}]}, "tasks.0: source 'scense:': unknown kind"),
        ({"tasks": ["broken"]}, "task 'broken' cannot be imported (No module named 'no_such_module')"),
        ({"tasks": ["knn", "knn"]}, "tasks: 'knn-"),
        ({"tasks": [{"task": "knn", "only": ["AA"]}]}, "tasks.0.only: no checkpoint is named 'AA' (did you mean 'A'?)"),
        ({"data": None}, "tasks.0: has no data; give the suite or the task a source, or name one by --data"),
        ({"checkpoints": []}, "lists no checkpoints; name some: mte-bench run"),
        ({"checkpoints": [{"name": "A", "checkpont": "x"}]}, "checkpoints.0.checkpont"),
        ({"checkpoints": ["a/dino.pth", "b/dino.pth"]}, "checkpoints: 'dino' is there twice; give one of them another name"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(
    changes: dict[str, Any],
    expected: str,
    place: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_line: Callable[..., str],
) -> None:
    offer(monkeypatch)
    write(place, folder, **changes)
    assert expected in error_line("run", "suite.yaml")
    assert not (place / "runs").exists()


def test_mistakes_on_the_command_line(place: Path, error_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no suite named 'frozn' (did you mean 'frozen'?)" in error_line("run", "frozn")
    for given, expected in {
        "partitoin=gpu": "unknown key 'partitoin' (did you mean 'partition'?)",
        "partition": "--slurm partition: write it as key=value",
        "workers=0": "--slurm workers=0: a whole number from 1",
        "workers=yes": "--slurm workers=True: a whole number from 1",
        "max_num_timeout=-1": "--slurm max_num_timeout=-1: a whole number from 0",
        "cluster=moon": "--slurm cluster=moon: slurm or local",
        "timeout_min=soon": '--slurm: Parameter "timeout_min" expected type',
    }.items():
        local = ["--slurm", "cluster=local"] if "cluster" not in given else []
        assert expected in error_line("run", "suite.yaml", "--out", "out", *local, "--slurm", given)
    monkeypatch.setenv("PATH", str(place))  # nor is there a SLURM where there is one
    assert "cluster=local does without SLURM" in error_line("run", "suite.yaml", "--slurm", "workers=2")
    (place / "file").touch()
    assert "file/A/knn-" in (line := error_line("run", "suite.yaml", "--out", "file")) and "choose another --out" in line


def test_slurm_without_submitit_says_what_to_install(
    place: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'mte-bench[slurm]'" in error_line("run", "suite.yaml", "--slurm", "workers=2")
