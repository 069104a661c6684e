"""The pixel operations of views, on many images at once: what PIL computes, in NumPy.

``planes`` is uint8 (3, n, h, w): red, green and blue of n images of one size. Factors, shifts and radii are (n,), one per
image. Every function returns new planes that equal, bit for bit, what torchvision's functions make of each image as a PIL
image. Hue and blur would take most of a view's time: here they are 3 to 6 and 1.5 to 2 times faster than on PIL images
(``benchmarks/views.py``, one core of an AMD EPYC).

The blends are sums and products of float32 like PIL's. Builds of PIL for other processors than x86-64 may fuse the two, so
that a value there can differ by one level.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLURRED_AT_ONCE = 1 << 16
"""Pixels that are blurred in one go: the three 32-bit arrays that this takes should fit into a core's own cache."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def brightness(planes: Bytes, factors: Floats) -> Bytes:
    """From black (factor 0) to the image (1) and beyond."""
    return _blend(None, planes, factors)


def contrast(planes: Bytes, factors: Floats) -> Bytes:
    """From the image's mean grey level (factor 0) to the image (1) and beyond."""
    grey = luma(planes).reshape(planes.shape[1], -1)
    means = np.floor(grey.sum(1, dtype=np.uint32) / grey.shape[1] + 0.5)
    return _blend(_each(means.astype(np.float32), grey.shape[1]), planes, factors)


def saturation(planes: Bytes, factors: Floats) -> Bytes:
    """From the grey image (factor 0) to the image (1) and beyond."""
    return _blend(luma(planes).ravel().astype(np.float32), planes, factors)


def grayscale(planes: Bytes) -> Bytes:
    """The grey image, three times."""
    return np.broadcast_to(luma(planes), planes.shape)


def solarize(planes: Bytes, threshold: int) -> Bytes:
    """Values from ``threshold`` (0 to 256) on are inverted."""
    return planes ^ np.negative((planes >= threshold).view(np.uint8))


def luma(planes: Bytes) -> Bytes:
    """Grey levels (n, h, w): ITU-R 601-2 in 16-bit fixed point."""
    red, green, blue = planes
    total = red.astype(np.uint32)
    total *= 19595
    total += green * np.uint32(38470)
    total += blue * np.uint32(7471)
    total += 1 << 15
    total >>= 16
    return total.astype(np.uint8)


def _blend(base: Floats | None, planes: Bytes, factors: Floats) -> Bytes:
    """``base + factor * (image - base)``, cut to 0 to 255, fractions dropped; ``base`` is one value per pixel, or None for 0."""
    blended = np.empty(planes.shape, np.uint8)
    factor = _each(factors, planes[0, 0].size)
    for plane, out in zip(planes.reshape(3, -1), blended.reshape(3, -1), strict=True):
        value = plane.astype(np.float32)
        if base is None:
            value *= factor
        else:
            value -= base
            value *= factor
            value += base
        out[:] = np.clip(value, 0, 255, out=value)
    return blended


def _each(values: NDArray[Any], pixels: int) -> NDArray[Any]:
    """``values`` (n,) repeated for every pixel (n * pixels,): flat arrays are what NumPy is quickest with."""
    return np.repeat(values, pixels) if len(values) > 1 else np.broadcast_to(values, pixels)


def hue(planes: Bytes, shifts: Bytes) -> Bytes:
    """Turn the hue by ``shifts`` steps: to HSV in 8 bits, where hues are added modulo 256, and back."""
    hues, saturations, shares = _hue_tables()
    red, green, blue = planes.reshape(3, -1)
    low, high = np.minimum(red, green), np.maximum(red, green)
    value, least = np.maximum(high, blue), np.minimum(low, blue)
    spread = value - least
    middle = np.maximum(low, np.minimum(high, blue)) - least

    order = (blue < red).view(np.uint8)
    for less in (green < blue, red < green):
        order = order + order + less
    turned = hues.take(_index(_index(order, spread, np.uint32), middle, np.uint32)) + _each(shifts, planes[0, 0].size)
    packed = saturations.take(_index(value, spread))
    least = (packed >> 8).astype(np.uint8)
    share = shares.take(_index(turned, packed & 255))
    share *= value
    share += 0.5
    middle = share.astype(np.uint8)

    out = np.empty(planes.shape, np.uint8)
    value ^= middle  # so that "middle ^ value" is the value
    least ^= middle
    for plane, (largest, smallest) in zip(out.reshape(3, -1), _SECTORS, strict=True):
        plane[:] = middle ^ (_within(turned, *largest) & value) ^ (_within(turned, *smallest) & least)
    return out


# From which hue on, and for how many, red, green and blue are the largest and the smallest of the three channels.
_SECTORS = (((213, 86), (85, 85)), ((43, 85), (170, 85)), ((128, 85), (255, 86)))


def _within(hues: Bytes, start: int, count: int) -> Bytes:
    """255 where ``hues`` is one of the ``count`` values from ``start`` on (modulo 256), else 0."""
    return np.negative(((hues - np.uint8(start)) < count).view(np.uint8))


