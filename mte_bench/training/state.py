"""``training.pt``: what a run needs to go on exactly where it stopped."""

from pathlib import Path
from typing import Any

import torch

from mte_bench.errors import UserError
from mte_bench.files import atomic

NAME = "training.pt"
FORMAT = 1
"""Version of the layout."""


def write(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state``, which has its ``identity``, into ``folder`` atomically."""
    for left in folder.glob(f".{NAME}.*"):  # by a process that was killed while it wrote: as large as the state
        left.unlink(missing_ok=True)
    with atomic(folder / NAME) as path:
        torch.save({"format": FORMAT, **state}, path)


def read_own(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the run in ``folder`` that stopped; None if there is none.

    Raises ``UserError`` if that run had another ``identity`` (settings, data, seed), naming each difference.
    """
    path = folder / NAME
    if not path.exists():
        return None
    state = read(path)
    different = differences(state["identity"], identity)
    if different:
        raise UserError(
            f"{folder}: holds a run with other settings ({'; '.join(different[:5])}); "
            "repeat its settings to go on, or choose another --out"
        )
    return state


def read(path: Path) -> dict[str, Any]:
    """The state in ``path``, never executing code from it; raises ``UserError`` if it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file, and in some advises to run its code
        raise UserError(f"{path}: not a training state, or cut short; remove the file to start anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: a training state of another version; remove the file to start anew")
    return {"measured": state["step"], "resumed": 0, **state}  # the first runs' states are without these two


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """``key: old -> new`` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and list(old) == list(new):
        return []
    return [] if old == new else [f"{key}: {old} there, {new} now"]
