"""Webdataset shards as a source: each tar is indexed once, then every image is one seek and one read away.

``tar:PATTERN`` expands braces (``{000..146}``, ``{a,b}``) and globs (``*``). The split is told by ``{split}`` in the pattern
(replaced by train and val) or by a second pattern: ``tar:TRAIN?val=VAL``. In a shard, members with the same name up to the
first dot make one sample: ``0001.jpg`` (or another image suffix) and ``0001.cls``, a class number or name; other members are
ignored. Classes are those of the train shards; numbers are kept as they are.
"""

import glob
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mte_bench.console import log
from mte_bench.data.sources import IMAGE_SUFFIXES, EncodedImages, ImageSet, Names, Source, Split, decode, fingerprint_of
from mte_bench.errors import CorruptImage, UserError
from mte_bench.files import atomic, cache_folder, hash_of

_INDEX_VERSION = 1


class Index(NamedTuple):
    """The images of one shard, in its order: names, places and sizes in bytes, and ``cls`` texts ("" where there is none)."""

    names: list[str]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: list[str]


class TarImages(EncodedImages):
    """The images of ``shards``, shard by shard, in the order of each."""

    def __init__(self, source: Source, split: Split, shards: Sequence[str], indexes: Sequence[Index], classes: Sequence[str]):
        self.source, self.split, self.classes, self.shards = str(source), split, tuple(classes), tuple(shards)
        self.names = Names(name for index in indexes for name in index.names)
        self.shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.names) for index in indexes])
        self.offsets = np.concatenate([index.offsets for index in indexes])
        self.sizes = np.concatenate([index.sizes for index in indexes])
        number = {name: label for label, name in enumerate(classes)} | {"": -1}
        texts = [text for index in indexes for text in index.labels]
        strange = next((text for text in texts if text not in number), None)
        if strange is not None:
            raise UserError(f"source {source}: class '{strange}' of the {split} shards is not in the train shards")
        self.labels = np.array([number[text] for text in texts], np.int64)
        places = "\0".join([*self.classes, *(Path(shard).name for shard in shards)])
        self.fingerprint = fingerprint_of(places.encode(), self.names.text, self.names.ends, self.sizes, self.shard, self.labels)

    def name(self, index: int) -> str:
        return f"{Path(self.shards[self.shard[index]]).name}/{self.names[index]}"

    def image(self, index: int) -> Image.Image:
        shard = self.shards[self.shard[index]]
        path = f"{shard}/{self.names[index]}"
        try:
            with open(shard, "rb") as file:
                file.seek(int(self.offsets[index]))
                return decode(file.read(int(self.sizes[index])), path, self.side)
        except OSError as error:
            raise CorruptImage(path, error.strerror or "cannot be opened") from error


def open_tar(source: Source, split: Split) -> ImageSet:
    """The images of the shards that ``source`` names for ``split``. Indexes are kept in the cache folder."""
    pattern = _pattern(source, split)
    shards = _shards(source, pattern)
    train = shards if split == "train" else _expand(_pattern(source, "train"))
    indexes = _indexes(list(dict.fromkeys([*shards, *train])))
    classes = _classes([indexes[shard] for shard in train or shards])
    images = TarImages(source, split, shards, [indexes[shard] for shard in shards], classes)
    if not len(images):
        raise UserError(f"source {source}: no images in the {len(shards)} shards of '{pattern}'")
    return images


def _pattern(source: Source, split: Split) -> str:
    if "{split}" in source.path:
        if "val" in source.options:
            raise UserError(f"source {source}: give {{split}} in the pattern or val=PATTERN, not both")
        return source.path.replace("{split}", split)
    if split == "train":
        return source.path
    if "val" not in source.options:
        raise UserError(f"source {source}: no val split; write {{split}} in the pattern, or add ?val=PATTERN")
    return source.options["val"]


def _shards(source: Source, pattern: str) -> list[str]:
    shards = _expand(pattern)
    if not shards:
        raise UserError(f"source {source}: no file matches '{pattern}'")
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing:
        raise UserError(f"source {source}: {len(missing)} of {len(shards)} shards are missing, first '{missing[0]}'")
    return shards


def _expand(pattern: str) -> list[str]:
    """The paths that a brace and glob pattern stands for. A name that braces alone spell out is kept, there or not."""
    from webdataset.shardlists import expand_urls

    paths: list[str] = []
    for path in expand_urls(str(Path(pattern).expanduser())):
        paths += sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    return paths


def _classes(indexes: Sequence[Index]) -> list[str]:
    texts = {text for index in indexes for text in index.labels if text}
    if texts and all(text.isdecimal() for text in texts):
        return [str(number) for number in range(max(map(int, texts)) + 1)]
    return sorted(texts)


def _indexes(shards: Sequence[str]) -> dict[str, Index]:
    """The index of each shard, from the cache or made now and kept there, by path, size and time of change."""
    found: dict[str, Index] = {}
    made = 0
    for shard in shards:
        status = Path(shard).stat()
        key = hash_of([_INDEX_VERSION, str(Path(shard).resolve()), status.st_size, status.st_mtime_ns], 16)
        kept = cache_folder() / "tars" / f"{key}.npz"
        if not kept.exists():
            if not made:
                log(f"indexing tar shards (once; {len(shards)} in all, kept in {kept.parent})")
            made += 1
            _keep(kept, _index(shard))
        found[shard] = _load(kept)
    return found


def _index(shard: str) -> Index:
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive, open(shard, "rb") as file:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile() or not dot or not stem:
                    continue
                if suffix.lower() == "cls":
                    file.seek(member.offset_data)
                    text = file.read(member.size).decode().strip()
                    labels[key] = str(int(text)) if text.isdecimal() else text
                elif f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    pictures.setdefault(key, (member.name, member.offset_data, member.size))
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{shard}: not a tar file of images and classes ({error}); unpack it if it is compressed") from error
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror or error})") from error
    names = [name for name, _, _ in pictures.values()]
    places = np.array([(offset, size) for _, offset, size in pictures.values()], np.int64).reshape(-1, 2)
    return Index(names, places[:, 0], places[:, 1], [labels.get(key, "") for key in pictures])


def _keep(path: Path, index: Index) -> None:
    names, labels = Names(index.names), Names(index.labels)
    with atomic(path) as temporary:
        np.savez(
            temporary,
            offsets=index.offsets,
            sizes=index.sizes,
            names=np.frombuffer(names.text, np.uint8),
            name_ends=names.ends,
            labels=np.frombuffer(labels.text, np.uint8),
            label_ends=labels.ends,
        )


def _load(path: Path) -> Index:
    with np.load(path, allow_pickle=False) as kept:
        names = Names.from_arrays(kept["names"].tobytes(), kept["name_ends"])
        labels = Names.from_arrays(kept["labels"].tobytes(), kept["label_ends"])
        return Index([*names], kept["offsets"], kept["sizes"], [*labels])
