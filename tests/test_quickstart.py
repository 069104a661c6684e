"""The whole path in one command, as short as it can be."""

import json
import re
from pathlib import Path

import pytest

from mte_bench import cli
from mte_bench.records import find_records, read_record


def test_quickstart_goes_from_nothing_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart", "--smoke"]) == 0
    shown = capsys.readouterr()
    for name in ("random encoder", "DINO", "DINO+MTE"):  # the result, and nothing else, is on stdout
        assert re.search(rf"│ {re.escape(name)} +│ +\d+\.\d \[", shown.out)
    assert "mte-bench pretrain" not in shown.out and "13/13" in shown.err

    folder = tmp_path / "quickstart-smoke"
    page = (folder / "report" / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(pictures) >= 5 and all((folder / "report" / picture).stat().st_size > 1000 for picture in pictures)

    records = {path: read_record(path) for path in find_records([folder])}
    assert sorted(record.task for record in records.values()) == sorted(
        [*["pretrain"] * 2, *["knn"] * 3, *["linear"] * 3, *["attention"] * 2, "cka", "pooling"]
    )
    for record in records.values():  # each names the command that repeats it
        assert record.command.startswith("mte-bench ") and record.command.split()[1] in (record.task, "analyze")

    # Once more: nothing is trained again, the features come from the cache, the numbers are the same.
    state = (folder / "dino-mte" / "training.pt").stat().st_mtime_ns
    assert cli.main(["quickstart", "--smoke", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert state == (folder / "dino-mte" / "training.pt").stat().st_mtime_ns
    assert len(again) == 6 and all(all(record["details"]["features_cached"]) for record in again)
    (before,) = (record for path, record in records.items() if path.parent.name.startswith("knn") and record.subject.mte)
    assert again[2]["metrics"]["top1_k10"]["value"] == before.metrics["top1_k10"].value
