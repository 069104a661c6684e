"""Retrieval: its metrics beside independent implementations, who is never an answer, and what the command leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate

from downstream import retrieval
from downstream.knn import KNN
from downstream.neighbour_picture import Answers, draw_neighbours
from downstream.retrieval import RETRIEVAL, RetrievalProtocol, Retrieved, evaluate_retrieval, retrieve
from downstream.task import Outcome, Split
from mte_bench.cli import run
from mte_bench.data.sources import ImageSet, open_source
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.plotting import picture
from mte_bench.records import read_record

ENCODER = "random:vit_tiny_patch16_224?image_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2"
CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


class Drawn(ImageSet):
    """Images of one colour each."""

    def __init__(self, labels: np.ndarray, split: str):
        self.source, self.split, self.classes, self.labels, self.fingerprint = "drawn", split, CLASSES, labels, "drawn"

    def name(self, index: int) -> str:
        return f"{self.split}/{index}.png"

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (16, 16), (80 * int(self.labels[index]), index % 256, 0))


def made_up(n: int, seed: int, width: int = 8, split: str = "val") -> Split:
    """Noisy clusters: neighbours are often, not always, of one class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    centres = np.random.default_rng(9).standard_normal((3, width))
    features = (centres[labels] + 1.5 * generator.standard_normal((n, width))).astype(np.float32)
    return Split(features, labels, CLASSES, Drawn(labels, split))


def cosine(queries: Split, bank: Split) -> np.ndarray:
    a, b = (split.features.astype(np.float64) for split in (queries, bank))
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def protocol(**settings: Any) -> RetrievalProtocol:
    common = {"task": "retrieval", "version": 1, "feature": "global", "image_size": None, "resize": None}
    return RetrievalProtocol.check({**common, "bank": "train", "recall": (1, 5, 10), **settings}, "test")


def means(outcome: Outcome) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in outcome.scores.items()} | {
        name: float(found.correct.mean()) for name, found in outcome.metrics.items()
    }


@pytest.mark.parametrize("bank", ["train", "val"])
def test_metrics_are_those_of_torchmetrics_and_scikit_learn(bank: str) -> None:
    train, val = made_up(150, 1, split="train"), made_up(60, 0)
    answers = train if bank == "train" else val
    similar, same = cosine(val, answers), answers.labels == val.labels[:, None]
    expected: dict[str, list[float]] = {"map": [], "recall_1": [], "recall_5": [], "recall_10": []}
    for row in range(len(similar)):
        others = np.ones(len(answers.labels), bool) if bank == "train" else np.arange(len(val.labels)) != row
        scores, relevant = similar[row, others], same[row, others]
        precision = average_precision_score(relevant, scores)
        arguments = torch.from_numpy(scores + 2), torch.from_numpy(relevant)  # it leaves out what is not above 0
        assert float(retrieval_average_precision(*arguments)) == pytest.approx(precision, abs=1e-6)
        expected["map"].append(precision)
        for k in (1, 5, 10):
            expected[f"recall_{k}"].append(float(retrieval_hit_rate(*arguments, top_k=k)))
    outcome = evaluate_retrieval(protocol(bank=bank), train, val, CPU)
    np.testing.assert_allclose(outcome.scores["map"], expected["map"], atol=1e-12)
    for name, found in outcome.metrics.items():
        assert found.correct.tolist() == [bool(value) for value in expected[name]]
    assert means(outcome) == pytest.approx({name: np.mean(values) for name, values in expected.items()})
    assert 0.2 < means(outcome)["map"] < 0.95 and means(outcome)["recall_1"] < means(outcome)["recall_10"]


def test_the_nearest_are_those_of_k_nn() -> None:
    train, val = made_up(150, 1), made_up(60, 0)
    similarities, indices = KNN((7,)).fit(train.features, train.labels).neighbours(val.features)
    found = retrieve(val, train, 7, CPU)
    assert torch.equal(found.indices, indices) and torch.equal(found.similarities, similarities)


