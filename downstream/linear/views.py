"""Augmented views to train on: which images a step takes, and one random crop of each, perhaps mirrored.

The order of a pass comes from (seed, pass), a view from (seed, pass, image): neither a restart nor the number of processes or
workers changes what a step sees.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from downstream.features import Pass, loader_options
from mte_bench.data.draws import TRIES, Draws, clamped_box, crop_box, cut_out
from mte_bench.data.sources import ImageSet
from mte_bench.errors import CorruptImage, UserError
from mte_bench.settings import Settings

Keys = NDArray[np.int64]
"""``b 2``: the pass over the images and the index of each image of a step."""


class ViewSettings(Settings):
    """How a view is cut out of an image. Source of the defaults: torchvision's ``RandomResizedCrop`` and flip."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width over height."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = 0.5
    """How often it is mirrored."""
    clamped: bool = Field(False, exclude_if=lambda clamped: not clamped)
    """Whether a crop that is larger than the image is cut to it (MAE) rather than drawn anew."""


class Steps(NamedTuple):
    """Which of ``images`` images each step takes."""

    images: int
    batch_size: int
    epochs: int
    steps_per_epoch: int | None = None
    """None is one pass over the images; a number lets passes follow each other, whole batches all the way."""
    drop_last: bool = False
    """Whether what is left at the end of a pass, less than a batch, is left out."""
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch. Raises ``UserError`` if there is none."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        if self.drop_last and self.images < self.batch_size:
            raise UserError(f"batch_size {self.batch_size} is more than the {self.images} train images; set a smaller one")
        return self.images // self.batch_size if self.drop_last else -(-self.images // self.batch_size)

    def from_epoch(self, first: int) -> Iterator[Keys]:
        """What each step takes from epoch ``first`` to the end."""
        order = lru_cache(2)(lambda number: Draws(self.seed).order(number, self.images))
        for epoch in range(first, self.epochs):
            for step in range(self.per_epoch):
                if self.steps_per_epoch is None:
                    first_place = epoch * self.images + step * self.batch_size
                    places = np.arange(first_place, min(first_place + self.batch_size, (epoch + 1) * self.images))
                else:
                    places = np.arange(self.batch_size) + (epoch * self.per_epoch + step) * self.batch_size
                passes, rows = np.divmod(places, self.images)
                indices = np.concatenate([order(int(number))[rows[passes == number]] for number in np.unique(passes)])
                yield np.stack([passes, indices], axis=1)


def share(images: int, place: tuple[int, int]) -> tuple[int, int]:
    """Of a step's ``images``, those that process ``place`` (rank, processes) has: the first and the one behind the last."""
    rank, processes = place
    return rank * images // processes, (rank + 1) * images // processes


class _Shares(Sampler[Keys]):
    """A process's part of every step, in pieces of ``size`` images."""

    def __init__(self, steps: Steps, first_epoch: int, place: tuple[int, int], size: int):
        self.steps, self.first_epoch, self.place, self.size = steps, first_epoch, place, size

    def __iter__(self) -> Iterator[Keys]:
        for keys in self.steps.from_epoch(self.first_epoch):
            first, last = share(len(keys), self.place)
            for start in range(first, last, self.size):
                yield keys[start : min(start + self.size, last)]


class _Views(Dataset[Tensor | CorruptImage]):
    """Maps ``Keys`` to views (``b 3 h w``, 8 bits); an image that cannot be read is returned as its error, not raised."""

    def __init__(self, images: ImageSet, settings: ViewSettings, size: int, seed: int):
        self.images, self.settings, self.size = images, settings, size
        self.draws = Draws(seed)

    def __getitem__(self, keys: Keys) -> Tensor | CorruptImage:
        views = np.empty((len(keys), 3, self.size, self.size), np.uint8)
        try:
            for view, (number, index) in zip(views, keys.tolist(), strict=True):
                view[:] = self._view(number, index).transpose(2, 0, 1)
        except CorruptImage as error:  # a worker would wrap it in its traceback
            return error
        return torch.from_numpy(views)

    def _view(self, number: int, index: int) -> NDArray[np.uint8]:
        image, settings = self.images.image(index), self.settings
        (numbers,) = self.draws.views(number, index, 1)
        box = (clamped_box if settings.clamped else crop_box)(settings.scale, settings.ratio, image.size, numbers)
        return cut_out(image, box, self.size, settings.interpolation, numbers[2 * TRIES + 2] < settings.flip)


def view_batches(
    images: ImageSet, settings: ViewSettings, size: int, steps: Steps, first_epoch: int, place: tuple[int, int], how: Pass
) -> Iterator[Tensor]:
    """For every step from ``first_epoch`` on, process ``place``'s views, ``size`` pixels a side: uint8 ``b 3 h w``.

    They come in pieces of ``how.batch_size``, and what is left of the step. Raises ``CorruptImage`` for one that cannot be read.
    """
    loader: DataLoader[Any] = DataLoader(
        _Views(images, settings, size, steps.seed),
        batch_size=None,  # the sampler gives whole pieces
        sampler=_Shares(steps, first_epoch, place, how.batch_size),
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its draw for the workers' seeds, which nothing here uses, leaves the global state alone
        **loader_options(how),
    )
    for batch in loader:
        if isinstance(batch, CorruptImage):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch
