"""Sources: where images come from, written as ``kind:path?option=value&...``.

| spec | images | labels |
|---|---|---|
| ``scenes?train=4000&val=1000&size=64&seed=0`` | the embedded data, drawn by code | class |
| ``imagefolder:PATH``, or just ``PATH`` | ``PATH/train/<class>/*``, ``PATH/val/...`` (or ``test/``) | class, none if flat |
| ``inat:PATH?year=2018`` | the files that ``PATH/{train,val}2018.json`` lists | category, with its taxonomy |
| ``coco:PATH?year=2017&classes=person,car`` | ``PATH/{train,val}2017/*`` | none; ``classes`` are what ``mte-bench coco`` finds |
| ``ade20k:PATH`` | ``PATH/images/{training,validation}/*``, or ``train``, ``val`` | none |
| ``tar:PATTERN`` | webdataset shards: braces and globs, ``{split}`` or ``?val=PATTERN`` | the ``cls`` member |

Every kind also takes ``per_class=N`` or ``images=N``: a subset of each split, balanced over the classes, always the same one,
and contained in every larger one. For semi-supervised evaluation the train split alone is made smaller, and val stays whole:
``train_share=0.01`` takes that share of every class, rounded, at least one image; ``train_per_class=N`` so many; and
``train_list=FILE`` the images that a text file names, one a line (SimCLRv2's ``1percent.txt`` and ``10percent.txt``).

Images are decoded as torchvision and DINO do: ``convert("RGB")`` whatever the file holds (palette, grey, CMYK, alpha dropped),
no rotation by EXIF, no repair of truncated files. Of 16 bits a pixel the upper eight are taken, where torchvision's images
would be white; 32 bits, whose range nobody knows, are refused as corrupt.
"""

import copy
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mte_bench.errors import CorruptImage, UserError, did_you_mean

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
"""What counts as an image file (torchvision's list)."""


class ImageSet:
    """The images of one split of a source. Picklable, and cheap to send to other processes.

    ``labels`` (n,) int64 index ``classes``; -1 where there is no label. ``fingerprint`` (16 hex digits) changes with any
    name, size in bytes or label; it does not read the pixels. ``subset`` is the option that made it smaller, or None.
    ``taxonomy`` has, for each taxonomic rank that the source knows, the taxon of every class. ``remarks`` are what is odd
    about the data and yet no mistake.
    """

    source: str
    split: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    fingerprint: str
    subset: str | None = None
    taxonomy: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The image's file name relative to the source, for people."""
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        """The decoded image, RGB; raises ``CorruptImage`` naming the file."""
        raise NotImplementedError

    def reduced(self, side: int) -> "ImageSet":
        """The same images, JPEGs decoded at a half, a quarter or an eighth of their size where both sides stay at least ``side``.

        What is no JPEG, or is not decoded at all, stays as it is.
        """
        return self


class Subset(ImageSet):
    """The images of ``parent`` at ``indices``."""

    def __init__(self, parent: ImageSet, indices: NDArray[np.int64], subset: str | None):
        self.parent, self.indices, self.subset = parent, indices, subset
        self.source, self.split, self.classes = parent.source, parent.split, parent.classes
        self.taxonomy, self.remarks = dict(parent.taxonomy), parent.remarks
        self.labels = parent.labels[indices]
        self.fingerprint = fingerprint_of(parent.fingerprint.encode(), indices)

    def name(self, index: int) -> str:
        return self.parent.name(int(self.indices[index]))

    def image(self, index: int) -> Image.Image:
        return self.parent.image(int(self.indices[index]))

    def reduced(self, side: int) -> ImageSet:
        smaller = copy.copy(self)
        smaller.parent = self.parent.reduced(side)
        return smaller


@dataclass(frozen=True)
class Source:
    """A parsed spec: ``kind``, ``path`` ("" for ``scenes``) and ``options``; ``str`` gives the canonical spec."""

    kind: str
    path: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "&".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return self.kind + (f":{self.path}" if self.path else "") + (f"?{options}" if options else "")

    def share(self, option: str) -> float:
        """An option above 0 and up to 1."""
        try:
            value = float(self.options[option])
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise UserError(f"source {self}: option '{option}' is above 0 and at most 1, got '{self.options[option]}'")
        return value

    def number(self, option: str, default: int) -> int:
        """A whole-number option, at least 0 for ``seed`` and 1 for others."""
        text = self.options.get(option, str(default))
        least = 0 if option == "seed" else 1
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise UserError(f"source {self}: option '{option}' is a whole number from {least}, got '{text}'")
        return int(text)


