"""Records: one result with all that is needed to trust and repeat it (``record.json``)."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field

from mte_bench import __version__
from mte_bench.errors import UserError
from mte_bench.files import hash_of, require_writable, write_json
from mte_bench.settings import Settings

SCHEMA_VERSION = 1
RECORD_NAME = "record.json"
PREDICTIONS_NAME = "predictions.parquet"


class Metric(Settings):
    """One number: percentages are 0 to 100; ``ci95`` is a bootstrap over the ``n`` images, never over seeds."""

    value: float
    ci95: tuple[float, float] | None = None
    n: int = Field(ge=0)


class Protocol(Settings):
    """The named settings of the evaluation, resolved."""

    name: str
    version: int = 1
    settings: dict[str, Any] = {}


class Subject(Settings):
    """What was measured: the encoder in a checkpoint, and where it comes from."""

    checkpoint: str
    sha256: str
    family: str
    arch: str
    image_size: int | None = None
    patch_size: int | None = None
    """Where it is not the one in ``arch``."""
    arch_options: dict[str, Any] = {}
    """Further keyword arguments of the timm model."""
    method: str | None = None
    mte: bool = False
    epochs: float | None = None
    seed: int | None = None
    recipe: str | None = None
    recipe_hash: str | None = None
    pretrain_data: str | None = None
    parts: tuple["Subject", ...] = ()
    """The encoders of an ensemble; ``sha256`` is then over theirs, and what they do not share is left out above."""

    @classmethod
    def ensemble(cls, parts: Sequence["Subject"]) -> "Subject":
        """The subject that several encoders are together; a single one stays what it is."""
        if len(parts) == 1:
            return parts[0]
        values = [part.model_dump(mode="json", exclude={"parts"}) for part in parts]
        shared = {key: value for key, value in values[0].items() if all(other[key] == value for other in values)}
        own = {
            "checkpoint": " + ".join(part.checkpoint for part in parts),
            "sha256": hash_of([part.sha256 for part in parts], 64),
            "family": " + ".join(dict.fromkeys(part.family for part in parts)),
            "arch": " + ".join(dict.fromkeys(part.arch for part in parts)),
            "method": " + ".join(dict.fromkeys(part.method for part in parts if part.method)) or None,
            "mte": any(part.mte for part in parts),
            "parts": values,
        }
        return cls.check(shared | own, "ensemble")


class Data(Settings):
    """The images: ``images`` counts each split used; ``fingerprint`` hashes names, sizes and labels."""

    source: str
    split: str
    images: dict[str, int]
    classes: int | None = None
    fingerprint: str
    subset: str | None = None
    corrupt: list[str] = []


class Cost(Settings):
    """Wall-clock seconds of the task, images per second of its encoder pass, peak memory of process or device."""

    seconds: float
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None


class Record(Settings):
    """One result of one task on one subject."""

    schema_version: int = SCHEMA_VERSION
    task: str
    protocol: Protocol
    subject: Subject
    data: Data
    metrics: dict[str, Metric]
    cost: Cost
    environment: dict[str, Any]
    command: str
    created: str
    predictions: str | None = None
    files: dict[str, str] = {}
    details: dict[str, Any] = {}


def make_record(**parts: Any) -> Record:
    """A record with the time, command and environment of now."""
    parts.setdefault("environment", environment())
    parts.setdefault("command", shlex.join(["mte-bench", *sys.argv[1:]]))
    parts.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
    return Record.check(parts, "record")


@contextmanager
def as_if_typed(words: Sequence[str]) -> Iterator[None]:
    """Let records that are made inside name ``mte-bench WORDS`` as the command that repeats them."""
    typed = sys.argv
    sys.argv = ["mte-bench", *words]
    try:
        yield
    finally:
        sys.argv = typed


def write_record(folder: str | Path, record: Record) -> Path:
    """Write ``folder/record.json`` atomically and return its path. Side files must be written first."""
    path = Path(folder) / RECORD_NAME
    write_json(path, record.model_dump(mode="json"))
    return path


def require_place(folder: str | Path, task: str) -> None:
    """Raise ``UserError`` unless a record of ``task`` can be written to ``folder`` and takes the place of no other task's."""
    require_writable(folder)
    try:
        old = read_record(Path(folder) / RECORD_NAME)
    except UserError:
        return
    if old.task != task:
        raise UserError(f"{folder}: holds the record of {old.task}; choose another --out")


def read_record(path: str | Path) -> Record:
    """Read and validate one record file; raises ``UserError`` naming the file if it is broken or of another schema."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a readable record (no regular file)")  # a named pipe would be waited for
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise UserError(f"{path}: no such record") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable record ({error})") from error
    found = values.get("schema_version") if isinstance(values, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(f"{path}: record schema {found}, this version reads {SCHEMA_VERSION}; evaluate again")
    return Record.check(values, str(path))


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def find_records(paths: Iterable[str | Path]) -> list[Path]:
    """All ``record.json`` below the given folders (or the given files), sorted; one that is reached by several ways, once.

    One that cannot be read (a link to nowhere, a folder of that name) is among them, and so is one in each folder that cannot
    be looked into, which may hold some: ``read_record`` says why. Raises ``UserError`` for a path that does not exist.
    """
    found: set[Path] = set()

    def closed(error: OSError) -> None:
        found.add(Path(error.filename) / RECORD_NAME)

    for path in map(Path, paths):
        if path.is_dir():
            below = os.walk(path, onerror=closed)
            found.update(Path(folder) / RECORD_NAME for folder, folders, files in below if RECORD_NAME in (*folders, *files))
        elif path.is_file():
            found.add(path)
        else:
            raise UserError(f"{path}: no such run folder or record")
    return sorted({_real(path): path for path in sorted(found, reverse=True)}.values())


def _real(path: Path) -> Path:
    with suppress(OSError):  # it lies in a folder that cannot be looked into
        if path.is_file():
            return path.resolve()
    return path.parent.resolve() / path.name


_PACKAGES = ("torch", "torchvision", "timm", "faiss-cpu", "scikit-learn", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Versions, device and source state, as they go into a record."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    versions["mte-bench"] = __version__
    cuda = torch.cuda.is_available()
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        **_git_state(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_state() -> dict[str, Any]:
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return {"git_commit": None, "dirty": None}

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "dirty": None}
