"""``compare``, ``check`` and ``report`` on dense records: paired over images, class by class, and nothing taken on trust."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_up import ENVIRONMENT, subject
from mte_bench import cli
from mte_bench.dense.detection import IOUS, DetectedImages, Matches, Objects
from mte_bench.dense.files import Images, write_images
from mte_bench.dense.resampling import draw_weights, intervals, stated
from mte_bench.dense.segmentation import SegmentedImages
from mte_bench.records import Cost, Data, Metric, Protocol, make_record, write_record
from reports.baseline import read_baseline

N, K = 60, 4
NAMES = tuple(f"val/{i:03}.png" for i in range(N))
CLASSES = ("road", "sky", "tree", "never there")
DATA = {"source": "ade20k:streets", "split": "val", "images": {"train": 100, "val": N}, "classes": K, "fingerprint": "ade2" * 4}
MAIN = {"ade20k": "mIoU", "coco": "bbox_mAP"}


def segmentation(accuracy: float, seed: int = 0, only: int | None = None, sample: int = 7) -> SegmentedImages:
    """Images of three classes, hard and easy ones, the same whatever the accuracy; ``only`` one class gains by it."""
    world, rng = np.random.default_rng(sample), np.random.default_rng(seed)
    truth = world.integers(0, 3, (N, 100))
    ease = world.uniform(-0.25, 0.25, (N, 1))
    level = np.where(truth == only, accuracy, 0.5) if only is not None else accuracy
    found = np.where(rng.random(truth.shape) < level + ease, truth, (truth + 1) % 3)
    count = [[np.bincount(x[x == y], minlength=K), np.bincount(x, minlength=K), np.bincount(y, minlength=K)]
             for x, y in zip(found, truth, strict=True)]  # fmt: skip
    return SegmentedImages(NAMES, CLASSES, np.array(count, np.int64))


def detection(accuracy: float, seed: int = 0, sample: int = 7) -> DetectedImages:
    """Two objects and five detections in each image; the better the encoder, the more and the closer it finds."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(N), 2)
    labels = np.random.default_rng(sample).integers(0, 3, 2 * N)
    best = np.where(rng.random(2 * N) < accuracy, rng.integers(0, IOUS, 2 * N), -1)  # the highest IoU at which it is found
    found = np.array([sum(1 << t for t in range(top + 1)) for top in best], np.int64)
    sizes = ((1 << 4 * IOUS) - 1) ^ ((1 << 2 * IOUS) - 1)  # all objects are small: of the other sizes nothing counts
    order = np.argsort(np.concatenate([rows, np.arange(N).repeat(3)]), kind="stable")
    count = 2 * N + 3 * N
    bits = np.concatenate([found | found << IOUS, np.zeros(3 * N, np.int64)])[order]
    matches = Matches(bits, np.full(count, sizes, np.int64))
    guesses = np.concatenate([labels, rng.integers(0, 3, 3 * N)])[order]
    scores = np.concatenate([rng.random(2 * N), rng.random(3 * N) ** 2])[order]
    all_rows = np.concatenate([rows, np.arange(N).repeat(3)])[order]
    return DetectedImages(NAMES, CLASSES, Objects(rows, labels, np.full(2 * N, 3)), all_rows, guesses, scores, {"bbox": matches})


def evaluated(folder: Path, task: str, images: Images, who: Any = None, **changes: Any) -> Path:
    """A dense record with what its images add."""
    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder / "images.parquet", images)
    ends = intervals(images)
    metrics = {name: Metric(value=float(v[0]), ci95=ends[name], n=N) for name, v in stated(images).overall.items()}
    parts = {
        "task": task,
        "protocol": Protocol(name=f"{task}-tiny", settings={"steps": 20}),
        "subject": who or subject(),
        "data": Data(**DATA),  # type: ignore[arg-type]
        "metrics": metrics,
        "cost": Cost(seconds=3.0),
        "environment": ENVIRONMENT,
        "command": f"mte-bench {task}",
        "created": "2026-11-20T10:00:00+00:00",
        "predictions": "images.parquet",
    }
    write_record(folder, make_record(**(parts | changes)))
    return folder


