"""``check``: a regression is caught, equal predictions never fail, and what cannot be judged is named and fails."""

import json
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from downstream.evaluate import load_protocol, settings_of
from downstream.suites.cells import cells_of, load_suite
from made_up import KNN, SCENES, evaluation, subject
from mte_bench import cli
from mte_bench.files import hash_of
from mte_bench.records import Protocol
from reports.baseline import measure, read_baseline
from reports.collect import collect
from reports.gate import Status, judge

N = SCENES["images"]["val"]
BEFORE = np.random.default_rng(0).permutation(N) < 0.6 * N


def flipped(lost, gained=0):
    """``BEFORE`` with so many images lost and gained."""
    right, order = BEFORE.copy(), np.random.default_rng(1).permutation(N)
    right[[i for i in order if BEFORE[i]][:lost]] = False
    right[[i for i in order if not BEFORE[i]][:gained]] = True
    return right


def cell(folder, right=BEFORE, who=None, task="knn", **changes):
    evaluation(folder, task, who or subject(), None, right=right, **changes)
    return folder


def measured(folder):
    (found,) = measure(collect([folder])).cells
    return found


@pytest.fixture
def baseline(tmp_path):
    """A baseline of two cells, whose runs are gone."""
    for task in ("knn", "linear"):
        cell(tmp_path / "old" / task, task=task)
    assert cli.main(["check", str(tmp_path / "old"), "--baseline", str(tmp_path / "base.json"), "--update"]) == 0
    shutil.rmtree(tmp_path / "old")
    return tmp_path / "base.json"


