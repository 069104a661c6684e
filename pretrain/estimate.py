"""What a run will take, from two small steps measured on this machine."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mte_bench.device import wait

if TYPE_CHECKING:
    from pretrain.trainer import Trainer

SMALL, LARGE = 2, 6


def estimate(trainer: "Trainer") -> dict[str, str]:
    """Steps, memory and time of a whole run, to be shown; the data's cost is not in it (it overlaps with the steps).

    Time: forward, backward and update measured with two batch sizes; what grows with the batch is taken as linear.
    Memory: weights, gradients, optimiser and teacher, and the activations that autograd keeps of a micro-batch.
    """
    _measure(trainer, SMALL)  # warm-up
    small, _ = _measure(trainer, SMALL)
    large, kept = _measure(trainer, LARGE)
    per_image = max(large - small, 0.0) / (LARGE - SMALL)
    fixed = max(large - LARGE * per_image, 0.0)
    recipe = trainer.recipe
    step = recipe.accumulate * (fixed + per_image * trainer.micro_batch)
    trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    every = sum(p.numel() for p in trainer.student.parameters()) + sum(p.numel() for p in trainer.teacher.parameters())
    state = 4 * every + 12 * trained  # float32 weights of both; gradients and AdamW's two moments
    activations = kept / LARGE * trainer.micro_batch
    hours = trainer.total_steps * step / 3600
    return {
        "images": f"{len(trainer.images):,}",
        "steps": f"{trainer.total_steps:,} ({trainer.steps_per_epoch:,} per epoch)",
        "images per step": f"{recipe.batch_size} = {trainer.processes} process(es) x {recipe.accumulate} x {trainer.micro_batch}",
        "trained parameters": f"{trained / 1e6:.1f} M",
        "memory per process": f"{gib(state + activations)} GiB ({gib(state)} state, {gib(activations)} activations)",
        "time": f"{hours:.1f} h ({step:.2f} s per step on {trainer.device})" if hours >= 1 else f"{60 * hours:.1f} min",
    }


def _measure(trainer: "Trainer", images: int) -> tuple[float, int]:
    """Seconds of one step on ``images`` images, and the bytes that autograd kept for it."""
    groups = [torch.randn(count, images, 3, size, size, device=trainer.device) for count, size in trainer.recipe.views.groups]
    labels = None
    if trainer.method.labelled:
        groups[0], labels = trainer.method.labels(groups[0], torch.zeros(images, dtype=torch.long, device=trainer.device), 0)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in trainer.student.parameters()}
    wait(trainer.device)
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        parts = trainer.forward(trainer.student, groups, [None] * len(groups), epoch=0, labels=labels)[0]
    parts["loss"].backward()
    trainer.update(0.0)
    wait(trainer.device)
    return time.perf_counter() - started, sum(size for place, size in kept.items() if place not in weights)


def gib(size: float) -> str:
    """Bytes as GiB with one decimal."""
    return f"{size / 2**30:.1f}"
