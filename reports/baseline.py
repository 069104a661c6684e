"""The baseline file of a regression gate: of each cell what is needed to judge a new measurement without the old run.

A cell is the main metric of one record. With it are kept who was right on which image, a bit each, and a hash of the images'
names, so that a new measurement is compared image by image. Of a dense record it is the metric on resampled images: the
new measurement is taken on the same resamples.
"""

import base64
import binascii
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat

from mte_bench.dense.resampling import DRAWS, Floats
from mte_bench.errors import UserError, did_you_mean
from mte_bench.files import write_json
from mte_bench.naming import architecture_title, data_key, data_title, method_title
from mte_bench.settings import Settings
from reports.collect import Collection, Entry, is_random, protocol_text
from reports.predictions import Predictions
from reports.topics import HEADLINES, headline

SCHEMA_VERSION = 1
TOLERANCE = 0.5  # percentage points


class Cell(Settings):
    """One metric of one encoder, in percent.

    ``right`` holds a bit for each image in the order of their names, packed; ``drawn``, of dense records, the metric on each
    resample of the images as float32; both in base64.
    """

    task: str
    metric: str
    protocol: str
    data: str
    fingerprint: str
    subset: str | None
    split: str
    encoder: str
    architecture: str
    origin: str
    """The recipe, or the name of a checkpoint that has none."""
    recipe_hash: str | None
    pretrain_data: str | None
    epochs: float | None
    seed: int | None
    value: float
    n: int = Field(ge=0)
    images: str | None
    """Hash of the images' names; of a dense record, of how often each was drawn too."""
    right: str | None
    drawn: str | None = None

    @property
    def role(self) -> tuple[object, ...]:
        """What the cell is of, whatever has changed about it since."""
        protocol = self.protocol.partition("@")[0]
        encoder = (self.encoder, self.architecture, self.origin, self.pretrain_data, self.epochs, self.seed)
        return (self.task, self.metric, protocol, self.data, self.split, *encoder)

    @property
    def place(self) -> tuple[object, ...]:
        """What must be equal for two values to be comparable."""
        return (self.protocol, self.fingerprint, self.subset, self.split)

    @property
    def name(self) -> str:
        """The cell in a few words."""
        task = HEADLINES.get(self.task, ("", self.task))[1]
        seed = "" if self.seed is None else f", seed {self.seed}"
        origin = f" {self.origin}" if self.origin and self.origin not in self.encoder else ""
        epochs = "" if self.epochs is None else f", {self.epochs:g} epochs"
        subset = f" ({self.subset})" if self.subset else ""
        title = self.data.partition("?")[0]
        return f"{task} on {title}{subset}: {self.encoder}{origin}, {self.architecture}{epochs}{seed}"

    def bits(self) -> NDArray[np.bool_] | None:
        """``n``: who was right, in the order of the images' names; None where not kept. Raises ``ValueError`` if not that."""
        if self.right is None:
            return None
        packed = np.frombuffer(base64.b64decode(self.right, validate=True), np.uint8)
        found = np.unpackbits(packed, count=self.n).astype(bool) if len(packed) == -(-self.n // 8) else None
        if found is None or abs(100 * found.sum() - self.value * self.n) > 0.01 * self.n:
            raise ValueError(f"'right' does not hold {self.value:.2f} % of {self.n} images")
        return found

    def draws(self) -> Floats | None:
        """``b``: the metric on each resample; None where not kept. Raises ``ValueError`` if not that."""
        if self.drawn is None:
            return None
        packed = base64.b64decode(self.drawn, validate=True)
        found = np.frombuffer(packed, "<f4").astype(np.float64) if len(packed) == 4 * DRAWS else None
        if found is None or not np.isfinite(found).any() or np.nanmin(found) < 0 or np.nanmax(found) > 100 + 1e-3:
            raise ValueError(f"'drawn' does not hold {DRAWS} values in percent")
        return found


class Baseline(Settings):
    """The file's contents; ``tolerances`` names the tasks that have another tolerance (percentage points) than the rest."""

    schema_version: int = SCHEMA_VERSION
    tolerance: NonNegativeFloat = TOLERANCE
    tolerances: dict[str, NonNegativeFloat] = {}
    cells: tuple[Cell, ...] = ()

    def tolerance_of(self, task: str) -> float:
        """How far a cell of ``task`` may fall."""
        return self.tolerances.get(task, self.tolerance)


@dataclass(frozen=True)
class Measured:
    """What can be put into a baseline: every cell, and what was left out of it."""

    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]


