"""The sweep against independent classifiers trained one by one with torch; its choice of rate; its reproducibility."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from downstream.evaluate import load_protocol
from downstream.linear import LINEAR
from downstream.linear.heads import accuracy, hold_out
from downstream.linear.probe import IBOT_RATES, LinearProbe
from downstream.task import Split
from mte_bench.errors import UserError


def blobs(n, width=12, classes=4, seed=0, spread=1.2):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return (centres[labels] + spread * generator.normal(size=(n, width))).astype(np.float32), labels


def one_by_one(probe, x, y, classes, rate):
    """The same training with torch's own layer, loss, optimiser and schedule."""
    generator = torch.Generator().manual_seed(probe.seed)
    layer = nn.Linear(x.shape[1], classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, x.shape[1], generator=generator) * probe.init_std)
        layer.bias.zero_()
    lr = rate * probe.batch_size / probe.rate_per
    optimiser = torch.optim.SGD(layer.parameters(), lr, momentum=probe.momentum, weight_decay=probe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, probe.epochs, eta_min=0)
    for _ in range(probe.epochs):
        for batch in torch.randperm(len(x), generator=generator).split(probe.batch_size):
            optimiser.zero_grad()
            nn.functional.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimiser.step()
        schedule.step()
    return layer


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_stacked_training_is_that_of_independent_classifiers_value_by_value(weight_decay):
    features, labels = blobs(500)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    rates = (1e-4, 3e-3, 2e-2, 0.1, 0.5)
    probe = LinearProbe(rates, epochs=8, batch_size=64, weight_decay=weight_decay, seed=3)
    heads = probe._train(x, y, torch.arange(500), 4, rates)
    for index, rate in enumerate(rates):
        layer = one_by_one(probe, x, y, 4, rate)
        torch.testing.assert_close(heads.weight[index], layer.weight.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(heads.bias[index], layer.bias.detach(), rtol=0, atol=1e-5)
        logits = layer(x)
        top1, loss = accuracy(heads, x, y)
        assert top1[index] == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
        assert loss[index] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), abs=1e-5)


def test_the_same_seed_gives_the_same_weights_bit_for_bit():
    features, labels = blobs(300)
    first, again = (LinearProbe(epochs=3, seed=1).fit(features, labels) for _ in range(2))
    assert torch.equal(first.sweep_.weight, again.sweep_.weight) and torch.equal(first.heads_.weight, again.heads_.weight)
    assert first.held_out_top1_ == again.held_out_top1_ and first.chosen_ == again.chosen_
    other = LinearProbe(epochs=3, seed=2).fit(features, labels)
    assert not torch.equal(first.sweep_.weight, other.sweep_.weight)


def test_what_is_reported_was_trained_on_all_images_with_the_chosen_rate():
    features, labels = blobs(300)
    probe = LinearProbe((1e-3, 0.1), epochs=5, batch_size=64).fit(features, labels)
    layer = one_by_one(probe, torch.from_numpy(features), torch.from_numpy(labels), 4, probe.chosen_)
    torch.testing.assert_close(probe.heads_.weight[0], layer.weight.detach(), rtol=0, atol=1e-5)
    expected = layer(torch.from_numpy(features)).topk(4, dim=1).indices.numpy()
    assert np.array_equal(probe.predict(features), expected)


def test_the_rate_is_the_one_that_is_best_on_held_out_train_images():
    features, labels = blobs(400)
    probe = LinearProbe((1e-6, 1e-2, 0.1), epochs=20, batch_size=64).fit(features, labels)
    out = hold_out(labels, 0.1, 0)
    layers = [one_by_one(probe, *(torch.from_numpy(z[~out]) for z in (features, labels)), 4, rate) for rate in probe.rates]
    held = torch.from_numpy(features[out])
    top1 = [100 * (layer(held).argmax(1).numpy() == labels[out]).mean() for layer in layers]
    assert probe.held_out_top1_ == pytest.approx(top1)
    assert top1[probe.rates.index(probe.chosen_)] == max(top1) > top1[0]