def check(baseline, *arguments, capsys):
    """Exit code and verdicts."""
    capsys.readouterr()
    code = cli.main(["check", "--baseline", str(baseline), "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("lost", "gained", "tolerance", "expected"),
    [
        (0, 0, 0.0, Status.SAME),
        (40, 0, 0.5, Status.FELL),
        (40, 0, 10.0, Status.SAME),  # exactly the tolerance
        (40, 0, 9.9, Status.FELL),
        (40, 38, 0.4, Status.CHANCE),  # half a point down, and as many images changed sides one way as the other
        (4, 0, 0.5, Status.CHANCE),  # p = 1/8
        (6, 0, 0.5, Status.FELL),  # p = 1/32
        (0, 40, 0.5, Status.BETTER),
        (38, 40, 0.4, Status.SAME),
    ],
)
def test_a_cell_fails_when_it_falls_by_more_than_the_tolerance_and_not_by_chance(tmp_path, lost, gained, tolerance, expected):
    before, now = measured(cell(tmp_path / "a")), measured(cell(tmp_path / "b", flipped(lost, gained)))
    verdicts = [judge(before, now, tolerance, seed) for seed in range(100 if lost in (0, 40) else 3)]
    assert {verdict.status for verdict in verdicts} == {expected}  # whatever the seed of the interval
    assert verdicts[0].change == pytest.approx(100 * (gained - lost) / N)
    assert expected.failed == (expected is Status.FELL)
    if lost + gained:
        assert verdicts[0].interval[0] <= verdicts[0].change <= verdicts[0].interval[1]


def test_the_same_predictions_pass_and_a_planted_fall_does_not(tmp_path, baseline, capsys):
    for task in ("knn", "linear"):
        cell(tmp_path / "new" / task, task=task)
    code, verdicts = check(baseline, tmp_path / "new", "--tolerance", "0", capsys=capsys)
    assert code == 0 and [verdict["status"] for verdict in verdicts] == ["ok", "ok"]
    cell(tmp_path / "new" / "linear", flipped(24), task="linear")
    code, verdicts = check(baseline, tmp_path / "new", capsys=capsys)
    assert code == 1
    first, second = verdicts
    assert (first["task"], first["status"], second["status"]) == ("linear", "fell", "ok")
    assert first["change"] == pytest.approx(-6) and first["mcnemar_p"] < 1e-5 and first["tolerance"] == 0.5
    assert check(baseline, tmp_path / "new", "--tolerance", "linear=7", capsys=capsys)[0] == 0
    assert check(baseline, tmp_path / "new", "--tolerance", "knn=7", capsys=capsys)[0] == 1


def test_the_order_of_the_images_does_not_matter_and_their_names_do(tmp_path, baseline, capsys):
    for task in ("knn", "linear"):
        cell(tmp_path / "new" / task, task=task)
    path = tmp_path / "new" / "knn" / "predictions.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.take(np.random.default_rng(0).permutation(N)), path)
    code, verdicts = check(baseline, tmp_path / "new", capsys=capsys)
    assert code == 0 and {verdict["mcnemar_p"] for verdict in verdicts} == {1.0}
    cell(tmp_path / "new" / "knn", names=[f"other {i}" for i in range(N)])
    code, verdicts = check(baseline, tmp_path / "new", capsys=capsys)
    assert code == 0 and "other images: judged by the tolerance alone" in verdicts[0]["remark"]


def test_without_predictions_the_tolerance_decides(tmp_path, baseline, capsys):
    cell(tmp_path / "new" / "linear", task="linear", predictions=False)
    cell(tmp_path / "new" / "knn", flipped(3), predictions=False)
    code, (first, second) = check(baseline, tmp_path / "new", capsys=capsys)
    assert code == 1 and first["status"] == "fell" and second["status"] == "ok"
    assert "no predictions image by image: judged by the tolerance alone" in first["remark"]


def test_what_cannot_be_judged_is_named_and_fails_and_what_is_new_is_named(tmp_path, baseline, capsys):
    cell(tmp_path / "new" / "knn", protocol=Protocol(name="knn", settings=KNN | {"temperature": 0.1}))
    cell(tmp_path / "new" / "linear", task="linear", data={**SCENES, "fingerprint": "0" * 16})
    cell(tmp_path / "new" / "more", who=subject(True), task="linear")
    code, verdicts = check(baseline, tmp_path / "new", capsys=capsys)
    found = {verdict["status"]: verdict for verdict in verdicts}
    assert code == 1 and set(found) == {"other protocol", "other data", "new"}
    assert found["other protocol"]["remark"].startswith("was knn@1 ") and found["other protocol"]["change"] is None
    assert found["other data"]["remark"] == f"was scenes {SCENES['fingerprint']}, is scenes {'0' * 16}"
    shutil.rmtree(tmp_path / "new")
    cell(tmp_path / "new" / "knn")
    (tmp_path / "new" / "linear").mkdir()
    (tmp_path / "new" / "linear" / "record.json").write_text('{"schema_version": 1, "task": "lin')
    code, verdicts = check(baseline, tmp_path / "new", capsys=capsys)
    assert code == 1 and [verdict["status"] for verdict in verdicts] == ["missing", "ok"]
    cli.main(["check", "--baseline", str(baseline), str(tmp_path / "new")])
    said = capsys.readouterr().err
    assert "linear/record.json: not a readable record" in said and "1 file left out" in said
    assert said.rstrip().endswith("FAILED: 1 of 2 cells fail (1 missing, 1 ok)")


def test_a_cell_measured_twice_is_two_cells(tmp_path, capsys):
    cell(tmp_path / "runs" / "a")
    cell(tmp_path / "runs" / "b", flipped(40), created="2026-11-21T10:00:00+00:00")
    base = tmp_path / "base.json"
    assert cli.main(["check", str(tmp_path / "runs"), "--baseline", str(base), "--update"]) == 0
    assert check(base, tmp_path / "runs", capsys=capsys)[0] == 0
    code, verdicts = check(base, tmp_path / "runs" / "a", capsys=capsys)
    assert code == 1 and verdicts[0]["status"] == "missing" and verdicts[0]["cell"].endswith("(repeat 2)")


def test_a_changed_recipe_is_said_and_judged_and_two_recipes_are_not_mixed_up(tmp_path, capsys):
    base, one, other = tmp_path / "base.json", subject(recipe_hash="1" * 12), subject(recipe_hash="2" * 12)
    cell(tmp_path / "old", who=one)
    cli.main(["check", str(tmp_path / "old"), "--baseline", str(base), "--update"])
    cell(tmp_path / "new" / "a", flipped(40), who=other)
    code, (verdict,) = check(base, tmp_path / "new", capsys=capsys)
    assert code == 1 and verdict["status"] == "fell" and verdict["remark"] == "the recipe's settings have changed"
    cell(tmp_path / "new" / "b", who=one)
    code, verdicts = check(base, tmp_path / "new", capsys=capsys)
    assert code == 0 and [verdict["status"] for verdict in verdicts] == ["ok", "new"]
    moved = {**SCENES, "source": "imagefolder:/another/place"}
    shutil.rmtree(tmp_path / "new")
    cell(tmp_path / "new", who=one, data=moved)
    assert check(base, tmp_path / "new", capsys=capsys)[0] == 0  # the same images under another name


def test_update_says_what_it_changes_and_keeps_the_tolerances(tmp_path, baseline, capsys):
    first = baseline.read_bytes()
    for task in ("knn", "linear"):
        cell(tmp_path / "new" / task, task=task)
    assert cli.main(["check", str(tmp_path / "new"), "--baseline", str(baseline), "--update"]) == 0
    assert baseline.read_bytes() == first
    shutil.rmtree(tmp_path / "new" / "linear")
    cell(tmp_path / "new" / "knn", flipped(40))
    more = ["--update", "--tolerance", "2", "--tolerance", "knn=1.5"]
    code, verdicts = check(baseline, tmp_path / "new", *more, capsys=capsys)
    assert code == 0 and [verdict["status"] for verdict in verdicts] == ["fell", "missing"]
    (kept,) = read_baseline(baseline).cells
    assert kept.value == 50.0 and read_baseline(baseline).tolerance_of("linear") == 2
    assert check(baseline, tmp_path / "new", "--update", capsys=capsys)[1][0]["tolerance"] == 1.5


def test_junit_and_summary(tmp_path, baseline, capsys, monkeypatch):
    cell(tmp_path / "new" / "knn", flipped(40), who=subject(recipe="a<|>b"))
    cell(tmp_path / "new" / "linear", task="linear")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    code, _ = check(baseline, tmp_path / "new", "--junit", tmp_path / "junit.xml", capsys=capsys)
    assert code == 1
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    cases = root.findall(".//testcase")
    assert (root.get("tests"), root.get("failures"), len(cases)) == ("3", "1", 3)
    (failure,) = root.findall(".//failure")
    assert failure.get("type") == "missing"
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("before\n### mte-bench check: FAILED: 1 of 3 cells fail (1 missing, 1 ok, 1 new)")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_what_the_user_can_mend(tmp_path, baseline, error_line):
    runs = str(cell(tmp_path / "new"))
    given = ("check", runs, "--baseline")
    assert "base2.json: no such baseline; write it with" in error_line(*given, str(tmp_path / "base2.json"))
    assert "write percentage points from 0" in error_line(*given, str(baseline), "--tolerance", "-1")
    assert "no cell is of task 'kn' (did you mean 'knn'?)" in error_line(*given, str(baseline), "--tolerance", "kn=1")
    text = baseline.read_text()
    for broken, expected in (
        (text[:300], "not a readable baseline"),
        (text.replace('"schema_version": 1', '"schema_version": 0'), "baseline schema 0, this version reads 1"),
        (text.replace('"value": 60.0', '"value": 61.0'), "'right' does not hold 61.00 % of 400 images"),
        (text.replace('"right": "', '"right": "AAAA'), "'right' does not hold"),
        (text.replace('"task"', '"tusk"', 1), "unknown setting 'cells.0.tusk' (did you mean 'task'?)"),
    ):
        baseline.write_text(broken)
        line = error_line(*given, str(baseline))
        assert expected in line and "base.json" in line
    cell(tmp_path / "cka", task="knn")
    record = json.loads((tmp_path / "cka" / "record.json").read_text()) | {"task": "cka", "predictions": None}
    (tmp_path / "cka" / "record.json").write_text(json.dumps(record))
    assert "no evaluation among the records" in error_line("check", str(tmp_path / "cka"), "--baseline", "x.json", "--update")


def test_the_workflow_that_is_to_be_copied_runs_what_there_is():
    folder = Path(__file__).resolve().parent.parent / "docs"
    (block,) = [part.partition("```")[0] for part in (folder / "gate.md").read_text().split("```yaml\n")[1:]]
    (job,) = yaml.safe_load(block)["jobs"].values()
    words = " ".join(step.get("run", "") for step in job["steps"]).replace("\\\n", " ").split()
    verbs = {words[index + 1] for index, word in enumerate(words) if word == "mte-bench"}
    assert verbs and verbs <= set(cli.commands()) and "check" in verbs


def test_the_baseline_of_this_repository_is_of_the_cells_of_its_gate():
    """If this fails, a protocol has changed: measure anew with .ci/gate --update."""
    root = Path(__file__).resolve().parent.parent
    stated = Counter()
    for cell in cells_of(load_suite(str(root / ".ci" / "gate.yaml")), "gate", Path("cells"), {}):
        name, protocol = load_protocol(cell.offer, cell.request.protocol, cell.request.set)
        stated[cell.offer.name, f"{name}@{protocol.version} {hash_of(settings_of(protocol), 8)}"] += 1
    baseline = read_baseline(root / "tests" / "gate.json")
    assert Counter((cell.task, cell.protocol) for cell in baseline.cells) == stated
    tasks = {"knn", "linear", "finetune", "inat", "coco", "ade20k"}
    assert {task for task, _ in stated} == set(baseline.tolerances) == tasks and set(stated.values()) == {2}
    assert len({cell.architecture for cell in baseline.cells}) == 2
    assert all(cell.right for cell in baseline.cells if cell.task not in ("coco", "ade20k"))


@pytest.mark.slow
def test_a_shuffled_block_fails_and_the_same_encoder_passes_each_time(tmp_path, capsys):
    """An encoder trained on scenes for some epochs; the features are computed anew each time, in batches of other sizes."""
    data, run = "scenes?train=1000&val=400", tmp_path / "run"
    train = ["pretrain", "supervised_tiny_scenes", "--data", data, "--out", str(run), "--set", "epochs=6", "--workers", "0"]
    assert cli.main(train) == 0

    def knn(encoder, out, batch):
        options = ["--out", str(out), "--batch-size", str(batch), "--workers", "0", "--cache", str(tmp_path / out.name)]
        assert cli.main(["knn", str(encoder), "--data", data, *options]) == 0
        shutil.rmtree(tmp_path / out.name, ignore_errors=True)

    first = tmp_path / "first" / "knn"
    knn(run, first, 64)
    base = tmp_path / "base.json"
    assert cli.main(["check", str(first), "--baseline", str(base), "--update"]) == 0
    assert read_baseline(base).cells[0].value > 40  # far above chance, which is 10

    verdicts = []
    for batch in range(20, 40):
        knn(run, tmp_path / "again" / "knn", batch)
        verdicts.append(check(base, tmp_path / "again", capsys=capsys)[0])
    assert verdicts == [0] * 20

    weights = run / "encoder.safetensors"
    tensors = load_file(weights)
    with open(weights, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length))["__metadata__"]
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.startswith("blocks.0."):
            order = torch.randperm(tensor.numel(), generator=generator)
            tensors[name] = tensor.flatten()[order].reshape(tensor.shape).contiguous()
    save_file(tensors, weights, metadata=metadata)
    knn(run, tmp_path / "shuffled" / "knn", 64)
    code, (verdict,) = check(base, tmp_path / "shuffled", capsys=capsys)
    assert code == 1 and verdict["status"] == "fell" and verdict["mcnemar_p"] < 0.05
