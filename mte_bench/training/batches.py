"""Which image when, and reading them in worker processes: what pre-training and fine-tuning share.

The order of an epoch comes from (seed, epoch): what a step sees depends neither on the number of processes or workers nor
on where a run was stopped.
"""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from mte_bench.data.draws import Draws
from mte_bench.data.sources import ImageSet
from mte_bench.errors import CorruptImage, UserError

Key = tuple[int, int]
"""(epoch, place). A place below the number n of images is an image's index; place + n, place + 2 n ... are repetitions of
it, with random choices of their own."""


class StepSampler(Sampler[list[Key]]):
    """For every micro-step from optimiser step ``first_step`` to the end of the run, the (epoch, place) of this process.

    Step s of an epoch takes images ``order[s * batch_size : (s + 1) * batch_size]``; what is left at the end of an epoch is
    dropped. Of these, process r has the r-th contiguous part, and its micro-steps are contiguous parts of that.
    Raises ``UserError`` if the batch cannot be divided so, or if there are fewer images than one batch.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        epochs: int,
        *,
        seed: int = 0,
        first_step: int = 0,
        process: tuple[int, int] = (0, 1),
        accumulate: int = 1,
        repeats: int = 1,
    ):
        if images < batch_size:
            raise UserError(f"batch_size {batch_size} is more than the {images} images of the data; set a smaller batch_size")
        if batch_size % (process[1] * accumulate):
            parts = f"{process[1]} processes x {accumulate} accumulated micro-batches"
            raise UserError(f"batch_size {batch_size} is not divisible by {parts}; change one of them")
        self.images, self.batch_size, self.epochs, self.seed = images, batch_size, epochs, seed
        self.first_step, self.accumulate, self.repeats = first_step, accumulate, repeats
        self.rank, self.processes = process
        self.steps_per_epoch = images // batch_size

    def __len__(self) -> int:
        return (self.epochs * self.steps_per_epoch - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch_size // self.processes
        micro = share // self.accumulate
        first_epoch, first = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = self.order(epoch)
            for step in range(first, self.steps_per_epoch):
                start = step * self.batch_size + self.rank * share
                for part in range(start, start + share, micro):
                    yield [(epoch, place) for place in order[part : part + micro]]
            first = 0

    def order(self, epoch: int) -> list[int]:
        """The places of the images in the order in which ``epoch`` takes them."""
        return epoch_order(self.seed, epoch, self.images, self.repeats)


def epoch_order(seed: int, epoch: int, images: int, repeats: int = 1) -> list[int]:
    """The order in which an epoch takes the images, as places; with ``repeats``, each so many times in a row."""
    order = Draws(seed).order(epoch, images)
    turns = np.arange(images)
    places: list[int] = (order[turns // repeats] + turns % repeats * images).tolist()
    return places


def readable(images: ImageSet, index: int, allowed: int, corrupt: dict[str, str]) -> tuple[int, Image.Image]:
    """The image at ``index``, or the next that can be read (after the last, the first), and its index.

    Those that cannot are entered into ``corrupt``, name and reason; raises ``CorruptImage`` at the ``allowed + 1``-th in a row.
    """
    for passed in range(len(images)):
        position = (index + passed) % len(images)
        try:
            return position, images.image(position)
        except CorruptImage as error:
            corrupt[images.name(position)] = error.reason
            if passed >= allowed:
                raise
    raise UserError(f"{images.source}: not one of its {len(images)} images can be read")


class Batch(Protocol):
    """Whatever a step takes in."""

    @property
    def corrupt(self) -> dict[str, str]:
        """Images that could not be read, by name, and why; others stand in their place."""


B = TypeVar("B", bound=Batch)


def load_batches(
    dataset: Dataset[B | UserError], sampler: StepSampler, *, workers: int, pin_memory: bool, allow_corrupt: int
) -> Iterator[B]:
    """The batches that ``dataset`` makes of what ``sampler`` gives.

    The ``workers`` live as long as the iterator, through all epochs; each computes on one thread. 0 works in this process.
    Raises the ``UserError`` that ``dataset`` returns in place of a batch, and ``CorruptImage`` when the process meets its
    ``allow_corrupt + 1``-th different image that cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,  # the sampler gives whole batches
        sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its draw for the workers' seeds, which nothing here uses, leaves the global state alone
    )
    return _checked(loader, allow_corrupt)


def _as_it_is(batch: Any) -> Any:
    return batch


def _checked(loader: DataLoader[B | UserError], allow_corrupt: int) -> Iterator[B]:
    corrupt: set[str] = set()
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        for name, reason in batch.corrupt.items():
            corrupt.add(name)
            if len(corrupt) > allow_corrupt:
                raise CorruptImage(name, reason)
        yield batch
