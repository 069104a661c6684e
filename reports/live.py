"""A report that is written again while a study runs."""

from pathlib import Path
from time import sleep, strftime

from mte_bench.console import log
from mte_bench.errors import UserError
from mte_bench.records import find_records
from reports.report import write_report


def keep_writing(runs: list[str], out: str, pictures_of_images: bool, seconds: int) -> None:
    """Write the report whenever records have come or changed, looking every ``seconds``, until interrupted.

    Its HTML is loaded again by the browser just as often. Raises ``UserError`` if a path of ``runs`` does not exist; records
    that cannot be read, or none at all, are said and waited for.
    """
    seen: object = None
    log(f"looking for new records every {seconds} s; Ctrl-C ends it and writes the last report")
    try:
        while True:
            now = _state(find_records(runs))
            if now != seen:
                seen = now
                try:
                    written = write_report(runs, out, pictures_of_images, refresh=seconds)
                    log(f"{strftime('%H:%M:%S')}  {written.page}: {written.summary['records']} records")
                except UserError as error:
                    log(f"{strftime('%H:%M:%S')}  {error}")
            sleep(seconds)
    except KeyboardInterrupt:
        log("")


def _state(records: list[Path]) -> list[tuple[Path, int, int]]:
    found = []
    for path in records:
        try:
            status = path.stat()
        except OSError:  # its run was removed just now, or it is a link to nowhere
            continue
        found.append((path, status.st_mtime_ns, status.st_size))
    return found
