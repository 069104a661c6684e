"""Images with label PNGs beside them: ADE20K's folders, and whatever else is laid out like them.

``PATH/images/{training,validation}/**/NAME.*`` with ``PATH/annotations/{training,validation}/**/NAME.png`` (the folders may
also be called ``train`` and ``val``). A label PNG holds a number per pixel: as grey values or as indices of a palette.
"""

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from mte_bench.data.sources import ImageSet, fingerprint_of, parse_source
from mte_bench.errors import UserError
from mte_bench.settings import Settings

Labels = NDArray[np.uint8]
VOID = 255
"""What pixels that do not count have in the truth, whatever they have in the files."""
_READERS = 8


class LabelSettings(Settings):
    """What the numbers in the label PNGs mean."""

    reduce_zero_label: bool
    """True: 0 does not count and class i (from 0) is written as i + 1, as in ADE20K. False: class i is written as i."""
    ignore_index: int = Field(default=255, ge=0, le=255)
    """A number in the files that does not count either."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in order; null takes them from ``objectInfo*.csv`` (ADE20K) or ``classes.txt`` in the folder."""

    def truth(self, written: Labels) -> Labels:
        """Classes (from 0) and ``VOID`` from what a file holds (``h w``)."""
        truth = written - np.uint8(1) if self.reduce_zero_label else written.copy()  # 0 becomes 255
        truth[written == self.ignore_index] = VOID
        return truth

    def written(self, classes: Labels) -> Labels:
        """What a file holds for ``classes`` (``h w``, without ``VOID``)."""
        return classes + np.uint8(self.reduce_zero_label)


class Pairs:
    """``images``, those of one split of ``spec`` (``ade20k:PATH``), with their labels.

    Raises ``UserError`` naming what is missing: a folder, the label PNG of an image, the names of the classes.
    """

    upright = None

    def __init__(self, spec: str, settings: LabelSettings, images: ImageSet):
        self.root, self.settings = Path(parse_source(spec).path).expanduser(), settings
        self.images, self.label_root = images, self.root / "annotations"
        self.classes = settings.classes or _names_in(self.root)
        if not 2 <= len(self.classes) < VOID:
            raise UserError(f"{self.root}: {len(self.classes)} classes; 2 to {VOID - 1} are possible")
        sizes = [self._size(index) for index in range(len(self.images))]
        self.fingerprint = fingerprint_of(self.images.fingerprint.encode(), np.array(sizes), "\0".join(self.classes).encode())

    def label_path(self, index: int) -> Path:
        """Where the labels of the image at ``index`` are."""
        return (self.label_root / Path(self.images.name(index)).relative_to("images")).with_suffix(".png")

    def results(self, index: int) -> dict[str, Any]:
        """The truth as mmseg's transforms want it."""
        labels = self.labels(index)
        return {"size": labels.shape, "gt_seg_map": labels, "seg_fields": ["gt_seg_map"]}

    def labels(self, index: int) -> Labels:
        """The truth of the image at ``index``: ``h w``, classes from 0 and ``VOID``."""
        return self.settings.truth(self.written(index))

    def written(self, index: int) -> Labels:
        """What the label file holds: ``h w``; raises ``UserError`` naming it if it cannot be read or has colours."""
        path = self.label_path(index)
        try:
            with Image.open(path) as file:
                mode, pixels = file.mode, np.asarray(file)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: not readable as an image ({error}); mend it, or remove it with its image") from error
        if pixels.ndim != 2 or mode not in ("L", "P", "1"):
            raise UserError(
                f"{path}: of mode {mode}; labels are one number of 8 bits per pixel, as grey values or a palette's indices"
            )
        return pixels.astype(np.uint8)

    def check(self, trained: bool) -> None:
        """Read all label files; raise ``UserError`` naming the first with a number that is no class, or of another size.

        Also if no pixel of any image has a class, whether it is ``trained`` on or not.
        """
        with ThreadPoolExecutor(_READERS) as pool:
            seen = np.zeros(VOID + 1, bool)
            for found in pool.map(self._checked, range(len(self.images))):
                seen |= found
        if not seen[: len(self.classes)].any():
            raise UserError(f"{self.label_root}: no pixel of {self.images.split} has a class; see labels.ignore_index")

    def _checked(self, index: int) -> NDArray[np.bool_]:
        """Which numbers the truth of an image has."""
        truth = self.labels(index)
        seen = np.zeros(VOID + 1, bool)
        seen[truth] = True
        wrong = np.flatnonzero(seen[len(self.classes) : VOID])
        if len(wrong):
            value = int(wrong[0]) + len(self.classes) + self.settings.reduce_zero_label
            raise UserError(
                f"{self.label_path(index)}: holds the number {value}, but there are {len(self.classes)} classes; "
                "mend it, or see --set labels.classes, labels.ignore_index and labels.reduce_zero_label"
            )
        width, height = self._image_size(index)
        if truth.shape != (height, width):
            raise UserError(f"{self.label_path(index)}: {truth.shape[1]} x {truth.shape[0]} pixels, its image {width} x {height}")
        return seen

    def _image_size(self, index: int) -> tuple[int, int]:
        try:
            with Image.open(self.root / self.images.name(index)) as file:
                return file.size
        except (OSError, SyntaxError, ValueError):
            return self.images.image(index).size  # says what is wrong with it

    def _size(self, index: int) -> int:
        try:
            return self.label_path(index).stat().st_size
        except FileNotFoundError:
            raise UserError(
                f"{self.label_path(index)}: no labels for {self.images.name(index)}; add them, or remove it"
            ) from None


def _names_in(root: Path) -> tuple[str, ...]:
    """The class names that the data set brings; of synonyms (``building;edifice``) the first."""
    listing = root / "classes.txt"
    if listing.is_file():
        return tuple(filter(None, map(str.strip, listing.read_text(encoding="utf-8").splitlines())))
    for table in sorted(root.glob("objectInfo*.csv")):
        with open(table, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if rows and "Name" in rows[0]:
            return tuple(row["Name"].partition(";")[0] for row in rows)
    raise UserError(
        f"{root}: what are its classes called? Put them into {listing}, one per line, or give --set 'labels.classes=[road, sky]'"
    )
