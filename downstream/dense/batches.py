"""Images with their truth, augmented by OpenMMLab's transforms: the same ones whatever process makes them, and whenever."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from downstream.features import Pass
from mte_bench.console import ProgressLine
from mte_bench.data.sources import ImageSet
from mte_bench.errors import CorruptImage, UserError
from mte_bench.training.batches import Key, StepSampler, readable
from mte_bench.training.seeded import seeded

Transform = Callable[[dict[str, Any]], Any]


class Truth(Protocol):
    """The images of one split and what is in them."""

    @property
    def images(self) -> ImageSet:
        """Where the images come from."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names."""

    @property
    def fingerprint(self) -> str:
        """Changes with any image's name or size and with the truth."""

    @property
    def upright(self) -> Sequence[bool] | None:
        """Whether each image is higher than wide, if batches are to be of one kind; None where all are cropped to one size."""

    def check(self, trained: bool) -> None:
        """Raise ``UserError`` naming file and entry of a mistake in the truth; some only matter if it is ``trained`` on."""

    def results(self, index: int) -> dict[str, Any]:
        """What transforms call results, without the image: the truth of the image at ``index``, and ``size``, (h, w)."""


class ShapedSteps(StepSampler):
    """Steps whose images lie in groups of ``group`` that are all upright or all lying, so that little of a batch is padding.

    As mmdet's sampler by aspect ratio: the order of the epoch is kept but for what waits until its group is full; what is
    left at the end of it forms mixed groups.
    """

    def __init__(self, upright: Sequence[bool], group: int, *arguments: Any, **options: Any):
        super().__init__(len(upright), *arguments, **options)
        self.upright, self.group = upright, group

    def order(self, epoch: int) -> list[int]:
        """The places of the images in the order in which ``epoch`` takes them."""
        grouped: list[int] = []
        waiting: dict[bool, list[int]] = {False: [], True: []}
        for place in super().order(epoch):
            group = waiting[self.upright[place]]
            group.append(place)
            if len(group) == self.group:
                grouped += group
                group.clear()
        return grouped + waiting[False] + waiting[True]


class Batch(NamedTuple):
    """One process's images of one micro-step, packed as the models want them."""

    packed: list[dict[str, Any]]
    """``inputs`` (``3 h w``, bytes, BGR) and ``data_samples`` of each image."""
    corrupt: dict[str, str]
    """Images that could not be read, by name, and why; others stand in their place."""


class Augmented(Dataset[Batch | UserError]):
    """Maps a list of (epoch, place) to a ``Batch``; an error that the user can mend is returned, not raised."""

    def __init__(self, truth: Truth, transform: Transform, seed: int, allow_corrupt: int):
        self.truth, self.transform, self.seed, self.allow_corrupt = truth, transform, seed, allow_corrupt

    def __getitem__(self, keys: Sequence[Key]) -> Batch | UserError:
        packed: list[dict[str, Any]] = []
        corrupt: dict[str, str] = {}
        images = self.truth.images
        try:
            for epoch, place in keys:
                index, image = readable(images, place % len(images), self.allow_corrupt, corrupt)
                with seeded((self.seed << 64) + (epoch << 32) + place):
                    packed.append(self.transform(results_of(self.truth, index, image)))
        except UserError as error:  # a worker would wrap it in its traceback
            return error
        return Batch(packed, corrupt)


def results_of(truth: Truth, index: int, image: Image.Image) -> dict[str, Any]:
    """What transforms start from: ``img`` (``h w 3``, bytes, BGR), its shapes, and the truth.

    Raises ``UserError`` if the truth is of an image of another size.
    """
    pixels, results = bgr(image), truth.results(index)
    shape = pixels.shape[:2]
    height, width = results.pop("size")
    if shape != (height, width):
        name = truth.images.name(index)
        raise UserError(
            f"{name}: {shape[1]} x {shape[0]} pixels, but what is in it is given for {width} x {height}; mend one of them"
        )
    return {"img": pixels, "img_shape": shape, "ori_shape": shape, **results}


def bgr(image: Image.Image) -> NDArray[np.uint8]:
    """``h w 3``: the order of colours that OpenMMLab's transforms take images in."""
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


class Tested(Dataset[Any]):
    """Maps a number to ``prepare`` of that image and its index; an image that cannot be read to the error."""

    def __init__(self, images: ImageSet, own: Sequence[int], prepare: Callable[[Image.Image], Any]):
        self.images, self.own, self.prepare = images, own, prepare

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        index = self.own[number]
        try:
            return index, self.prepare(self.images.image(index))
        except CorruptImage as error:
            return index, error


def tested(
    images: ImageSet, prepare: Callable[[Image.Image], Any], how: Pass, process: tuple[int, int], lost: dict[int, str]
) -> Iterator[tuple[int, Any]]:
    """This process's share of ``images``: index and what ``prepare`` makes of the image, which must be picklable.

    Images that cannot be read are entered into ``lost``; raises ``CorruptImage`` for one more than ``how`` allows. Progress
    is shown by the first process.
    """
    rank, processes = process
    own, line = range(rank, len(images), processes), ProgressLine()
    loader = DataLoader(Tested(images, own, prepare), batch_size=None, num_workers=how.workers, collate_fn=_as_it_is)
    for done, (index, prepared) in enumerate(loader, 1):
        if isinstance(prepared, CorruptImage):
            if len(lost) >= how.allow_corrupt:
                raise prepared
            lost[index] = images.name(index)
        else:
            yield index, prepared
        if rank == 0:
            line.show(f"val: {done}/{len(own)} images  {done / line.seconds:.2f} images/s", last=done == len(own))


def _as_it_is(value: Any) -> Any:
    return value
