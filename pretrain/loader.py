"""From images to batches of views, read and augmented in worker processes.

A view comes from (seed, epoch, image, view): what a step sees depends neither on the number of processes or workers nor
on where a run was stopped.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mte_bench.data.draws import Draws
from mte_bench.data.sources import ImageSet
from mte_bench.errors import UserError
from mte_bench.training.batches import Key, StepSampler, load_batches, readable
from pretrain.masks import Masking, draw_mask
from pretrain.recipe import Recipe, Views
from pretrain.views import make_views


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


def step_sampler(images: ImageSet, recipe: Recipe, seed: int, first_step: int, process: tuple[int, int]) -> StepSampler:
    """Which of ``images`` are in which micro-step of the run; see ``StepSampler``."""
    return StepSampler(
        len(images),
        recipe.batch_size,
        recipe.epochs,
        seed=seed,
        first_step=first_step,
        process=process,
        accumulate=recipe.accumulate,
        repeats=recipe.repeats,
    )


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

    See ``load_batches``. Raises ``UserError`` for a batch that does not fit.
    """
    sampler = step_sampler(images, recipe, seed, first_step, process)
    dataset = ViewDataset(images, recipe.views, seed=seed, allow_corrupt=allow_corrupt, masks=masks)
    return load_batches(dataset, sampler, workers=workers, pin_memory=pin_memory, allow_corrupt=allow_corrupt)
