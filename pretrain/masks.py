"""Masks of patches for masked image modelling. Source: iBOT ``loader.py``."""

import math
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mte_bench.settings import Settings

TRIES = 10


class Masking(Settings):
    """Which patches of the student's global views are hidden."""

    shape: Literal["block", "random"] = "block"
    ratios: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.3, 0.2))
    """(mean, spread) of the masked share, one entry chosen uniformly for each view and then a share from mean - spread to
    mean + spread: by default half the views stay whole and the others lose 10 to 50 %."""
    start_epoch: int = Field(0, ge=0)
    """Nothing is masked before this epoch."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if not self.ratios or any(not 0 <= mean - abs(spread) <= mean + abs(spread) <= 1 for mean, spread in self.ratios):
            raise ValueError("ratios must be at least one (mean, spread), with mean - spread and mean + spread from 0 to 1")
        return self


def draw_mask(masking: Masking, rows: int, columns: int, epoch: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """A mask (rows, columns), True where a patch is hidden."""
    mask = np.zeros((rows, columns), np.bool_)
    if epoch < masking.start_epoch:
        return mask
    shares = [generator.uniform(mean - spread, mean + spread) if spread else mean for mean, spread in masking.ratios]
    wanted = shares[generator.integers(len(shares))] * rows * columns
    if masking.shape == "random":
        mask.reshape(-1)[generator.permutation(rows * columns)[: int(wanted)]] = True
        return mask
    covered = 0
    while covered < wanted:
        added = _add_block(mask, wanted - covered, generator)
        if not added:
            break
        covered += added
    return mask


def _add_block(mask: NDArray[np.bool_], remaining: float, generator: np.random.Generator) -> int:
    """Try to hide one more rectangle of patches, at most ``remaining`` new ones; how many it hid."""
    rows, columns = mask.shape
    least = (min(rows, columns) // 3) ** 2
    for _ in range(TRIES):
        area = least + (remaining - least) * generator.random()
        aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width >= columns or height >= rows:
            continue
        top, left = generator.integers(0, rows - height + 1), generator.integers(0, columns - width + 1)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= remaining:
            block[:] = True
            return new
    return 0
