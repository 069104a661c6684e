"""Where a record goes: the folder of an evaluation, named by what it is of, and never that of another record."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from downstream.task import TaskProtocol
from mte_bench import records
from mte_bench.data.sources import parse_source
from mte_bench.encoders.checkpoint import Checkpoint
from mte_bench.errors import UserError
from mte_bench.files import hash_of
from mte_bench.records import Subject

if TYPE_CHECKING:
    from downstream.evaluate import Request


def output_folder(request: "Request", task: str, name: str, protocol: TaskProtocol, checkpoint: Checkpoint) -> Path:
    """``--out``, else a folder in the run folder or (of an ensemble always) under ``runs``.

    Settings changed by ``--set`` add their hash.
    """
    if request.out:
        return Path(request.out)
    if request.others:
        texts = [request.checkpoint, *request.others]
        base = Path("runs") / f"{'+'.join(map(slug, texts))[:100]}-{hash_of(texts)[:6]}"
    else:
        base = checkpoint.folder / "evaluations" if checkpoint.folder else Path("runs") / slug(request.checkpoint)
    parts = [name if name.startswith(task) else f"{task}-{name}", data_name(request.data)]
    parts += [protocol.hash[:6]] * bool(request.set) + ["smoke"] * request.smoke
    return base / "-".join(parts)


def data_name(source: str) -> str:
    """A source as part of a file name."""
    parsed = parse_source(source)
    options = (f"{key}{value}" for key, value in sorted(parsed.options.items()))
    return slug("-".join([Path(parsed.path).name or parsed.kind, *options]))


def slug(text: str) -> str:
    """``text`` as part of a file name: of a path its last component, the kind before a colon kept."""
    kind, colon, rest = text.partition(":")
    if colon and "/" not in kind:
        return f"{kind}-{slug(rest)}"
    if "/" in text or Path(text).suffix in (".pt", ".pth", ".safetensors"):
        text = Path(text).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "data"


def refuse_clash(folder: Path, task: str, subject: Subject, source: str, fingerprint: str) -> None:
    """Raise ``UserError`` rather than overwrite the record of another task, checkpoint or data in ``folder``, and if it cannot
    be written: before anything that takes long is done.
    """
    records.require_place(folder, task)
    try:
        old = records.read_record(folder / records.RECORD_NAME)
    except UserError:
        return
    if old.subject.sha256 != subject.sha256 and old.subject.checkpoint != subject.checkpoint:
        raise UserError(f"{folder}: holds the record of checkpoint {old.subject.checkpoint}; choose another --out")
    if old.data.source != source and old.data.fingerprint != fingerprint:
        raise UserError(f"{folder}: holds a record on {old.data.source}; choose another --out")
