"""Losses step by step against the references' own training, written with torch's layer, loss, optimiser and schedule.

Same features, batches and initial weights; 50 steps over five epochs and more, so that the schedule counts. Each peer is built
as its reference builds it: DINO ``eval_linear.py``, iBOT ``eval_linear_multi.py``, MoCo v3 ``main_lincls.py``, MoBY
``moby_linear.py``, DINOv2 ``linear.py``, MAE ``main_linprobe.py``.
"""

import math

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from downstream.evaluate import load_protocol
from downstream.linear import LINEAR
from downstream.linear.heads import HeadTrainer, fresh_heads, logits

STEPS, PER_EPOCH, WIDTH, CLASSES, BATCH = 50, 8, 24, 10, 64


def batches(steps=STEPS):
    """Features that look like normalised tokens, of clustered classes."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    for _ in range(steps):
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        yield centres[y] + torch.randn(BATCH, WIDTH, generator=generator), y


def ours(protocol):
    """Loss of every head before each step: ``steps r``."""
    heads = fresh_heads(len(protocol.rates), CLASSES, WIDTH, protocol.init_std, torch.Generator().manual_seed(0))
    start = heads.weight[0].clone()
    trainer = protocol.trainer(heads)
    losses = [trainer.step(x, y, protocol.rates_at(step, PER_EPOCH)) for step, (x, y) in enumerate(batches())]
    return torch.stack(losses), start, trainer


class Peer:
    """One classifier of the reference."""

    def __init__(self, start, criterion=None):
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.layer.weight.data.copy_(start)
        self.layer.bias.data.zero_()
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.losses = []

    def step(self, x, y, optimiser, clip=None):
        loss = self.criterion(self.layer(x), y)
        optimiser.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(self.layer.parameters(), clip)
        optimiser.step()
        self.losses.append(loss.item())


def cosine_by_epoch(start, rate, epochs):
    """DINO, iBOT: ``CosineAnnealingLR``, stepped behind each epoch."""
    peer = Peer(start)
    optimiser = torch.optim.SGD(peer.layer.parameters(), rate * BATCH / 256.0, momentum=0.9, weight_decay=0)
    schedule = CosineAnnealingLR(optimiser, epochs, eta_min=0)
    for step, (x, y) in enumerate(batches(), 1):
        peer.step(x, y, optimiser)
        if step % PER_EPOCH == 0:
            schedule.step()
    return peer


def mocov3(start, rate, epochs):
    """The rate is computed and set before each epoch."""
    peer, first = Peer(start), rate * BATCH / 256
    optimiser = torch.optim.SGD(peer.layer.parameters(), first, momentum=0.9, weight_decay=0.0)
    for step, (x, y) in enumerate(batches()):
        for group in optimiser.param_groups:
            group["lr"] = first * 0.5 * (1.0 + math.cos(math.pi * (step // PER_EPOCH) / epochs))
        peer.step(x, y, optimiser)
    return peer


def dinov2(start, rate, epochs):
    """``CosineAnnealingLR`` over all steps."""
    peer = Peer(start)
    optimiser = torch.optim.SGD(peer.layer.parameters(), rate * BATCH / 256.0, momentum=0.9, weight_decay=0)
    schedule = CosineAnnealingLR(optimiser, epochs * PER_EPOCH, eta_min=0)
    for x, y in batches():
        peer.step(x, y, optimiser)
        schedule.step()
    return peer


def moby(start, rate, epochs):
    """timm's cosine with warm-up, stepped behind each step by that step's own number; clipped, smoothed, Nesterov."""
    peer = Peer(start, LabelSmoothingCrossEntropy(smoothing=0.1))
    scale = BATCH / 512.0
    optimiser = torch.optim.SGD(peer.layer.parameters(), momentum=0.9, nesterov=True, lr=rate * scale, weight_decay=0.0)
    schedule = CosineLRScheduler(
        optimiser,
        t_initial=epochs * PER_EPOCH,
        lr_min=5e-6 * scale,
        warmup_lr_init=5e-7 * scale,
        warmup_t=WARMUP * PER_EPOCH,
        cycle_limit=1,
        t_in_epochs=False,
    )
    for step, (x, y) in enumerate(batches()):
        peer.step(x, y, optimiser, CLIP)
        schedule.step_update(step)
    return peer


def mae(start, rate, epochs):
    """torch's batch normalisation in front; LARS from its formula, in float64; the rate is set before each step."""
    peer, norm, first = Peer(start), nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6).double(), rate * BATCH / 256
    peer.layer.double()
    weight, bias = peer.layer.parameters()
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step, (x, y) in enumerate(batches()):
        epoch = step / PER_EPOCH
        along = (epoch - WARMUP) / (epochs - WARMUP)
        now = first * (epoch / WARMUP if epoch < WARMUP else 0.5 * (1 + math.cos(math.pi * along)))
        loss = peer.criterion(peer.layer(norm(x.double())), y)
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            local = (0.001 * weight.square().sum().sqrt() / gradients[0].square().sum().sqrt(), 1)
            for parameter, gradient, moved, scale in zip((weight, bias), gradients, velocity, local, strict=True):
                moved.mul_(0.9).add_(scale * gradient)
                parameter.sub_(now * moved)
        peer.losses.append(loss.item())
    peer.evaluated = nn.Sequential(norm, peer.layer).eval()
    return peer


