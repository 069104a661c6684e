"""Ridge against scikit-learn's; logistic regression against its own optimality condition in float64."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier

from downstream.evaluate import load_protocol
from downstream.linear import LINEAR, ridge
from downstream.linear.heads import hold_out
from downstream.linear.logistic import LogisticProbe
from downstream.linear.ridge import RidgeProbe
from downstream.task import Split
from mte_bench.errors import UserError

PENALTIES = (1e-6, 1e-3, 0.1, 10.0)


def blobs(n, width=12, classes=4, seed=0, spread=1.2):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return centres[labels] * 3 + 5 + 3 * spread * generator.normal(size=(n, width)), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_every_penalty_is_scikit_learns_ridge(classes, monkeypatch):
    monkeypatch.setattr(ridge, "ROWS", 97)  # read in parts
    features, labels = blobs(500, classes=classes)
    queries, _ = blobs(200, classes=classes, seed=1)
    probe = RidgeProbe(PENALTIES).fit(features, labels)
    centred = features - features.mean(0)
    for place, penalty in enumerate(PENALTIES):
        alpha = penalty * np.trace(centred.T @ centred) / features.shape[1]
        weight, bias = probe.sweep_.weight[place].numpy(), probe.sweep_.bias[place].numpy()
        peer = Ridge(alpha=alpha).fit(features, np.where(labels[:, None] == np.arange(classes), 1.0, -1.0))
        np.testing.assert_allclose(weight, peer.coef_, rtol=0, atol=1e-6)
        np.testing.assert_allclose(bias, peer.intercept_, rtol=0, atol=1e-6)
        probe.heads_ = probe.sweep_.take([place])
        assert np.array_equal(probe.predict(queries)[:, 0], RidgeClassifier(alpha=alpha).fit(features, labels).predict(queries))


def test_the_penalty_is_the_one_that_is_best_on_held_out_train_images():
    features, labels = blobs(60, width=40)  # fewer images than least squares would like
    probe = RidgeProbe((1e-9, 0.3, 1e6)).fit(features, labels)
    out, scores = hold_out(labels, 0.1, 0), []
    centred = features[~out] - features[~out].mean(0)
    for penalty in probe.penalties:
        alpha = penalty * np.trace(centred.T @ centred) / 40
        scores.append(100 * RidgeClassifier(alpha=alpha).fit(features[~out], labels[~out]).score(features[out], labels[out]))
    assert probe.held_out_top1_ == pytest.approx(scores)
    assert probe.chosen_ == probe.penalties[int(np.argmax(scores))] and len(set(scores)) > 1


def test_features_in_16_bits_and_of_any_scale_give_the_same_classes(tmp_path):
    features, labels = blobs(300)
    np.save(tmp_path / "half.npy", features.astype(np.float16))
    plain = RidgeProbe(PENALTIES).fit(features, labels).predict(features)
    half = RidgeProbe(PENALTIES).fit(np.load(tmp_path / "half.npy", mmap_mode="r"), labels).predict(features)
    large = RidgeProbe(PENALTIES).fit(1e4 * features, labels).predict(1e4 * features)
    assert (plain[:, 0] == half[:, 0]).mean() > 0.98 and np.array_equal(plain, large)


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_minimises_ibots_objective(classes):
    features, labels = blobs(400, classes=classes)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    probe = LogisticProbe((0.01, 0.1, 1e-3), tolerance=1e-7).fit(features.astype(np.float32), labels)
    for place, penalty in enumerate(probe.penalties):
        weight = probe.sweep_.weight[place].double().numpy()
        scores = unit @ weight.T
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        gradient = (chances - np.eye(classes)[labels]).T @ unit / len(unit) + penalty * weight
        assert abs(gradient).max() < 5e-7 and abs(penalty * weight).max() > 1e-3
        assert not probe.sweep_.bias.any()


def test_a_class_without_train_images_is_never_predicted():
    features, labels = blobs(300)
    present = labels != 2
    for probe in (RidgeProbe(PENALTIES), LogisticProbe()):
        ranked = probe.fit(features[present], labels[present]).predict(features)
        assert set(ranked[:, 0]) == {0, 1, 3} and set(ranked[:, 3]) == {2}


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_the_evaluation_reports_the_chosen_penalty_and_what_val_would_have_chosen(name):
    full, protocol = load_protocol(LINEAR, name)
    assert full == f"linear-{name}"
    classes = tuple("abcd")
    outcome = protocol.evaluate(Split(*blobs(300), classes), Split(*blobs(100, seed=1), classes), torch.device("cpu"))
    details = outcome.details
    assert list(outcome.metrics) == ["top1"] and details["penalty"] in details["penalties"]
    assert details["held_out_images"] == 30 and len(details["held_out_top1"]) == len(details["penalties"])
    assert details["top1_if_chosen_on_val"] >= 100 * outcome.metrics["top1"].correct.mean() - 1e-3
    assert protocol.estimate(300, 100, 12, 4, torch.device("cpu")).seconds > 0


@pytest.mark.parametrize("probe", [RidgeProbe(PENALTIES), LogisticProbe()])
def test_one_class_is_refused(probe):
    with pytest.raises(UserError, match="one class only"):
        probe.fit(blobs(20)[0], np.zeros(20, np.int64))
