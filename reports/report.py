"""A report: one page, as markdown with its pictures beside it and as HTML, from the records below some folders and nothing else.

The same records give the same bytes. Writing into a folder that is read from is fine: only ``record.json`` files are read.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mte_bench.files import require_writable, write_json
from mte_bench.naming import architecture_title, data_title
from mte_bench.records import Record
from reports.ablations import Ablation, ablations
from reports.budget import budget
from reports.collect import Collection, Entry, Measure, Row, collect, data_tables
from reports.figures import FOLDER, PREFIXES, Figure, Kind, copy_pictures, draw_curves
from reports.markdown import code, link_text, plain_text
from reports.page import write_page
from reports.paper import paper, same_data
from reports.predictions import Predictions
from reports.runs import cost_table, environments, machinery, period, record_table
from reports.tables import Cell, Section, accuracy_table, cell_summary, section, seed_table
from reports.topics import TOPICS, Topic, is_evaluation

PAGE, SUMMARY = "report.md", "report.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What was written: the page and the summary of its cells (the contents of ``report.json``)."""

    page: Path
    summary: dict[str, Any]
    sections: tuple[Section, ...]
    unusable: tuple[str, ...]
    """One line for each file that was left out."""


def write_report(
    runs: Sequence[str | Path], out: str | Path, pictures_of_images: bool = True, refresh: int | None = None
) -> Report:
    """Write ``out/report.md``, ``report.html``, ``report.json`` and ``figures/`` from every record below ``runs``.

    The HTML holds its pictures; with ``refresh`` a browser loads it again every so many seconds.

    With ``pictures_of_images`` false nothing that shows the images of the data is put there. Pictures of an earlier report
    in ``out`` that this one does not have are removed. Raises ``UserError`` if there is nothing to report, or ``out``
    cannot be written.
    """
    require_writable(out)
    out = Path(out)
    collection = collect(runs)
    predictions = Predictions(collection.unusable)
    sections = tuple(section(table, collection, predictions) for table in data_tables(collection))
    curves = draw_curves(collection, out)
    pictures = copy_pictures(collection, out, pictures_of_images)
    files = [figure.file for figure in [*curves, *(figure for figures in pictures.values() for figure in figures)]]

    left_out = ((item.path, item.reason.replace(str(item.path), item.path.name)) for item in collection.unusable)
    unusable = [f"{link_text(path, out)}: {reason}" for path, reason in left_out]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "records": len(collection.entries),
        "tables": [cell_summary(part) for part in sections],
        "figures": sorted(files),
        "unusable": unusable,
    }
    _remove_earlier(out, files)
    write_json(out / SUMMARY, summary)
    values = {
        "title": _title(sections, collection),
        "opening": _opening(collection, sections),
        "again": _again(runs, out, pictures_of_images),
        "topics": [_topic_view(topic, parts) for topic in TOPICS if (parts := [s for s in sections if s.data.topic is topic])],
        "ablations": [_ablation_view(found) for part in sections for found in ablations(part, collection)],
        "curves": curves,
        "pictures": _picture_views(pictures),
        "cost": cost_table(collection),
        "environments": [plain_text(text) for text in environments(collection)],
        "records": record_table(collection, out),
        "commands": _commands(entry.record for entry in collection.entries),
        "unusable": [plain_text(line) for line in unusable],
    }
    write_page("report.md.j2", values, out / PAGE, refresh)
    return Report(out / PAGE, summary, sections, tuple(unusable))


def _title(sections: Sequence[Section], collection: Collection) -> str:
    titles = [row.title for part in sections for row, _ in part.cells if row.kind > 0]
    if not titles:
        titles = [entry.title for entry in collection.entries]
    data = [data_title(entry.record.data.source) for entry in _compared(collection)]
    several = list(dict.fromkeys(title.removesuffix("+MTE") for title in titles))
    if len(several) > 3:
        with_mte = ", with and without MTE," if any(title.endswith("+MTE") for title in titles) else ""
        return plain_text(f"{len(several)} methods{with_mte} on {_listed(data)}")
    return plain_text(f"{_listed(titles)} on {_listed(data)}")


def _opening(collection: Collection, sections: Sequence[Section]) -> dict[str, str]:
    """The parts of the sentence that says what was compared."""
    all_records = [entry.record for entry in collection.entries]
    found = [part.data.record for part in sections]
    trained_on = {_of_val(record) for record in found if "train" in record.data.images}
    evaluated = [record for record in found if "train" in record.data.images or _of_val(record) not in trained_on]
    seeds = sorted({record.subject.seed for record in all_records if record.subject.seed is not None})
    return {
        "methods": plain_text(_listed(entry.title for entry in _compared(collection))),
        "architectures": plain_text(_listed(architecture_title(record.subject) for record in all_records)),
        "data": _listed(f"{_data_title(record)} ({_data_text(record)})" for record in evaluated),
        "seeds": f"seed{'s' if len(seeds) > 1 else ''} {_listed(map(str, seeds))}" if seeds else "",
        "records": str(len(all_records)),
        "period": period(all_records),
        "machinery": plain_text(machinery(all_records)),
    }


def _of_val(record: Record) -> tuple[str, int | None]:
    """Equal for the same images to validate on, also where those to train on were not looked at."""
    return record.data.source, record.data.images.get("val")


