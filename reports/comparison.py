"""How a comparison is shown: on the terminal, and as a page with every class and pictures of what changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mte_bench.console import log, show_table
from mte_bench.files import write_json
from mte_bench.naming import data_title, is_embedded, slug
from mte_bench.records import Data
from reports.classes import AnyClasses, ClassChange, DenseChange
from reports.compare import Value
from reports.examples import draw_examples
from reports.figures import FOLDER
from reports.markdown import Table, code, interval, number, plain_text, plus_minus, probability
from reports.page import write_page
from reports.pairs import Pair, Pairs, as_values

PAGE, SUMMARY = "compare.md", "compare.json"
PREFIX = "changed-"
SCHEMA_VERSION = 1
SHOWN_CLASSES = 5  # winners and losers on the terminal
SHOWN_PAIRS = 4  # with more of them the terminal shows no classes
PICTURED = 3  # winners and losers with pictures
CLASS_COLUMNS = ("Class", "n", "A", "B", "B − A", "only B right", "only A right")
DENSE_COLUMNS = ("Class", "images", "A", "B", "B − A [95 %]")
METRIC_COLUMNS = ("Metric", "A", "B", "B − A [95 %]")


def show(pairs: Pairs, a: str, b: str) -> None:
    """The tables on stdout, what could not be compared on stderr."""
    rows = [
        [
            pair.measure.name,
            data_text(pair),
            encoders(pair),
            f"{pair.images:,}",
            _value(pair.values[0]),
            _value(pair.values[1]),
            f"{plus_minus(pair.change.difference)} {interval(pair.change.interval, signed=True)}",
            probability(pair.change.p_value),
            seeds(pair),
        ]
        for pair in pairs.found
    ]
    columns = ["task", "data", "encoder", "n", "A", "B", "B − A [95 %]", "McNemar p", "seeds"]
    show_table(f"A = {a}, B = {b} (percent; ± over seeds)", columns, rows)
    if len(pairs.found) <= SHOWN_PAIRS:
        for pair in pairs.found:
            _show_metrics(pair)
            _show_classes(pair)
    else:
        log(f"classes of {len(pairs.found)} comparisons: write them with --out DIR, or see --json")
    for name, cells in pairs.alone.items():
        for cell in cells:
            log(f"only in {name}: {cell}")
    for line in pairs.unusable:
        log(f"left out: {line}")


def _show_metrics(pair: Pair) -> None:
    """Of a dense task, whose numbers are many."""
    if pair.metrics:
        title = f"{pair.measure.name}, {encoders(pair)}: every metric"
        show_table(title, ["metric", *METRIC_COLUMNS[1:]], [list(row) for row in _metric_rows(pair)])


def _metric_rows(pair: Pair) -> list[tuple[str, ...]]:
    return [
        (m.name, number(m.a), number(m.b), f"{plus_minus(m.b - m.a)} {interval(m.interval, signed=True)}") for m in pair.metrics
    ]


def _show_classes(pair: Pair) -> None:
    if pair.classes is None:
        log(f"{pair.measure.name}, {encoders(pair)}: no classes, as {_why_no_classes(pair)}")
        return
    changes = [*pair.classes.winners(SHOWN_CLASSES), *reversed(pair.classes.losers(SHOWN_CLASSES))]
    rows = []
    for change in changes:
        cells = _class_cells(change)
        if isinstance(change, ClassChange):
            examples = change.winning if change.difference > 0 else change.losing
            cells = (*cells, ", ".join(example.name for example in examples[:2]))
        rows.append(list(cells))
    dense = any(isinstance(change, DenseChange) for change in pair.classes.every)
    columns = [*(DENSE_COLUMNS if dense else CLASS_COLUMNS), *([] if dense else ["for example"])]
    by = f" in {pair.measure.metric}" if dense else ""
    title = f"{pair.measure.name}, {encoders(pair)}: classes that gain and lose most{by}, of {len(pair.classes.every)}"
    show_table(title, [columns[0].lower(), *columns[1:]], rows)


def _why_no_classes(pair: Pair) -> str:
    if pair.metrics:
        return f"{pair.measure.metric} is no mean over classes"
    return "predictions of the same images are not beside both records"


def _class_cells(change: ClassChange | DenseChange) -> tuple[str, ...]:
    """As ``CLASS_COLUMNS`` or ``DENSE_COLUMNS`` says."""
    shared = (change.name, f"{change.images:,}", number(change.a), number(change.b))
    if isinstance(change, DenseChange):
        return (*shared, f"{plus_minus(change.difference)} {interval(change.interval, signed=True)}")
    return (*shared, plus_minus(change.difference), f"{change.gained:.4g}", f"{change.lost:.4g}")


def _value(value: Value) -> str:
    return number(value.value) + ("" if value.spread is None else f" ± {value.spread:.2f}")


def encoders(pair: Pair) -> str:
    """What is compared, in a few words."""
    a, b = pair.a, pair.b
    if a.name == b.name:
        return a.name
    if a.architecture != b.architecture or a.repeat or b.repeat:
        return f"{a.name} → {b.name}"
    return f"{a.title} → {b.title}, {a.architecture}"


def data_text(pair: Pair) -> str:
    """The data's name and subset."""
    return data_title(pair.data.source) + (f" ({pair.data.subset})" if pair.data.subset else "")