def _scenes(source: Source, split: Split) -> ImageSet:
    from mte_bench.data.scenes_cache import open_scenes

    return open_scenes(source, split)


def _inat(source: Source, split: Split) -> ImageSet:
    from mte_bench.data.inaturalist import open_inat

    return open_inat(source, split)


def _files(opener: str) -> Callable[[Source, Split], ImageSet]:
    def open_files(source: Source, split: Split) -> ImageSet:
        from mte_bench.data import folders

        opened: ImageSet = getattr(folders, opener)(source, split)
        return opened

    return open_files


def _tar(source: Source, split: Split) -> ImageSet:
    from mte_bench.data.tars import open_tar

    return open_tar(source, split)


_SUBSET = ("per_class", "images")
_TRAIN_SUBSET = ("train_share", "train_per_class", "train_list")
_KINDS: dict[str, tuple[Callable[[Source, Split], ImageSet], tuple[str, ...]]] = {
    "scenes": (_scenes, ("train", "val", "size", "seed")),
    "imagefolder": (_files("open_imagefolder"), ()),
    "inat": (_inat, ("year",)),
    "coco": (_files("open_coco"), ("year", "classes")),
    "ade20k": (_files("open_ade20k"), ()),
    "tar": (_tar, ("val",)),
}
KINDS = tuple(_KINDS)


def parse_source(spec: str) -> Source:
    """Split ``spec`` into kind, path and options; raises ``UserError`` for what cannot be meant. Touches no files."""
    head, _, tail = _OPTIONS.split(spec, maxsplit=1) if _OPTIONS.search(spec) else (spec, "", "")
    kind, colon, path = head.partition(":")
    if head in _KINDS:
        kind, path = head, ""
    elif not colon or len(kind) == 1 or "/" in kind:  # no kind given: a folder (also C:\...)
        kind, path = "imagefolder", head
    elif kind not in _KINDS:
        raise UserError(f"source '{spec}': unknown kind '{kind}'{did_you_mean(kind, _KINDS)}")
    if (kind == "scenes") == bool(path):
        wanted = "it takes no path, only options" if path else f"write it as {kind}:PATH"
        raise UserError(f"source '{spec}': {wanted}")
    return Source(kind, path, _options(spec, kind, tail))


_OPTIONS = re.compile(r"(\?)(?=\w+=)")  # a '?' of a glob pattern is not followed by key=


def _options(spec: str, kind: str, text: str) -> dict[str, str]:
    known = (*_KINDS[kind][1], *_SUBSET, *_TRAIN_SUBSET)
    options: dict[str, str] = {}
    for item in text.split("&") if text else ():
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UserError(f"source '{spec}': write options as key=value, got '{item}'")
        if key not in known:
            raise UserError(f"source '{spec}': unknown option '{key}' of {kind}{did_you_mean(key, known)}")
        if key in options:
            raise UserError(f"source '{spec}': option '{key}' is given twice")
        options[key] = value
    for exclusive in (_SUBSET, _TRAIN_SUBSET):
        if len(both := [option for option in exclusive if option in options]) > 1:
            raise UserError(f"source '{spec}': give {both[0]} or {both[1]}, not both")
    return options


def open_source(spec: str, split: Split) -> ImageSet:
    """The images of one split. Raises ``UserError`` naming what is missing or misspelt."""
    source = parse_source(spec)
    if split not in SPLITS:
        raise UserError(f"split '{split}': one of {', '.join(SPLITS)}")
    images = _KINDS[source.kind][0](source, split)
    for option in _SUBSET:
        if option in source.options:
            images = take(images, option, source.number(option, 1))
    return _smaller_train(source, images) if split == "train" else images


def _smaller_train(source: Source, images: ImageSet) -> ImageSet:
    if "train_share" in source.options:
        return take_share(images, source.share("train_share"))
    if "train_per_class" in source.options:
        return take(images, "per_class", source.number("train_per_class", 1), "train_per_class")
    if "train_list" in source.options:
        return take_listed(images, source.options["train_list"])
    return images


