"""The bank of a k-NN search: rows of unit length, made block by block from features that may lie in a file."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def normalise(features: Tensor) -> Tensor:
    """Rows of ``features`` (``n c``) with unit length, float32; a zero row stays zero."""
    return F.normalize(features.float(), dim=1)


class Bank:
    """Features (``n c``) as a search reads them, without a copy of the whole.

    Args:
        features: any floating type, in memory or memory-mapped; kept as they are.
        device: where the rows are wanted. They are brought to unit length on the CPU wherever that is, so that no device
            rounds them in its own way; ``mps``, which has no float64 to judge them with, is taken as ``cpu``.
    """

    def __init__(self, features: NDArray[np.floating], device: str | torch.device = "cpu"):
        self.features = features
        self.device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Rows of unit length, float32, on the device; ``which`` is a slice or indices on the CPU."""
        chosen = self.features[which if isinstance(which, slice) else which.numpy()]
        return normalise(torch.from_numpy(np.array(chosen))).to(self.device)

    def blocks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The rows from ``start`` to ``stop`` in blocks of ``size``, each with the place of its first row."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, size):
            yield first, self.rows(slice(first, min(first + size, stop)))
