"""Publishing runs: copies of what may be shown, from which alone the report is then made again.

A record goes with what it names: curves, predictions, values and plots. Weights stay where they are, and so does whatever
shows images of the data, except of the embedded data, which code has drawn. Paths of the machine become names.
"""

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from mte_bench.errors import UserError
from mte_bench.files import atomic, sha256_file
from mte_bench.records import RECORD_NAME, Record, find_records, read_record, write_record
from reports.figures import PICTURES, may_be_shown

DATA = (".json", ".jsonl", ".parquet")
"""Side files that are numbers and names: copied whatever task they are of."""

_PATH = re.compile(r"(?P<before>^|[:=]|\s\+\s)(?P<path>(?:/(?!/)|\.\./|~/).*?)(?=\?|\s\+\s|$)")


def publish_runs(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Copy every record below ``runs`` and its side files into ``out``, folder by folder; returns the folders written.

    A run keeps its name: of a folder of runs, what lies in it comes to lie in ``out``; a folder that holds a record itself
    becomes one in ``out``. What is there already is replaced, and nothing is removed. Raises ``UserError`` for broken
    records, for two that would lie at one place, and if ``out`` holds ``runs``.
    """
    out = Path(out)
    places: dict[Path, Path] = {}  # where to: where from
    for run in map(Path, runs):
        start = run.parent if run.is_file() else run
        top = start.resolve().parent if (start / RECORD_NAME).is_file() else start.resolve()
        if start.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{run}: lies in {out} already; report on it without --publish, or give the folder it came from")
        for path in find_records([run]):
            folder = path.parent.resolve()
            if folder.is_relative_to(out.resolve()):
                continue  # published earlier, into a folder below the runs
            place = folder.relative_to(top)
            if places.setdefault(place, folder) != folder:
                raise UserError(f"{folder} and {places[place]}: both would be published as {out / place}; rename one")
    for place, folder in sorted(places.items()):
        _copy(folder, out / place)
    return [out / place for place in sorted(places)]


def _copy(folder: Path, target: Path) -> None:
    record = read_record(folder / RECORD_NAME)
    named = {**record.files, **({"predictions": record.predictions} if record.predictions else {})}
    kept = {key: name for key, name in named.items() if _kept(record, key, folder, name)}
    for name in kept.values():
        source, copied = folder / name, target / name
        if not copied.is_file() or sha256_file(copied) != sha256_file(source):
            with atomic(copied) as temporary:
                shutil.copyfile(source, temporary)
    for name in set(named.values()) - set(kept.values()):  # of an earlier publication that was allowed more
        if PurePath(name).suffix in PICTURES and (target / name).resolve().is_relative_to(target.resolve()):
            (target / name).unlink(missing_ok=True)
    files = {key: name for key, name in record.files.items() if key in kept}
    predictions = record.predictions if "predictions" in kept else None
    told = record.model_copy(update={"files": files, "predictions": predictions})
    write_record(target, Record.check(without_machine_paths(told.model_dump(mode="json")), str(folder / RECORD_NAME)))


def _kept(record: Record, key: str, folder: Path, name: str) -> bool:
    path, suffix = (folder / name).resolve(), PurePath(name).suffix
    if not path.is_file() or not path.is_relative_to(folder):
        return False
    return suffix in DATA or (suffix in PICTURES and may_be_shown(record, key))


def without_machine_paths(value: Any) -> Any:
    """``value`` (of a record) with every path that is absolute or leaves the working folder cut down to its last name.

    ``imagefolder:/data/imagenet?per_class=10`` becomes ``imagefolder:imagenet?per_class=10``; from a folder called ``runs`` or
    ``.data`` on, the way stays: ``/home/me/runs/a`` is ``runs/a``. A command is taken apart into its words first.
    """
    if isinstance(value, Mapping):
        return {
            key: _command(item) if key == "command" and isinstance(item, str) else without_machine_paths(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    return _PATH.sub(_name, value) if isinstance(value, str) else value


def _command(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError:  # not a command line
        return str(without_machine_paths(text))
    return shlex.join(_PATH.sub(_name, word) for word in words)


def _name(found: re.Match[str]) -> str:
    parts = PurePath(found["path"]).parts
    start = next((place for place in range(len(parts) - 2, -1, -1) if parts[place] in ("runs", ".data")), len(parts) - 1)
    return found["before"] + "/".join(parts[start:])
