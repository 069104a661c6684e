"""Few-shot banks and grids of the k-NN evaluation: what is drawn, what each metric is called, what is kept in the record."""

import numpy as np
import pytest
import torch

from downstream.evaluate import PROTOCOLS, load_protocol
from downstream.knn import KNN, KNN_TASK, draw_bank, estimate_knn, evaluate_knn
from downstream.task import Split
from mte_bench.errors import UserError
from mte_bench.files import hash_of
from mte_bench.settings import load_yaml, names_in

CLASSES = tuple("abcdefg")
COUNTS = (30, 30, 30, 30, 30, 30, 3)


def split(seed, counts=COUNTS):
    labels = np.repeat(np.arange(7), counts)
    centres = np.random.default_rng(99).normal(size=(7, 12))
    rows = centres[labels] + 1.5 * np.random.default_rng(seed).normal(size=(len(labels), 12))
    return Split(rows.astype(np.float32), labels, CLASSES)


TRAIN, VAL = split(0), split(1, (10,) * 7)
CPU = torch.device("cpu")


def few_shot(*assignments):
    protocol = load_protocol(KNN_TASK, "fewshot", assignments)[1]
    return evaluate_knn(protocol, TRAIN, VAL, CPU)


def test_a_bank_has_n_images_of_every_class_and_all_of_a_smaller_one():
    labels = np.random.default_rng(0).permutation(TRAIN.labels)
    drawn = [draw_bank(labels, 5, np.random.default_rng(seed)) for seed in range(200)]
    for bank in drawn:
        assert np.bincount(labels[bank]).tolist() == [5] * 6 + [3]
        assert (np.diff(bank) > 0).all()
    share = np.bincount(np.concatenate(drawn), minlength=len(labels)) / len(drawn)
    assert np.all(share[labels == 6] == 1)
    assert abs(share[labels != 6] - 5 / 30).max() < 5 * np.sqrt(5 / 30 * 25 / 30 / 200)  # every image as likely as another
    assert np.array_equal(drawn[3], draw_bank(labels, 5, np.random.default_rng(3)))


def test_each_draw_is_the_classifier_on_its_bank():
    outcome = few_shot("few_shot.per_class=[2, 5]", "few_shot.draws=3", "k=[1, 3, 10]")
    for n, k in ((2, 1), (2, 2), (5, 1), (5, 3), (5, 5)):
        values = []
        for draw in range(3):
            bank = draw_bank(TRAIN.labels, n, np.random.default_rng([0, n, draw]))
            predicted = KNN(k=(k,)).fit(TRAIN.features[bank], TRAIN.labels[bank]).predict(VAL.features)[k, 0.07]
            metric = outcome.metrics[f"top1_n{n}_k{k}_draw{draw}"]
            assert np.array_equal(metric.predicted, predicted[:, 0])
            values.append(100 * np.mean(predicted[:, 0] == VAL.labels))
        found = outcome.details["over_draws"][f"top1_n{n}_k{k}"]
        assert found["mean"] == pytest.approx(np.mean(values)) and found["sd"] == pytest.approx(np.std(values, ddof=1))
        assert len(set(values)) > 1  # draws differ
    assert len(outcome.metrics) == 2 * 3 * 5  # top-1 and top-5, draws, and as DINOv2: of k those up to n, and n


def test_classes_with_fewer_images_are_counted(capsys):
    assert few_shot("few_shot.per_class=[2, 5]", "few_shot.draws=1").details["classes_with_fewer"] == {"5": 1}
    assert "1 classes have fewer than 5 images and give all of them" in capsys.readouterr().err


def test_one_draw_has_no_spread():
    found = few_shot("few_shot.per_class=[2]", "few_shot.draws=1").details["over_draws"]["top1_n2_k2"]
    assert found["sd"] is None


def test_the_seed_decides_the_draws():
    def drawn(seed):
        outcome = few_shot("few_shot.per_class=[2]", "few_shot.draws=1", f"few_shot.seed={seed}")
        return outcome.metrics["top1_n2_k2_draw0"].predicted

    assert np.array_equal(drawn(1), drawn(1)) and not np.array_equal(drawn(1), drawn(2))


def test_a_smoke_run_draws_once():
    protocol = load_protocol(KNN_TASK, "fewshot")[1]
    assert protocol.few_shot.draws == 5 and protocol.for_smoke().few_shot.draws == 1
    assert load_protocol(KNN_TASK, "knn")[1].for_smoke().few_shot is None


def test_several_temperatures_come_from_one_search_and_name_their_metrics(monkeypatch):
    searches = []
    monkeypatch.setattr(KNN, "_searched", lambda self, x, f=KNN._searched: searches.append(1) or f(self, x))
    grid = evaluate_knn(load_protocol(KNN_TASK, "knn", ("k=[5, 20]", "temperature=[0.07, 1]"))[1], TRAIN, VAL, CPU)
    assert len(searches) == 1
    assert [name for name in grid.metrics if name.startswith("top1")] == [
        "top1_k5_t0.07",
        "top1_k5_t1",
        "top1_k20_t0.07",
        "top1_k20_t1",
    ]
    for temperature in ("0.07", "1", "[0.07]"):
        alone = evaluate_knn(load_protocol(KNN_TASK, "knn", ("k=[5, 20]", f"temperature={temperature}"))[1], TRAIN, VAL, CPU)
        for k in (5, 20):
            named = grid.metrics[f"top1_k{k}_t{temperature.strip('[]')}"]
            assert np.array_equal(alone.metrics[f"top1_k{k}"].predicted, named.predicted)


@pytest.mark.parametrize("name", [name for name in names_in(PROTOCOLS) if name.startswith("knn")])
def test_settings_are_what_the_protocol_file_says_and_nothing_else(name):
    protocol = load_protocol(KNN_TASK, name)[1]
    assert protocol.hash == hash_of(load_yaml(name, PROTOCOLS, "protocol"))


def test_gap_is_the_mean_of_the_patch_tokens_before_or_after_the_norm():
    assert load_protocol(KNN_TASK, "gap")[1].feature == "patch-mean"
    assert load_protocol(KNN_TASK, "gap-normed")[1].feature == "patch-mean-normed"


@pytest.mark.parametrize(
    "setting", ["temperature=0", "temperature=[]", "few_shot={per_class: [5]}", "few_shot.draws=0", "few_shot.per_class=[0]"]
)
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(UserError, match=r"protocol knn-fewshot: (temperature|few_shot)"):
        load_protocol(KNN_TASK, "fewshot", (setting,))


def test_the_estimate_counts_every_draw():
    one, five = (
        estimate_knn(load_protocol(KNN_TASK, "fewshot", (f"few_shot.draws={draws}",))[1], 10_000, 100, 16, 7, CPU).seconds
        for draws in (1, 500)
    )
    assert five > 20 * one
