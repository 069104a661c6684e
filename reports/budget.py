"""On what budget encoders were trained further: steps, images, what stands on the encoder, time.

A number after a training says as much of the budget as of the encoder, so the budget stands beside it.
"""

from collections.abc import Sequence

from mte_bench.naming import flat
from mte_bench.records import Record
from reports.runs import device, duration

TRAINING = ("finetune", "inat", "coco", "ade20k")
"""Tasks that train an encoder or a model on it; what others fit is cheap, and no part of the encoder."""

WIDTHS = {
    "pyramid": "a pyramid of {} channels",
    "heads.channels": "heads of {} channels",
    "head.channels": "a head of {} channels",
}
"""Settings of dense protocols that say how wide is what stands on the encoder, and how that is said."""


def budget(records: Sequence[Record]) -> str:
    """What each training of ``records`` took, which are of one task, protocol and data; "" where no encoder was trained.

    Steps, images of a step and how often each training image was seen, the widths of what stands on the encoder, parameters
    in all, and the time of the shortest and the longest.
    """
    first = records[0]
    settings, details = flat(first.protocol.settings), first.details
    steps = details.get("steps") or (details.get("trained") or {}).get("steps")
    batch, images = settings.get("batch_size"), first.data.images.get("train")
    if first.task not in TRAINING or not (steps and batch and images):
        return ""
    parts = [f"{steps:,} steps of {batch:,} images (each of {images:,} seen {steps * batch / images:.3g} times)"]
    parts += [text.format(settings[path]) for path, text in WIDTHS.items() if settings.get(path)]
    if "parameters" in details:
        parts.append(f"{details['parameters'] / 1e6:.3g} M parameters in all")
    if settings.get("joining.frozen"):
        parts.append("the encoder frozen")
    seconds = [record.cost.seconds for record in records]
    times = dict.fromkeys((duration(min(seconds)), duration(max(seconds))))
    return f"{', '.join(parts)}; {' to '.join(times)} on {device(first)}"
