"""The bank of a k-NN search: rows of unit length, made block by block from features that may lie in a file."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def normalise(features: Tensor) -> Tensor:
    """Rows of ``features`` (``n c``) with unit length, float32; a zero row stays zero."""
    rows = features.float()
    return rows / _lengths(rows)


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
        """The rows from ``start`` to ``stop`` in blocks of ``size``, each with the place of its first row.

        A block holds until the next one is asked for, which takes its memory.
        """
        stop = len(self) if stop is None else stop
        memory = torch.empty(min(size, stop - start), self.features.shape[1])
        for first in range(start, stop, size):
            rows = self.features[first : min(first + size, stop)]
            block = memory[: len(rows)]
            block.copy_(torch.from_numpy(np.asarray(_Readable(rows))))
            yield first, block.div_(_lengths(block)).to(self.device)


class _Readable:
    """``rows`` for torch, which warns of arrays that must not be written to; it copies them, many times as fast as NumPy."""

    def __init__(self, rows: NDArray[np.floating]):
        self.rows = rows  # lives as long as what is made of it
        interface = rows.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _lengths(rows: Tensor) -> Tensor:
    """What brings ``rows`` (``n c``) to unit length when they are divided by it: ``n 1``."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
