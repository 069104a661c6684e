"""Record files as they lie about: each is found once, and what cannot be read is named, never waited for or passed over."""

import json
import os
from pathlib import Path

import pytest

from made_up import evaluation, subject
from mte_bench import cli
from mte_bench.errors import UserError
from mte_bench.records import find_records, read_record
from reports.report import write_report


def left_by_hand(runs: Path) -> list[str]:
    """Puts what no command leaves below ``runs``; returns the names of the folders."""
    text = (runs / "good" / "record.json").read_text()
    places = {name: runs / name / "record.json" for name in ("nowhere", "circle", "pipe", "folder", "mark", "far", "none")}
    for path in places.values():
        path.parent.mkdir()
    places["nowhere"].symlink_to("/nowhere/record.json")
    places["circle"].symlink_to("record.json")
    os.mkfifo(places["pipe"])
    places["folder"].mkdir()
    places["mark"].write_text("\ufeff" + text, encoding="utf-8")
    places["far"].write_text(f'{{"schema_version": {"9" * 5000}}}')
    places["none"].write_text("")
    return sorted(places)


def test_what_is_no_readable_file_is_named_and_does_not_hold_up_the_report(tmp_path, capsys):
    evaluation(tmp_path / "runs" / "good", "knn", subject(), 0.6)
    names = left_by_hand(tmp_path / "runs")
    written = write_report([tmp_path / "runs"], tmp_path / "report")
    assert written.summary["records"] == 1
    assert [line.partition("/record.json: ")[0] for line in written.unusable] == [f"../runs/{name}" for name in names]
    page = (tmp_path / "report" / "report.md").read_text()
    assert f"{len(names)} files could not be used" in page and "no regular file" in page
    base = tmp_path / "base.json"
    assert cli.main(["check", str(tmp_path / "runs"), "--baseline", str(base), "--update"]) == 0
    said = capsys.readouterr().err
    assert f"{len(names)} files left out" in said and all(f"runs/{name}/record.json: " in said for name in names)
    assert cli.main(["check", str(tmp_path / "runs"), "--baseline", str(base)]) == 0


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    evaluation(tmp_path / "open", "knn", subject(), 0.6)
    (tmp_path / "shut" / "run").mkdir(parents=True)
    look = os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_records([tmp_path]) == [tmp_path / "open" / "record.json", tmp_path / "shut" / "record.json"]


def test_a_record_is_found_once_by_whatever_way(tmp_path, monkeypatch):
    evaluation(tmp_path / "a" / "b", "knn", subject(), 0.6)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "record.json").symlink_to("../a/b/record.json")
    monkeypatch.chdir(tmp_path)
    real = tmp_path / "a" / "b" / "record.json"
    assert find_records(["a", tmp_path, "a/b/record.json", "link", "c"]) == [real]
    assert read_record(real).metrics == read_record("link/b/record.json").metrics
    with pytest.raises(UserError, match="absent: no such run folder"):
        find_records(["absent"])


@pytest.mark.parametrize("more", [{"schema_version": 99}, {"surprise": 1}, {"metrics": {"top1_k10": {"value": "high", "n": 4}}}])
def test_records_of_another_version_or_kind_are_refused_with_their_name(tmp_path, more):
    evaluation(tmp_path, "knn", subject(), 0.6)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    with pytest.raises(UserError, match=r"record\.json: .*(schema 99|surprise|high)"):
        read_record(path)