def _compared(collection: Collection) -> Sequence[Entry]:
    """The entries that tell what a report is of: not cost, which is measured on noise, nor analyses of several runs."""

    def tells(record: Record) -> bool:
        return record.data.split != "none" and (not record.subject.parts or is_evaluation(record))

    return [entry for entry in collection.entries if tells(entry.record)] or collection.entries


def _data_title(record: Record) -> str:
    return plain_text(data_title(record.data.source))


def _data_text(record: Record) -> str:
    data = record.data
    names = {"train": "training", "val": "validation"}
    counts = " and ".join(f"{count:,} {names.get(split, split)}" for split, count in data.images.items())
    classes = f", {data.classes} classes" if data.classes else ""
    subset = f", subset {data.subset}" if data.subset else ""
    return plain_text(f"{counts} images{classes}{subset}")


def _again(runs: Iterable[str | Path], out: Path, pictures_of_images: bool) -> str:
    """The command that writes this report again, from the report's own folder, whatever order the runs were named in."""
    words = ["mte-bench", "report", *sorted({link_text(Path(run), out) for run in runs}), "--out", "."]
    return shlex.join(words if pictures_of_images else [*words, "--no-pictures-of-images"])


def _topic_view(topic: Topic, parts: Sequence[Section]) -> dict[str, Any]:
    views = [_section_view(part) for part in parts]
    titles = [view["title"] for view in views]
    for view in views:  # parts of one set of images are told apart by their sizes
        view["title"] += f": {view['data']}" if titles.count(view["title"]) > 1 else ""
    return {"title": topic.title, "paper": topic.paper, "parts": views}


def _section_view(part: Section) -> dict[str, Any]:
    record = part.data.record
    protocols = [f"{plain_text(c.name)} {code(c.metric)} by {code(c.protocol)}{_chosen(c, part)}" for c in part.columns]
    subset = f", subset {plain_text(record.data.subset)}" if record.data.subset else ""
    return {
        "title": _data_title(record) + subset,
        "beside_paper": _beside_paper(part),
        "unit": part.unit,
        "data": _data_text(record),
        "fingerprint": record.data.fingerprint,
        "protocols": _listed(protocols),
        "budgets": _budgets(part),
        "chance": f"{100 / record.data.classes:.3g}" if record.data.classes and part.is_top1 else None,
        "accuracy": accuracy_table(part),
        "seeds": seed_table(part),
        "has_repeats": any(row.repeat for row, _ in part.cells),
        "unpaired": any(_is_unpaired(row, cell) for row, cells in part.cells for cell in cells),
    }


def _is_unpaired(row: Row, cell: Cell) -> bool:
    """Whether a value with MTE is without the interval of its difference to the plain run's."""
    if row.kind != 2 or cell.value is None or cell.column.of_mte_alone:
        return False
    return cell.comparison is None or cell.comparison.interval is None


def _budgets(part: Section) -> list[str]:
    """What the trainings in each column took."""
    found = []
    for measure in part.data.measures:
        records = [entry.record for row in part.data.rows for entry in row.cells.get(measure, {}).values()]
        if text := budget(records):
            found.append(plain_text(f"{measure.title}: {text}"))
    return found


def _chosen(column: Measure, part: Section) -> str:
    """Which epoch a fine-tuned encoder is measured after."""
    found = (cell.entry for _, cells in part.cells for cell in cells if cell.column == column and cell.entry)
    how = next(found).record.protocol.settings.get("reports")
    return {"best": " (the best epoch on val)", "last": " (the last epoch)"}.get(str(how), "")


def _beside_paper(part: Section) -> str:
    """Why no number of the paper stands beside these; "" where one does, or the paper has none of this kind."""
    topic = part.data.topic
    if not topic.paper or any(cell.paper is not None for _, cells in part.cells for cell in cells):
        return ""
    if not any(same_data(name, part.data.record.data) for name in topic.data):
        names = " or ".join(paper()["comparable"]["data"][name]["name"] for name in topic.data)
        return f"Other data than the paper's ({names}), so none of its numbers stands beside these."
    return "No row is of the method, architecture, length and protocol of one of the paper's, so none of its numbers is here."


def _ablation_view(found: Ablation) -> dict[str, Any]:
    row, record = found.row, found.part.data.record
    method = plain_text(row.title.removesuffix("+MTE"))
    return {
        "title": plain_text(found.title),
        "number": found.number,
        "what": f"{method}, {plain_text(row.architecture)}, {row.epochs} epochs, on {_data_title(record)}",
        "table": found.as_table(),
    }


def _picture_views(pictures: dict[Kind, list[Figure]]) -> list[dict[str, Any]]:
    return [{"kind": kind, "figures": figures} for kind, figures in pictures.items()]


def _commands(records: Iterable[Record]) -> list[str]:
    """Each record's command once: pre-training first."""
    ordered = sorted(records, key=lambda record: record.task != "pretrain")
    return list(dict.fromkeys(" ".join(record.command.split()) for record in ordered))


def _remove_earlier(out: Path, files: Sequence[str]) -> None:
    """Remove the pictures that an earlier report, also one that was cut off, put into ``out`` and this one does not have."""
    kept = {Path(file).name for file in files}
    for path in (out / FOLDER).glob("*"):
        if path.name not in kept and path.name.lstrip(".").startswith(PREFIXES):
            path.unlink()


def _listed(words: Iterable[str]) -> str:
    """``a, b and c``, each once."""
    *most, last = dict.fromkeys(words) or [""]
    return f"{', '.join(most)} and {last}" if most else last