def measure(collection: Collection) -> Measured:
    """The cells of every evaluation in ``collection``; raises ``UserError`` if there is none."""
    predictions = Predictions(collection.unusable)
    cells, left_out = [], []
    for entry in collection.evaluations:
        metric = entry.record.metrics.get(headline(entry.record))
        if metric is None or not math.isfinite(metric.value):
            left_out.append(f"{entry.folder}: its record has no finite value of '{headline(entry.record)}'")
        else:
            cells.append(_cell(entry, predictions))
    if not cells:
        raise UserError("; ".join(left_out) or "no evaluation among the records; give what knn, linear and the like wrote")
    return Measured(tuple(cells), tuple(left_out))


def _cell(entry: Entry, predictions: Predictions) -> Cell:
    record, subject, data = entry.record, entry.record.subject, entry.record.data
    name = headline(record)
    found = predictions.of(entry, name)
    found = None if found is None else found.by_name()
    dense = predictions.resamples.of(entry)
    drawn = None if dense is None or name not in dense.overall else dense.overall[name]
    nameless = "" if is_random(subject) else PurePath(subject.checkpoint).name
    return Cell(
        task=record.task,
        metric=name,
        protocol=protocol_text(record),
        data=data_key(data.source),
        fingerprint=data.fingerprint,
        subset=data.subset,
        split=data.split,
        encoder=method_title(subject),
        architecture=architecture_title(subject),
        origin=subject.recipe or nameless,
        recipe_hash=subject.recipe_hash,
        pretrain_data=None if subject.pretrain_data is None else data_title(subject.pretrain_data),
        epochs=subject.epochs,
        seed=subject.seed,
        value=record.metrics[name].value,
        n=record.metrics[name].n,
        images=found.images_hash if found else dense.digest if dense else None,
        right=None if found is None else base64.b64encode(np.packbits(found.right).tobytes()).decode(),
        drawn=None if drawn is None else base64.b64encode(drawn.astype("<f4").tobytes()).decode(),
    )


def read_baseline(path: str | Path) -> Baseline:
    """Read and validate a baseline; raises ``UserError`` naming the file and what is wrong."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such baseline; write it with mte-bench check --baseline {path} --update RUNS") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable baseline ({error})") from error
    found = values.get("schema_version") if isinstance(values, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(f"{path}: baseline schema {found}, this version reads {SCHEMA_VERSION}; remove it and use --update")
    baseline = Baseline.check(values, str(path))
    for index, cell in enumerate(baseline.cells):
        try:
            cell.bits()
            cell.draws()
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{path}: cells.{index} ({cell.name}): {error}; restore the file or use --update") from error
    return baseline


def with_tolerances(baseline: Baseline, given: Iterable[str], tasks: Iterable[str]) -> Baseline:
    """``baseline`` with other tolerances: ``1.5`` for all tasks, ``knn=1.5`` for one of ``tasks``.

    Raises ``UserError`` for anything else.
    """
    overall, single = baseline.tolerance, dict(baseline.tolerances)
    for text in given:
        task, equals, points = text.rpartition("=")
        try:
            number = float(points)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise UserError(f"--tolerance {text}: write percentage points from 0, such as 0.5 or {task or 'knn'}=0.5")
        if not equals:
            overall, single = number, {}
        elif task in tasks:
            single[task] = number
        else:
            raise UserError(f"--tolerance {text}: no cell is of task '{task}'{did_you_mean(task, tasks)}")
    return baseline.model_copy(update={"tolerance": overall, "tolerances": single})


def write_baseline(path: str | Path, baseline: Baseline) -> None:
    """Write ``baseline`` atomically; the bytes are the same for the same cells."""
    write_json(path, baseline.model_dump(mode="json"))


def repeats(cells: Iterable[Cell]) -> list[int]:
    """Of each cell how many before it have its role and place: 0 unless something was measured again."""
    seen: dict[tuple[object, ...], int] = {}
    found = []
    for cell in cells:
        key = (*cell.role, *cell.place, cell.recipe_hash)
        found.append(seen.get(key, 0))
        seen[key] = found[-1] + 1
    return found
