"""Files that the tests of sources read: folders of drawn JPEGs, and tar shards of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image


def picture(seed: int, width: int = 12, height: int = 10) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def class_folders(root: Path, counts: dict[str, dict[str, int]]) -> Path:
    """``counts[split][class]`` JPEG files; every one another image."""
    for split, classes in counts.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                picture(number_of(split, name, index)).save(root / split / name / f"{index:03d}.jpg")
    return root


def number_of(*parts: object) -> int:
    return int.from_bytes("".join(map(str, parts)).encode(), "big") % 2**32


def shards(root: Path, labels: Callable[[int], object] = lambda i: i % 3) -> None:
    """Two train shards of five images and one val shard of three, as webdataset writes them."""
    number = 0
    for name, count in (("train-0", 5), ("train-1", 5), ("val-0", 3)):
        with wds.TarWriter(str(root / f"{name}.tar")) as writer:
            for _ in range(count):
                sample = {"__key__": f"some/sample{number:04d}", "jpg": picture(number), "cls": labels(number)}
                writer.write(sample | {"json": {"n": number}})
                number += 1
