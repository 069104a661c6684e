"""Features: one pass of an encoder over a split, kept on disk (``feature_store``) and not computed twice."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from downstream.feature_store import Corrupt, FeatureStore
from mte_bench.console import ProgressLine
from mte_bench.data.sources import ImageSet
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.device import autocast
from mte_bench.encoders.encoder import Encoder, Tokens
from mte_bench.errors import CorruptImage, UserError, did_you_mean
from mte_bench.files import cache_folder

CODE_VERSION = 1
"""Part of every key: raise it when the same images and weights give other features than before."""

COMMIT_SECONDS = 10.0  # a kill loses at most so much work


class Kind(NamedTuple):
    """One kind of feature: what it makes of the tokens (``b c``), and after which blocks it needs them."""

    compute: Callable[[Tokens], Tensor]
    blocks: tuple[int, ...] = ()


KINDS: dict[str, Kind] = {
    "global": Kind(lambda tokens: tokens.global_token),  # after the final norm
    "patch-mean": Kind(lambda tokens: tokens.raw_patches.mean(dim=1)),  # before it: iBOT's avgpool 1
    "patch-mean-normed": Kind(lambda tokens: tokens.patches.mean(dim=1)),
}


class Features(NamedTuple):
    """The features of one split. Images that could not be decoded have no row."""

    arrays: dict[str, NDArray[np.floating]]
    """For each kind ``rows c``, memory-mapped; float32, or float16 where the encoder ran in 16 bits."""
    kept: NDArray[np.int64]
    """``rows``: which image of the split a row belongs to, ascending."""
    corrupt: list[str]
    """Names of the images that could not be decoded."""
    cached: bool
    """Whether no image had to be encoded."""
    seconds: float
    """Wall-clock time of the pass that computed them, now or earlier."""
    waiting: float
    """Share of it, 0 to 1, in which the encoder waited for decoded images."""

    @property
    def images_per_second(self) -> float:
        """Of the pass that computed them."""
        return (len(self.kept) + len(self.corrupt)) / max(self.seconds, 1e-9)


class Pass(NamedTuple):
    """How the encoder goes over the images: none of it, but for the precision, changes what the features are."""

    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    batch_size: int = 64
    workers: int = 0
    allow_corrupt: int = 0
    cache: Path | None = None
    """Folder of the cache; None is ``features`` in the program's cache folder."""
    commit_seconds: float = COMMIT_SECONDS


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
    transform, the data's fingerprint, the precision, the kind and ``CODE_VERSION``. The batch size is not part of it, but
    a pass that was stopped goes on only with the same one, so that batches are composed as if it had not been.
    Raises ``CorruptImage`` for the first image beyond ``allow_corrupt`` that cannot be decoded; ``UserError`` for an
    unknown kind, for non-finite features and for a cache that cannot be written.
    """
    stores = {kind: _store(encoder, weights, images, transform, kind, how) for kind in kinds}
    with ExitStack() as locks:
        for store in sorted(stores.values(), key=lambda store: store.folder):  # one order: no two wait for each other
            locks.enter_context(store.locked())
        missing = {kind: store for kind, store in stores.items() if store.images < len(images)}
        if missing:
            start = max(set.intersection(*(store.resumable(how.batch_size) for store in missing.values())))
            for store in missing.values():
                store.rewind(start, how.batch_size)
            _encode(missing, start, encoder, images, transform, how)
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
    blocks = sorted({index for kind in kinds for index in KINDS[kind].blocks})
    with torch.inference_mode(), autocast(how.device, how.precision):
        tokens = encoder.to(how.device)(batch.to(how.device, non_blocking=True), blocks=blocks)
        features = {}
        for kind in kinds:
            own = tuple(tokens.blocks[blocks.index(index)] for index in KINDS[kind].blocks)
            features[kind] = KINDS[kind].compute(tokens._replace(blocks=own)).float().cpu().numpy().astype(_dtype(how))
    return features


def _store(
    encoder: Encoder, weights: str, images: ImageSet, transform: EvaluationTransform, kind: str, how: Pass
) -> FeatureStore:
    if kind not in KINDS:
        raise UserError(f"feature '{kind}': there is no such kind{did_you_mean(kind, KINDS)}")
    about = {
        "code": CODE_VERSION,
        "weights": weights,
        "encoder": encoder.spec.model_dump(mode="json"),
        "transform": transform.model_dump(mode="json"),
        "data": images.fingerprint,
        "precision": str(how.precision).removeprefix("torch."),
        "kind": kind,
    }
    return FeatureStore(how.cache or cache_folder() / "features", about, _dtype(how))


def _dtype(how: Pass) -> type[np.floating]:
    return np.float32 if how.precision == torch.float32 else np.float16


def _encode(
    stores: dict[str, FeatureStore], start: int, encoder: Encoder, images: ImageSet, transform: EvaluationTransform, how: Pass
) -> None:
    """Append to ``stores`` the features of the images from ``start`` on."""
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
                    f"the encoder's {kind} feature of {name} is not finite: a diverged checkpoint, or --precision float32"
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
        line.show(
            f"features of {images.split}: {done}/{len(images)} images  {(done - start) / line.seconds:.0f} images/s  "
            f"data wait {100 * waited_in_all / line.seconds:.0f} %",
            last=done == len(images),
        )


def _refuse(corrupt: Sequence[Corrupt], allowed: int) -> None:
    """Raise for the first corrupt image that is one too many."""
    if len(corrupt) > allowed:
        raise CorruptImage(corrupt[allowed].path, corrupt[allowed].reason)


class _Decoded(Dataset[tuple[Tensor, Corrupt | None]]):
    """The transformed images from ``start`` on; a blank one and the reason where the file cannot be decoded."""

    def __init__(self, images: ImageSet, transform: EvaluationTransform, start: int):
        self.images, self.transform, self.start = images, transform, start

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
    forked = how.workers > 0 and sys.platform == "linux"
    loader = DataLoader(
        _Decoded(images, transform, start),
        batch_size=how.batch_size,
        num_workers=how.workers,
        collate_fn=_collate,
        pin_memory=how.device.type == "cuda",
        prefetch_factor=4 if how.workers else None,
        # Forked workers start at once and end when this process is killed; those of a fork server outlive it.
        multiprocessing_context="fork" if forked else None,
        worker_init_fn=partial(_end_without, os.getpid()) if forked else None,
    )
    iterator = iter(loader)
    while True:
        before = time.monotonic()
        batch = next(iterator, None)
        if batch is None:
            return
        yield *batch, time.monotonic() - before


def _end_without(parent: int, _worker: int) -> None:
    """End a worker whose parent was killed while it started: torch's own watch would take its new parent for the true one."""
    if os.getppid() != parent:
        os._exit(1)


def _collate(items: list[tuple[Tensor, Corrupt | None]]) -> tuple[Tensor, list[Corrupt]]:
    return torch.stack([image for image, _ in items]), [corrupt for _, corrupt in items if corrupt is not None]
