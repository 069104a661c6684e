"""``compare``: what is paired with what, whether the numbers are right, and that nothing is left out in silence."""

import json

import numpy as np
import pytest
from scipy import stats

from made_up import ACCURACY, CIFAR, KNN, SCENES, build_runs, evaluation, subject
from mte_bench.cli import main
from mte_bench.data.sources import open_source
from mte_bench.errors import UserError
from mte_bench.records import Protocol
from mte_bench.statistics import paired_bootstrap
from reports.pairs import pair


def compared(capsys, *arguments):
    capsys.readouterr()
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def by_hand(right, other):
    """McNemar's exact test below 25 discordant images, its mid-p version from there on, by scipy."""
    fewer, pairs = min((right & ~other).sum(), (other & ~right).sum()), (right ^ other).sum()
    exact = 2 * stats.binom.cdf(fewer, pairs, 0.5)
    return min(1.0, exact if pairs < 25 else exact - stats.binom.pmf(fewer, pairs, 0.5))


def test_one_record_against_one(tmp_path, capsys):
    a = evaluation(tmp_path / "a", "knn", subject(False, 0), 0.60, seed=1)
    b = evaluation(tmp_path / "b", "knn", subject(True, 3), 0.66, seed=2)
    (found,) = compared(capsys, tmp_path / "a" / "record.json", tmp_path / "b")["pairs"]
    change = found["b_minus_a"]
    assert change["difference"] == pytest.approx(100 * (b.mean() - a.mean()))
    assert change["ci95"] == pytest.approx([100 * end for end in paired_bootstrap(b, a)[1:]])
    assert change["mcnemar_p"] == pytest.approx(by_hand(b, a), rel=1e-9)
    assert [found[side]["value"] for side in "ab"] == pytest.approx([100 * a.mean(), 100 * b.mean()])
    assert found["images"] == len(a) and change["spread_over_seeds"] is None


def test_classes_add_up_to_the_totals(tmp_path, capsys):
    right = build_runs(tmp_path, seeds=(0, 1, 2))
    found = compared(capsys, tmp_path / "plain-0", tmp_path / "mte-0")["pairs"]
    assert [pair["task"] for pair in found] == ["knn", "linear"]
    a, b = right["knn", False, 0], right["knn", True, 0]
    classes = found[0]["classes"]
    assert sum(row["images"] for row in classes) == len(a) == SCENES["images"]["val"]
    assert sum(row["gained"] for row in classes) == (b & ~a).sum() and sum(row["lost"] for row in classes) == (a & ~b).sum()
    assert any(row["lost"] == 0 for row in classes) and not any(np.signbit(row["lost"]) for row in classes)  # no "-0"
    for side, answers in (("a", a), ("b", b)):
        assert sum(row[side] / 100 * row["images"] for row in classes) == pytest.approx(answers.sum())
    labels = np.arange(len(a)) % SCENES["classes"]
    for number, row in enumerate(classes):
        rows = np.flatnonzero(labels == number)
        assert row["class"] == f"class {number}"
        assert row["difference"] == pytest.approx(100 * (b[rows].mean() - a[rows].mean()))
        assert row["examples_gained"] == [f"{i:05}.jpg" for i in rows if b[i] and not a[i]][:6]

    for name in ("a", "b"):  # three seeds: means over them
        (tmp_path / name).mkdir()
    for kind, name in ((False, "a"), (True, "b")):
        for seed in range(3):
            evaluation(tmp_path / name / str(seed), "knn", subject(kind, seed), ACCURACY[kind], seed=10 * kind + seed)
    (found,) = compared(capsys, tmp_path / "a", tmp_path / "b")["pairs"]
    total = sum(row["gained"] - row["lost"] for row in found["classes"])
    assert 100 * total / len(a) == pytest.approx(found["b_minus_a"]["difference"])
    seeds = found["b_minus_a"]["seeds"]
    assert [row["mcnemar_p"] for row in seeds] == pytest.approx(
        [by_hand(right["knn", True, s], right["knn", False, s]) for s in range(3)], rel=1e-9
    )
    differences = [row["b"] - row["a"] for row in seeds]
    assert found["b_minus_a"]["spread_over_seeds"] == pytest.approx(np.std(differences, ddof=1))
    assert found["b_minus_a"]["mcnemar_p"] is None
    sums = (sum(right["knn", kind, seed].astype(int) for seed in range(3)) for kind in (True, False))
    assert found["b_minus_a"]["ci95"] == pytest.approx([100 / 3 * end for end in paired_bootstrap(*sums)[1:]])


