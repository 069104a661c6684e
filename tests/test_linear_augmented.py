"""The probe on augmented views: against a plain loop over images, stopped and gone on, by several processes and workers."""

import json

import numpy as np
import pytest
import torch
from test_evaluate import ENCODER, draw
from torch import nn
from torchvision.transforms import functional as F

from downstream import commands
from downstream.evaluate import evaluation_transform, load_protocol
from downstream.features import Pass, extract
from downstream.linear import LINEAR, training
from downstream.linear.heads import hold_out
from downstream.linear.training import Training
from downstream.linear.views import Steps
from downstream.task import Material, Split
from mte_bench.data.draws import TRIES, Draws, crop_box
from mte_bench.data.sources import open_source
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.errors import UserError
from mte_bench.records import read_record
from tiny import Killed

SMALL = ("epochs=3", "batch_size=16", "rates=[0.01, 0.3]", "feature=cls-last2")
SWIN = "random:swin_tiny_patch4_window7_224?image_size=32&window_size=4&embed_dim=16&depths=[1,1,2,1]&num_heads=[1,2,2,4]"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(draw(tmp_path_factory.mktemp("drawn")))


def material(data, folder, protocol, *, checkpoint=ENCODER, workers=0, batch_size=7):
    opened = open_checkpoint(checkpoint)
    transform, how = evaluation_transform(opened, protocol), Pass(workers=workers, batch_size=batch_size, cache=folder / "cache")
    train, val = (open_source(data, split) for split in ("train", "val"))
    kinds = protocol.kinds(opened.encoder)
    found = [extract(opened.encoder, opened.sha256, images, transform, kinds, how).arrays for images in (train, val)]
    both = list(zip(found, (train, val), strict=True))
    splits = {kind: tuple(Split(arrays[kind], i.labels, i.classes) for arrays, i in both) for kind in kinds}
    return Material(opened.encoder, train, transform, how, splits, folder, "identity")


def trained(data, folder, name="ibot-sweep", changes=SMALL, **options):
    """A whole training and what came of it."""
    _, protocol = load_protocol(LINEAR, name, changes)
    run = Training(protocol, material(data, folder, protocol, **options))
    return run, run.run()


def heads(run):
    trainers = {f"{sweep.kind} {name}": trainer for sweep in run.sweeps for name, trainer in sweep.trainers.items()}
    return {name: torch.cat([t.ready.weight.flatten(1), t.ready.bias], 1) for name, t in trainers.items()}


def plain_view(image, numbers, size, view):
    left, top, right, bottom = crop_box(view.scale, view.ratio, image.size, numbers)
    image = F.resized_crop(image, top, left, bottom - top, right - left, [size, size], F.InterpolationMode.BILINEAR)
    return F.hflip(image) if numbers[2 * TRIES + 2] < view.flip else image


