"""Where features are kept: rows appended block by block, so that a kill at any moment leaves nothing wrong to be read.

A folder holds one kind of feature of one split under one encoder: ``features.npy`` (when complete, open it with
``numpy.load(..., mmap_mode="r")``) and ``features.json``, which says what they are and which blocks of rows are written,
each with a checksum. It is replaced only after the rows have reached the disk. Whoever opens the folder reads the
blocks through and trusts those that match; the work goes on behind them. A lock lets one process at a time do this.

Processes that share the work each fill folders of the same kind inside (``piece``), which are then joined.
"""

import fcntl
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mte_bench.console import log
from mte_bench.errors import UserError
from mte_bench.files import hash_of, write_json

_READ = 1 << 22
_STATE = ("about", "batch_size", "width", "seconds", "waiting", "corrupt", "blocks")


class Block(NamedTuple):
    """Rows that were written together: images and rows up to its end, and the CRC-32 of its own bytes."""

    images: int
    rows: int
    checksum: int


class Corrupt(NamedTuple):
    """An image that could not be decoded and has no row: its place in the split, path and reason."""

    image: int
    path: str
    reason: str


class FeatureStore:
    """One folder of features; use it inside ``with store.locked():``.

    Args:
        root: the cache.
        about: everything that determines the features; its hash is the folder's name.
        dtype: of the rows.
    """

    def __init__(self, root: Path, about: dict[str, Any], dtype: type[np.floating]):
        self.about, self.dtype = about, np.dtype(dtype)
        self.folder = root / hash_of(about, 24)
        self.batch_size = self.width = 0
        self.seconds = self.waiting = 0.0
        self.blocks: list[Block] = []
        self.corrupt: list[Corrupt] = []
        self._file: io.FileIO | None = None
        self._checksum = self._rows = 0

    @property
    def images(self) -> int:
        """Images that are done."""
        return self.blocks[-1].images if self.blocks else 0

    @property
    def rows(self) -> NDArray[np.floating]:
        """The rows, memory-mapped read-only: ``rows c``."""
        count = self.blocks[-1].rows if self.blocks else 0
        if not count:
            return np.empty((0, self.width), self.dtype)
        with self._explained():
            return np.memmap(self._path, self.dtype, "r", offset=len(self._header(0)), shape=(count, self.width))

    @contextmanager
    def locked(self, wait: bool = True) -> Iterator[bool]:
        """Hold the folder for this process; opens the store, closes it at the end.

        Waits for another process that has it, or, if it shall not ``wait``, yields False and holds nothing.
        The lock is a POSIX one: it ends with the process however that ends, and children do not inherit it.
        """
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "w")  # noqa: SIM115 - closed below
        try:
            with self._explained():
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    if not wait:
                        yield False
                        return
                    log("another process is extracting the same features; waiting for it")
                    fcntl.lockf(lock, fcntl.LOCK_EX)
            self.read()
            yield True
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            lock.close()

    def finished(self, images: int) -> bool:
        """Whether all ``images`` are said to be done. Needs no lock, opens nothing and reads no rows."""
        blocks = self._said()
        return bool(blocks) and blocks[-1].images == images

    def piece(self, start: int, stop: int) -> "FeatureStore":
        """A store of its own for the images from ``start`` to ``stop``, which it counts from 0."""
        return FeatureStore(self._pieces, {**self.about, "images": [start, stop]}, self.dtype.type)

    @property
    def shared(self) -> bool:
        """Whether pieces are there, of a pass that several processes share."""
        return self._pieces.exists()

    def take_over(self, piece: "FeatureStore", start: int, stop: int) -> None:
        """Append the rows of a ``piece`` that is complete and locked, and make them count."""
        rows = piece.rows
        for first in range(0, len(rows), size := max(1, _READ // max(1, rows[:1].nbytes))):
            self.append(rows[first : first + size])
        corrupt = [item._replace(image=start + item.image) for item in piece.corrupt]
        self.commit(stop, corrupt, piece.seconds, piece.waiting)

    @contextmanager
    def pieces_kept(self) -> Iterator[None]:
        """Inside, no other process removes the pieces; as many processes as like may be inside."""
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self._sharing, "a+")  # noqa: SIM115 - closed below
        try:
            with self._explained():
                fcntl.lockf(lock, fcntl.LOCK_SH)
            yield
        finally:
            lock.close()

    def forget_pieces(self) -> None:
        """Remove what the pieces take on the disk, unless another process is at them: then that one will, when it is done."""
        if not self.shared:
            return
        with open(self._sharing, "a+") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return
            shutil.rmtree(self._pieces, ignore_errors=True)

    def resumable(self, batch_size: int) -> set[int]:
        """Numbers of images behind which a pass with this batch size can go on."""
        return {0, *(block.images for block in self.blocks)} if batch_size == self.batch_size else {0}

    def rewind(self, images: int, batch_size: int) -> None:
        """Keep the blocks of the first ``images`` and make ready to append."""
        if images == 0:
            self.seconds = self.waiting = 0.0
        self.batch_size = batch_size
        self.blocks = [block for block in self.blocks if block.images <= images]
        self.corrupt = [corrupt for corrupt in self.corrupt if corrupt.image < images]
        self._rows = self.blocks[-1].rows if self.blocks else 0
        self._checksum = 0
        if self._file is not None:
            self._file.close()
        with self._explained():
            # Unbuffered: what could not be written fails here and not once more when the file is closed.
            self._file = open(self._path, "r+b" if self.blocks else "wb", buffering=0)  # noqa: SIM115 - closed with the lock
            if self.blocks:
                self._file.truncate(len(self._header(0)) + self._rows * self.width * self.dtype.itemsize)
                self._file.seek(0, os.SEEK_END)

    def append(self, rows: NDArray[np.floating]) -> None:
        """Write ``rows`` (``b c``); they count after ``commit``."""
        assert self._file is not None, "rewind first"
        data = np.ascontiguousarray(rows, dtype=self.dtype).tobytes()
        with self._explained():
            if self._file.tell() == 0:
                self.width = rows.shape[1]
                _write(self._file, self._header(0))
            _write(self._file, data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._rows += len(rows)

    def commit(self, images: int, corrupt: list[Corrupt], seconds: float, waiting: float) -> None:
        """Make what was appended count: ``images`` are done in all, ``seconds`` and ``waiting`` were spent on what is new."""
        assert self._file is not None, "rewind first"
        with self._explained():
            end = self._file.tell()
            self._file.seek(0)
            _write(self._file, self._header(self._rows))
            self._file.seek(end)
            os.fsync(self._file.fileno())
        self.blocks.append(Block(images, self._rows, self._checksum))
        self.corrupt += corrupt
        self.seconds += seconds
        self.waiting += waiting
        self._checksum = 0
        state = {name: getattr(self, name) for name in _STATE}
        with self._explained():
            write_json(self._state, state)

    @property
    def _path(self) -> Path:
        return self.folder / "features.npy"

    @property
    def _pieces(self) -> Path:
        return self.folder / "pieces"

    @property
    def _sharing(self) -> Path:
        return self.folder / "sharing"

    @property
    def _state(self) -> Path:
        return self.folder / "features.json"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the file system refuses into a ``UserError`` that names the folder."""
        try:
            yield
        except (OSError, UserError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            text = getattr(reason, "strerror", None) or error
            raise UserError(
                f"{self.folder}: features cannot be kept there ({text}); free space or choose another --cache"
            ) from error

    def _header(self, rows: int) -> bytes:
        """NumPy's header, which leaves room for the number of rows to grow: its length is always the same."""
        header = io.BytesIO()
        shape = {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, self.width)}
        np.lib.format.write_array_header_1_0(header, shape)
        return header.getvalue()

    def read(self) -> None:
        """Read the state and keep the blocks whose bytes are as they were written."""
        blocks = self._said()
        self.blocks = self._intact(blocks)
        if len(self.blocks) < len(blocks):
            log(f"{self._path}: damaged behind image {self.images}; extracting again from there")

    def _said(self) -> list[Block]:
        """Read the state; returns the blocks that it lists."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            self.batch_size, self.width = int(state["batch_size"]), int(state["width"])
            self.seconds, self.waiting = float(state["seconds"]), float(state["waiting"])
            self.corrupt = [Corrupt(*item) for item in state["corrupt"]]
            return [Block(*item) for item in state["blocks"]]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return []

    def _intact(self, blocks: list[Block]) -> list[Block]:
        """The leading blocks whose checksums match."""
        if not blocks or not self._path.exists():
            return []
        row, previous, intact = self.width * self.dtype.itemsize, 0, []
        with open(self._path, "rb") as file:
            file.seek(len(self._header(0)))
            for block in blocks:
                left, checksum = (block.rows - previous) * row, 0
                while left > 0 and (data := file.read(min(left, _READ))):
                    checksum, left = zlib.crc32(data, checksum), left - len(data)
                if left or checksum != block.checksum:
                    break
                intact.append(block)
                previous = block.rows
        return intact


def _write(file: io.FileIO, data: bytes) -> None:
    """All of ``data``; the system may take it in pieces."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) or 0 :]
