"""The picture of k-NN on several kinds of feature: accuracy over the number of patches that were averaged (MTE, Fig. 14)."""

from collections.abc import Mapping
from pathlib import Path

from downstream.feature_kinds import patches_taken
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.plotting import BLACK, BLUE, GREEN, ORANGE, RED, SKY, picture, title_width

LINES = {"top": ("most attended", BLUE, "o"), "bottom": ("least attended", ORANGE, "s")}
NAMES = {"global": "global token", "patch-mean": "all patches", "patch-mean-normed": "all patches, after the norm"}
LEVELS = (BLACK, GREEN, RED, SKY)
DASHES = ("--", ":", "-.", (0, (1, 3)))


def draw_kinds(top1: Mapping[str, float], k: int, path: Path, transform: EvaluationTransform, subject: str) -> None:
    """``top1`` (percent) of each kind: a line over the patches for those that choose some, a level for any other."""
    title = f"k-NN (k = {k}) on the mean of some patch tokens, chosen by CLS attention\n{subject}"
    with picture(path, max(6.4, title_width(title)), 4.2) as figure:
        axes = figure.add_subplot()
        for end, (label, colour, marker) in LINES.items():
            points = sorted((patches_taken(kind), value) for kind, value in top1.items() if kind.startswith(f"patches-{end}"))
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"{label} patches")
        others = [kind for kind in top1 if not patches_taken(kind)]
        for kind, colour, dash in zip(others, LEVELS, DASHES, strict=False):
            axes.axhline(top1[kind], color=colour, linestyle=dash, label=NAMES.get(kind, kind))
        counts = sorted({patches_taken(kind) for kind in top1} - {0})
        if counts:
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
        axes.set_xlabel("patches averaged (logarithmic)")
        axes.set_ylabel("top-1 (%)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