def seeds(pair: Pair) -> str:
    """How many seeds: ``3``, of both if they differ ``3 / 2``, and how many pairs of them where not all have one."""
    counts = [len(value.seeds) for value in pair.values]
    text = str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} / {counts[1]}"
    pairs = len(pair.change.seeds)
    return text if pairs in counts and counts[0] == counts[1] else f"{text}, {pairs or 'none'} in pairs"


def write(pairs: Pairs, a: str, b: str, out: str | Path, pictures: bool = True) -> Path:
    """Write ``out/compare.md``, ``compare.html`` and ``compare.json``, with ``pictures`` also some images that changed.

    Images of the embedded data are shown always. Pictures need the source to be where the records say; where it is not, a
    remark says so. Returns the page's path.
    """
    out = Path(out)
    found: list[str] = []
    sections = []
    for index, pair in enumerate(pairs.found):
        section: dict[str, Any] = {"title": plain_text(f"{pair.measure.name} on {data_text(pair)}: {encoders(pair)}")}
        section |= {"summary": _summary(pair), "metrics": _metric_table(pair), "classes": _class_table(pair), "pictures": []}
        section["why"] = plain_text(_why_no_classes(pair))
        if (pictures or is_embedded(pair.data.source)) and pair.classes is not None:
            stem = f"{FOLDER}/{PREFIX}{index + 1}-{slug(data_title(pair.data.source))}"
            section["pictures"] = _pictures(pair.classes, pair.data, out, stem)
            found += [file for file, _ in section["pictures"]]
        sections.append(section)
    for path in (out / FOLDER).glob(f"{PREFIX}*"):
        if f"{FOLDER}/{path.name}" not in found:
            path.unlink()
    write_json(out / SUMMARY, {"schema_version": SCHEMA_VERSION, **as_values(pairs)})
    values = {
        "a": a,
        "b": b,
        "overview": _overview(pairs.found),
        "sections": sections,
        "alone": {name: [plain_text(cell) for cell in cells] for name, cells in pairs.alone.items()},
        "unusable": [plain_text(line) for line in pairs.unusable],
    }
    write_page("compare.md.j2", values, out / PAGE)
    return out / PAGE


def _overview(pairs: Sequence[Pair]) -> Table:
    rows = []
    for pair in pairs:
        change = pair.change
        spread = "" if change.spread is None else f"\n± {change.spread:.2f} over seeds"
        rows.append(
            (
                plain_text(pair.measure.name) + f"\n{code(pair.measure.metric)}\n{code(pair.measure.protocol)}",
                f"{plain_text(data_text(pair))}\n{code(pair.data.fingerprint[:8])}",
                plain_text(encoders(pair)),
                f"{pair.images:,}",
                seeds(pair),
                *(f"**{_value(value)}**\n{interval(value.interval)}" for value in pair.values),
                f"**{plus_minus(change.difference)}**\n{interval(change.interval, signed=True)}{spread}",
                probability(change.p_value),
            )
        )
    columns = ("Task", "Data", "Encoder", "n", "Seeds", "A [95 %]", "B [95 %]", "B − A [95 %]", "McNemar p")
    return Table(columns, tuple(rows), "lllrrrrrr")


def _summary(pair: Pair) -> Table | None:
    """Seed by seed; None for one."""
    if len(pair.change.seeds) < 2:
        return None
    rows = tuple(
        (
            str(seed.seed),
            number(seed.plain),
            number(seed.value),
            f"{plus_minus(seed.difference)} {interval(seed.interval, signed=True)}",
            probability(seed.p_value),
        )
        for seed in pair.change.seeds
    )
    return Table(("Seed", "A", "B", "B − A [95 %]", "McNemar p"), rows, "rrrrr")


def _metric_table(pair: Pair) -> Table | None:
    """Every metric of a dense task; None for others."""
    return Table(METRIC_COLUMNS, tuple((code(row[0]), *row[1:]) for row in _metric_rows(pair)), "lrrr") if pair.metrics else None


def _class_table(pair: Pair) -> Table | None:
    """Every class, those first that gain most."""
    if pair.classes is None:
        return None
    every: list[ClassChange | DenseChange] = sorted(pair.classes.every, key=lambda change: -change.difference)
    dense = any(isinstance(change, DenseChange) for change in every)
    rows = [(plain_text(change.name), *_class_cells(change)[1:]) for change in every]
    columns = DENSE_COLUMNS if dense else CLASS_COLUMNS
    return Table(columns, tuple(rows), "l" + "r" * (len(columns) - 1))


def _pictures(classes: AnyClasses, data: Data, out: Path, stem: str) -> list[tuple[str, str]]:
    """Files and what they show: images of the classes that gain and lose most; none where they cannot be opened."""
    drawn = []
    for name, what, changes in (
        ("gained", "right in B alone", classes.winners(PICTURED)),
        ("lost", "right in A alone", classes.losers(PICTURED)),
    ):
        rows = [
            (change.name, change.winning if name == "gained" else change.losing)
            for change in changes
            if isinstance(change, ClassChange)
        ]
        file = f"{stem}-{name}.png"
        if rows and draw_examples(data, rows, out / file):
            titles = ", ".join(title for title, _ in rows)
            drawn.append((file, plain_text(f"Images {what}, of {titles}; below each what A and what B says")))
    return drawn
