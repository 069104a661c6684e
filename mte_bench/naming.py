"""How subjects, architectures and sources are called in tables and pictures: the paper's words where it has one."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mte_bench.records import Subject

METHODS = {
    "dino": "DINO",
    "ibot": "iBOT",
    "byol": "BYOL",
    "mocov3": "MoCo v3",
    "moby": "MoBY",
    "hssl": "HSSL",
    "supervised": "supervised",
    "dinov2": "DINOv2",
    "mae": "MAE",
}

MOST_DIFFERING = 4  # settings that tell recipes apart by name; more are a recipe of their own
_NOT_TOLD = ("description", "snapshot_every")

_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
_VIT = re.compile(r"(vit|deit)_(tiny|small|base|large|huge)_patch(\d+)_\d+")
_SWIN = re.compile(r"swin_(tiny|small|base|large)_patch4_window7_224")
_OPTIONS = {"embed_dim": "width", "depth": "depth", "num_heads": "heads", "depths": "depths", "window_size": "window"}


def method_key(method: str) -> str:
    """One spelling for every way of writing a method: ``MoCo V3`` and ``mocov3`` are the same; ``+MTE`` is dropped."""
    return re.sub(r"[^a-z0-9]", "", method.lower().removesuffix("+mte"))


def method_title(subject: Subject) -> str:
    """The method as Table 5 prints it (``DINO+MTE``), ``random encoder``, or the checkpoint's name where no method is known.

    Of an ensemble its encoders' titles: ``DINO × 2``, ``DINO & iBOT+MTE``.
    """
    if subject.parts:
        counts = Counter(map(method_title, subject.parts))
        return " & ".join(f"{title} × {count}" if count > 1 else title for title, count in counts.items())
    if subject.family == "random":
        return "random encoder"
    if not subject.method:
        return f"{subject.family} {PurePath(subject.checkpoint).name.removeprefix(f'{subject.family}:')}"
    title = METHODS.get(method_key(subject.method), subject.method.removesuffix("+MTE"))
    return f"{title}+MTE" if subject.mte else title


def architecture_title(subject: Subject) -> str:
    """``ViT-S/16`` for timm's ``vit_small_patch16_224``; the name itself where it has no short one.

    Options of the model (another depth or width) and an image size other than 224 are named too. With another width a
    ViT or a Swin is none of the sizes that have a letter: ``ViT/8 (width 96, depth 4)``.
    """
    title = subject.arch
    if vit := _VIT.fullmatch(subject.arch):
        size = "" if "embed_dim" in subject.arch_options else f"-{_SIZES[vit[2]]}"
        title = f"{'ViT' if vit[1] == 'vit' else 'DeiT'}{size}/{subject.patch_size or vit[3]}"
    elif swin := _SWIN.fullmatch(subject.arch):
        title = "Swin" if "embed_dim" in subject.arch_options else f"Swin-{_SIZES[swin[1]].replace('Ti', 'T')}"
    order = [*_OPTIONS, *sorted(subject.arch_options.keys() - _OPTIONS)]
    options = [f"{_OPTIONS.get(key, key)} {_option(subject.arch_options[key])}" for key in order if key in subject.arch_options]
    title += f" ({', '.join(options)})" if options else ""
    return title if subject.image_size in (None, 224) else f"{title} at {subject.image_size} px"


def peculiarity(recipe: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    """What ``recipe`` sets where the recipes ``alike`` differ, ``target each``; "" if that is not known or is too much to say."""
    recipes = [flat(other) for other in alike]
    keys = list(dict.fromkeys(key for other in recipes for key in other if key not in _NOT_TOLD))
    differing = [key for key in keys if any(other.get(key, "–") != recipes[0].get(key, "–") for other in recipes)]
    if not all(recipes) or len(differing) > MOST_DIFFERING:
        return ""
    own = flat(recipe)
    return ", ".join(f"{key.rpartition('.')[2]} {_setting(own.get(key, '–'))}" for key in differing)


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """``{"mte": {"pooled": 6}}`` as ``{"mte.pooled": 6}``."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flat(value, f"{start}{key}.") if isinstance(value, Mapping) else {f"{start}{key}": value}
    return result


def _option(value: Any) -> str:
    """``2/4/4`` for what a Swin has stage by stage."""
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def data_title(source: str) -> str:
    """``cifar10`` for ``imagefolder:some/where/cifar10?per_class=10``; sources without a path keep their kind's name."""
    kind, colon, rest = source.partition(":")
    place = (rest if colon else kind).partition("?")[0]
    return re.sub(r"[{*\[].*", "", PurePath(place).name).rstrip("-_.") or kind


def data_key(source: str) -> str:
    """The title with the options: the same images at two places, or two subsets at one, are told apart."""
    return f"{data_title(source)}?{source.partition('?')[2]}"


def slug(text: str) -> str:
    """``text`` as part of a file name: lower case, digits, and hyphens between."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("+", "-")).strip("-") or "x"


def is_embedded(source: str) -> bool:
    """Whether the images are the embedded data, which code draws: they may be shown to anyone."""
    return source.partition("?")[0] == "scenes"
