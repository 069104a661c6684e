"""From images to batches of views: which image when, read and augmented in worker processes.

The order of an epoch comes from (seed, epoch), a view from (seed, epoch, image, view): what a step sees depends neither on
the number of processes or workers nor on where a run was stopped.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mte_bench.data.draws import Draws
from mte_bench.data.sources import ImageSet
from mte_bench.errors import CorruptImage, UserError
from pretrain.masks import Masking, draw_mask
from pretrain.recipe import Recipe, Views
from pretrain.views import make_views, readable

Key = tuple[int, int]
"""(epoch, place). A place below the number n of images is an image's index; place + n, place + 2 n ... are repetitions of
it, with random choices of their own."""


class Batch(NamedTuple):
    """One process's images of one micro-step."""

    groups: list[Tensor]
    """uint8, one per resolution: the global views (2 or 1, b, 3, h, w), then the local (local_count, b, 3, h, w) if any.
    ``normalise`` makes floats of them, best on the device: a quarter of the bytes travel."""
    labels: Tensor
    """(b,) int64, -1 where there is none."""
    indices: Tensor
    """(b,) int64: the images that the views were made of."""
    masks: Tensor | None
    """(2 or 1, b, rows * columns) bool: which patches of the global views the student does not see; None without masking."""
    corrupt: dict[str, str]
    """Images that could not be read, by name, and why; others stand in their place."""


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
            order = epoch_order(self.seed, epoch, self.images, self.repeats)
            for step in range(first, self.steps_per_epoch):
                start = step * self.batch_size + self.rank * share
                for part in range(start, start + share, micro):
                    yield [(epoch, place) for place in order[part : part + micro]]
            first = 0


def epoch_order(seed: int, epoch: int, images: int, repeats: int = 1) -> list[int]:
    """The order in which an epoch takes the images, as places; with ``repeats``, each so many times in a row."""
    order = Draws(seed).order(epoch, images)
    turns = np.arange(images)
    places: list[int] = (order[turns // repeats] + turns % repeats * images).tolist()
    return places


class ViewDataset(Dataset[Batch | UserError]):
    """Maps a list of (epoch, place) to the ``Batch`` of their views; errors the user can mend are returned, not raised.

    In place of an image that cannot be read comes the next one by index that can (after the last, the first), with its own
    label and index, but the random choices of the image it replaces. At most ``allow_corrupt`` are passed over in a row.
    """

    def __init__(self, images: ImageSet, views: Views, *, seed: int = 0, allow_corrupt: int = 0, masks: "Grid | None" = None):
        self.images, self.views, self.allow_corrupt = images, views, allow_corrupt
        self.draws, self.masks = Draws(seed), masks

    def __getitem__(self, keys: Sequence[Key]) -> Batch | UserError:
        taken: list[int] = []
        corrupt: dict[str, str] = {}

        def read() -> Iterator[Image.Image]:
            for _, place in keys:
                position, image = readable(self.images, place % len(self.images), self.allow_corrupt, corrupt)
                taken.append(position)
                yield image

        try:
            groups = make_views(read(), keys, self.views, self.draws)
        except UserError as error:  # a worker would wrap it in its traceback
            return error
        masks = None if self.masks is None else self.masks.draw(keys, len(groups[0]), self.draws)
        return Batch(groups, torch.from_numpy(self.images.labels[taken]), torch.tensor(taken), masks, corrupt)


class Grid(NamedTuple):
    """Masks of ``rows`` x ``columns`` patches."""

    masking: Masking
    rows: int
    columns: int

    def draw(self, keys: Sequence[Key], views: int, draws: Draws) -> Tensor:
        """Masks (views, n, rows * columns) of the images with these ``keys``."""
        masks = np.empty((views, len(keys), self.rows, self.columns), np.bool_)
        for place, (epoch, index) in enumerate(keys):
            generator = draws.masks(epoch, index)
            for view in range(views):
                masks[view, place] = draw_mask(self.masking, self.rows, self.columns, epoch, generator)
        return torch.from_numpy(masks).flatten(2)


def view_loader(
    images: ImageSet,
    recipe: Recipe,
    *,
    seed: int = 0,
    first_step: int = 0,
    process: tuple[int, int] = (0, 1),
    workers: int = 2,
    pin_memory: bool = False,
    allow_corrupt: int = 0,
    masks: Grid | None = None,
) -> Iterator[Batch]:
    """The batches of all micro-steps from optimiser step ``first_step`` to the end of the run, for process (rank, processes).

    The ``workers`` live as long as the iterator, through all epochs; each computes on one thread. 0 works in this process.
    Raises ``UserError`` for a batch that does not fit, and ``CorruptImage`` when the process meets its
    ``allow_corrupt + 1``-th different image that cannot be read.
    """
    sampler = StepSampler(
        len(images),
        recipe.batch_size,
        recipe.epochs,
        seed=seed,
        first_step=first_step,
        process=process,
        accumulate=recipe.accumulate,
        repeats=recipe.repeats,
    )
    loader = DataLoader(
        ViewDataset(images, recipe.views, seed=seed, allow_corrupt=allow_corrupt, masks=masks),
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


def _checked(loader: DataLoader[Batch | UserError], allow_corrupt: int) -> Iterator[Batch]:
    corrupt: set[str] = set()
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        for name, reason in batch.corrupt.items():
            corrupt.add(name)
            if len(corrupt) > allow_corrupt:
                raise CorruptImage(name, reason)
        yield batch
