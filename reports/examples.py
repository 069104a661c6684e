"""Pictures of the images on which two encoders differ, where the source of the records can be opened."""

from collections.abc import Sequence
from pathlib import Path

from mte_bench.console import log
from mte_bench.data.sources import ImageSet, open_source
from mte_bench.errors import UserError
from mte_bench.plotting import picture
from mte_bench.records import Data
from reports.classes import MOST_EXAMPLES, Example

WIDTH, HEIGHT = 1.45, 2.0  # of one image with its caption, inches


def draw_examples(data: Data, rows: Sequence[tuple[str, Sequence[Example]]], path: Path) -> bool:
    """Draw a row of images for each class, what A and B say below each; False, with a remark, if they cannot be opened.

    The images are found by name in the source as it is now.
    """
    try:
        images = open_source(data.source, "train" if data.split == "train" else "val")
        wanted = {example.name for _, examples in rows for example in examples}
        places = {name: index for index in range(len(images)) if (name := images.name(index)) in wanted}
        if missing := wanted - places.keys():
            raise UserError(f"{data.source}: has no image {min(missing)}")
        _draw(images, places, rows, path)
    except UserError as error:
        log(f"no pictures of what changed: {error}")
        return False
    return True


def _draw(images: ImageSet, places: dict[str, int], rows: Sequence[tuple[str, Sequence[Example]]], path: Path) -> None:
    columns = min(MOST_EXAMPLES, max(len(examples) for _, examples in rows))
    with picture(path, WIDTH * max(columns, 3), HEIGHT * len(rows) + 0.2) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for line, (title, examples) in zip(grid, rows, strict=True):
            for axes in line:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            line[0].set_title(title, loc="left", fontsize=9, fontweight="bold")
            for axes, example in zip(line, examples, strict=False):
                axes.imshow(images.image(places[example.name]))
                axes.set_xlabel(
                    "\n".join(f"{side}: {_short(word)}" for side, word in zip("AB", example.said, strict=True)), fontsize=7
                )


def _short(word: str | None, most: int = 18) -> str:
    word = word or "no class"
    return word if len(word) <= most else f"{word[: most - 1]}…"
