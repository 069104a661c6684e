"""How image files are decoded: as torchvision does, smaller where asked, and by name where they are corrupt."""

import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import pil_loader

from mte_bench.data.sources import open_source
from mte_bench.errors import CorruptImage
from source_files import class_folders, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "set", {"train": {"cat": 2, "ant": 2}, "val": {"cat": 2}})


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "rotated"])
def test_every_kind_of_file_is_decoded_as_torchvision_does(mode: str, folder: Path) -> None:
    image, path = picture(3), folder / "train" / "ant" / "000.jpg"
    path.unlink()
    if mode == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned by a quarter: neither torchvision nor DINO turns it
        image.save(path, exif=exif)
    elif mode == "CMYK":
        image.convert(mode).save(path)
    else:
        path = path.with_suffix(".png")
        image.convert(mode).save(path)
    images = open_source(str(folder), "train")
    assert images.name(0).startswith("train/ant/000")
    assert images.image(0).mode == "RGB" and images.image(0).size == (12, 10)
    assert np.array_equal(np.asarray(images.image(0)), np.asarray(pil_loader(str(path))))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_of_16_bits_the_upper_eight_are_taken(suffix: str, folder: Path) -> None:
    """torchvision's loader makes nearly all of them white."""
    path = folder / "train" / "ant" / "000.jpg"
    path.unlink()
    grey = np.asarray(picture(3).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(path.with_suffix(suffix))
    image = open_source(str(folder), "train").image(0)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(kind: type[np.generic], folder: Path) -> None:
    path = folder / "train" / "ant" / "000.jpg"
    path.unlink()
    Image.fromarray(np.zeros((8, 8), kind)).save(path.with_suffix(".tiff"))
    with pytest.raises(CorruptImage, match=r"000\.tiff.*32 bits and no known range; convert it to 8 bits"):
        open_source(str(folder), "train").image(0)


@pytest.mark.parametrize("form", ["", "?per_class=1", "tar"])
def test_reduced_images_are_the_smallest_that_are_large_enough(form: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.jpg"):
        Image.open(path).resize((170, 130)).save(path)
    if form == "tar":
        with tarfile.open(tmp_path / "train.tar", "w") as shard:
            shard.add(folder / "train" / "ant" / "000.jpg", "000.jpg")
    images = open_source(f"tar:{tmp_path}/{{split}}.tar" if form == "tar" else f"{folder}{form}", "train")
    sizes = {side: images.reduced(side).image(0).size for side in (16, 17, 32, 33, 65, 66)}
    assert sizes == {16: (22, 17), 17: (43, 33), 32: (43, 33), 33: (85, 65), 65: (85, 65), 66: (170, 130)}
    assert images.image(0).size == (170, 130) and images.reduced(16).fingerprint == images.fingerprint


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "gone"])
def test_a_corrupt_image_is_named(damage: str, folder: Path) -> None:
    path = folder / "train" / "ant" / "000.jpg"
    images = open_source(str(folder), "train")
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) * 2 // 3], "empty": b"", "text": b"hello", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    with pytest.raises(CorruptImage, match=re.escape(str(path))) as error:
        images.image(0)
    assert "\n" not in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).path == str(path)
    images.image(1)
