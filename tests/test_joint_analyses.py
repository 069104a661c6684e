"""Analyses of several runs, on records and curves whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from made_up import CIFAR, build_runs, evaluation, pretraining, recipe, subject
from mte_bench.errors import UserError
from mte_bench.records import read_record
from mte_bench.training.live import Curves
from reports.collect import Unusable, collect
from reports.convergence import convergence, crossing
from reports.curves import Line, curve_lines, draw_line, mean_of
from reports.report import write_report
from reports.token_counts import token_counts


def test_a_run_with_mte_reaches_what_plain_ends_with_where_lines_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain ends with 50, 51 and 52; with MTE the seeds are 25 + epoch + seed, looked at every fifth epoch."""
    build_runs(tmp_path / "runs")
    record = convergence([str(tmp_path / "runs")], "knn_top1", str(tmp_path / "out"), False)
    assert record == read_record(tmp_path / "out" / "record.json")
    assert {name: metric.value for name, metric in record.metrics.items()} == pytest.approx(
        {
            "epochs_to_plain_dino-mte": 25,
            "hours_to_plain_dino-mte": 690 * 25 / 30 / 3600,
            "knn_top1_dino": 51,
            "knn_top1_dino-mte": 56,
        }
    )
    plain, mte = json.loads((tmp_path / "out" / "convergence.json").read_text())["lines"]
    assert [epoch for epoch, _ in mte["reaches_plain"]["of_each_seed"]] == pytest.approx([26, 25, 24])
    assert plain["reaches_plain"] is None and len(plain["runs"]) == 3
    said = capsys.readouterr().out
    assert "epoch 25.0 (seeds 24.0 to 26.0)" in said and "record's, even over epochs" in said and "3 of 3 runs" in said
    assert len(record.subject.parts) == 6


def test_seconds_in_the_curves_are_taken_and_a_line_that_falls_short_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_runs(tmp_path, seeds=(0,))
    for name, lift in (("plain-0", 20), ("mte-0", 0)):
        path = tmp_path / name / "curves.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["seconds"] = line["epoch"] ** 2
            if "knn_top1" in line:
                line["knn_top1"] += lift
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    convergence([str(tmp_path / "plain-0"), str(tmp_path / "mte-0")], "knn_top1", str(tmp_path / "out"), False)
    lines = json.loads((tmp_path / "out" / "convergence.json").read_text())["lines"]
    assert [seconds for _, seconds, _ in lines[1]["runs"][0]["epoch_seconds_value"]] == [25, 100, 225, 400, 625, 900]
    assert lines[1]["reaches_plain"]["epoch_seconds"] is None
    said = capsys.readouterr().out
    assert "never" in said and "0 of 1 runs" in said and "measured" in said and "15 min 00 s" in said


