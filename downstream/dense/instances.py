"""Images with boxes and masks in COCO's JSON.

``PATH/annotations/instances_{train,val}YEAR.json`` with the images in ``PATH/{train,val}YEAR/``. Of
``coco:PATH?classes=person,car`` only these categories are learnt and tested; all others are background.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from mte_bench.data.sources import ImageSet, Names, Split, Subset, fingerprint_of, parse_source
from mte_bench.errors import UserError, did_you_mean

OUTSIDE = 1.0
"""Pixels by which a box may reach over the edge of its image: COCO's own are rounded."""


class Instances:
    """``images``, those of one split of ``spec`` (``coco:PATH?year=2017``), with their boxes and masks.

    Classes are the categories by id. To train, images without any annotation and those with a side below ``least_side`` pixels
    are left out, as mmdet does; images that the JSON does not list are left out always. Raises ``UserError`` for a JSON that is
    missing or not in COCO's format, and naming the first listed image that is not there.
    """

    def __init__(self, spec: str, split: Split, images: ImageSet, least_side: int = 0):
        source = parse_source(spec)
        year = source.number("year", 2017)
        self.file = Path(source.path).expanduser() / "annotations" / f"instances_{split}{year}.json"
        content = _read(self.file)
        try:
            categories = self._chosen(content["categories"], source.options.get("classes"))
            left_out = {category["id"] for category in content["categories"]} - {category["id"] for category in categories}
            self.category_ids = [category["id"] for category in categories]
            self.classes = tuple(str(category["name"]) for category in categories)
            self._no_two("categories have the id", [category["id"] for category in content["categories"]])
            self._no_two("images have the id", [image["id"] for image in content["images"]])
            self._no_two("images have the file_name", [image["file_name"] for image in content["images"]])
            listed = {f"{split}{year}/{image['file_name']}": image for image in content["images"]}
            known = {image["id"] for image in content["images"]}
            found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for annotation in content["annotations"]:
                if annotation["image_id"] not in known:
                    raise self._mistake(annotation, f"is of image {annotation['image_id']}, which is not listed")
                if not _is_box(annotation["bbox"]):
                    raise self._mistake(annotation, f"has no box of four numbers (bbox is {annotation['bbox']})")
                if annotation["category_id"] not in left_out:
                    found[annotation["image_id"]].append(_reduced(annotation))
            sizes = {name: (int(image["width"]), int(image["height"]), image["id"]) for name, image in listed.items()}
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.file}: not in COCO's format (no {error} where it is needed)") from error
        whole = images.parent if isinstance(images, Subset) else images
        if missing := sorted(listed.keys() - {whole.name(index) for index in range(len(whole))}):
            raise UserError(
                f"{self.file}: lists {len(missing)} images that are not there, first {missing[0]}; add or unlist them"
            )

        def usable(name: str) -> bool:
            if name not in sizes:
                return False
            width, height, number = sizes[name]
            return split == "val" or (number in found and min(width, height) >= least_side)

        indices = [index for index in range(len(images)) if usable(images.name(index))]
        if not indices:
            raise UserError(f"{self.file}: no image of {split} can be used: none is listed, has annotations and is large enough")
        self.images = Subset(images, np.array(indices, np.int64), images.subset)
        self.sizes = [sizes[images.name(index)] for index in indices]
        self.upright = [height > width for width, height, _ in self.sizes]
        self._annotations = Names(json.dumps(found.get(number, [])) for _, _, number in self.sizes)  # small between processes
        chosen = ("\0".join(self.classes).encode(),) if left_out else ()
        self.fingerprint = fingerprint_of(
            self.images.fingerprint.encode(), hashlib.sha256(self.file.read_bytes()).digest(), *chosen
        )

    def _chosen(self, categories: list[dict[str, Any]], names: str | None) -> list[dict[str, Any]]:
        """The categories by id; of ``names``, separated by commas, only these."""
        ordered = sorted(categories, key=lambda category: category["id"])
        if names is None:
            return ordered
        wanted = {name.strip() for name in names.split(",")}
        if unknown := sorted(wanted - (known := {str(category["name"]) for category in ordered})):
            raise UserError(f"{self.file}: no category '{unknown[0]}'{did_you_mean(unknown[0], known)}; see classes of --data")
        return [category for category in ordered if str(category["name"]) in wanted]

    def image_id(self, index: int) -> Any:
        """COCO's number of the image at ``index``."""
        return self.sizes[index][2]

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """COCO's entries for the image at ``index``: id, bbox, category_id, area, iscrowd and segmentation."""
        found: list[dict[str, Any]] = json.loads(self._annotations[index])
        return found

    def results(self, index: int) -> dict[str, Any]:
        """The truth as mmdet's transforms want it; boxes that mmdet drops (outside, under a pixel, empty) are left out."""
        width, height, number = self.sizes[index]
        place = {category: label for label, category in enumerate(self.category_ids)}
        instances = []
        for entry in self.annotations(index):
            x, y, w, h = entry["bbox"]
            inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
            if inside and w >= 1 and h >= 1 and entry["area"] > 0:
                box = {"bbox": [x, y, x + w, y + h], "bbox_label": place[entry["category_id"]]}
                instances.append({**box, "mask": entry["segmentation"], "ignore_flag": entry["iscrowd"]})
        return {"size": (height, width), "img_id": number, "instances": instances}

    def check(self, trained: bool) -> None:
        """Raise ``UserError`` naming the first annotation that is wrong and, if ``trained``, a category that has no image."""
        seen = set()
        known = set(self.category_ids)
        for index, (width, height, _) in enumerate(self.sizes):
            for entry in self.annotations(index):
                x, y, w, h = entry["bbox"]
                if entry["category_id"] not in known:
                    raise self._mistake(entry, f"is of category {entry['category_id']}, which is not listed")
                if min(x, y) < -OUTSIDE or x + w > width + OUTSIDE or y + h > height + OUTSIDE or w < 0 or h < 0:
                    where = f"box {[x, y, w, h]} lies outside its image {self.images.name(index)} ({width} x {height})"
                    raise self._mistake(entry, where)
                if wrong := _mask_mistake(entry["segmentation"], height, width):
                    raise self._mistake(entry, wrong)
                seen.add(entry["category_id"])
        if trained and self.images.subset is None and (empty := [c for c in self.category_ids if c not in seen]):
            name = self.classes[self.category_ids.index(empty[0])]
            raise UserError(
                f"{self.file}: category {empty[0]} ({name}) has no image to learn from, and {len(empty) - 1} more; unlist them"
            )

    def _no_two(self, what: str, keys: list[Any]) -> None:
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise UserError(f"{self.file}: two {what} {twice[0]}; remove one")

    def _mistake(self, annotation: dict[str, Any], what: str) -> UserError:
        return UserError(f"{self.file}: annotation {annotation.get('id')} {what}; mend or remove it")


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mask_mistake(mask: Any, height: int, width: int) -> str:
    """What is wrong with a ``segmentation``; "" if it is one of COCO's: polygons, run lengths, compressed run lengths.

    Polygons without three corners are allowed beside others, as the models leave them out.
    """
    if not mask:
        return "has no mask (segmentation)"
    if isinstance(mask, list):
        if not all(isinstance(polygon, list) and all(map(_is_number, polygon)) for polygon in mask):
            return "has a mask whose polygons are not lists of numbers (segmentation)"
        corners = any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask)
        return "" if corners else "has a mask without a polygon of three corners, x and y of each (segmentation)"
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), list | str) or "size" not in mask:
        return "has a mask that is neither polygons nor run lengths with counts and size (segmentation)"
    if list(mask["size"]) != [height, width]:
        return f"has a mask of height and width {mask['size']}, its image {[height, width]}"
    if isinstance(runs := mask["counts"], list) and (
        not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != height * width
    ):
        return f"has a mask whose run lengths (counts) do not add up to its {height * width} pixels"
    return ""


def _reduced(annotation: dict[str, Any]) -> dict[str, Any]:
    """What of an annotation is used."""
    x, y, w, h = (float(value) for value in annotation["bbox"])
    return {
        "id": annotation["id"],
        "category_id": annotation["category_id"],
        "bbox": [x, y, w, h],
        "area": annotation.get("area", w * h),
        "iscrowd": annotation.get("iscrowd", 0),
        "segmentation": annotation.get("segmentation"),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not in COCO's format")
    return content
