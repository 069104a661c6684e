"""What tests of mistakes type: short commands on small data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ErrorLine = Callable[..., str]
SCENES = "scenes?train=40&val=20&size=32"
RANDOM = "random:vit_tiny_patch16_224?image_size=32&patch_size=8&embed_dim=48&depth=1"
PRETRAIN = ("pretrain", "dino_tiny_scenes", "--smoke", "--workers", "0")
KNN = ("knn", RANDOM, "--workers", "0")


def write_images(folder: Path, *classes: str, count: int = 6) -> Path:
    """An image folder with ``count`` images of each class in train and in val."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.jpg")
    return folder
