"""What ``--dry-run`` shows: the resolved settings, counts, and what an evaluation would take on this machine."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from downstream.features import Pass, as_decoded, encode_batch, extracted
from downstream.task import P, Task
from mte_bench.console import show_json, show_table
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.encoders.encoder import Encoder


class Part(NamedTuple):
    """One of the encoders whose features are evaluated together (mostly there is one), and how images come to it."""

    checkpoint: Checkpoint
    transform: EvaluationTransform


def plan(
    task: Task[P],
    protocol: P,
    parts: Sequence[Part],
    train: ImageSet,
    val: ImageSet,
    how: Pass,
) -> dict[str, Any]:
    """What would be done and, from a few images and steps measured on this machine, what it would take."""
    images = len(train) + len(val)
    passes = [_pass(part, train, val, protocol.kinds(part.checkpoint.encoder), how) for part in parts]
    width = sum(one.width for one in passes)
    todo = [images - one.done for one in passes]
    views = protocol.view_passes(len(train)) * len(train)
    estimate = task.estimate(protocol, len(train), len(val), width, len(train.classes), how.device)
    named = [f"{part.checkpoint.subject.checkpoint} ({_shown(part.checkpoint.encoder)})" for part in parts]
    transforms = [part.transform.model_dump(mode="json") for part in parts]
    return {
        "encoder": " + ".join(named),
        "data": val.source,
        "images": {"train": len(train), "val": len(val)},
        "classes": len(train.classes),
        "transform": transforms[0] if len(parts) == 1 else transforms,
        "feature_width": width,
        "feature_steps": sum(math.ceil(left / how.batch_size) for left in todo),
        "feature_images_cached": sum(one.done for one in passes),
        "feature_bytes": images * width * np.dtype(how.dtype).itemsize,
        "feature_seconds": _short(sum(left * one.seconds for left, one in zip(todo, passes, strict=True))),
        **({"view_seconds": _short(views * passes[0].seconds)} if views else {}),
        "task_seconds": _short(estimate.seconds),
        "task_memory_bytes": estimate.memory_bytes,
    }


class _Pass(NamedTuple):
    """Of one encoder: images whose features are there already, width of a feature, seconds per image."""

    done: int
    width: int
    seconds: float


def _pass(part: Part, train: ImageSet, val: ImageSet, kinds: tuple[str, ...], how: Pass) -> _Pass:
    encoder, transform, weights = part.checkpoint.encoder, part.transform, part.checkpoint.sha256
    done = sum(min(extracted(encoder, weights, images, transform, kind, how) for kind in kinds) for images in (train, val))
    decoded = as_decoded(train, transform)
    batch = torch.stack([transform(decoded.image(0))] * min(how.batch_size, 16)).to(how.device)
    width = sum(features.shape[1] for features in encode_batch(encoder, batch, kinds, how).values())
    decode = seconds_of(lambda: transform(decoded.image(0)))
    encode = seconds_of(lambda: encode_batch(encoder, batch, kinds, how)) / len(batch)
    return _Pass(done, width, max(encode, decode / how.workers) if how.workers else encode + decode)


def _shown(encoder: Encoder) -> str:
    return f"{encoder.spec.arch}, {encoder.spec.image_size} px"


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
        rows = [[key, f"{value:,}" if type(value) is int else str(value)] for key, value in _flat(plan)]
        show_table("nothing done: this is what would be", ["", ""], rows)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
