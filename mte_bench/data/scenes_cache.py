"""The embedded data as a source: drawn once into memory-mapped arrays in the cache folder, then served from there."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mte_bench.console import log
from mte_bench.data.scenes import CLASSES, VERSION, draw
from mte_bench.data.sources import ImageSet, Source, Split, fingerprint_of
from mte_bench.errors import UserError
from mte_bench.files import atomic, cache_folder, hash_of

DEFAULTS = {"train": 4000, "val": 1000, "size": 64, "seed": 0}


class SceneImages(ImageSet):
    """Image ``i`` of a split is drawing ``i``, of class ``i % len(classes)``."""

    def __init__(self, source: Source, split: Split):
        self.source, self.split, self.classes = str(source), split, CLASSES
        count, size, seed = (source.number(option, DEFAULTS[option]) for option in (split, "size", "seed"))
        if size < 16:
            raise UserError(f"source {source}: size is at least 16 pixels")
        self.labels = np.arange(count) % len(CLASSES)
        drawn = {"version": VERSION, "split": split, "count": count, "size": size, "seed": seed}
        self.fingerprint = fingerprint_of(hash_of(drawn).encode(), self.labels)
        self.path = cache_folder() / "scenes" / f"{split}-{count}x{size}-{hash_of(drawn)}.npy"
        if not self.path.exists():
            _draw_all(self.path, seed, split, count, size)
        self._pixels: NDArray[np.uint8] | None = None

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """All images (n h w 3), memory-mapped."""
        if self._pixels is None:
            self._pixels = np.load(self.path, mmap_mode="r")
        return self._pixels

    def name(self, index: int) -> str:
        return f"{self.split}/{self.classes[self.labels[index]]}/{index:06d}"

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pixels": None}


def open_scenes(source: Source, split: Split) -> ImageSet:
    """The split ``split`` of ``scenes?train=N&val=N&size=S&seed=K``; drawn now if it is not in the cache."""
    return SceneImages(source, split)


def _draw_all(path: Path, seed: int, split: Split, count: int, size: int) -> None:
    log(f"drawing {count} {split} scenes of {size} x {size} pixels (once; kept in {path.parent})")
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    with atomic(path) as temporary, open(temporary, "wb") as file:  # not a memory map: on a full disk that would be a SIGBUS
        np.lib.format.write_array_header_1_0(file, header)
        for index in range(count):
            file.write(draw(seed, split, index, size).image.tobytes())