def about(drawn: Any, value: float) -> Any:
    """The middle 95 % of resampled values, moved to where their mean is the value."""
    return pytest.approx(np.nanquantile(drawn, (0.025, 0.975)) + value - np.nanmean(drawn), abs=2e-4)


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["compare", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def checked(capsys: pytest.CaptureFixture[str], baseline: Path, *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    code = cli.main(["check", "--baseline", str(baseline), "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("metric", "make"), [("mIoU", segmentation), ("bbox_mAP", detection)])
def test_an_interval_is_as_wide_as_the_spread_over_samples(metric: str, make: Any) -> None:
    """Of one made-up encoder: how the metric varies over samples, and what four of them say of that by themselves."""
    spread = np.std([stated(make(0.6, seed, sample=seed)).overall[metric][0] for seed in range(30)], ddof=1)
    ends = [intervals(make(0.6, seed, sample=seed))[metric] for seed in range(4)]
    assert 0.65 < np.mean([high - low for low, high in ends]) / (2 * 1.96 * spread) < 1.5


@pytest.mark.parametrize(("task", "make"), [("ade20k", segmentation), ("coco", detection)])
def test_two_records_are_compared_on_the_same_resamples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, make: Any
) -> None:
    a, b = make(0.5), make(0.6)
    evaluated(tmp_path / "a", task, a)
    evaluated(tmp_path / "b", task, b, subject(True))
    (found,) = compared(capsys, tmp_path / "a", tmp_path / "b")["pairs"]
    weights, name = draw_weights(NAMES), MAIN[task]
    before, after = a.measure(weights), b.measure(weights)
    change = found["b_minus_a"]
    assert found["metric"] == name
    assert change["difference"] == pytest.approx(stated(b).overall[name][0] - stated(a).overall[name][0])
    assert change["ci95"] == about(after.overall[name] - before.overall[name], change["difference"])
    assert change["mcnemar_p"] is None
    assert found["metrics"].keys() == stated(a).overall.keys()
    assert found["metrics"][name] | {"ci95": None} == {
        "a": found["a"]["value"], "b": found["b"]["value"], "difference": change["difference"], "ci95": None,
    }  # fmt: skip
    classes = found["classes"]
    assert [row["class"] for row in classes] == list(CLASSES[:3])
    assert [row["images"] for row in classes] == a.holding()[:3].tolist()
    for k, row in enumerate(classes):
        assert row["a"] == pytest.approx(stated(a).classes[name][k, 0])
        assert row["ci95"] == about((after.classes[name] - before.classes[name])[k], row["difference"])
    assert np.mean([row["difference"] for row in classes]) == pytest.approx(change["difference"])


def test_images_that_are_hard_for_both_make_the_paired_interval_the_narrower_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, accuracy in (("a", 0.5), ("b", 0.53)):
        evaluated(tmp_path / name, "ade20k", segmentation(accuracy, seed=len(name)))
    (found,) = compared(capsys, tmp_path / "a", tmp_path / "b")["pairs"]
    low, high = found["b_minus_a"]["ci95"]
    apart = np.hypot(*(np.diff(found[side]["ci95"])[0] for side in "ab"))
    assert low > 0 and high - low < 0.6 * apart


def test_means_over_seeds_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {(kind, seed): segmentation(0.5 + 0.1 * kind, seed) for kind in (False, True) for seed in range(2)}
    for (kind, seed), images in made.items():
        evaluated(tmp_path / str(kind) / str(seed), "ade20k", images, subject(kind, seed))
    (found,) = compared(capsys, tmp_path / "False", tmp_path / "True")["pairs"]
    weights = draw_weights(NAMES)
    drawn = {key: images.measure(weights).overall["mIoU"] for key, images in made.items()}
    mean = [(drawn[kind, 0] + drawn[kind, 1]) / 2 for kind in (False, True)]
    assert found["b_minus_a"]["ci95"] == about(mean[1] - mean[0], found["b_minus_a"]["difference"])
    assert found["a"]["ci95"] == about(mean[0], found["a"]["value"])
    _, one = found["b_minus_a"]["seeds"]
    assert one["ci95"] == about(drawn[True, 1] - drawn[False, 1], one["b"] - one["a"])


def test_the_terminal_and_the_page_say_what_gains_and_what_loses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tmp_path / "a", "ade20k", segmentation(0.5))
    evaluated(tmp_path / "b", "ade20k", segmentation(0.7, only=1), subject(True))
    line = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert cli.main(line) == 0
    shown = capsys.readouterr()
    assert "every metric" in shown.out and "classes that gain and lose most in mIoU, of 3" in shown.out
    assert [word in shown.out for word in ("sky", "never there", "for example")] == [True, False, False]
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "| `mAcc` |" in page and "| sky | 60 |" in page and "only B right" not in page
    assert cli.main([*line[:3], "--metric", "aAcc"]) == 0
    assert "no classes, as aAcc is no mean over classes" in capsys.readouterr().err


@pytest.mark.parametrize(("mistake", "said"), [
    ("other encoder", "its record says"),
    ("fewer images", "of 59 images, its record says"),
    ("classification", "is not what a dense task writes"),
    ("cut", "images.parquet: "),
])  # fmt: skip
def test_a_file_that_does_not_belong_to_its_record_is_named_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str, said: str
) -> None:
    evaluated(tmp_path / "a", "ade20k", segmentation(0.5))
    evaluated(tmp_path / "b", "ade20k", segmentation(0.7), subject(True))
    path = tmp_path / "b" / "images.parquet"
    if mistake == "other encoder":
        shutil.copy(tmp_path / "a" / "images.parquet", path)
    elif mistake == "fewer images":
        whole = segmentation(0.7)
        write_images(path, SegmentedImages(NAMES[1:], CLASSES, whole.counts[1:]))
    elif mistake == "classification":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"name": NAMES, "label": [0] * N}), path)
    else:
        path.write_bytes(path.read_bytes()[:500])
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    (line,) = found["unusable"]
    assert "b/images.parquet: " in line and said in line
    (pair,) = found["pairs"]
    assert pair["b_minus_a"]["difference"] > 5 and pair["b_minus_a"]["ci95"] is None
    assert pair["classes"] is None and pair["metrics"] == {}