@pytest.mark.parametrize("itself", [False, True])
def test_blocks_change_nothing(itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    val = made_up(60, 0)
    bank = val if itself else made_up(150, 1)
    whole = retrieve(val, bank, 5, CPU, itself)
    monkeypatch.setattr(retrieval, "_BLOCK_VALUES", 7 * len(bank.labels))
    assert_same(retrieve(val, bank, 5, CPU, itself), whole)


def assert_same(one: Retrieved, other: Retrieved) -> None:
    assert torch.equal(one.indices, other.indices)
    np.testing.assert_allclose(one.average_precision, other.average_precision, atol=1e-9)


def test_no_image_is_an_answer_to_itself_also_among_its_duplicates() -> None:
    features = np.repeat(np.eye(2, 4, dtype=np.float32), [15, 3], axis=0)  # more duplicates than neighbours are asked for
    val = Split(features, np.arange(18) % 2, CLASSES)
    found = retrieve(val, val, 4, CPU, itself=True)
    assert (found.indices != torch.arange(18)[:, None]).all()
    assert found.indices[0].tolist() == [1, 2, 3, 4] and found.indices[2].tolist() == [0, 1, 3, 4]
    assert found.indices[17].tolist() == [15, 16, 0, 1]
    assert found.similarities[:15].unique().tolist() == [1.0]


def test_a_collapsed_encoder_has_the_precision_of_chance() -> None:
    bank = Split(np.ones((40, 4), np.float32), np.arange(40) % 4 // 3, CLASSES)  # 30 of class 0, 10 of class 1
    found = retrieve(Split(np.ones((2, 4), np.float32), np.array([0, 1]), CLASSES), bank, 3, CPU)
    assert found.average_precision.tolist() == [0.75, 0.25]
    assert found.indices.tolist() == [[0, 1, 2]] * 2


def test_a_class_that_the_bank_lacks_is_never_found() -> None:
    train, val = made_up(50, 1, split="train"), made_up(20, 0)
    lonely = train._replace(labels=np.zeros(50, np.int64), images=Drawn(np.zeros(50, np.int64), "train"))
    outcome = evaluate_retrieval(protocol(), lonely, val, CPU)
    assert outcome.details["queries_without_their_class_in_the_bank"] == (val.labels > 0).sum()
    assert (outcome.scores["map"] == (val.labels == 0)).all() and (outcome.metrics["recall_1"].correct == (val.labels == 0)).all()
    single = made_up(20, 0)
    single.labels[:] = np.r_[2, np.arange(19) % 2]
    outcome = evaluate_retrieval(protocol(bank="val"), train, single, CPU)
    assert outcome.details["queries_without_their_class_in_the_bank"] == 1 and outcome.scores["map"][0] == 0


def test_the_picture_frames_what_is_right_and_shows_every_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from downstream import neighbour_picture

    frames: list[bool] = []
    captions: list[str] = []
    framed, written = neighbour_picture._frame, neighbour_picture._caption
    monkeypatch.setattr(neighbour_picture, "_frame", lambda *a: (frames.append(a[3]), framed(*a)))
    monkeypatch.setattr(neighbour_picture, "_caption", lambda *a: (captions.append(a[3]), written(*a)))
    queries, bank = Drawn(np.array([2, 0, 1, 0, 2]), "val"), Drawn(np.array([0, 1, 2, 1]), "train")
    neighbours = np.array([[0, 2], [0, 1], [1, 3], [3, 2], [1, 2]])
    right = bank.labels[neighbours] == queries.labels[:, None]
    answers = Answers(neighbours, np.linspace(1, 0.1, 10).reshape(5, 2), right)
    transform = EvaluationTransform.for_size(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    path = tmp_path / "picture.png"
    draw_neighbours(path, queries, bank, answers, transform, "title\nof two lines", 3, 2)
    assert captions == [
        *("ant", "✓ 0.800\nant", "✗ 0.700\nbee"),
        *("bee", "✓ 0.600\nbee", "✓ 0.500\nbee"),
        *("cat", "✗ 0.200\nbee", "✓ 0.100\ncat"),
    ]
    assert frames == [True, False, True, True, False, True]
    with Image.open(path) as image:
        colours = {colour[:3] for _, colour in image.getcolors(1 << 20)}
    assert {(0, 114, 178), (230, 159, 0)} <= colours
    first = path.read_bytes()
    draw_neighbours(path, queries, bank, answers, transform, "title\nof two lines", 3, 2)
    assert path.read_bytes() == first


def command(data: Path, out: Path, *arguments: str) -> Any:
    options = ("--data", str(data), "--out", str(out), "--workers", "0", "--device", "cpu", "--cache", str(out.parent / "cache"))
    return run(["retrieval", ENCODER, *options, *arguments])


def test_a_name_that_the_font_lacks_is_no_line_on_the_terminal(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with picture(tmp_path / "picture.png") as figure:
        figure.add_subplot().set_title("\N{CJK UNIFIED IDEOGRAPH-732B}")
    assert (tmp_path / "picture.png").stat().st_size and not recwarn.list


def test_the_command_leaves_a_record_with_neighbours_and_a_picture(folder: Path, tmp_path: Path) -> None:
    record = command(folder, tmp_path / "out")
    assert record == read_record(tmp_path / "out" / "record.json")
    assert list(record.metrics) == ["map", "recall_1", "recall_5", "recall_10"]
    assert all(metric.n == 8 and metric.ci95 for metric in record.metrics.values())
    columns = pyarrow.parquet.read_table(tmp_path / "out" / record.predictions).to_pydict()
    train, val = open_source(str(folder), "train"), open_source(str(folder), "val")
    assert columns["name"] == [val.name(index) for index in range(8)]
    assert record.metrics["map"].value == pytest.approx(100 * np.mean(columns["average_precision"]))
    names = {train.name(index): int(label) for index, label in enumerate(train.labels)}
    labels = [[names[name] for name in row] for row in columns["neighbours"]]
    assert labels == columns["neighbour_labels"] and np.shape(labels) == (8, 10)
    assert (np.diff(columns["similarities"], axis=1) <= 0).all()
    for k in (1, 5, 10):
        hit = [label in row[:k] for label, row in zip(columns["label"], labels, strict=True)]
        assert record.metrics[f"recall_{k}"].value == pytest.approx(100 * np.mean(hit))
        predicted = np.array(columns[f"prediction:recall_{k}"]) == np.array(columns["label"])
        assert predicted.tolist() == hit
    with Image.open(tmp_path / "out" / record.files["picture"]) as image:
        assert image.format == "PNG" and min(image.size) > 500


def test_leave_one_out_asks_the_val_images_only(folder: Path, tmp_path: Path) -> None:
    record = command(folder, tmp_path / "out", "--set", "bank=val", "--set", "recall=[1, 7]")
    columns = pyarrow.parquet.read_table(tmp_path / "out" / record.predictions).to_pydict()
    for name, neighbours in zip(columns["name"], columns["neighbours"], strict=True):
        assert sorted([name, *neighbours]) == sorted(columns["name"])
    assert record.metrics["recall_7"].value == 100 and record.details["bank"] == "val without the query itself"


def test_mistakes_are_told(folder: Path, tmp_path: Path, error_line: Callable[..., str]) -> None:
    start = ("retrieval", ENCODER, "--data", str(folder), "--out", str(tmp_path), "--workers", "0", "--set")
    assert "recall 50 is more than the 34 images of the bank" in error_line(*start, "recall=[50]")
    assert "bank: input should be 'train' or 'val'" in error_line(*start, "bank=test")
    assert "did you mean 'recall'?" in error_line(*start, "recal=[1]")


def test_a_dry_run_estimates(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, tmp_path / "out", "--dry-run", "--json") is None
    plan = json.loads(capsys.readouterr().out)
    assert plan["task_seconds"] > 0 and plan["task_memory_bytes"] > 0 and not (tmp_path / "out").exists()
    estimate = [RETRIEVAL.estimate(protocol(bank=bank), 3000, 100, 8, 3, CPU).memory_bytes for bank in ("train", "val")]
    assert estimate[0] - estimate[1] == 4 * 2900 * 8
