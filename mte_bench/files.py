"""Files that matter are written beside their name and renamed, so that a kill or a full disk leaves the old one whole."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mte_bench.errors import UserError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success sync it and rename it to ``path``, otherwise remove it.

    Raises ``UserError`` when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another --out") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(folder: str | Path) -> None:
    """Raise ``UserError`` unless files can be written to ``folder``, which need not be there yet; makes nothing."""
    if folder == "":
        raise UserError("--out '': names no folder")
    place = folder = Path(folder)
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{folder}: cannot be written ({place} is a file, not a folder); choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written ({place} is read-only); change its permissions or choose another --out")


def _refusal(error: Exception) -> str | None:
    """Why the disk refused a write; None for other errors. torch and safetensors wrap it in types of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if "inline_container" in str(error):  # the zip file of torch.save
        return "the disk is full, or a limit on file sizes is reached"
    return str(error).partition("I/O error: ")[2] or None


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def hash_of(value: Any, length: int = 12) -> str:
    """The first ``length`` hex digits of the SHA-256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where derived data is kept between commands: ``$XDG_CACHE_HOME/mte-bench`` or ``~/.cache/mte-bench``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mte-bench"
