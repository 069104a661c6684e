"""Making views: crop, flip, jitter, grayscale, blur, solarize, in DINO's order. Source: DINO ``main_dino.py``, ``utils.py``.

What is random in a view comes from (seed, epoch, image index, view number) and nothing else. Cropping and resizing is
PIL's; the rest is done on many views of one size at once (``pretrain.pixels``). Views are 8-bit: a quarter of the bytes
to pass from process to process and to the device, where ``normalise`` (``mte_bench.data.transforms``) makes an encoder's
input of them.

Supervised recipes have RandAugment (timm's) in the jitter's place, and random erasing as the last step. That one fills a
rectangle of the normalised image with standard normal noise (DeiT, timm ``random_erasing.py``); here the noise is taken
back to 8 bits, which clips the 3 % of it that is darker than black or lighter than white. So its draws, too, are a
view's own, whatever process or device it goes to, and the picture of the views shows it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import chain, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor

from mte_bench.data.draws import TRIES, Draws, crop_box, cut_out
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import RESAMPLING
from mte_bench.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD
from mte_bench.plotting import COLOURS, picture
from mte_bench.training.batches import readable
from mte_bench.training.seeded import seeded
from pretrain import pixels
from pretrain.recipe import View, Views

GROUP = 1 << 17
"""Pixels of the views that are finished together: enough to be worth the calls, few enough for the processor's cache."""

JITTERS: tuple[Callable[..., pixels.Bytes], ...] = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)
ORDERS = np.array(list(permutations(range(len(JITTERS)))))


class Choices(NamedTuple):
    """What was drawn for one view."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom of the crop in pixels of the image."""
    flip: bool
    order: int
    """Which of ``ORDERS`` the jitter has; -1 for no jitter."""
    factors: tuple[float, float, float, float]
    """Of brightness, contrast and saturation (1 changes nothing), and the turn of the hue as a share of the circle."""
    grayscale: bool
    blur: float
    """Standard deviation in pixels; 0 for none."""
    solarize: bool
    augment: int
    """Seed of RandAugment; -1 for none."""
    erase: int
    """Seed of the erased rectangle and its noise; -1 for none."""


def choose(view: View, size: tuple[int, int], numbers: Sequence[float]) -> Choices:
    """Turn ``NUMBERS`` uniform numbers into a view of an image of ``size`` (width, height).

    Every choice has its own numbers, so that changing one setting leaves the other choices as they were.
    """
    flip, jitter, order, brightness, contrast, saturation, hue, grayscale, blur, radius, solarize = numbers[2 * TRIES + 2 : 33]
    augment, erase, noise = numbers[33:36]
    strengths = view.jitter_strength
    low, high = view.blur_radius
    return Choices(
        box=crop_box(view.scale, view.ratio, size, numbers),
        flip=flip < view.flip,
        order=int(order * len(ORDERS)) if jitter < view.jitter else -1,
        factors=(
            _around_one(strengths[0], brightness),
            _around_one(strengths[1], contrast),
            _around_one(strengths[2], saturation),
            strengths[3] * (2 * hue - 1),
        ),
        grayscale=grayscale < view.grayscale,
        blur=low + (high - low) * radius if blur < view.blur else 0.0,
        solarize=solarize < view.solarize,
        augment=int(augment * 2**53) if view.auto_augment else -1,
        erase=int(noise * 2**53) if erase < view.erase else -1,
    )


def _around_one(strength: float, number: float) -> float:
    """Uniform from 1 - strength (but not below 0) to 1 + strength."""
    least = max(0.0, 1 - strength)
    return least + (1 + strength - least) * number


def crop(image: Image.Image, view: View, choices: Choices) -> pixels.Bytes:
    """The first part of a view: cropped, resized, perhaps flipped and put through RandAugment, (h, w, 3)."""
    flipped = cut_out(image, choices.box, view.size, view.interpolation, choices.flip)
    if view.auto_augment is None:
        return flipped
    with seeded(choices.augment):
        return np.asarray(_rand_augment(view)(Image.fromarray(np.ascontiguousarray(flipped))))


@lru_cache
def _rand_augment(view: View) -> RandAugment:
    """With timm's fill colour and its reach of translations for images of the view's size."""
    fill = tuple(round(255 * channel) for channel in IMAGENET_MEAN)
    how = {"translate_const": int(0.45 * view.size), "img_mean": fill, "interpolation": RESAMPLING[view.interpolation]}
    return rand_augment_transform(view.auto_augment, how)


