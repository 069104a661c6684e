"""Features: one pass of an encoder over a split, kept on disk (``feature_store``) and not computed twice.

Processes that ``torchrun`` started share the pass. The split is cut into pieces of whole batches; each process takes one
after the other that nobody else has, by its lock, so that a slow, late or killed one holds up nothing but the piece it is
at. The pieces are then joined. As the batches are those of a single process, so are the features. Processes on several
machines need the cache on a disk that they share.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from downstream.feature_kinds import kind_of
from downstream.feature_store import Corrupt, FeatureStore
from mte_bench.console import ProgressLine
from mte_bench.data.sources import ImageSet, Subset
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.device import autocast
from mte_bench.encoders.encoder import Encoder
from mte_bench.errors import CorruptImage, UserError
from mte_bench.files import cache_folder

CODE_VERSION = 2  # 1: images of 16 bits a pixel were white
"""Part of every key: raise it when the same images and weights give other features than before."""

COMMIT_SECONDS = 10.0  # a kill loses at most so much work


MOST_PIECES, LEAST_BATCHES = 64, 4  # of a pass that is shared; a piece is worth starting the decoding processes for

FeatureDtype = Literal["auto", "float16", "float32"]


class Features(NamedTuple):
    """The features of one split. Images that could not be decoded have no row."""

    arrays: dict[str, NDArray[np.floating]]
    """For each kind ``rows c``, memory-mapped, of ``Pass.dtype``."""
    kept: NDArray[np.int64]
    """``rows``: which image of the split a row belongs to, ascending."""
    corrupt: list[str]
    """Names of the images that could not be decoded."""
    cached: bool
    """Whether no image had to be encoded."""
    seconds: float
    """Wall-clock time of the pass that computed them, now or earlier; added up over the processes that shared it."""
    waiting: float
    """Share of it, 0 to 1, in which the encoder waited for decoded images."""

    @property
    def images_per_second(self) -> float:
        """Of the pass that computed them."""
        return (len(self.kept) + len(self.corrupt)) / max(self.seconds, 1e-9)


class Pass(NamedTuple):
    """How the encoder goes over the images: none of it, but for precision and type, changes what the features are."""

    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    batch_size: int = 64
    workers: int = 0
    allow_corrupt: int = 0
    cache: Path | None = None
    """Folder of the cache; None is ``features`` in the program's cache folder."""
    commit_seconds: float = COMMIT_SECONDS
    feature_dtype: FeatureDtype = "auto"
    """How features are kept; ``auto`` is float32, or float16 where the encoder runs in 16 bits."""
    rank: int = 0
    processes: int = 1
    """Which of how many processes that share the work this one is."""

    @property
    def dtype(self) -> type[np.floating]:
        """NumPy's type of the features."""
        wide = self.precision == torch.float32 if self.feature_dtype == "auto" else self.feature_dtype == "float32"
        return np.float32 if wide else np.float16


def extract(
    encoder: Encoder,
    weights: str,
    images: ImageSet,
    transform: EvaluationTransform,
    kinds: Sequence[str] = ("global",),
    how: Pass = Pass(),  # noqa: B008 - immutable
) -> Features:
    """Features of ``images``, from the cache or by one pass that computes all missing ``kinds``.

    ``weights`` is the SHA-256 of the encoder's weights. The key of a feature consists of it, the encoder's spec, the
    transform, the data's fingerprint, the precision, the type, the kind and ``CODE_VERSION``. Neither the batch size nor the
    number of processes is part of it, but a pass that was stopped goes on only with the same batch size, so that batches are
    composed as if it had not been. A process alone goes on with the pieces of a shared pass, several begin with pieces anew.
    What is kept is read through once, to compare its checksums. The memory used depends on the size of a batch alone.
    Raises ``CorruptImage`` for the first image beyond ``allow_corrupt`` that cannot be decoded; ``UserError`` for a kind that
    is unknown or that the encoder does not have, for non-finite features and for a cache that cannot be written.
    """
    stores = {kind: _store(encoder, weights, images, transform, kind, how) for kind in kinds}
    task = _Task(encoder, transform, how)
    spans = _spans(len(images), how.batch_size)
    unfinished = {kind: store for kind, store in stores.items() if not store.finished(len(images))}
    shared = how.processes > 1 or any(store.shared for store in unfinished.values())
    if shared:
        with ExitStack() as kept:
            for store in unfinished.values():
                kept.enter_context(store.pieces_kept())
            _share(unfinished, spans, images, task)
    with ExitStack() as locks:
        _lock(stores, locks)
        missing = _missing(stores, len(images))
        if shared:
            _join(missing, spans, images, task)
        _complete(stores, images, task, f"features of {images.split}")
        for store in stores.values():
            store.forget_pieces()
    first = stores[kinds[0]]
    _refuse(first.corrupt, how.allow_corrupt)
    corrupt = [item.image for item in first.corrupt]
    return Features(
        arrays={kind: store.rows for kind, store in stores.items()},
        kept=np.delete(np.arange(len(images)), corrupt),
        corrupt=[images.name(index) for index in corrupt],
        cached=not missing,
        seconds=first.seconds,
        waiting=first.waiting / max(first.seconds, 1e-9),
    )


