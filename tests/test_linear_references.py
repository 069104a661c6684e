"""Losses step by step against the references' own training, written with torch's layer, loss, optimiser and schedule.

Same features, batches and initial weights; 50 steps over five epochs and more, so that the schedule counts. Each peer is built
as its reference builds it: DINO ``eval_linear.py``, iBOT ``eval_linear_multi.py``, MoCo v3 ``main_lincls.py``, MoBY
``moby_linear.py``, DINOv2 ``linear.py``.
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
from downstream.linear.heads import fresh_heads

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
    return torch.stack(losses), start, trainer.heads


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


WARMUP, CLIP = 2, 0.5  # of MoBY, so small that 50 steps see all of it
CASES = {
    "dino": (cosine_by_epoch, ["epochs=7"]),
    "ibot-sweep": (cosine_by_epoch, ["epochs=7"]),
    "mocov3": (mocov3, ["epochs=7"]),
    "dinov2-grid": (dinov2, ["epochs=7"]),
    "moby": (moby, ["epochs=7", f"warmup_epochs={WARMUP}", f"clip={CLIP}"]),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_the_references_over_50_steps(name):
    reference, changes = CASES[name]
    _, protocol = load_protocol(LINEAR, name, (*changes, f"batch_size={BATCH}"))
    losses, start, heads = ours(protocol)
    for head, rate in enumerate(protocol.rates):
        peer = reference(start, rate, protocol.epochs)
        torch.testing.assert_close(losses[:, head], torch.tensor(peer.losses), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(heads.weight[head], peer.layer.weight.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(heads.bias[head], peer.layer.bias.detach(), rtol=1e-4, atol=1e-4)
    assert losses[-1].min() < 0.95 * losses[0].min()


def test_protocols_state_the_references_constants():
    stated = {name: load_protocol(LINEAR, name)[1] for name in CASES}
    assert {name: (p.epochs, p.batch_size, p.rate_per) for name, p in stated.items()} == {
        "dino": (100, 1024, 256),
        "ibot-sweep": (100, 1024, 256),
        "mocov3": (90, 1024, 256),
        "dinov2-grid": (10, 1024, 256),
        "moby": (100, 512, 512),
    }
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
    }
