"""The classes that a classifier ranks highest for every image of a split: what ``classify`` and fine-tuning measure."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from downstream.features import Pass, decoded_batches
from mte_bench import distributed
from mte_bench.console import ProgressLine
from mte_bench.data.sources import ImageSet, Subset
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.device import autocast
from mte_bench.errors import UserError


def ranked_classes(
    model: nn.Module,
    images: ImageSet,
    transform: EvaluationTransform,
    how: Pass,
    top: int,
    process: tuple[int, int] = (0, 1),
    title: str = "",
) -> NDArray[np.int64]:
    """The ``top`` most likely classes of each image, best first: ``n top``; -1 for an image that could not be read.

    ``model``, on the device and put into evaluation mode, makes scores ``b classes`` of images ``b c h w``; of several sets of
    scores (``s b classes``) the classes come as ``s n top``. The images are spread over the processes (``process``: rank and
    number), and each gets all answers. With a ``title`` there is a line of progress.
    Raises ``CorruptImage`` for the first image beyond ``how.allow_corrupt``, ``UserError`` if none can be read, and for scores
    that are not finite.
    """
    rank, processes = process
    own = Subset(images, np.arange(rank, len(images), processes), "")
    parts: list[NDArray[np.int64]] = []
    done, line = 0, ProgressLine()
    model.eval()
    with torch.inference_mode(), autocast(how.device, how.precision):
        for batch, lost, _ in decoded_batches(own, transform, how):
            scores = model(batch.to(how.device, non_blocking=True)).float()
            finite = scores.isfinite().all(-1).view(-1, len(batch)).all(0)
            if not finite.all():
                name = own.name(done + int(finite.int().argmin()))
                raise UserError(f"the classifier's scores of {name} are not finite: diverged weights, or --precision float32")
            ranked = scores.topk(top, dim=-1).indices.cpu().numpy()
            ranked[..., np.array(lost, dtype=np.int64) - done, :] = -1
            parts.append(ranked)
            done += len(batch)
            if title and rank == 0:
                line.show(f"{title}: {done}/{len(own)} images  {done / line.seconds:.0f} images/s", last=done == len(own))
    everyone = distributed.gathered({rank: np.concatenate(parts, axis=-2)} if parts else {})
    first = next(iter(everyone.values()))
    found = np.empty((*first.shape[:-2], len(images), top), np.int64)
    for place, part in everyone.items():
        found[..., place::processes, :] = part
    if (found < 0).all():
        raise UserError(f"{images.source}: not one of the {len(images)} {images.split} images can be read")
    return found