def extracted(encoder: Encoder, weights: str, images: ImageSet, transform: EvaluationTransform, kind: str, how: Pass) -> int:
    """How many of ``images`` an extraction would find done."""
    store = _store(encoder, weights, images, transform, kind, how)
    store.read()
    return store.images if store.images == len(images) else max(store.resumable(how.batch_size))


def encode_batch(encoder: Encoder, batch: Tensor, kinds: Sequence[str], how: Pass) -> dict[str, NDArray[np.floating]]:
    """The features (``b c``) of transformed images (``b c h w``), for each of ``kinds``, as they are kept."""
    wanted = {name: kind_of(name, encoder) for name in kinds}
    blocks = sorted({index for kind in wanted.values() for index in kind.blocks})
    attention = any(kind.attention for kind in wanted.values())
    features = {}
    with torch.inference_mode(), autocast(how.device, how.precision):
        tokens = encoder.to(how.device)(batch.to(how.device, non_blocking=True), blocks=blocks, attention=attention)
        for name, kind in wanted.items():
            own = tuple(tokens.blocks[blocks.index(index)] for index in kind.blocks)
            features[name] = kind.compute(tokens._replace(blocks=own)).float().cpu().numpy().astype(how.dtype)
    return features


def _store(
    encoder: Encoder, weights: str, images: ImageSet, transform: EvaluationTransform, kind: str, how: Pass
) -> FeatureStore:
    kind_of(kind, encoder, transform.crop)  # refuses what cannot be computed
    about = {
        "code": CODE_VERSION,
        "weights": weights,
        "encoder": encoder.spec.model_dump(mode="json"),
        "transform": transform.model_dump(mode="json"),
        "data": images.fingerprint,
        "precision": str(how.precision).removeprefix("torch."),
        "type": np.dtype(how.dtype).name,
        "kind": kind,
    }
    return FeatureStore(how.cache or cache_folder() / "features", about, how.dtype)


class _Task(NamedTuple):
    """What is done with the images."""

    encoder: Encoder
    transform: EvaluationTransform
    how: Pass


Stores = Mapping[str, FeatureStore]


