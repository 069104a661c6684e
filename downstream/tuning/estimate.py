"""What a fine-tuning will take, from a few images measured on this machine."""

from typing import Any

import torch
from torch import Tensor

from downstream.plan import seconds_of
from downstream.tuning.tuner import Tuner
from mte_bench.device import autocast


def estimate(tuner: Tuner) -> dict[str, Any]:
    """What a fine-tuning would take, from a few images measured on this machine; what grows with them is taken as linear."""
    protocol, device, model = tuner.protocol, tuner.how.device, tuner.model
    count = min(tuner.micro_batch, 32 if device.type == "cuda" else 4)
    side = model.encoder.spec.side
    images, targets = (
        torch.randn(count, 3, side, side, device=device),
        torch.zeros(count, len(tuner.images.classes), device=device),
    )
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def train() -> None:
        with autocast(device, tuner.how.precision):
            loss = tuner.loss(model(images).float(), targets)
        loss.backward()
        model.zero_grad()
        loss.item()

    def evaluate() -> None:
        with torch.inference_mode(), autocast(device, tuner.how.precision):
            model(images).sum().item()

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train()
    first = tuner.images.image(0)
    augment = seconds_of(lambda: tuner.augmentation(first, 0, 0)) / max(1, tuner.how.workers)
    step, forward = seconds_of(train) / count, seconds_of(evaluate) / count
    seen, evaluations = tuner.total_steps * protocol.batch_size, -(-protocol.epochs // protocol.evaluate_every)
    parameters = sum(p.numel() for p in model.parameters())
    seconds = seen * max(step, augment) + evaluations * len(tuner.val) * forward
    return {
        "arch": f"{model.encoder.spec.arch}, {side} px",
        "data": tuner.val.source,
        "images": {"train": len(tuner.images), "val": len(tuner.val)},
        "classes": len(tuner.images.classes),
        "steps": tuner.total_steps,
        "steps_per_epoch": tuner.steps_per_epoch,
        "images_per_step": f"{tuner.processes} process(es) x {protocol.accumulate} x {tuner.micro_batch}",
        "peak_lr": protocol.peak_lr,
        "parameters": parameters,
        "state_bytes": 4 * parameters * (4 + (protocol.ema is not None)),  # weights, gradients, two moments, average
        "activation_bytes": round(sum(kept.values()) / count * tuner.micro_batch),
        "task_seconds": float(f"{seconds / tuner.processes:.3g}"),
    }
