"""Sources that are image files in folders: class folders, COCO, ADE20K."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from mte_bench.data.sources import IMAGE_SUFFIXES, EncodedImages, ImageSet, Names, Source, Split, decode, fingerprint_of
from mte_bench.errors import CorruptImage, UserError, did_you_mean

File = tuple[str, int]  # path relative to the source, bytes
_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "test")}
_SCANNERS = 16  # folders read at a time: hides the latency of network file systems


class FileImages(EncodedImages):
    """Image files below ``root``; ``names`` are their paths relative to it."""

    def __init__(
        self, source: Source, split: Split, root: Path, files: Sequence[File], labels: ArrayLike, classes: Sequence[str]
    ):
        self.source, self.split, self.classes = str(source), split, tuple(classes)
        self.root, self.names = str(root), Names(name for name, _ in files)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.fingerprint = fingerprint_of(
            "\0".join(self.classes).encode("utf-8", "surrogateescape"),
            self.names.text,
            self.names.ends,
            np.array([size for _, size in files], np.int64),
            self.labels,
        )

    def name(self, index: int) -> str:
        return self.names[index]

    def image(self, index: int) -> Image.Image:
        path = f"{self.root}/{self.names[index]}"
        try:
            with open(path, "rb") as file:
                return decode(file, path, self.side)
        except OSError as error:
            raise CorruptImage(path, error.strerror or "cannot be opened") from error


def open_imagefolder(source: Source, split: Split) -> ImageSet:
    """``PATH/<split>/<class>/**/*``; classes are the folder names of train, sorted. Files straight in the split have no class."""
    root = existing(source, Path(source.path).expanduser())
    train = root / "train"
    folder = next((root / name for name in _SPLIT_FOLDERS[split] if (root / name).is_dir()), None)
    if folder is None:
        wanted = "/ or ".join(_SPLIT_FOLDERS[split])
        raise UserError(f"source {source}: {root} has no {wanted}/ folder; lay it out as train/<class>/* and val/<class>/*")
    own = _subfolders(folder)
    if not own:
        return _unlabelled(source, split, root, folder)
    classes = _subfolders(train) if split == "val" and train.is_dir() else own
    strange = sorted(set(own) - set(classes))
    if strange:
        raise UserError(f"source {source}: class folder {folder.name}/{strange[0]} has no counterpart in train/")
    with ThreadPoolExecutor(_SCANNERS) as pool:
        found = list(pool.map(lambda name: _scan(folder / name, f"{folder.name}/{name}"), own))
    place = {name: index for index, name in enumerate(classes)}
    labels = np.repeat([place[name] for name in own], [len(files) for files in found])
    files = [file for group in found for file in group]
    if not files:
        raise UserError(f"source {source}: no images in {folder} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return FileImages(source, split, root, files, labels, classes)


def open_coco(source: Source, split: Split) -> ImageSet:
    """``PATH/<split><year>/*``, without labels; the annotations are not needed."""
    root = existing(source, Path(source.path).expanduser())
    return _unlabelled(source, split, root, root / f"{split}{source.number('year', 2017)}")


def open_ade20k(source: Source, split: Split) -> ImageSet:
    """``PATH/images/{training,validation}/*`` (or ``train``, ``val``), without labels; the annotations are not needed."""
    root = existing(source, Path(source.path).expanduser())
    names = ("training", "train") if split == "train" else ("validation", "val")
    folder = next((root / "images" / name for name in names if (root / "images" / name).is_dir()), root / "images" / names[0])
    return _unlabelled(source, split, root, folder)


def _unlabelled(source: Source, split: Split, root: Path, folder: Path) -> ImageSet:
    if not folder.is_dir():
        raise UserError(f"source {source}: {root} has no {folder.relative_to(root)}/ folder")
    files = _scan(folder, folder.relative_to(root).as_posix())
    if not files:
        raise UserError(f"source {source}: no images in {folder} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return FileImages(source, split, root, files, np.full(len(files), -1), ())


def existing(source: Source, root: Path) -> Path:
    if root.exists() and not root.is_dir():
        raise UserError(f"source {source}: '{root}' is a file; unpack it if it is an archive, and give the folder")
    if not root.is_dir():
        raise UserError(f"source {source}: no folder '{root}'{did_you_mean(source.path, ['scenes'], listed=False)}")
    return root


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _scan(folder: Path, prefix: str) -> list[File]:
    """The image files below ``folder``, sorted; their names start with ``prefix``. Links are followed."""
    return sorted(_walk(str(folder), prefix, ()))


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[File]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}/{entry.name}"
            if entry.name.startswith("."):
                continue
            image = entry.name[entry.name.rfind(".") :].lower() in IMAGE_SUFFIXES
            if image and entry.is_file():
                yield name, entry.stat().st_size
            elif image and entry.is_symlink() and not entry.is_dir():
                yield name, 0  # leads nowhere: a corrupt image, rather than one that nobody misses
            elif entry.is_dir():
                here = entry.stat()
                if (here.st_dev, here.st_ino) not in above:  # a link to a folder above it would never end
                    yield from _walk(entry.path, name, (*above, (here.st_dev, here.st_ino)))


def with_sizes(source: Source, root: Path, names: Sequence[str], listing: str) -> list[File]:
    """The listed files; raises ``UserError`` naming the first that is missing."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    there: dict[str, int] = {}
    with ThreadPoolExecutor(_SCANNERS) as pool:
        for files in pool.map(lambda folder: _files_in(root / folder, folder), folders):
            there.update(files)
    missing = [name for name in names if name not in there]
    if missing:
        raise UserError(f"source {source}: {listing} names {len(missing)} files that are not in {root}, first '{missing[0]}'")
    return [(name, there[name]) for name in names]


def _files_in(folder: Path, prefix: str) -> list[File]:
    try:
        with os.scandir(folder) as entries:
            start = f"{prefix}/" if prefix else ""
            return [(start + entry.name, entry.stat().st_size) for entry in entries if entry.is_file()]
    except OSError:
        return []