def test_means_over_different_seeds_are_compared_as_means(tmp_path, capsys):
    a = [evaluation(tmp_path / "a" / str(seed), "knn", subject(False, seed), 0.6, seed=seed) for seed in (0, 1)]
    b = [evaluation(tmp_path / "b" / str(seed), "knn", subject(True, seed), 0.7, seed=seed) for seed in (5, 6, 7)]
    (found,) = compared(capsys, tmp_path / "a", tmp_path / "b")["pairs"]
    change = found["b_minus_a"]
    assert change["difference"] == pytest.approx(100 * (np.mean(b) - np.mean(a)))
    assert change["seeds"] == [] and change["mcnemar_p"] is None
    expected = 100 * np.std(np.mean(b, axis=0) - np.mean(a, axis=0)) / np.sqrt(len(a[0]))  # standard error, closed form
    assert (change["ci95"][1] - change["ci95"][0]) / (2 * 1.96) == pytest.approx(expected, rel=0.05)
    total = sum(row["gained"] - row["lost"] for row in found["classes"])
    assert 100 * total / len(a[0]) == pytest.approx(change["difference"])


def test_the_same_kinds_are_paired_and_the_rest_is_named(tmp_path, capsys):
    for name, shift in (("old", 0.0), ("new", 0.1)):
        for mte in (False, True):
            evaluation(tmp_path / name / str(mte), "knn", subject(mte, 0), ACCURACY[mte] + shift, seed=mte)
    evaluation(tmp_path / "new" / "again", "knn", subject(True, 0), 0.5, created="2026-11-21T10:00:00+00:00")
    evaluation(tmp_path / "new" / "random", "knn", subject(random=True), 0.2)
    evaluation(tmp_path / "old" / "linear", "linear", subject(False, 0), 0.6)
    found = compared(capsys, tmp_path / "old", tmp_path / "new")
    pairs = [(pair["a"]["encoder"], pair["b"]["encoder"], pair["b"]["repeat"]) for pair in found["pairs"]]
    assert pairs == [("DINO", "DINO", 0), ("DINO+MTE", "DINO+MTE", 0), ("DINO+MTE", "DINO+MTE", 1)]
    assert len(found["only_in_a"]) == 1 and found["only_in_a"][0].startswith("DINO, ViT-S/16 at 64 px: linear by linear-fast@1")
    assert len(found["only_in_b"]) == 1 and found["only_in_b"][0].startswith("random encoder, ")
    main(["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    shown = capsys.readouterr()
    assert "only in A: DINO, ViT-S/16" in shown.err and "only in B: random encoder" in shown.err
    assert "(repeat 2)" in shown.out and "classes that gain and lose most, of 8" in shown.out


def test_other_protocols_and_other_images_are_never_paired(tmp_path):
    evaluation(tmp_path / "a", "knn", subject(), 0.5)
    evaluation(tmp_path / "b", "knn", subject(), 0.6, protocol=Protocol(name="knn", settings=KNN | {"temperature": 0.1}))
    evaluation(tmp_path / "c", "knn", subject(), 0.7, CIFAR)
    for other in ("b", "c"):
        with pytest.raises(UserError, match="nothing was measured under the same protocol on the same images: A has DINO"):
            pair([tmp_path / "a"], [tmp_path / other])
    with pytest.raises(UserError, match="by the metric 'top5'"):
        pair([tmp_path / "a"], [tmp_path / "a"], "top5")


def test_without_predictions_the_values_are_compared_and_no_more(tmp_path, capsys):
    evaluation(tmp_path / "a", "knn", subject(), 0.5)
    evaluation(tmp_path / "b", "knn", subject(True), 0.6, predictions=False)
    (tmp_path / "b" / "half").mkdir()
    (tmp_path / "b" / "half" / "record.json").write_text("{")
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    change = found["pairs"][0]["b_minus_a"]
    assert change["difference"] == pytest.approx(10, abs=8) and change["ci95"] is None and change["mcnemar_p"] is None
    assert found["pairs"][0]["classes"] is None
    assert len(found["unusable"]) == 1 and "half/record.json" in found["unusable"][0]


def test_pictures_of_what_changed_where_the_source_can_be_opened(tmp_path, capsys, folder):
    images = open_source(str(folder), "val")
    data = {"source": f"imagefolder:{folder}", "classes": 2, "fingerprint": "f" * 16, "images": {"train": 34, "val": len(images)}}
    named = [images.name(index) for index in range(len(images))]
    for name, accuracy in (("a", 0.3), ("b", 0.8)):
        evaluation(tmp_path / name, "knn", subject(name == "b"), accuracy, data, names=named)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "compare.md").read_text()
    pictures = list((tmp_path / "out" / "figures").iterdir())
    assert pictures and all(f"(figures/{path.name})" in page for path in pictures)
    assert (tmp_path / "out" / "compare.html").read_text().count("data:image/png") == len(pictures)
    listed = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert listed["pairs"] == compared(capsys, tmp_path / "a", tmp_path / "b")["pairs"]

    (tmp_path / "moved").mkdir()
    for name in "ab":
        text = (tmp_path / name / "record.json").read_text().replace(str(folder), str(tmp_path / "nowhere"))
        (tmp_path / name / "record.json").write_text(text)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    assert "no pictures of what changed: " in capsys.readouterr().err
    assert not list((tmp_path / "out" / "figures").iterdir())  # those of the earlier comparison are gone
    assert "data:image" not in (tmp_path / "out" / "compare.html").read_text()