def test_it_is_the_plain_loop_over_images_rates_and_epochs(data, tmp_path):
    """Views by torchvision, features by timm, classifiers by torch, one by one; also the choice of the rate."""
    run, outcome = trained(data, tmp_path, changes=SMALL)
    protocol, images, encoder = run.protocol, run.material.images, run.material.encoder
    held = hold_out(images.labels, 0.1, 0)
    start = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 0.01

    @torch.no_grad()
    def features(batch):
        taken = encoder.model.get_intermediate_layers(batch, n=2, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in taken], dim=1)

    def normalised(image):
        return F.normalize(F.to_tensor(image), encoder.spec.mean, encoder.spec.std)

    val = open_source(data, "val")
    asked = features(torch.stack([run.material.transform(val.image(i)) for i in range(len(val))]))
    tested = features(torch.stack([run.material.transform(images.image(i)) for i in np.flatnonzero(held)]))
    found, chosen = [], []
    for rate in protocol.rates:
        layers = {"all": nn.Linear(64, 7), "kept": nn.Linear(64, 7)}
        optimisers = {}
        for name, layer in layers.items():
            layer.weight.data.copy_(start)
            layer.bias.data.zero_()
            optimisers[name] = torch.optim.SGD(layer.parameters(), rate * 16 / 256, momentum=0.9)
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 3) for o in optimisers.values()]
        accuracies = []
        for epoch in range(3):
            order = Draws(0).order(epoch, len(images))
            for first in range(0, len(images), 16):
                taken = order[first : first + 16]
                draws = [Draws(0).views(epoch, int(i), 1)[0] for i in taken]
                views = [plain_view(images.image(int(i)), n, 16, protocol.view) for i, n in zip(taken, draws, strict=True)]
                x, y = features(torch.stack([normalised(view) for view in views])), torch.from_numpy(images.labels[taken])
                for name, rows in (("all", torch.ones(len(y), dtype=torch.bool)), ("kept", torch.from_numpy(~held[taken]))):
                    optimisers[name].zero_grad()
                    nn.functional.cross_entropy(layers[name](x[rows]), y[rows]).backward()
                    optimisers[name].step()
            for schedule in schedules:
                schedule.step()
            accuracies.append(100 * (layers["all"](asked).argmax(1).numpy() == val.labels).mean())
        found.append((layers, accuracies))
        chosen.append((layers["kept"](tested).argmax(1).numpy() == images.labels[held]).mean())
    for place, (layers, accuracies) in enumerate(found):
        for name, trainer in run.sweeps[0].trainers.items():
            torch.testing.assert_close(trainer.heads.weight[place], layers[name].weight.detach(), rtol=0, atol=1e-5)
            torch.testing.assert_close(trainer.heads.bias[place], layers[name].bias.detach(), rtol=0, atol=1e-5)
        assert [top1[place] for top1 in run.val_top1] == pytest.approx(accuracies)
    details, best = outcome.details, int(np.argmax(chosen))
    assert chosen[0] != chosen[1] and details["rate"] == protocol.rates[best]
    assert details["held_out_top1"][run.kinds[0]] == pytest.approx([100 * share for share in chosen], abs=1e-3)
    assert 100 * outcome.metrics["top1"].correct.mean() == pytest.approx(found[best][1][-1])
    everything = [value for _, accuracies in found for value in accuracies]
    assert 100 * outcome.metrics["top1_best_on_val"].correct.mean() == pytest.approx(max(everything))


GRID = (*SMALL, "feature=cls-last1, cls-last2+patch-mean", "steps_per_epoch=null", "val_every_epoch=true")