def test_a_rate_that_diverges_is_never_chosen():
    features, labels = blobs(200)
    probe = LinearProbe((1e38, 1e-2), epochs=3, batch_size=32).fit(features * 10, labels)
    assert probe.chosen_ == 1e-2
    assert probe.held_out_top1_[0] == 0 and math.isinf(probe.held_out_loss_[0])
    assert torch.isfinite(probe.heads_.weight).all()


def test_long_training_reaches_logistic_regression():
    features, labels = blobs(2000)
    queries, truth = blobs(1000, seed=7)
    probe = LinearProbe(epochs=30, batch_size=256).fit(features, labels)
    peer = LogisticRegression(C=1e4, max_iter=2000).fit(features, labels)
    ours = (probe.predict(queries)[:, 0] == truth).mean()
    assert ours == pytest.approx(peer.score(queries, truth), abs=0.015)


def test_standardised_features_do_not_depend_on_their_scale_and_place():
    features, labels = blobs(300)
    moved = features * np.geomspace(0.01, 100, 12, dtype=np.float32) + np.linspace(-3, 3, 12, dtype=np.float32)
    plain, other = (LinearProbe((0.1,), epochs=5, standardise=True).fit(x, labels).predict(x) for x in (features, moved))
    assert (plain[:, 0] == other[:, 0]).mean() > 0.99


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_every_class_is_held_out_in_proportion(share):
    labels = np.repeat([0, 1, 2, 3], [100, 30, 2, 1])
    held = hold_out(labels, share, seed=0)
    assert [int(held[labels == label].sum()) for label in range(4)] == [100 * share, 30 * share, 1, 0]
    assert np.array_equal(held, hold_out(labels, share, seed=0)) and not np.array_equal(held, hold_out(labels, share, seed=1))


def test_one_class_or_nothing_to_hold_out_is_refused():
    features, _ = blobs(20)
    with pytest.raises(UserError, match="one class only"):
        LinearProbe().fit(features, np.zeros(20, np.int64))
    with pytest.raises(UserError, match="none can be held out"):
        LinearProbe().fit(features[:4], np.arange(4))


def test_features_in_16_bits_on_disk_are_trained_in_32(tmp_path):
    features, labels = blobs(300)
    np.save(tmp_path / "half.npy", features.astype(np.float16))
    half = LinearProbe((0.1,), epochs=5).fit(np.load(tmp_path / "half.npy", mmap_mode="r"), labels)
    assert half.heads_.weight.dtype == torch.float32
    assert (
        half.predict(features)[:, 0] == LinearProbe((0.1,), epochs=5).fit(features, labels).predict(features)[:, 0]
    ).mean() > 0.99


def test_the_protocol_states_the_defaults_of_the_estimator_and_ibots_rates():
    name, protocol = load_protocol(LINEAR, "fast")
    assert name == "linear-fast"
    stated, default = (vars(probe) for probe in (protocol.probe(torch.device("cpu")), LinearProbe()))
    assert {**stated, "device": "cpu"} == default
    assert list(IBOT_RATES) == pytest.approx([d * 10.0**e for e in range(-4, 1) for d in range(1, 10)])


def test_the_evaluation_tells_every_rate_and_what_choosing_on_val_would_have_given(capsys):
    classes = tuple("abcd")
    _, protocol = load_protocol(LINEAR, "fast", ("rates=[0.001, 0.1]", "epochs=3"))
    outcome = protocol.evaluate(Split(*blobs(200), classes), Split(*blobs(100, seed=1), classes), torch.device("cpu"))
    assert list(outcome.metrics) == ["top1"]  # of four classes, the first five are no measure
    assert outcome.details["rate"] in outcome.details["rates"] == [0.001, 0.1]
    assert len(outcome.details["held_out_top1"]) == 2 and outcome.details["held_out_images"] == 20
    assert 0 <= outcome.details["top1_if_chosen_on_val"] <= 100
    assert "edge of the sweep" in capsys.readouterr().err
