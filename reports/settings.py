"""What tells recipes of one title apart: the settings in which they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

MOST_DIFFERING = 4  # settings that tell rows apart by name; more are a recipe of their own


def differing_settings(own: Mapping[str, Any], recipes: Sequence[Mapping[str, Any]]) -> str | None:
    """``pooled 6, ten true``: what ``own`` says where ``recipes``, which it is among, differ.

    None where a recipe is not known (empty), where none or more than ``MOST_DIFFERING`` settings differ.
    """
    flat = [_flat(recipe) for recipe in recipes]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe if key != "description"))
    differing = [key for key in keys if any(other.get(key, "–") != flat[0].get(key, "–") for other in flat)]
    if not all(flat) or not 0 < len(differing) <= MOST_DIFFERING:
        return None
    mine = _flat(own)
    return ", ".join(f"{key.rpartition('.')[2]} {_written(mine.get(key, '–'))}" for key in differing)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """``{"mte": {"pooled": 6}}`` as ``{"mte.pooled": 6}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{start}{key}.") if isinstance(value, Mapping) else {f"{start}{key}": value}
    return flat