@pytest.mark.parametrize(("name", "changes", "checkpoint"), [
    ("dinov2-grid", GRID, ENCODER),
    ("moby", ("epochs=3", "batch_size=16", "warmup_epochs=1"), SWIN),
    ("mae", ("epochs=3", "batch_size=16", "warmup_epochs=1", "norm_batch=8", "rates=[1.0, 9.0]"), ENCODER),
])  # fmt: skip
def test_stopped_after_an_epoch_or_within_one_it_ends_with_the_same_heads(data, tmp_path, monkeypatch, name, changes, checkpoint):
    whole, expected = trained(data, tmp_path / "whole", name, changes, checkpoint=checkpoint)
    features, calls, per_epoch = Training._features, [], whole.steps.per_epoch

    def until(self, views, images, step):
        calls.append(step)
        if len(calls) in (per_epoch + 2, 2 * per_epoch + 4):  # within the second epoch, then within the third
            raise Killed
        return features(self, views, images, step)

    monkeypatch.setattr(Training, "_features", until)
    for _ in range(2):
        with pytest.raises(Killed):
            trained(data, tmp_path / "killed", name, changes, checkpoint=checkpoint, workers=2)
    again, outcome = trained(data, tmp_path / "killed", name, changes, checkpoint=checkpoint)
    assert calls[2 * per_epoch + 4 :] == list(range(2 * per_epoch, 3 * per_epoch))  # it went on, it did not start again
    ours, theirs = heads(again), heads(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and outcome.details == expected.details
    assert all(np.array_equal(outcome.metrics[m].predicted, expected.metrics[m].predicted) for m in expected.metrics)


def test_neither_workers_nor_the_encoders_batch_change_what_is_seen(data, tmp_path):
    plain, _ = trained(data, tmp_path / "a", changes=(*SMALL, "epochs=1"))
    other, _ = trained(data, tmp_path / "b", changes=(*SMALL, "epochs=1"), workers=2, batch_size=5)
    for key, expected in heads(plain).items():
        torch.testing.assert_close(heads(other)[key], expected, rtol=0, atol=1e-6)


def test_stochastic_depth_is_drawn_anew_for_each_step_and_only_while_training(data, tmp_path):
    changes = ("epochs=1", "batch_size=16", "warmup_rate=1", "warmup_epochs=0")
    with_depth, _ = trained(data, tmp_path / "a", "moby", changes, checkpoint=SWIN)
    without, _ = trained(data, tmp_path / "b", "moby", (*changes, "drop_path=0"), checkpoint=SWIN)
    assert not torch.equal(heads(with_depth)["global all"], heads(without)["global all"])
    views = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    first, again, other = (with_depth._features(iter([views]), 4, step)["global"] for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[0], first[1])
    assert not with_depth.material.encoder.training


def process(rank, data, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    run, outcome = trained(data, folder, "dinov2-grid", GRID)
    state = {f"{s.kind} {name}": (s.own, t.heads.weight) for s in run.sweeps for name, t in s.trainers.items()}
    torch.save((state, outcome.details, {m: p.predicted for m, p in outcome.metrics.items()}), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_heads_of_one(data, tmp_path):
    alone, expected = trained(data, tmp_path / "alone", "dinov2-grid", GRID)
    (tmp_path / "two").mkdir()
    torch.multiprocessing.start_processes(process, (data, tmp_path / "two"), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for sweep in alone.sweeps:
        for name, trainer in sweep.trainers.items():
            taken = []
            for state, *_ in found:
                own, weight = state[f"{sweep.kind} {name}"]
                torch.testing.assert_close(weight, trainer.heads.weight[own], rtol=0, atol=1e-5)
                taken += own
            assert sorted(taken) == [0, 1]
    for _, details, predicted in found:
        assert details["held_out_top1"] == expected.details["held_out_top1"] and details["processes"] == 2
        assert details["val_top1"] == expected.details["val_top1"]
        assert all(np.array_equal(predicted[m], p.predicted) for m, p in expected.metrics.items())


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"steps_per_epoch": 3}])
def test_a_pass_takes_every_image_once(options):
    steps = Steps(images=10, batch_size=4, epochs=5, seed=1, **options)
    batches = list(steps.from_epoch(0))
    assert len(batches) == 5 * steps.per_epoch
    assert [len(keys) for keys in batches[: steps.per_epoch]] == {0: [4, 4, 2], 1: [4, 4], 3: [4, 4, 4]}[sum(options.values())]
    keys = [tuple(key) for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)
    per_pass = [[index for number, index in keys if number == p] for p in range(5)]
    full = 8 if "drop_last" in options else 10
    assert all(len(set(indices)) == full for indices in per_pass) and per_pass[0] != per_pass[1]
    again = list(steps.from_epoch(3))
    assert all(np.array_equal(a, b) for a, b in zip(again, batches[3 * steps.per_epoch :], strict=True))


def test_a_batch_that_the_data_cannot_fill_is_refused():
    with pytest.raises(UserError, match="batch_size 64 is more than the 10 train images"):
        _ = Steps(images=10, batch_size=64, epochs=1, drop_last=True).per_epoch


def run(data, out, *changes, **options):
    return commands.linear(ENCODER, data, out=str(out), set_=list(changes), workers=0, **({"protocol": "ibot-sweep"} | options))


def test_the_command_writes_a_record_and_leaves_no_state(data, tmp_path, capsys):
    record = run(data, tmp_path / "out", *SMALL)
    assert record == read_record(tmp_path / "out" / "record.json")
    assert list(record.metrics) == ["top1", "top5", "top1_best_on_val"]
    assert record.metrics["top1_best_on_val"].value >= record.metrics["top1"].value
    assert record.details["feature"] == "cls-last2" and len(record.details["val_top1"]["cls-last2"]) == 2
    assert not list((tmp_path / "out").glob("unfinished*"))
    output = capsys.readouterr()
    assert "top1_best_on_val" in output.out and "epoch 3/3" in output.err


def test_an_interrupted_command_says_that_it_goes_on(data, tmp_path, capsys, monkeypatch):
    measure = Training._measure

    def until(self):
        if self.epoch == 2:
            raise Killed
        measure(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Training, "_measure", until)
        run(data, tmp_path / "out", *SMALL)
    (state,) = (tmp_path / "out").glob("unfinished*")
    other = run(data, tmp_path / "out", *SMALL, "momentum=0.5")
    assert state.exists() and other.protocol.settings["momentum"] == 0.5  # the state of other settings is left alone
    capsys.readouterr()
    record = run(data, tmp_path / "out", *SMALL)
    assert "going on behind epoch 1" in capsys.readouterr().err and not state.exists()
    assert record.details["best_val_top1_per_epoch"] == run(data, tmp_path / "whole", *SMALL).details["best_val_top1_per_epoch"]


def test_a_state_that_is_none_is_refused_by_name(data, tmp_path):
    _, protocol = load_protocol(LINEAR, "ibot-sweep", SMALL)
    training_ = Training(protocol, material(data, tmp_path, protocol))
    training_._path.write_bytes(b"no state")
    with pytest.raises(UserError, match=r"unfinished-\w+\.pt: not a state to go on from .* remove the file"):
        training_.run()


def test_smoke_and_dry_run(data, tmp_path, capsys):
    record = run(data, tmp_path / "out", "feature=cls-last2", smoke=True, batch_size=16)
    assert record.details["steps"] == 2
    capsys.readouterr()
    assert run(data, tmp_path / "dry", *SMALL, dry_run=True, json=True) is None
    plan = json.loads(capsys.readouterr().out)
    assert plan["feature_width"] == 64 and plan["view_seconds"] > 0 and not (tmp_path / "dry").exists()


def test_what_the_architecture_takes_is_what_was_published():
    _, protocol = load_protocol(LINEAR, "dino")
    for arch, kind in (
        ("vit_tiny_patch16_224", "cls-last4"),
        ("vit_small_patch16_224", "cls-last4"),
        ("vit_base_patch16_224?depth=1", "cls+patch-mean"),
        (SWIN.removeprefix("random:"), "pooled-last4"),
    ):
        assert protocol.kinds(open_checkpoint(f"random:{arch}").encoder) == (kind,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "dino", "--with", ENCODER], "--with: protocol linear-dino trains on augmented views of one encoder"),
        (["--protocol", "ridge", "--set", "solver=rigde"], "no solver 'rigde' (did you mean 'ridge'?)"),
        (
            ["--protocol", "ridge", "--set", "feature=global, patch-mean"],
            "'global, patch-mean': this protocol takes a single",
        ),
        (["--protocol", "dino", "--set", "feature=cls-last"], "feature 'cls-last': there is no such kind"),
        (["--protocol", "moby", "--set", "batch_size=512"], "batch_size 512 is more than the 56 train images"),
        (["--protocol", "dino", "--set", "schedul=step"], "unknown setting 'schedul' (did you mean 'schedule'?)"),
    ],
)
def test_what_cannot_be_is_one_line(data, error_line, arguments, message):
    assert message in error_line("linear", ENCODER, "--data", data, "--workers", "0", *arguments)
