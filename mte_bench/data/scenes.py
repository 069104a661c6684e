"""The embedded data: textured things on textured grounds, drawn from (seed, split, index) by code alone.

A class is a silhouette with a surface pattern. Everything else is nuisance: colours, which of the two colours is the
lighter, place, size, tilt, phase and scale of the pattern, ground, clutter, slanting light, noise. Masks come
from the drawing itself, so they are exact. What the classes cost pixels, networks and random encoders is measured by
``benchmarks/scenes_difficulty.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Masks = NDArray[np.bool_]

VERSION = 8
"""Changes whenever a drawing changes: part of every cache key and fingerprint."""
SPLITS = ("train", "val")
TILT = 0.45
"""Things stand upright, give or take so many radians."""

MOST = 6
"""Things in an image of several, unless said otherwise."""


@dataclass(frozen=True)
class Kind:
    """One class: its silhouette and surface pattern (names in ``SHAPES`` and ``PATTERNS``)."""

    shape: str
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.pattern}_{self.shape}"


@dataclass(frozen=True)
class Thing:
    """One drawn thing: ``label`` indexes ``KINDS``; ``mask`` (h w) is what can be seen of it."""

    label: int
    mask: Masks


@dataclass(frozen=True)
class Drawing:
    """``image`` (h w 3) uint8, its things from back to front, and ``clutter`` (h w), where blobs that are no things show."""

    image: NDArray[np.uint8]
    things: tuple[Thing, ...]
    clutter: Masks


KINDS = (
    Kind("dome", "bricked"),
    Kind("cross", "checked"),
    Kind("disc", "dotted"),
    Kind("triangle", "latticed"),
    Kind("square", "ringed"),
    Kind("crescent", "spiral"),
    Kind("clover", "spoked"),
    Kind("ring", "striped"),
    Kind("star", "wavy"),
    Kind("bar", "zigzag"),
)
"""In the order of their names, so that class folders number them alike."""
CLASSES = tuple(kind.name for kind in KINDS)


def draw(seed: int, split: str, index: int, size: int = 64) -> Drawing:
    """Image ``index`` of ``split``, ``size`` x ``size``: one large thing, of class ``index % 10``.

    The same arguments give the same drawing, up to the rounding of the machine's sines.
    """
    rng = _generator(seed, split, index, 0)
    canvas = _Canvas(rng, size, size)
    canvas.scatter_clutter(rng, int(rng.integers(0, 5)), 0.12)
    radius = rng.uniform(0.34, 0.5)
    place = 0.5 + rng.uniform(-1, 1, 2) * (0.5 - 0.6 * radius)
    canvas.paint(rng, index % len(KINDS), radius, place)
    return canvas.finish(rng)


def draw_many(seed: int, split: str, index: int, height: int, width: int, most: int = MOST) -> Drawing:
    """Image ``index`` of ``split`` with one to ``most`` smaller things, which may hide parts of each other.

    A thing of which less than a quarter can be seen is left out: its pixels are then clutter.
    """
    rng = _generator(seed, split, index, 1)
    canvas = _Canvas(rng, height, width)
    canvas.scatter_clutter(rng, int(rng.integers(2, 8)), 0.06)
    for _ in range(rng.integers(1, most + 1)):
        place = rng.uniform(0.1, 0.9, 2) * (width, height) / min(height, width)
        canvas.paint(rng, int(rng.integers(len(KINDS))), rng.uniform(0.14, 0.32), place)
    return canvas.finish(rng, least_seen=0.25)


def _generator(seed: int, split: str, index: int, manner: int) -> np.random.Generator:
    return np.random.default_rng((seed, SPLITS.index(split), index, manner))


class _Canvas:
    """An image in the making; places and radii are in units of its shorter side."""

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.unit = min(height, width)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        self.x, self.y = (x + np.float32(0.5)) / self.unit, (y + np.float32(0.5)) / self.unit
        dark, light = _two_colours(rng, rng.uniform(0.02, 0.12))
        waves = np.sum([self.ripples(rng, *rng.uniform(3, 40, 2)) for _ in range(3)], axis=0)
        share = np.clip(waves * np.float32(0.35) + np.float32(0.5), 0, 1)
        self.pixels: Floats = dark + (light - dark) * share[..., None]
        self.clutter = np.zeros((height, width), np.bool_)
        self.things: list[tuple[Thing, int]] = []  # with the pixels it would show if nothing hid it

    def ripples(self, rng: np.random.Generator, frequency: float, bending: float) -> Floats:
        """Bent waves in -1..1; frequencies in radians per unit."""
        u, _ = _turned(self.x, self.y, rng.uniform(0, 2 * np.pi), frequency)
        v, _ = _turned(self.x, self.y, rng.uniform(0, 2 * np.pi), 0.3 * bending)
        return np.sin(u + np.float32(rng.uniform(0, 2 * np.pi)) + np.sin(v + np.float32(rng.uniform(0, 2 * np.pi))))

    def scatter_clutter(self, rng: np.random.Generator, count: int, largest: float) -> None:
        """Blobs of one colour each."""
        for _ in range(count):
            cx, cy = rng.uniform(0, 1, 2) * (self.x.shape[1], self.x.shape[0]) / self.unit
            radius, squeeze = rng.uniform(0.25 * largest, largest), rng.uniform(0.4, 1)
            u, v = _turned(self.x - np.float32(cx), self.y - np.float32(cy), rng.uniform(0, np.pi), 1 / radius)
            distance = np.hypot(u, v / np.float32(squeeze)) - 1
            self.blend(_two_colours(rng, 0.3)[0], distance * np.float32(radius * squeeze))
            self.clutter |= distance < 0

    def paint(self, rng: np.random.Generator, label: int, radius: float, place: NDArray[np.float64]) -> None:
        """One thing of class ``label`` in front of all that is there."""
        kind = KINDS[label]
        u, v = _turned(self.x - np.float32(place[0]), self.y - np.float32(place[1]), rng.uniform(-TILT, TILT), 1 / radius)
        v = v * np.float32(rng.uniform(0.85, 1.18))
        frequency = 2 * np.pi * rng.uniform(3.5, 5.5)  # radians per radius
        p, q = u * np.float32(frequency), v * np.float32(frequency)
        if kind.pattern not in CENTRED:
            p, q = p + np.float32(rng.uniform(0, 2 * np.pi)), q + np.float32(rng.uniform(0, 2 * np.pi))
        field = PATTERNS[kind.pattern](p, q) * np.float32(radius * self.unit / frequency)
        one, other = _two_colours(rng, rng.uniform(0.5, 0.85))
        surface = one + (other - one) * np.clip(field + np.float32(0.5), 0, 1)[..., None]
        distance = SHAPES[kind.shape](u, v) * np.float32(radius)
        self.blend(surface, distance)
        mask = distance < 0
        for thing, _ in self.things:
            thing.mask[mask] = False
        self.clutter &= ~mask
        self.things.append((Thing(label, mask), int(mask.sum())))

    def blend(self, colour: Floats, distance: Floats) -> None:
        """Lay ``colour`` where ``distance`` (in units of the shorter side) is negative, with a soft edge of one pixel."""
        cover = np.clip(np.float32(0.5) - distance * np.float32(self.unit), 0, 1)[..., None]
        self.pixels += (colour - self.pixels) * cover

    def finish(self, rng: np.random.Generator, least_seen: float = 0.0) -> Drawing:
        """Light from one side, noise; then bytes."""
        slope, _ = _turned(self.x - np.float32(0.5), self.y - np.float32(0.5), rng.uniform(0, 2 * np.pi))
        self.pixels *= (1 + np.float32(rng.uniform(0, 0.5)) * slope)[..., None]
        self.pixels += rng.standard_normal(self.pixels.shape, np.float32) * np.float32(rng.uniform(0, 0.04))
        for thing, whole in self.things:
            if thing.mask.sum() < least_seen * whole:
                self.clutter |= thing.mask
        things = tuple(thing for thing, whole in self.things if thing.mask.any() and thing.mask.sum() >= least_seen * whole)
        return Drawing((np.clip(self.pixels, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8), things, self.clutter)


def _turned(x: Floats, y: Floats, angle: float, scale: float = 1.0) -> tuple[Floats, Floats]:
    c, s = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    return c * x + s * y, c * y - s * x


def _two_colours(rng: np.random.Generator, contrast: float) -> tuple[Floats, Floats]:
    """Two colours in 0..1, ``contrast`` apart in luminance, the first as often the darker as the lighter.

    Their middle stays near grey: overall brightness is the first thing that encoders tell images apart by.
    """
    middle, half = rng.uniform(0.4, 0.6), contrast / 2 * rng.choice((-1, 1))
    tints = rng.uniform(-0.08, 0.08, (2, 3))
    tints -= tints.mean(axis=1, keepdims=True)
    one, other = np.clip(np.array([[middle - half], [middle + half]]) + tints, 0, 1).astype(np.float32)
    return one, other


# --- silhouettes: distance from the outline in radii, negative inside; v points down --------------------------------


def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - np.float32(0.95)


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - np.float32(0.66)) - np.float32(0.34)


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.82)


def _bar(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, np.maximum(np.abs(v) - np.float32(0.6), 0)) - np.float32(0.5)


def _cross(u: Floats, v: Floats) -> Floats:
    longer, shorter = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(longer - np.float32(1.0), shorter - np.float32(0.42))


def _triangle(u: Floats, v: Floats) -> Floats:
    """Point upwards."""
    return np.maximum(v - np.float32(0.55), np.abs(u) * np.float32(0.866) - v * np.float32(0.5) - np.float32(0.55))


def _star(u: Floats, v: Floats) -> Floats:
    """Five points, one upwards: the distance from the one edge that all ten are turned onto."""
    sector = 2 * np.pi / 5
    turn, r = np.arctan2(u, -v), np.hypot(u, v)
    angle = np.abs(turn - np.float32(sector) * np.floor(turn / np.float32(sector)) - np.float32(sector / 2))  # 0 in a notch
    notch, tip = 0.52, 1.1 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    along = (tip - (notch, 0)) / np.hypot(*(tip - (notch, 0)))
    return (r * np.cos(angle) - np.float32(notch)) * np.float32(along[1]) - r * np.sin(angle) * np.float32(along[0])


def _crescent(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.hypot(u, v) - np.float32(1.0), np.float32(0.68) - np.hypot(u - np.float32(0.55), v))


def _clover(u: Floats, v: Floats) -> Floats:
    """Three leaves."""
    return np.hypot(u, v) - np.float32(0.7) - np.float32(0.3) * np.cos(3 * np.arctan2(u, -v))


def _dome(u: Floats, v: Floats) -> Floats:
    below = v - np.float32(0.5)
    return np.maximum(np.hypot(u, below) - np.float32(1.05), below)


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "disc": _disc, "ring": _ring, "square": _square, "bar": _bar, "cross": _cross,
    "triangle": _triangle, "star": _star, "crescent": _crescent, "clover": _clover, "dome": _dome,
}  # fmt: skip


# --- surface patterns: a field in radians of phase whose sign chooses between the two colours ------------------------


def _dotted(p: Floats, q: Floats) -> Floats:
    return np.cos(p) + np.cos(q) - np.float32(0.4)


def _striped(p: Floats, q: Floats) -> Floats:
    return np.sin(p)


def _ringed(p: Floats, q: Floats) -> Floats:
    return np.sin(np.hypot(p, q))


def _zigzag(p: Floats, q: Floats) -> Floats:
    return np.sin(q + 2 * np.abs(np.mod(np.float32(0.6) * p, np.float32(2 * np.pi)) - np.float32(np.pi)))


def _checked(p: Floats, q: Floats) -> Floats:
    return 2 * np.sin(np.float32(0.8) * p) * np.sin(np.float32(0.8) * q)


def _latticed(p: Floats, q: Floats) -> Floats:
    """Lines that cross on the diagonals."""
    return np.maximum(np.cos((p + q) * np.float32(0.7)), np.cos((p - q) * np.float32(0.7))) - np.float32(0.65)


def _wavy(p: Floats, q: Floats) -> Floats:
    return np.sin(q + np.float32(1.6) * np.sin(np.float32(0.7) * p))


def _spiral(p: Floats, q: Floats) -> Floats:
    return np.sin(np.float32(0.8) * np.hypot(p, q) + 3 * np.arctan2(q, p))


def _spoked(p: Floats, q: Floats) -> Floats:
    return 2 * np.sin(9 * np.arctan2(q, p))


def _bricked(p: Floats, q: Floats) -> Floats:
    """Courses of half a period, every second shifted by half a brick, with joints between."""
    course = np.float32(np.pi / 2) * np.floor(q / np.float32(np.pi))
    return np.maximum(np.abs(np.cos(p / 2 + course)) - np.float32(0.92), np.abs(np.cos(q)) - np.float32(0.85)) * 4


PATTERNS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "dotted": _dotted, "striped": _striped, "ringed": _ringed, "zigzag": _zigzag, "checked": _checked,
    "latticed": _latticed, "wavy": _wavy, "spiral": _spiral, "spoked": _spoked, "bricked": _bricked,
}  # fmt: skip
CENTRED = frozenset(("ringed", "spiral", "spoked"))
"""Patterns around the thing's middle; the others start at any phase."""
