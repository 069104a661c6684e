"""The source ``inat``: the lists of the iNaturalist competitions of 2018 and 2019.

``train{year}.json`` and ``val{year}.json`` hold ``images`` (``id``, ``file_name``), ``annotations`` (``image_id``,
``category_id``) and ``categories`` (``id``, ``name``), and ``categories.json``, published afterwards, the categories' true
names and taxonomy. A class is a category that has an image to train on; classes are numbered in the order in which the
training annotations first name them. Source: iBOT ``eval_cls.py``.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from mte_bench.data.folders import FileImages, existing, with_sizes
from mte_bench.data.sources import Source, Split
from mte_bench.errors import UserError

RANKS = ("supercategory", "kingdom", "phylum", "class", "order", "family", "genus")
"""What ``categories.json`` says of a category, from the widest to the narrowest; ``supercategory`` is a rough group."""


class Listing(NamedTuple):
    """One of the competition's files, as far as it is needed."""

    path: Path
    files: list[str]
    """Names of the images."""
    labels: list[Any]
    """Each image's category."""
    order: list[Any]
    """The categories that have images, as the annotations first name them."""
    categories: dict[Any, dict[str, Any]]


def open_inat(source: Source, split: Split) -> FileImages:
    """The files listed in ``PATH/<split><year>.json``.

    Raises ``UserError`` that names file and entry for what is not in the format, for an image that is not there, and for a
    category of val without training images. A category without any is a remark.
    """
    root, year = existing(source, Path(source.path).expanduser()), source.number("year", 2018)
    own = _read(_listing(source, root, split, year))
    reference = own
    if split == "val" and (root / f"train{year}.json").is_file():
        reference = _read(root / f"train{year}.json")
    number = {category: index for index, category in enumerate(reference.order)}
    for category, file in zip(own.labels, own.files, strict=True):
        if category not in number:
            name = own.categories[category]["name"]
            raise UserError(
                f"{own.path}: category {category} ('{name}', image '{file}') has no training image in {reference.path.name}; "
                "remove its images from val or add some to train"
            )
    described = _described(root, {**own.categories, **reference.categories})
    images = FileImages(
        source,
        split,
        root,
        with_sizes(source, root, own.files, own.path.name),
        [number[category] for category in own.labels],
        [str(described[category]["name"]) for category in reference.order],
    )
    images.taxonomy = {
        rank: tuple(str(described[category][rank]) for category in reference.order)
        for rank in RANKS
        if all(described[category].get(rank) for category in reference.order)
    }
    given = set(own.labels)
    without = [str(described[category]["name"]) for category in own.categories if category not in given]
    if without:
        first = f"{len(without)} of {len(own.categories)} categories have no image, first '{without[0]}'"
        images.remarks = (f"{own.path.name}: {first}",)
    return images


def _listing(source: Source, root: Path, split: Split, year: int) -> Path:
    path = root / f"{split}{year}.json"
    if not path.is_file():
        years = sorted({found.stem.removeprefix(split) for found in root.glob(f"{split}[0-9]*.json")})
        hint = f"; there is year={years[0]}" if years else ""
        raise UserError(f"source {source}: {root} has no {path.name}{hint}")
    return path


def _read(path: Path) -> Listing:
    content = _json(path, dict)
    lists = {key: _list(path, content, key, needed) for key, needed in _NEEDED.items()}
    categories = {category["id"]: category for category in lists["categories"]}
    category_of: dict[Any, Any] = {}
    order: dict[Any, None] = {}
    for place, annotation in enumerate(lists["annotations"]):
        category = annotation["category_id"]
        if category not in categories:
            raise UserError(f"{path}: annotations[{place}]: category_id {category!r} is none of its categories")
        category_of[annotation["image_id"]] = category
        order[category] = None
    if not lists["images"]:
        raise UserError(f"{path}: lists no images")
    for place, image in enumerate(lists["images"]):
        if image["id"] not in category_of:
            raise UserError(f"{path}: images[{place}] ('{image['file_name']}'): no annotation has its id {image['id']!r}")
    labels = [category_of[image["id"]] for image in lists["images"]]
    given = set(labels)
    return Listing(
        path,
        [str(image["file_name"]) for image in lists["images"]],
        labels,
        [category for category in order if category in given],
        categories,
    )


_NEEDED = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}


def _list(path: Path, content: dict[str, Any], key: str, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The entries under ``key``, each with what is ``needed``; ``UserError`` naming the first that is not so."""
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path}: not in iNaturalist's format (no list '{key}')")
    _complete(path, entries, key, needed)
    return entries


def _complete(path: Path, entries: list[Any], name: str, needed: tuple[str, ...]) -> None:
    for place, entry in enumerate(entries):
        for key in needed:
            if not isinstance(entry, dict) or entry.get(key) is None or isinstance(entry[key], dict | list):
                raise UserError(f"{path}: {name}[{place}]: not in iNaturalist's format (no '{key}')")


def _described(root: Path, categories: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Name and ranks of each of ``categories``: what ``categories.json`` says, or else the listing itself."""
    path = root / "categories.json"
    entries = _json(path, list) if path.is_file() else []
    _complete(path, entries, "", ("id", "name"))
    said = {entry["id"]: entry for entry in entries}
    return {category: {**entry, **said.get(category, {})} for category, entry in categories.items()}


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: not in iNaturalist's format (a {type(content).__name__}, not a {kind.__name__})")
    return content
