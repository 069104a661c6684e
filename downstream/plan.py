"""What ``--dry-run`` shows: the resolved settings, counts, and what an evaluation would take on this machine."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from downstream.features import Pass, encode_batch, extracted
from downstream.task import P, Task
from mte_bench.console import show_json, show_table
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.checkpoint import Checkpoint


def plan(
    task: Task[P],
    protocol: P,
    checkpoint: Checkpoint,
    train: ImageSet,
    val: ImageSet,
    transform: EvaluationTransform,
    how: Pass,
) -> dict[str, Any]:
    """What would be done and, from a few images and steps measured on this machine, what it would take."""
    encoder, kind, device = checkpoint.encoder, protocol.feature, how.device
    done = sum(extracted(encoder, checkpoint.sha256, images, transform, kind, how) for images in (train, val))
    batch = torch.stack([transform(train.image(0))] * min(how.batch_size, 16)).to(device)
    width = encode_batch(encoder, batch, (kind,), how)[kind].shape[1]
    decode = seconds_of(lambda: transform(train.image(0)))
    encode = seconds_of(lambda: encode_batch(encoder, batch, (kind,), how)) / len(batch)
    per_image = max(encode, decode / how.workers) if how.workers else encode + decode
    images = len(train) + len(val)
    estimate = task.estimate(protocol, len(train), len(val), width, len(train.classes), device)
    return {
        "encoder": f"{checkpoint.subject.checkpoint} ({encoder.spec.arch}, {encoder.spec.image_size} px)",
        "data": val.source,
        "images": {"train": len(train), "val": len(val)},
        "classes": len(train.classes),
        "transform": transform.model_dump(mode="json"),
        "feature_width": width,
        "feature_steps": math.ceil((images - done) / how.batch_size),
        "feature_images_cached": done,
        "feature_bytes": images * width * (4 if how.precision == torch.float32 else 2),
        "feature_seconds": _short((images - done) * per_image),
        "task_seconds": _short(estimate.seconds),
        "task_memory_bytes": estimate.memory_bytes,
    }


def seconds_of(function: Callable[[], Any]) -> float:
    """Of one call: the fastest of three, after one that warms up."""
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """``plan`` on stdout, as a table or as JSON."""
    if as_json:
        show_json(plan)
    else:
        rows = [[key, f"{value:,}" if isinstance(value, int) else str(value)] for key, value in _flat(plan)]
        show_table("nothing done: this is what would be", ["", ""], rows)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