WARMUP, CLIP = 2, 0.5  # so small that 50 steps see all of it
CASES = {
    "dino": (cosine_by_epoch, ["epochs=7"]),
    "ibot-sweep": (cosine_by_epoch, ["epochs=7"]),
    "mocov3": (mocov3, ["epochs=7"]),
    "dinov2-grid": (dinov2, ["epochs=7"]),
    "moby": (moby, ["epochs=7", f"warmup_epochs={WARMUP}", f"clip={CLIP}"]),
    "mae": (mae, ["epochs=7", f"warmup_epochs={WARMUP}", "rates=[30.0]"]),  # LARS's steps are short: with 0.1 hardly any
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_references_over_50_steps(name):
    reference, changes = CASES[name]
    _, protocol = load_protocol(LINEAR, name, (*changes, f"batch_size={BATCH}"))
    losses, start, trainer = ours(protocol)
    heads = trainer.heads
    for head, rate in enumerate(protocol.rates):
        peer = reference(start, rate, protocol.epochs)
        torch.testing.assert_close(losses[:, head], torch.tensor(peer.losses), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(heads.weight[head], peer.layer.weight.detach().float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(heads.bias[head], peer.layer.bias.detach().float(), rtol=1e-4, atol=1e-4)
    assert losses[-1].min() < 0.95 * losses[0].min()


def test_mae_tests_with_the_running_statistics():
    reference, changes = CASES["mae"]
    _, protocol = load_protocol(LINEAR, "mae", (*changes, f"batch_size={BATCH}"))
    _, start, trainer = ours(protocol)
    x = next(batches())[0]
    expected = reference(start, protocol.rates[0], protocol.epochs).evaluated(x.double()).float()
    torch.testing.assert_close(logits(trainer.ready, x)[0].T, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(trainer.heads, x)[0].T, expected, atol=0.1)


def test_mae_normalises_parts_of_a_batch_each_by_itself():
    x, y = next(batches())
    start = fresh_heads(1, CLASSES, WIDTH, 0.01, torch.Generator().manual_seed(0))
    trainer = HeadTrainer(start, trust=0.001, norm_batch=BATCH // 2)
    norms = [nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6) for _ in range(2)]
    parts = torch.cat([norm(half) for norm, half in zip(norms, x.chunk(2), strict=True)])
    expected = nn.functional.cross_entropy(logits(start, parts)[0].T, y)
    torch.testing.assert_close(trainer.step(x, y, torch.zeros(1))[0], expected)
    torch.testing.assert_close(trainer.running.mean[0], norms[0].running_mean)
    torch.testing.assert_close(trainer.running.variance[0], norms[0].running_var)
    trainer.step(x[:1], y[:1], torch.zeros(1))  # a single image has no spread, and is no mistake
    assert all(part.isfinite().all() for part in (*trainer.ready, *trainer.running))


def test_lars_leaves_the_bias_alone_and_zero_weights_move():
    x, y = next(batches())
    for std in (0.0, 0.5):
        heads = fresh_heads(1, CLASSES, WIDTH, std, torch.Generator().manual_seed(0))
        before = heads.weight.clone()
        trainer = HeadTrainer(heads, momentum=0, weight_decay=0.1, trust=0.02)
        layer = nn.Linear(WIDTH, CLASSES)
        layer.weight.data.copy_(before[0])
        layer.bias.data.zero_()
        nn.functional.cross_entropy(layer(x), y).backward()
        trainer.step(x, y, torch.ones(1))
        torch.testing.assert_close(heads.bias[0], -layer.bias.grad)  # no decay, no scale
        gradient = layer.weight.grad + 0.1 * before[0]
        scale = 0.02 * before.norm() / gradient.norm() if std else 1  # of a zero weight there is no length to go by
        torch.testing.assert_close(heads.weight[0], before[0] - scale * gradient)


def test_protocols_state_the_references_constants():
    stated = {name: load_protocol(LINEAR, name)[1] for name in CASES}
    assert {name: (p.epochs, p.batch_size, p.rate_per) for name, p in stated.items()} == {
        "dino": (100, 1024, 256),
        "ibot-sweep": (100, 1024, 256),
        "mocov3": (90, 1024, 256),
        "dinov2-grid": (10, 1024, 256),
        "moby": (100, 512, 512),
        "mae": (90, 16384, 256),
    }
    assert stated["mae"].rates == (0.1,) and stated["mae"].rates_at(100, 10)[0] == 6.4  # behind ten epochs of warm-up
    assert (stated["mae"].trust, stated["mae"].norm_batch, stated["mae"].view.clamped) == (0.001, 512, True)
    assert stated["dino"].rates == (1e-3,) and stated["mocov3"].rates == (3,) and stated["moby"].rates == (1,)
    assert list(stated["ibot-sweep"].rates) == pytest.approx([n * 10**k for k in range(-4, 1) for n in range(1, 10)])
    assert len(stated["dinov2-grid"].rates) == 13 and stated["dinov2-grid"].steps(10**6).per_epoch == 1250
    views = {name: (p.view.interpolation, p.interpolation, p.view.scale, p.view.flip) for name, p in stated.items()}
    assert views == {
        "dino": ("bilinear", "bicubic", (0.08, 1.0), 0.5),
        "ibot-sweep": ("bilinear", "bicubic", (0.08, 1.0), 0.5),
        "mocov3": ("bilinear", "bilinear", (0.08, 1.0), 0.5),
        "dinov2-grid": ("bicubic", "bicubic", (0.08, 1.0), 0.5),
        "moby": ("bilinear", "bilinear", (0.08, 1.0), 0.5),
        "mae": ("bicubic", "bicubic", (0.08, 1.0), 0.5),
    }