def test_what_was_not_finite_is_null_in_curves_and_no_reader_minds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gradient that overflows float16 is skipped by its scaler and has an infinite norm; JSON knows none."""
    build_runs(tmp_path / "runs", seeds=(0,))
    folder = tmp_path / "runs" / "mte-0"
    curves = Curves(folder, 300)
    for norm in (1.0, float("inf")):
        curves.add({"loss": 2.5, "grad_norm": norm})
    curves.write(302, 30.2, 9.0)
    curves.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / "curves.jsonl").read_text().splitlines()]
    assert lines[-1] == {"step": 302, "epoch": 30.2, "seconds": 9.0, "loss": 2.5, "grad_norm": None}
    unusable: list[Unusable] = []
    read = list(curve_lines(collect([str(folder)]).of("pretrain")[0], unusable))
    assert len(read) == len(lines) and read[-1] == {"step": 302, "epoch": 30.2, "seconds": 9.0, "loss": 2.5} and not unusable


def test_seeds_of_one_point_are_seen_beside_their_mean() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    runs = [np.array([[5.0, value]]) for value in (29.7, 30.9)]
    assert draw_line(axes, Line("DINO", "dino", False, "black", ()), runs, mean_of(runs)) == pytest.approx((5, 30.3))
    dots, mean = axes.lines
    assert dots.get_ydata().tolist() == [29.7, 30.9] and dots.get_marker() == "o" and len(mean.get_ydata()) == 1
    low, high = axes.get_ylim()
    assert low < 29.7 and high > 30.9


def test_a_crossing_lies_on_the_line_between_two_looks() -> None:
    points = np.array([[4, 40, 10.0], [8, 100, 20], [12, 160, 15], [16, 200, 30]])
    assert crossing(points, 12.5) == (5, 55)
    assert crossing(points, 24) == (14.4, 184)
    assert crossing(points, 5) == (4, 40)
    assert crossing(points, 31) is None


def test_runs_that_cannot_be_compared_are_refused_by_name(tmp_path: Path) -> None:
    build_runs(tmp_path, seeds=(0,))
    pretraining(tmp_path / "other", subject(seed=5), recipe(), data=CIFAR)
    with pytest.raises(UserError, match="was trained on other images"):
        convergence([str(tmp_path)], "knn_top1", None, False)
    with pytest.raises(UserError, match="random-knn: holds no record of a finished pre-training"):
        convergence([str(tmp_path / "random-knn")], "knn_top1", None, False)
    with pytest.raises(UserError, match="plain-0: its curves have no classifier_top1"):
        convergence([str(tmp_path / "plain-0")], "classifier_top1", None, False)
    with pytest.raises(UserError, match="--metric knn: unknown"):
        convergence([str(tmp_path / "plain-0")], "knn", None, False)


def grid(root: Path) -> None:
    """Runs of some numbers of tokens and two seeds, worth 40 + tokens + seed percent."""
    for index, (cls, pooled) in enumerate([(0, 0), (2, 0), (0, 6), (2, 6)]):
        mte = {"auxiliary_cls": cls, "pooled": pooled, "ten": cls > 0, "fusion": "mean", "pool_bias": pooled == 0}
        for seed in (0, 1):
            own = {
                "sha256": f"{index}{seed}" + "a" * 62,
                "recipe_hash": f"{index}" * 12,
                "checkpoint": f"runs/{cls}-{pooled}-{seed}",
            }
            who, folder = subject(cls + pooled > 0, seed, **own), root / f"{cls}-{pooled}-{seed}"
            settings = recipe() | {"mte": mte if cls + pooled else None}
            pretraining(folder, who, settings)
            right = [place < 4 * (40 + cls + pooled + seed) for place in range(400)]
            evaluation(folder / "evaluations" / "knn", "knn", who, 0, right=np.array(right))


def test_the_runs_evaluations_are_put_in_order_by_their_numbers_of_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings of TEN differ where there are no CLS tokens, which is no difference."""
    grid(tmp_path / "runs")
    record = token_counts([str(tmp_path / "runs")], str(tmp_path / "runs" / "out"), False)
    assert {name: metric.value for name, metric in record.metrics.items()} == pytest.approx(
        {"k-nn_cls0_pooled0": 40.5, "k-nn_cls0_pooled6": 46.5, "k-nn_cls2_pooled0": 42.5, "k-nn_cls2_pooled6": 48.5}
    )
    assert "± 0.71" in capsys.readouterr().out
    convergence([str(tmp_path / "runs")], "knn_top1", str(tmp_path / "runs" / "speed"), False)
    write_report([tmp_path / "runs"], tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    for name in ("token-counts", "convergence"):
        assert f"(figures/{name}-scenes-" in page, name


def test_runs_that_differ_in_more_are_refused_with_the_setting(tmp_path: Path) -> None:
    grid(tmp_path)
    who = subject(True, 0, sha256="9" * 64, recipe_hash="9" * 12)
    odd = recipe() | {"mte": {"auxiliary_cls": 4, "pooled": 6, "ten": True, "fusion": "sum", "pool_bias": False}}
    pretraining(tmp_path / "odd", who, odd)
    with pytest.raises(UserError, match=r"odd: mte\.fusion is sum, and mean in .*2-0-0|mte\.fusion is mean, and sum in .*odd"):
        token_counts([str(tmp_path)], None, False)
    pretraining(tmp_path / "odd", who, odd | {"mte": odd["mte"] | {"fusion": "mean"}})
    with pytest.raises(UserError, match="odd has no evaluation"):
        token_counts([str(tmp_path)], None, False)
    with pytest.raises(UserError, match="all runs have 2 auxiliary CLS tokens and 6 adaptively pooled tokens"):
        token_counts([str(tmp_path / "2-6-0"), str(tmp_path / "2-6-1")], None, False)
