"""What the runs cost, and the list of every record."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mte_bench.naming import architecture_title, data_title, method_title
from mte_bench.records import RECORD_NAME, Record
from reports.collect import Collection, Entry, plain_hash, protocol_text
from reports.markdown import MISSING, Table, code, interval, link, plain_text
from reports.topics import headline, is_evaluation

VERSIONS = ("mte-bench", "torch", "torchvision", "timm", "faiss-cpu", "python")
"""Those of a record's versions that the report shows."""


def cost_table(collection: Collection) -> Table | None:
    """What each pre-training run took, and with MTE how many times the plain run's; None if there is no run."""
    runs = [entry.record for entry in collection.of("pretrain")]
    plain: dict[tuple[object, ...], Record] = {}
    for record in runs:
        if not record.subject.mte:
            plain.setdefault(_setting(record, collection), record)
    rows = [_cost(record, plain.get(_setting(record, collection))) for record in runs]
    ratios = [f"{what}\n+MTE ÷ plain" for what in ("Time", "Images/s", "Memory")]
    columns = ("Method", "Architecture", "Data", "Device", "Epochs", "Seed", "Time", "Images/s", "Peak memory", *ratios)
    return Table(columns, tuple(rows), "llllrrrrrrrr") if rows else None


def _setting(record: Record, collection: Collection) -> tuple[object, ...]:
    """What must be equal for the cost of two runs to be compared."""
    recipe = plain_hash(collection.recipe(record.subject)) or record.subject.sha256
    how = (device(record), record.details.get("precision"), record.details.get("processes"))
    return (recipe, record.subject.seed, record.data.fingerprint, *map(str, how))


def _cost(record: Record, plain: Record | None) -> tuple[str, ...]:
    subject, cost = record.subject, record.cost
    ratios = ["", "", ""]
    if subject.mte:
        names = ("seconds", "images_per_second", "peak_memory_bytes")
        ratios = [_ratio(getattr(cost, name), getattr(plain.cost, name) if plain else None) for name in names]
    return (
        plain_text(method_title(subject)),
        plain_text(architecture_title(subject)),
        plain_text(data_title(record.data.source)),
        plain_text(device(record)),
        MISSING if subject.epochs is None else f"{subject.epochs:g}",
        MISSING if subject.seed is None else str(subject.seed),
        duration(cost.seconds),
        MISSING if cost.images_per_second is None else _significant(cost.images_per_second),
        MISSING if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**30:.2f} GiB",
        *ratios,
    )


def _ratio(value: float | None, plain: float | None) -> str:
    return f"{value / plain:.2f}" if value and plain else MISSING


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``42 s``, ``4 min 10 s``, ``3 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def record_table(collection: Collection, out: Path) -> Table:
    """Every record, one line each; the column of that name counts ``environments`` from 1."""
    numbers = {text: number for number, text in enumerate(environments(collection), start=1)}
    rows = [_record_row(entry, out, numbers) for entry in collection.entries]
    columns = ("Record", "Subject", "Seed", "Data", "Protocol", "Value", "n", "Fingerprint", "Checkpoint", "Environment", "Made")
    return Table(columns, tuple(rows), "llrllrrllll")


def _record_row(entry: Entry, out: Path, environments: Mapping[str, int]) -> tuple[str, ...]:
    record, subject = entry.record, entry.record.subject
    name, value, n = headline_value(record)
    return (
        f"[{plain_text(record.task)}]({link(entry.folder / RECORD_NAME, out)})",
        f"{plain_text(method_title(subject))}, {plain_text(architecture_title(subject))}",
        MISSING if subject.seed is None else str(subject.seed),
        plain_text(data_title(record.data.source)) + (f" ({plain_text(record.data.subset)})" if record.data.subset else ""),
        code(protocol_text(record)),
        MISSING if value is None else f"{plain_text(name)} {value}",
        MISSING if n is None else f"{n:,}",
        code(record.data.fingerprint[:8]),
        code(subject.sha256[:8]),
        str(environments[environment(record)]),
        record.created[:10],
    )


def headline_value(record: Record) -> tuple[str, str | None, int | None]:
    """Name, value with interval, and n of the metric that stands for a record."""
    name = headline(record)
    if name not in record.metrics:
        return name, None, None
    metric = record.metrics[name]
    ends = f" {interval(metric.ci95)}" if metric.ci95 and is_evaluation(record) else ""
    return name, f"{metric.value:.4g}{ends}", metric.n


def environment(record: Record) -> str:
    """Device, versions and source state of a record in one line."""
    commit = record.environment.get("git_commit")
    source = [f"commit {commit[:8]}" + (" with changes" if record.environment.get("dirty") else "")] if commit else []
    return ", ".join([device(record), *_versions(record), *source])


def device(record: Record) -> str:
    """What the record was computed on."""
    return str(record.environment.get("device") or "unknown device")


def _versions(record: Record) -> list[str]:
    found = record.environment.get("versions") or {}
    return [f"{name} {found[name]}" for name in VERSIONS if name in found]


def machinery(records: Sequence[Record]) -> str:
    """Every device and every version that the records were made with."""
    devices = dict.fromkeys(device(record) for record in records)
    versions = sorted({text for record in records for text in _versions(record)}, key=lambda text: (_rank(text), text))
    return f"on {', '.join(devices)}" + (f" with {', '.join(versions)}" if versions else "")


def _rank(version: str) -> int:
    return VERSIONS.index(version.rpartition(" ")[0])


def environments(collection: Collection) -> list[str]:
    """Each environment once, in the order in which it is met."""
    return list(dict.fromkeys(environment(entry.record) for entry in collection.entries))


def period(records: Sequence[Record]) -> str:
    """The day or days on which the records were made."""
    days = sorted({record.created[:10] for record in records})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
