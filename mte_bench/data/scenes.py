"""The embedded data: textured things on textured grounds, drawn from (seed, split, index) by code alone.

A class is a silhouette with a surface pattern. Everything else is nuisance: colours, place, size, rotation, light, shadow,
ground, clutter. Masks come from the drawing itself, so they are exact.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

VERSION = 1
"""Changes whenever a drawing changes: part of every cache key and fingerprint."""
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Kind:
    """One class: its silhouette and surface pattern (names of ``SHAPES`` and ``PATTERNS``)."""

    shape: str
    pattern: str

    @property
    def name(self) -> str:
        return f"{self.pattern}_{self.shape}"


@dataclass(frozen=True)
class Thing:
    """One drawn object: ``label`` indexes ``KINDS``; ``mask`` (h w) is what can be seen of it."""

    label: int
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Drawing:
    """``image`` (h w 3) uint8 and the things in it, from back to front."""

    image: NDArray[np.uint8]
    things: tuple[Thing, ...]


# --- silhouettes: signed distance from the outline in units of the radius, negative inside -------------------------


def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - np.float32(0.95)


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - np.float32(0.68)) - np.float32(0.32)


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8)


def _bar(u: Floats, v: Floats) -> Floats:
    return np.hypot(np.maximum(np.abs(u) - np.float32(0.7), 0), v) - np.float32(0.42)


def _cross(u: Floats, v: Floats) -> Floats:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(a, b) - np.float32(1.0), np.minimum(a, b) - np.float32(0.38))


def _polygon(u: Floats, v: Floats, corners: int, radius: float) -> Floats:
    angles = np.arange(corners) * (2 * np.pi / corners)
    normals = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    sides = normals[0, :, None, None] * u + normals[1, :, None, None] * v
    return sides.max(axis=0) - np.float32(radius)


def _triangle(u: Floats, v: Floats) -> Floats:
    return _polygon(u, v, 3, 0.55)


def _star(u: Floats, v: Floats) -> Floats:
    """Five points: the reflected sector's straight edge."""
    sector = np.float32(2 * np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(v, u), sector) - sector / 2)  # 0 between two points, sector / 2 on a point
    r = np.hypot(u, v)
    x, y = r * np.cos(angle), r * np.sin(angle)
    inner, tip = 0.48, np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)]) * 1.08
    edge = tip - (inner, 0.0)
    length = np.hypot(*edge)
    return ((x - np.float32(inner)) * np.float32(edge[1]) - y * np.float32(edge[0])) / np.float32(length)


def _crescent(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.hypot(u, v) - np.float32(1.0), np.float32(0.72) - np.hypot(u - np.float32(0.55), v))


def _clover(u: Floats, v: Floats) -> Floats:
    """Three lobes."""
    return np.hypot(u, v) * np.float32(0.9) - np.float32(0.62) - np.float32(0.28) * np.cos(3 * np.arctan2(v, u))


def _half(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.hypot(u, v) - np.float32(1.05), -v - np.float32(0.05)) 


SHAPES = {
    "disc": _disc, "ring": _ring, "square": _square, "bar": _bar, "cross": _cross,
    "triangle": _triangle, "star": _star, "crescent": _crescent, "clover": _clover, "half": _half,
}  # fmt: skip


# --- surface patterns: a field whose sign chooses between two colours; w is 2 pi times cycles per radius -----------


def _triangle_wave(x: Floats) -> Floats:
    return np.abs(np.mod(x, np.float32(2 * np.pi)) - np.float32(np.pi)) - np.float32(np.pi / 2)


def _stripes(u: Floats, v: Floats) -> Floats:
    return np.sin(u)


def _dots(u: Floats, v: Floats) -> Floats:
    return np.cos(u) + np.cos(v) - np.float32(0.45)


def _checks(u: Floats, v: Floats) -> Floats:
    return 2 * np.sin(np.float32(0.8) * u) * np.sin(np.float32(0.8) * v)


def _rings(u: Floats, v: Floats) -> Floats:
    return np.sin(np.hypot(u, v))


def _waves(u: Floats, v: Floats) -> Floats:
    return np.sin(u + np.float32(1.6) * np.sin(np.float32(0.7) * v))


def _zigzag(u: Floats, v: Floats) -> Floats:
    return np.sin(u + 2 * _triangle_wave(np.float32(0.6) * v))


def _lattice(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.cos(u), np.cos(v)) - np.float32(0.6)


def _spokes(u: Floats, v: Floats) -> Floats:
    return np.sin(9 * np.arctan2(v, u))


def _bricks(u: Floats, v: Floats) -> Floats:
    row = np.floor(v / np.float32(np.pi))
    return np.maximum(np.cos(u / 2 + row * np.float32(np.pi / 2)) ** 32, np.cos(v - np.float32(np.pi)) ** 8 * 0 + np.abs(np.cos(v)) ** 8) - np.float32(0.4)


def _spiral(u: Floats, v: Floats) -> Floats:
    return np.sin(np.hypot(u, v) + 3 * np.arctan2(v, u))


PATTERNS = {
    "striped": _stripes, "dotted": _dots, "checked": _checks, "ringed": _rings, "wavy": _waves,
    "zigzag": _zigzag, "latticed": _lattice, "spoked": _spokes, "bricked": _bricks, "spiral": _spiral,
}  # fmt: skip