def erase(image: pixels.Bytes, seed: int) -> None:
    """Fill a rectangle of ``image`` (3, h, w) with noise, in place: 2 to 33 % of its area, aspect ratio 0.3 to 3.3.

    Source: timm ``RandomErasing``, whose defaults DeiT keeps.
    """
    generator = np.random.default_rng(seed)
    rows, columns = image.shape[1:]
    for _ in range(TRIES):
        area = generator.uniform(0.02, 1 / 3) * rows * columns
        aspect = math.exp(generator.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < rows and w < columns:
            top, left = generator.integers(0, rows - h, endpoint=True), generator.integers(0, columns - w, endpoint=True)
            noise = generator.standard_normal((h, w, 3)) * IMAGENET_STD + IMAGENET_MEAN
            image[:, top : top + h, left : left + w] = np.rint(255 * noise.clip(0, 1)).transpose(2, 0, 1)
            return


def finish(planes: pixels.Bytes, view: View, choices: Sequence[Choices]) -> None:
    """The rest, in place, for views (3, n, h, w) of one kind: jitter, grayscale, blur, solarize, erasing."""

    def change(where: NDArray[np.bool_], function: Callable[..., pixels.Bytes], *amounts: NDArray[Any]) -> None:
        rows = np.flatnonzero(where)
        if len(rows) == len(where):
            planes[:] = function(planes, *amounts)
        elif len(rows):
            planes[:, rows] = function(planes.take(rows, axis=1), *(amount[rows] for amount in amounts))

    orders = np.array([ORDERS[choice.order] if choice.order >= 0 else (-1,) * len(JITTERS) for choice in choices])
    factors = np.array([choice.factors for choice in choices], np.float32).T
    turns = np.array([int(choice.factors[3] * 255) & 255 for choice in choices], np.uint8)
    amounts = (*factors[:3], turns)
    for place in range(len(JITTERS)):
        for number, (jitter, amount, strength) in enumerate(zip(JITTERS, amounts, view.jitter_strength, strict=True)):
            if strength:
                change(orders[:, place] == number, jitter, amount)
    blurs = np.array([choice.blur for choice in choices], np.float32)
    change(np.array([choice.grayscale for choice in choices]), pixels.grayscale)
    change(blurs > 0, pixels.gaussian_blur, blurs)
    change(np.array([choice.solarize for choice in choices]), partial(pixels.solarize, threshold=view.solarize_threshold))
    for row, choice in enumerate(choices):
        if choice.erase >= 0:
            erase(planes[:, row], choice.erase)


class _Kind:
    """Views of one kind on their way into ``out`` (n, 3, h, w): cropped one by one, finished in groups."""

    def __init__(self, view: View, out: pixels.Bytes):
        self.view, self.out = view, out
        self.planes = np.empty((3, max(1, min(len(out), GROUP // view.size**2)), view.size, view.size), np.uint8)
        self.choices: list[Choices] = []
        self.done = 0

    def add(self, image: Image.Image, numbers: Sequence[float]) -> None:
        choices = choose(self.view, image.size, numbers)
        self.planes[:, len(self.choices)] = crop(image, self.view, choices).transpose(2, 0, 1)
        self.choices.append(choices)
        if len(self.choices) == self.planes.shape[1]:
            self.finish()

    def finish(self) -> None:
        count = len(self.choices)
        if count:
            planes = self.planes[:, :count]
            finish(planes, self.view, self.choices)
            self.out[self.done : self.done + count] = planes.swapaxes(0, 1)
            self.done += count
            self.choices.clear()


def make_views(images: Iterable[Image.Image], keys: Sequence[tuple[int, int]], views: Views, draws: Draws) -> list[Tensor]:
    """The views of ``images`` (RGB), whose ``keys`` are (epoch, index): one uint8 tensor per resolution.

    The first is (2, n, 3, h, w), both global views of the n images (or the only one); the second, if there are local
    views, is (local_count, n, 3, h, w).
    """
    groups = [np.empty((count, len(keys), 3, size, size), np.uint8) for count, size in views.groups]
    specs = views.global_views + [views.local] * views.local_count
    kinds = [_Kind(view, out) for view, out in zip(specs, chain.from_iterable(groups), strict=True)]
    for image, (epoch, index) in zip(images, keys, strict=True):
        for kind, numbers in zip(kinds, draws.views(epoch, index, len(kinds)), strict=True):
            kind.add(image, numbers)
    for kind in kinds:
        kind.finish()
    return [torch.from_numpy(group) for group in groups]


def draw_views(path: str | Path, images: ImageSet, views: Views, seed: int, rows: int = 3, most_locals: int = 4) -> None:
    """Draw some images, each in a row with its views of the first epoch, the crops framed in it, into the picture ``path``."""
    from matplotlib.patches import Rectangle

    specs = {f"global {number}": view for number, view in enumerate(views.global_views, 1)}
    specs |= {f"local {number + 1}": views.local for number in range(min(most_locals, views.local_count))}
    indices = sorted({len(images) * row // rows for row in range(rows)})
    draws = Draws(seed)
    with picture(path, width=1.6 * (len(specs) + 1), height=1.8 * len(indices)) as figure:
        for start, axes in zip(indices, figure.subplots(len(indices), len(specs) + 1, squeeze=False), strict=True):
            index, image = readable(images, start, len(images), {})  # the run itself counts those that cannot be read
            made = chain.from_iterable(make_views([image], [(0, index)], views, draws))
            axes[0].imshow(np.asarray(image))
            axes[0].set_title("image", fontsize=9)
            numbers = draws.views(0, index, len(specs))
            for axis, (name, spec), own, view, colour in zip(axes[1:], specs.items(), numbers, made, COLOURS, strict=False):
                left, top, right, bottom = choose(spec, image.size, own).box
                axes[0].add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=colour))
                axis.imshow(view[0].permute(1, 2, 0).numpy())
                axis.set_title(name, fontsize=9, color=colour)
            for axis in axes:
                axis.set_axis_off()