def _index(high: NDArray[Any], low: NDArray[Any], dtype: type[np.unsignedinteger] = np.uint16) -> NDArray[Any]:
    """``256 * high + low``."""
    index = high.astype(dtype)
    index <<= 8
    index |= low
    return index


@cache
def _hue_tables() -> tuple[Bytes, NDArray[np.uint16], Floats]:
    """PIL's conversions as three flat tables.

    - Hue by (order of the channels, largest - smallest, middle - smallest); the order is three bits: blue < red,
      green < blue, red < green.
    - Saturation by (value, largest - smallest); in the upper byte the smallest channel after going back.
    - The middle channel as a share of the largest after going back, by (hue, saturation).
    """
    first, second = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), indexing="ij")
    second = np.minimum(first, second)
    hues = np.zeros((8, 256, 256), np.uint8)
    for order, (largest, middle) in {1: (1, 2), 2: (2, 0), 3: (2, 1), 4: (0, 1), 5: (1, 0), 6: (0, 2)}.items():
        colours = np.zeros((256, 256, 3), np.uint8)
        colours[..., largest], colours[..., middle] = first, second
        hues[order] = np.asarray(Image.fromarray(colours).convert("HSV"))[..., 0]

    reds = np.stack([first, first - second, first - second], axis=-1)
    hsv = np.array(Image.fromarray(reds).convert("HSV"))
    saturations = hsv[..., 1].copy()
    hsv[..., 0] = 0
    least = np.asarray(Image.frombytes("HSV", (256, 256), hsv.tobytes()).convert("RGB"))[..., 2]

    place = np.arange(256)[:, None] * 6.0 / 255.0
    sector = np.floor(place)
    within = (place - sector).astype(np.float32)
    full = (np.arange(256) / 255.0).astype(np.float32)
    falling = 1.0 - (full * within).astype(np.float64)
    rising = 1.0 - full.astype(np.float64) * (1.0 - within.astype(np.float64))
    shares = np.where(sector % 2, falling, rising).astype(np.float32)
    return hues.ravel(), _index(least, saturations).ravel(), shares.ravel()


def gaussian_blur(planes: Bytes, radii: Floats) -> Bytes:
    """A Gaussian of standard deviation ``radii`` pixels as PIL approximates it: three box blurs along each axis.

    The boxes have fractional widths, and each pass rounds to 8 bits. Source: Gwosdek et al. 2011; PIL's ``BoxBlur.c``.
    """
    reach, near, far = _boxes(radii)
    blurred = np.empty(planes.shape, np.uint8)
    for whole in np.unique(reach):
        of_this = np.flatnonzero(reach == whole)
        at_once = max(1, BLURRED_AT_ONCE // planes[0, 0].size)
        for start in range(0, len(of_this), at_once):
            rows = of_this[start : start + at_once]
            for plane, out in zip(planes, blurred, strict=True):
                out[rows] = _box_blurs(plane[rows], int(whole), near[rows], far[rows])
    return blurred


def _boxes(radii: Floats) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint32]]:
    """Of each radius: the whole pixels that its box reaches to either side, their weight and the next one's (2^24 is 1)."""
    variance = radii * radii / np.float32(3)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    width = whole + fraction
    reach = width.astype(np.int64)
    near = (np.float32(1 << 24) / (width * 2 + 1)).astype(np.uint32)
    far = ((1 << 24) - (reach * 2 + 1) * near) // 2
    return reach, near, far.astype(np.uint32)


def _box_blurs(plane: Bytes, reach: int, near: NDArray[np.uint32], far: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Blur images (n, h, w) along both axes by boxes that all have the same ``reach``.

    The images lie in one flat array, each in a border that repeats its outermost pixels, so that a neighbour is the same
    distance away everywhere. What is computed for the borders is wrong and is repaired before every pass.
    """
    edge = reach + 1
    images, height, width = plane.shape
    bordered = np.empty((images, height + 2 * edge, width + 2 * edge), np.uint32)
    inner = bordered[:, edge:-edge, edge:-edge]
    inner[...] = plane
    flat = bordered.reshape(-1)
    near, far = _each(near, bordered[0].size), _each(far, bordered[0].size)
    sums, ends = np.empty_like(flat), np.empty_like(flat)
    for lines, step in ((bordered.swapaxes(1, 2), 1), (bordered, width + 2 * edge)):
        skip = edge * step
        size = len(flat) - 2 * skip
        total, outer, centre = sums[:size], ends[:size], flat[skip:-skip]
        for _ in range(3):
            lines[:, :edge] = lines[:, edge : edge + 1]
            lines[:, -edge:] = lines[:, -edge - 1 : -edge]
            np.multiply(centre, near[:size], out=total)
            for distance in range(step, skip, step):
                np.add(flat[skip - distance :][:size], flat[skip + distance :][:size], out=outer)
                outer *= near[:size]
                total += outer
            np.add(flat[:size], flat[2 * skip :], out=outer)
            outer *= far[:size]
            total += outer
            total += 1 << 23
            np.right_shift(total, 24, out=centre)
    return inner