KINDS = (
    Kind("disc", "dotted"),
    Kind("ring", "striped"),
    Kind("square", "ringed"),
    Kind("bar", "zigzag"),
    Kind("cross", "checked"),
    Kind("triangle", "latticed"),
    Kind("star", "wavy"),
    Kind("crescent", "spiral"),
    Kind("clover", "spoked"),
    Kind("half", "bricked"),
)
CLASSES = tuple(kind.name for kind in KINDS)


def draw(seed: int, split: str, index: int, size: int = 64) -> Drawing:
    """Image ``index`` of ``split``: one large thing of class ``index % 10``. The same arguments give the same drawing."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    x, y = _grid(size, size)
    canvas = _ground(rng, x, y)
    for _ in range(rng.integers(2, 6)):
        _clutter(rng, canvas, x, y)
    label = index % len(KINDS)
    radius = rng.uniform(0.30, 0.46)
    room = max(0.0, 0.5 - 0.75 * radius)
    centre = 0.5 + rng.uniform(-room, room, 2)
    mask = _paint(rng, canvas, x, y, KINDS[label], radius, centre)
    _light(rng, canvas, x, y)
    return Drawing(_finish(rng, canvas), (Thing(label, mask),))


def _grid(height: int, width: int) -> tuple[Floats, Floats]:
    """Pixel centres in units of the shorter side."""
    unit = min(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (x + np.float32(0.5)) / unit, (y + np.float32(0.5)) / unit


def _turned(x: Floats, y: Floats, angle: float, scale: float = 1.0) -> tuple[Floats, Floats]:
    c, s = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    return c * x + s * y, c * y - s * x


def _colours(rng: np.random.Generator, contrast: float) -> Floats:
    """Two colours (2, 3) in 0..1 that differ in luminance by about ``contrast``."""
    middle = rng.uniform(contrast / 2 + 0.05, 0.95 - contrast / 2)
    half = contrast / 2 * rng.choice((-1, 1))
    tint = rng.uniform(-1, 1, (2, 3))
    tint -= tint.mean(axis=1, keepdims=True)
    return np.clip(np.array([[middle - half], [middle + half]]) + 0.22 * tint, 0, 1).astype(np.float32)


def _ground(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """A ground of drifting waves and a gradient (h w 3)."""
    a, b = _colours(rng, rng.uniform(0.05, 0.3))
    field = np.zeros_like(x)
    for frequency in rng.uniform(3, 40, 4):
        u, _ = _turned(x, y, rng.uniform(0, np.pi), frequency)
        _, v = _turned(x, y, rng.uniform(0, np.pi), frequency * 0.3)
        field += np.sin(u + np.float32(rng.uniform(0, 6.3)) + np.float32(rng.uniform(0, 2)) * np.sin(v))
    share = np.clip(field * np.float32(0.3) + np.float32(0.5), 0, 1)[..., None]
    return a + (b - a) * share


def _clutter(rng: np.random.Generator, canvas: Floats, x: Floats, y: Floats) -> None:
    """A small one-coloured blob."""
    cx, cy = rng.uniform(0, 1, 2)
    u, v = _turned(x - np.float32(cx), y - np.float32(cy), rng.uniform(0, np.pi), 1 / rng.uniform(0.03, 0.12))
    distance = np.hypot(u, v * np.float32(rng.uniform(0.4, 1.0))) - 1
    _blend(canvas, _colours(rng, 0.3)[0], np.clip(0.5 - distance * 4, 0, 1))


def _paint(
    rng: np.random.Generator, canvas: Floats, x: Floats, y: Floats, kind: Kind, radius: float, centre: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Draw one thing on ``canvas`` in place; ``radius`` and ``centre`` in units of the shorter side. Returns its mask."""
    unit = min(x.shape)
    u, v = _turned(x - np.float32(centre[0]), y - np.float32(centre[1]), rng.uniform(0, 2 * np.pi), 1 / radius)
    v = v * np.float32(rng.uniform(0.85, 1.18))
    distance = SHAPES[kind.shape](u, v)
    frequency = 2 * np.pi * rng.uniform(2.0, 3.0)
    p, q = _turned(u, v, rng.uniform(0, 2 * np.pi), frequency)
    if kind.pattern not in ("ringed", "spoked", "spiral"):
        p, q = p + np.float32(rng.uniform(0, 6.3)), q + np.float32(rng.uniform(0, 6.3))
    field = PATTERNS[kind.pattern](p, q)
    sharp = np.clip(field * np.float32(radius * unit / frequency) + np.float32(0.5), 0, 1)[..., None]
    a, b = _colours(rng, rng.uniform(0.45, 0.7))
    surface = a + (b - a) * sharp
    alpha = np.clip(np.float32(0.5) - distance * np.float32(radius * unit), 0, 1)
    _blend(canvas, surface, alpha)
    return distance <= 0


def _light(rng: np.random.Generator, canvas: Floats, x: Floats, y: Floats) -> None:
    """Light falls from one side and leaves a soft shadow on the other."""
    u, _ = _turned(x - 0.5, y - 0.5, rng.uniform(0, 2 * np.pi))
    canvas *= (1 + np.float32(rng.uniform(0.0, 0.6)) * u)[..., None]


def _blend(canvas: Floats, colour: Floats, alpha: Floats) -> None:
    canvas += (colour - canvas) * alpha[..., None]


def _finish(rng: np.random.Generator, canvas: Floats) -> NDArray[np.uint8]:
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0.0, 0.04))
    return (np.clip(canvas + noise, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