def describe(spec: str, split: Split) -> dict[str, Any]:
    """What there is in one split: images, class names, smallest and largest class, fingerprint, the first image."""
    images = open_source(spec, split)
    counts = np.bincount(images.labels[images.labels >= 0], minlength=len(images.classes))
    return {
        "split": split,
        "images": len(images),
        "classes": list(images.classes),
        "per class": f"{counts.min()} to {counts.max()}" if len(counts) else None,
        "fingerprint": images.fingerprint,
        "subset": images.subset,
        "first": images.name(0),
        "pixels": "{} x {}".format(*images.image(0).size),
    }


def require_classes(images: ImageSet) -> None:
    """Raise ``UserError`` unless ``images`` has labels of at least two classes, as a labelled evaluation needs."""
    found = np.unique(images.labels[images.labels >= 0])
    if len(found) == 0:
        raise UserError(f"{images.source}: its images have no class labels; give a source with labels, such as imagefolder:PATH")
    if len(found) == 1:
        only = images.classes[found[0]]
        raise UserError(f"{images.source}: the {images.split} split has only one class ('{only}'); at least two are needed")


def take(images: ImageSet, option: str, count: int, called: str | None = None) -> ImageSet:
    """At most ``count`` images (``images``) or images of each class (``per_class``); all if there are no more.

    The subset is described as ``called``, by default ``option``.
    """
    rank = _ranks(images.labels)
    if option == "per_class":
        chosen = np.flatnonzero(rank < count)
    else:
        chosen = np.sort(np.lexsort((images.labels, rank))[:count])
    return Subset(images, chosen, f"{called or option}={count}")


def take_share(images: ImageSet, share: float) -> ImageSet:
    """``share`` of the images of every class, rounded, at least one; contained in every larger share."""
    _, places, sizes = np.unique(images.labels, return_inverse=True, return_counts=True)
    counts = np.maximum(1, np.floor(share * sizes + 0.5).astype(np.int64))
    return Subset(images, np.flatnonzero(_ranks(images.labels) < counts[places]), f"train_share={share:g}")


def take_listed(images: ImageSet, path: str) -> ImageSet:
    """The images that the text file ``path`` names, one a line, by path in the source or by file name alone.

    Raises ``UserError`` for a file that cannot be read and for an image that is not there.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"train_list {path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    wanted = {line.strip() for line in lines} - {""}
    if not wanted:
        raise UserError(f"train_list {path}: names no images; write one file name a line")
    found = [wanted & {name, name.rpartition("/")[2]} for name in map(images.name, range(len(images)))]
    if missing := wanted.difference(*found):
        raise UserError(
            f"train_list {path}: {len(missing)} of its {len(wanted)} images, first '{min(missing)}', are not in train"
        )
    chosen = np.flatnonzero([bool(names) for names in found])
    return Subset(images, chosen, f"train_list={Path(path).name}")


def _ranks(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each image (``n``), its place among those of its class in a random order that is always the same."""
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return rank


def fingerprint_of(*parts: bytes | NDArray[Any]) -> str:
    """Sixteen hex digits of the SHA-256 of the parts and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


class Names:
    """Many strings in two arrays: a million file names stay small in memory and between processes."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.text = b"".join(encoded)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def from_arrays(cls, text: bytes, ends: NDArray[np.int64]) -> "Names":
        """The names whose bytes follow each other in ``text``, each ending where ``ends`` says."""
        names = cls(())
        names.text, names.ends = text, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].decode("utf-8", "surrogateescape")


class EncodedImages(ImageSet):
    """Images that are decoded from files or bytes; ``side`` is what ``reduced`` was asked for, 0 for whole images."""

    side = 0

    def reduced(self, side: int) -> ImageSet:
        smaller = copy.copy(self)
        smaller.side = side
        return smaller


def decode(file: IO[bytes] | bytes, path: str, side: int = 0) -> Image.Image:
    """The image in an open file or in bytes, as RGB; raises ``CorruptImage`` naming ``path``.

    With ``side`` a JPEG is decoded at the smallest of its eighth, quarter, half and whole whose sides are at least so long: the
    decoder then computes only the low frequencies of each block of pixels (libjpeg's scaling, PIL's ``draft``).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of odd EXIF blocks and palettes; the pixels are what counts
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                if side:
                    image.draft(None, (side, side))
                return _rgb(image)
    except UnidentifiedImageError as error:  # its own words are about a Python object
        raise CorruptImage(path, "of no image format that is known") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptImage(path, reason) from error


def _rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8 bits a channel. Raises ``ValueError`` for 32 bits."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PIL's conversion makes 255 of all above
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits and no known range; convert it to 8 bits")
    return image.convert("RGB")