def test_a_record_of_other_images_has_no_interval_of_the_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tmp_path / "a", "ade20k", segmentation(0.5))
    other = segmentation(0.6)
    evaluated(
        tmp_path / "b", "ade20k", SegmentedImages(tuple(f"x{name}" for name in NAMES), CLASSES, other.counts), subject(True)
    )
    (found,) = compared(capsys, tmp_path / "a", tmp_path / "b")["pairs"]
    assert found["b_minus_a"]["ci95"] is None and found["classes"] is None


@pytest.mark.parametrize(("task", "make"), [("ade20k", segmentation), ("coco", detection)])
def test_the_gate_judges_by_the_paired_interval_without_the_old_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, make: Any
) -> None:
    old, base = make(0.6, 5), tmp_path / "base.json"
    evaluated(tmp_path / "old", task, old)
    assert cli.main(["check", str(tmp_path / "old"), "--baseline", str(base), "--update"]) == 0
    shutil.rmtree(tmp_path / "old")
    evaluated(tmp_path / "new", task, old)
    code, (verdict,) = checked(capsys, base, tmp_path / "new", "--tolerance", "0")
    assert (code, verdict["status"], verdict["remark"]) == (0, "ok", "")
    worse = make(0.3)
    evaluated(tmp_path / "new", task, worse)
    code, (verdict,) = checked(capsys, base, tmp_path / "new")
    weights = draw_weights(NAMES)
    change = worse.measure(weights).overall[MAIN[task]] - old.measure(weights).overall[MAIN[task]]
    assert (code, verdict["status"], verdict["mcnemar_p"]) == (1, "fell", None)
    assert verdict["ci95"] == about(change, verdict["change"])
    evaluated(tmp_path / "new", task, make(0.9))
    assert checked(capsys, base, tmp_path / "new")[1][0]["status"] == "better"
    again = next(images for seed in range(5) if -3 < drop(images := make(0.6, seed), old, MAIN[task]) < -0.05)
    evaluated(tmp_path / "new", task, again)
    code, (verdict,) = checked(capsys, base, tmp_path / "new", "--tolerance", "0")
    assert verdict["ci95"][0] < 0 < verdict["ci95"][1] and (code, verdict["status"]) == (0, "within chance")


def drop(images: Images, old: Images, metric: str) -> float:
    return float(stated(images).overall[metric][0] - stated(old).overall[metric][0])


def test_a_baseline_that_was_changed_by_hand_is_refused(tmp_path: Path, error_line: Any) -> None:
    base = tmp_path / "base.json"
    evaluated(tmp_path / "old", "ade20k", segmentation(0.6))
    assert cli.main(["check", str(tmp_path / "old"), "--baseline", str(base), "--update"]) == 0
    (cell,) = read_baseline(base).cells
    assert cell.drawn and len(cell.drawn) < 6000
    base.write_text(base.read_text().replace(cell.drawn, cell.drawn[:400]))
    assert "'drawn' does not hold 1000 values in percent" in error_line("check", str(tmp_path / "old"), "--baseline", str(base))


def test_without_the_file_the_tolerance_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base.json"
    evaluated(tmp_path / "run", "ade20k", segmentation(0.6))
    assert cli.main(["check", str(tmp_path / "run"), "--baseline", str(base), "--update"]) == 0
    (tmp_path / "run" / "images.parquet").unlink()
    code, (verdict,) = checked(capsys, base, tmp_path / "run")
    assert code == 0 and "judged by the tolerance alone" in verdict["remark"]


def test_a_report_of_seeds_has_the_interval_of_their_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        evaluated(tmp_path / str(seed), "ade20k", segmentation(0.6, seed), subject(True, seed))
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report"), "--json"]) == 0
    shown = capsys.readouterr()
    assert "left out" not in shown.err
    weights = draw_weights(NAMES)
    mean = np.mean([segmentation(0.6, seed).measure(weights).overall["mIoU"] for seed in range(2)], axis=0)
    low, high = about(mean, np.mean([stated(segmentation(0.6, seed)).overall["mIoU"][0] for seed in range(2)])).expected
    assert f"[{low:.1f}, {high:.1f}]" in (tmp_path / "report" / "report.md").read_text()
