"""One look for every picture: colour-blind-safe, labelled, legible in light and dark pages."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mte_bench.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for every common kind of colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK)

_STYLE: Any = {  # matplotlib types its keys one by one
    "figure.facecolor": "white",
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "mte-bench",
}


@contextmanager
def picture(path: str | Path, width: float = 6.4, height: float = 4.0, few_colours: bool = False) -> Iterator["Figure"]:
    """Yield an empty matplotlib figure of the house style (inches); on success write it to ``path`` (.png) atomically.

    With ``few_colours`` the file is a palette of 256, for pictures that show many images: a quarter of the bytes. The bytes are
    the same for the same drawing. No display is needed and pyplot's global state is not touched.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic(path) as temporary, warnings.catch_warnings():
            # A name in a script that the font lacks is drawn as boxes; a line of our code on the terminal would not help.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(temporary, metadata={"Software": None})
            if few_colours:
                use_few_colours(temporary)


def use_few_colours(path: str | Path) -> None:
    """Write the PNG at ``path`` anew with the 256 colours that suit it best.

    Median cut, then k-means: areas of one colour, as of a map by itself, keep theirs, which a palette that covers all colours
    evenly does not do. Not dithered: that would make the file larger again.
    """
    from PIL import Image

    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
    reduced.save(path, format="PNG", optimize=True)


def title_width(title: str) -> float:
    """Inches that a title of 10 points needs at most."""
    return 0.3 + 0.085 * max(len(line) for line in title.splitlines())


def shortened(text: str, length: int) -> str:
    """``text`` with its middle left out where it is longer: class and end of the file name stay."""
    half = length // 2
    return text if len(text) <= length else f"{text[: half - 1]}…{text[-half:]}"
