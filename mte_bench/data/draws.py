"""What is random about a view of an image, by counter: the same numbers whatever process draws them, and in whatever order.

What an epoch sees of an image then depends neither on the number of processes and workers nor on where a run was stopped.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mte_bench.data.transforms import RESAMPLING

TRIES = 10
"""Attempts at a crop that fits into the image before the central one is taken, and at a rectangle to erase."""
NUMBERS = 36
"""Random numbers that a view may use: a multiple of four, which is what the generator makes at a time."""


class Draws:
    """Random numbers by counter (Philox 4x64): any of them without those before it.

    The key is (seed, purpose); the counter is (block, 0, image index, epoch), and view v of an image has its own blocks.
    """

    def __init__(self, seed: int):
        self.seed = seed % 2**64
        self.generator = np.random.Generator(np.random.Philox(0))

    def views(self, epoch: int, index: int, count: int) -> list[list[float]]:
        """``NUMBERS`` uniform numbers in [0, 1) for each of the first ``count`` views of an image."""
        self._go_to(0, index, epoch)
        return self.generator.random((count, NUMBERS)).tolist()

    def order(self, epoch: int, images: int) -> NDArray[np.int64]:
        """A permutation of the images: the order in which the epoch takes them."""
        self._go_to(1, 0, epoch)
        return self.generator.permutation(images)

    def masks(self, epoch: int, index: int) -> np.random.Generator:
        """What the masks of an image's views are drawn from; good until the next call of this object."""
        self._go_to(2, index, epoch)
        return self.generator

    def _go_to(self, purpose: int, index: int, epoch: int) -> None:
        self.generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, 0, index, epoch], np.uint64), "key": np.array([self.seed, purpose], np.uint64)},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }


def crop_box(
    scale: tuple[float, float], ratio: tuple[float, float], size: tuple[int, int], numbers: Sequence[float]
) -> tuple[int, int, int, int]:
    """A random crop: its share of the area uniform, its aspect ratio log-uniform, its place uniform.

    If no try fits into the image, the largest central crop of an allowed ratio. Source: torchvision ``RandomResizedCrop``.
    """
    width, height = size
    smallest, largest = width * height * scale[0], width * height * scale[1]
    narrowest, widest = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(0, 2 * TRIES, 2):
        area = smallest + (largest - smallest) * numbers[attempt]
        aspect = math.exp(narrowest + (widest - narrowest) * numbers[attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(numbers[2 * TRIES] * (height - h + 1))
            left = int(numbers[2 * TRIES + 1] * (width - w + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def clamped_box(
    scale: tuple[float, float], ratio: tuple[float, float], size: tuple[int, int], numbers: Sequence[float]
) -> tuple[int, int, int, int]:
    """As ``crop_box`` with a single try, whose sides are cut to the image's where they are longer.

    Source: MAE ``util/crop.py``, which follows BYOL's own code.
    """
    width, height = size
    area = width * height * (scale[0] + (scale[1] - scale[0]) * numbers[0])
    narrowest, widest = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(narrowest + (widest - narrowest) * numbers[1])
    w, h = (min(max(1, round(math.sqrt(side))), most) for side, most in ((area * aspect, width), (area / aspect, height)))
    top = int(numbers[2 * TRIES] * (height - h + 1))
    left = int(numbers[2 * TRIES + 1] * (width - w + 1))
    return left, top, left + w, top + h


def cut_out(image: Image.Image, box: tuple[int, int, int, int], size: int, interpolation: str, flip: bool) -> NDArray[np.uint8]:
    """The ``box`` of an RGB ``image``, resized to ``size`` pixels a side by PIL, perhaps mirrored: (size, size, 3)."""
    part = image if box == (0, 0, *image.size) else image.crop(box)
    resized = np.asarray(part.resize((size, size), RESAMPLING[interpolation]))
    return resized[:, ::-1] if flip else resized