def _spans(images: int, batch_size: int) -> list[tuple[int, int]]:
    """The pieces of a shared pass: first image and the one behind the last, whole batches of a single process."""
    batches = -(-images // batch_size)
    size = batch_size * max(LEAST_BATCHES, -(-batches // MOST_PIECES))
    return [(start, min(start + size, images)) for start in range(0, images, size)]


def _share(stores: Stores, spans: list[tuple[int, int]], images: ImageSet, task: _Task) -> None:
    """Complete the pieces ``spans`` of ``stores``, together with the other processes.

    First those that nobody else is at, then, should their process end before they do, all others.
    """
    first = task.how.rank * len(spans) // task.how.processes
    for wait in (False, True):
        for number in [*range(first, len(spans)), *range(first)]:
            start, stop = spans[number]
            if all(store.finished(len(images)) for store in stores.values()):
                return  # the pieces have been joined
            pieces = {kind: store.piece(start, stop) for kind, store in stores.items()}
            pieces = {kind: piece for kind, piece in pieces.items() if not piece.finished(stop - start)}
            with ExitStack() as locks:
                if pieces and _lock(pieces, locks, wait):
                    title = f"features of {images.split}, piece {number + 1} of {len(spans)}"
                    _complete(pieces, _part(images, start, stop), task, title)


def _join(stores: Stores, spans: list[tuple[int, int]], images: ImageSet, task: _Task) -> None:
    """Put the pieces ``spans`` together in ``stores``, which are locked; a damaged one is mended first."""
    for kind, store in stores.items():
        store.rewind(0, task.how.batch_size)
        for start, stop in spans:
            piece = store.piece(start, stop)
            with piece.locked():
                _complete({kind: piece}, _part(images, start, stop), task, f"features of {images.split}, mended")
                store.take_over(piece, start, stop)


def _part(images: ImageSet, start: int, stop: int) -> ImageSet:
    return Subset(images, np.arange(start, stop), images.subset or "")


def _lock(stores: Stores, locks: ExitStack, wait: bool = True) -> bool:
    """Lock all of ``stores`` until ``locks`` ends; whether that could be done without waiting, if it shall not ``wait``."""
    in_order = sorted(stores.values(), key=lambda store: store.folder)  # no two processes wait for each other
    return all(locks.enter_context(store.locked(wait)) for store in in_order)


def _missing(stores: Stores, images: int) -> dict[str, FeatureStore]:
    return {kind: store for kind, store in stores.items() if store.images < images}


def _complete(stores: Stores, images: ImageSet, task: _Task, title: str) -> None:
    """Compute what is missing in ``stores``, which are locked."""
    missing, batch_size = _missing(stores, len(images)), task.how.batch_size
    if missing:
        start = max(set.intersection(*(store.resumable(batch_size) for store in missing.values())))
        for store in missing.values():
            store.rewind(start, batch_size)
        _encode(missing, start, images, task, title)


def _encode(stores: Stores, start: int, images: ImageSet, task: _Task, title: str) -> None:
    """Append to ``stores`` the features of the images from ``start`` on."""
    encoder, transform, how = task
    encoder.eval()
    encoder.use_drop_path(None)
    corrupt: list[Corrupt] = []  # since the last commit
    line, waited_in_all = ProgressLine(), 0.0
    done, committed, waiting = start, time.monotonic(), 0.0
    for batch, bad, waited in _batches(images, transform, how, start):
        features = encode_batch(encoder, batch, list(stores), how)
        corrupt += bad
        _refuse([*next(iter(stores.values())).corrupt, *corrupt], how.allow_corrupt)
        lost = [item.image - done for item in bad]
        for kind, rows in features.items():
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                name = images.name(done + int(np.argmin(finite)))
                raise UserError(
                    f"the encoder's {kind} feature of {name} is not finite: a diverged checkpoint, or too large for 16 bits "
                    "(--precision float32, --feature-dtype float32)"
                )
            stores[kind].append(np.delete(rows, lost, axis=0))
        done += len(batch)
        waiting += waited
        now = time.monotonic()
        if done == len(images) or now - committed >= how.commit_seconds:
            for store in stores.values():
                store.commit(done, corrupt, now - committed, waiting)
            corrupt, committed, waiting = [], now, 0.0
        waited_in_all += waited
        if how.rank == 0:
            line.show(
                f"{title}: {done}/{len(images)} images  {(done - start) / line.seconds:.0f} images/s  "
                f"data wait {100 * waited_in_all / line.seconds:.0f} %",
                last=done == len(images),
            )


def _refuse(corrupt: Sequence[Corrupt], allowed: int) -> None:
    """Raise for the first corrupt image that is one too many."""
    if len(corrupt) > allowed:
        raise CorruptImage(corrupt[allowed].path, corrupt[allowed].reason)


def as_decoded(images: ImageSet, transform: EvaluationTransform) -> ImageSet:
    """``images`` in the size that ``transform`` wants them decoded."""
    return images.reduced(transform.resize) if transform.decode == "reduced" else images


class _Decoded(Dataset[tuple[Tensor, Corrupt | None]]):
    """The transformed images from ``start`` on; a blank one and the reason where the file cannot be decoded."""

    def __init__(self, images: ImageSet, transform: EvaluationTransform, start: int):
        self.images, self.transform, self.start = as_decoded(images, transform), transform, start

    def __len__(self) -> int:
        return len(self.images) - self.start

    def __getitem__(self, row: int) -> tuple[Tensor, Corrupt | None]:
        try:
            return self.transform(self.images.image(self.start + row)), None
        except CorruptImage as error:
            side = self.transform.crop
            return torch.zeros(3, side, side), Corrupt(self.start + row, error.path, error.reason)


def decoded_batches(images: ImageSet, transform: EvaluationTransform, how: Pass) -> Iterator[tuple[Tensor, list[int], float]]:
    """All images in batches (``b c h w``), which of them could not be decoded (and are blank), and the seconds waited.

    Raises ``CorruptImage`` for the first one beyond ``how.allow_corrupt``.
    """
    corrupt: list[Corrupt] = []
    for batch, bad, waited in _batches(images, transform, how):
        corrupt += bad
        _refuse(corrupt, how.allow_corrupt)
        yield batch, [item.image for item in bad], waited


def _batches(
    images: ImageSet, transform: EvaluationTransform, how: Pass, start: int = 0
) -> Iterator[tuple[Tensor, list[Corrupt], float]]:
    """The images from ``start`` on as in ``decoded_batches``, and why some could not be decoded."""
    decoded = _Decoded(images, transform, start)
    loader = DataLoader(decoded, batch_size=how.batch_size, collate_fn=_collate, **loader_options(how))
    iterator = iter(loader)
    while True:
        before = time.monotonic()
        batch = next(iterator, None)
        if batch is None:
            return
        yield *batch, time.monotonic() - before


def loader_options(how: Pass) -> dict[str, Any]:
    """How a ``DataLoader`` starts its workers."""
    forked = how.workers > 0 and sys.platform == "linux"
    return {
        "num_workers": how.workers,
        "pin_memory": how.device.type == "cuda",
        "prefetch_factor": 4 if how.workers else None,
        # Forked workers start at once and end when this process is killed; those of a fork server outlive it.
        "multiprocessing_context": "fork" if forked else None,
        "worker_init_fn": partial(_end_without, os.getpid()) if forked else None,
    }


def _end_without(parent: int, _worker: int) -> None:
    """End a worker whose parent was killed while it started: torch's own watch would take its new parent for the true one."""
    if os.getppid() != parent:
        os._exit(1)


def _collate(items: list[tuple[Tensor, Corrupt | None]]) -> tuple[Tensor, list[Corrupt]]:
    return torch.stack([image for image, _ in items]), [corrupt for _, corrupt in items if corrupt is not None]
