"""From record files to the rows of a table: which records measure the same kind of encoder on the same images.

Nothing is averaged here and nothing is dropped: a record that cannot be used is named, and a record that measures again
what another one measured starts a row of its own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mte_bench.errors import UserError
from mte_bench.files import hash_of
from mte_bench.naming import architecture_title, data_key, method_title
from mte_bench.records import Data, Record, Subject, find_records, read_record
from reports.topics import HEADLINES, OF_MTE_ALONE, TOPICS, Topic, headline, is_evaluation, topic_of


@dataclass(frozen=True)
class Entry:
    """A record and the folder that it lies in."""

    folder: Path
    record: Record

    @property
    def title(self) -> str:
        """The method as tables print it."""
        return method_title(self.record.subject)


@dataclass(frozen=True)
class Unusable:
    """A file that was left out, and why."""

    path: Path
    reason: str


class Measure(NamedTuple):
    """A column: one metric of one task under one protocol."""

    task: str
    metric: str
    protocol: str
    name: str
    """The task as tables call it."""
    title: str
    """The name, with the protocol where the task was measured under several."""

    @property
    def of_mte_alone(self) -> bool:
        """Whether only rows with MTE can have a value here."""
        return self.metric in OF_MTE_ALONE

    def further(self, metric: str, name: str) -> "Measure":
        """Another metric of the same task and protocol."""
        return self._replace(metric=metric, name=name, title=name + self.title.removeprefix(self.name))


SEED = int | None


@dataclass(frozen=True)
class Collection:
    """Every usable record, in an order that depends on what they say and not on where they lie."""

    entries: tuple[Entry, ...]
    unusable: list[Unusable] = field(default_factory=list)
    """Files that could not be used; those beside the records (curves, predictions, pictures) are added when they are read."""

    def of(self, *tasks: str) -> list[Entry]:
        """The entries of some tasks."""
        return [entry for entry in self.entries if entry.record.task in tasks]

    @property
    def evaluations(self) -> list[Entry]:
        """The entries that accuracy tables, comparisons and baselines are of."""
        return [entry for entry in self.entries if is_evaluation(entry.record)]

    @cached_property
    def recipes(self) -> Mapping[str, Mapping[str, Any]]:
        """Recipe hash to the recipe's resolved settings, as the pre-training records state them."""
        pretrained = [entry.record for entry in self.of("pretrain")]
        return {r.subject.recipe_hash: r.protocol.settings for r in pretrained if r.subject.recipe_hash and r.protocol.settings}

    def recipe(self, subject: Subject) -> Mapping[str, Any]:
        """The resolved recipe that ``subject`` was pre-trained with; empty if no pre-training record tells."""
        return self.recipes.get(subject.recipe_hash or "", {})

    @cached_property
    def _pretrainings(self) -> Mapping[tuple[str | None, str], Record]:
        pretrained = [entry.record for entry in self.of("pretrain")]
        return {(record.subject.recipe_hash, data_key(record.data.source)): record for record in pretrained}

    def pretraining(self, subject: Subject) -> Record | None:
        """The record of a run by the recipe and on the data that ``subject`` was pre-trained with, by any seed, or None."""
        if subject.recipe_hash is None or subject.pretrain_data is None:
            return None
        return self._pretrainings.get((subject.recipe_hash, data_key(subject.pretrain_data)))


def collect(paths: Iterable[str | Path]) -> Collection:
    """Read every record below ``paths``; those that are broken or of another schema are kept as ``unusable``.

    Raises ``UserError`` if a path does not exist or nothing usable is found.
    """
    paths = list(paths)
    entries: list[Entry] = []
    unusable: list[Unusable] = []
    for path in find_records(paths):
        try:
            entries.append(Entry(path.parent, read_record(path)))
        except (UserError, RecursionError) as error:
            unusable.append(Unusable(path, str(error).removeprefix(f"{path}: ")))
    if not entries:
        where = ", ".join(map(str, paths))
        if not unusable:
            raise UserError(f"{where}: no record.json below; give the folders that pretrain, knn, linear or finetune wrote")
        first = f"{unusable[0].path}: {unusable[0].reason}"
        raise UserError(f"{where}: none of {len(unusable)} records can be read; the first is {first}")
    return Collection(tuple(sorted(entries, key=_order)), unusable)


def _order(entry: Entry) -> tuple[str, ...]:
    record, subject = entry.record, entry.record.subject
    seed = "" if subject.seed is None else f"{subject.seed:012d}"
    rank = "0" if is_random(subject) else "1"
    kind = (
        rank,
        architecture_title(subject),
        (subject.method or subject.family).lower(),
        f"{subject.epochs or 0:012.3f}",
        str(subject.mte),
    )
    return (record.data.source, *kind, seed, record.task, record.created, subject.sha256, protocol_text(record), record.command)


def protocol_text(record: Record) -> str:
    """The protocol as ``name@version`` and the hash of its settings: equal texts mean comparable numbers."""
    return f"{record.protocol.name}@{record.protocol.version} {hash_of(record.protocol.settings, 8)}"


def is_random(subject: Subject) -> bool:
    """Whether the subject is an encoder as it was initialised."""
    return subject.family == "random"


@dataclass
class Row:
    """One kind of encoder on one data source: its measurements by column, then by seed."""

    key: tuple[object, ...]
    """Equal for the same kind of encoder, also in another collection."""
    subject: Subject
    """Of its first measurement: all that is not the seed or the weights is common to the row."""
    title: str
    architecture: str
    repeat: int
    """0 for the first measurement of each seed, 1 for the second, and so on."""
    plain_recipe: str | None
    """Hash of the recipe without MTE; rows that share it differ in MTE alone. None if the recipe is not known."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The resolved settings of the pre-training; empty if they are not known."""
    cells: dict[Measure, dict[SEED, Entry]] = field(default_factory=dict)

    @property
    def kind(self) -> int:
        """0 random, 1 plain, 2 with MTE."""
        return 0 if is_random(self.subject) else 2 if self.subject.mte else 1

    @property
    def epochs(self) -> str:
        """Length of the pre-training, ``–`` if it is not known."""
        epochs = 0 if self.kind == 0 else self.subject.epochs
        return "–" if epochs is None else f"{epochs:g}"

    @property
    def name(self) -> str:
        """The encoder in a few words."""
        return f"{self.title}, {self.architecture}{self.repetition}"

    @property
    def repetition(self) -> str:
        """Which repeat it is; "" for the first measurement."""
        return f" (repeat {self.repeat + 1})" if self.repeat else ""


@dataclass(frozen=True)
class DataTable:
    """Everything of one topic that was measured on one set of images."""

    topic: Topic
    record: Record
    """One of them: its ``data`` is common to all."""
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]

    def baseline(self, row: Row) -> Row | None:
        """The plain row with the same recipe as ``row``, which has MTE; None if there is none or the recipe is not known."""
        if row.kind != 2 or row.plain_recipe is None:
            return None
        return self._plain.get(partner(row))

    @cached_property
    def _plain(self) -> dict[tuple[object, ...], Row]:
        """The first repeat of each plain row, by what a row with MTE must share with it."""
        rows = sorted((row for row in self.rows if row.kind == 1), key=lambda row: row.repeat)
        return {partner(row): row for row in reversed(rows)}


def partner(row: Row) -> tuple[object, ...]:
    """What a row with MTE and the plain row that it is compared with have in common."""
    subject = row.subject
    encoder = (row.architecture, subject.image_size, len(subject.parts))
    return (row.plain_recipe, *encoder, subject.epochs, data_key(subject.pretrain_data or ""))


def images_key(data: Data) -> tuple[str, str, str]:
    """Equal for the same images, by fingerprint and subset: the path that they lay at does not matter."""
    return (data.fingerprint, data.subset or "", data.split)


def data_tables(collection: Collection) -> list[DataTable]:
    """One table per topic and set of images, in the order of the topics."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for topic in TOPICS:
        for entry in collection.evaluations:
            if topic_of(entry.record.task) is topic:
                groups.setdefault((topic.title, *images_key(entry.record.data)), []).append(entry)
    return [_table(collection, entries) for entries in groups.values()]


def _table(collection: Collection, entries: list[Entry]) -> DataTable:
    rows: dict[tuple[object, ...], Row] = {}
    for key, repeat, measure, entry in _places(entries):
        subject = entry.record.subject
        if (key, repeat) not in rows:
            titles, recipe = (method_title(subject), architecture_title(subject)), collection.recipe(subject)
            rows[key, repeat] = Row(key, subject, *titles, repeat, plain_hash(recipe), recipe)
        rows[key, repeat].cells.setdefault(measure, {})[subject.seed] = entry
    ordered = sorted(rows.values(), key=_row_order)
    record = entries[0].record
    return DataTable(topic_of(record.task), record, _measures(entries), tuple(ordered))


def _row_order(row: Row) -> tuple[object, ...]:
    subject = row.subject
    method = (subject.method or subject.family).lower()
    random_first = row.kind > 0
    same = (row.architecture, subject.image_size or 0, method, subject.epochs or 0.0)
    return (random_first, *same, row.kind, subject.recipe_hash or "", row.repeat, subject.checkpoint)


def _places(entries: list[Entry]) -> list[tuple[tuple[object, ...], int, Measure, Entry]]:
    """For each entry its row's key, which repeat of that row it belongs to, and its column.

    A row holds each seed once. What measures the same again (the same weights under the same protocol, or other weights
    from the same recipe and seed) belongs to the next repeat.
    """
    columns = {(measure.task, measure.protocol): measure for measure in _measures(entries)}
    slots: dict[tuple[object, ...], list[tuple[str, int]]] = {}  # of each row and seed: (weights, how often measured)
    taken: dict[tuple[object, ...], int] = {}
    placed = []
    for entry in entries:
        subject = entry.record.subject
        measure = columns[entry.record.task, protocol_text(entry.record)]
        times = taken.get((subject.sha256, measure), 0)
        taken[subject.sha256, measure] = times + 1
        key = _row_key(subject)
        slot = slots.setdefault((key, subject.seed), [])
        if (subject.sha256, times) not in slot:
            slot.append((subject.sha256, times))
        placed.append((key, (subject.sha256, times), measure, entry))
    for slot in slots.values():  # repeats of one encoder stay together, encoders in the order in which they were met
        first = {sha: index for index, (sha, _) in reversed(list(enumerate(slot)))}
        slot.sort(key=lambda place: (first[place[0]], place[1]))
    return [(key, slots[key, entry.record.subject.seed].index(place), measure, entry) for key, place, measure, entry in placed]


def _row_key(subject: Subject) -> tuple[object, ...]:
    named = () if subject.seed is not None else (subject.sha256,)  # without a seed each checkpoint is its own kind
    kind = ("random",) if is_random(subject) else (subject.method or subject.family, subject.mte, subject.epochs)
    network = (architecture_title(subject), subject.arch, subject.image_size)
    return (*kind, *network, subject.recipe_hash or subject.recipe, data_key(subject.pretrain_data or ""), *named)


def _measures(entries: list[Entry]) -> tuple[Measure, ...]:
    """The columns of ``entries``; the protocol is part of the title only where a task was measured under several."""
    protocols: dict[str, dict[str, str]] = {}  # task to its protocols, each with its metric
    for entry in entries:
        protocols.setdefault(entry.record.task, {}).setdefault(protocol_text(entry.record), headline(entry.record))
    known = list(HEADLINES)
    result: list[Measure] = []
    for task in sorted(protocols, key=lambda task: (known.index(task) if task in known else len(known), task)):
        usual, name = HEADLINES.get(task, ("", task))
        short = [text.partition("@")[0] for text in protocols[task]]
        for text, metric in sorted(protocols[task].items(), key=lambda item: (item[1] != usual, item)):
            alone = text.partition("@")[0]
            which = alone if short.count(alone) == 1 else text
            told_apart = f" ({which}{'' if metric == usual else f', {metric}'})" if len(short) > 1 else ""
            result.append(Measure(task, metric, text, name, name + told_apart))
    return tuple(result)


NOT_OF_THE_METHOD = ("mte", "description", "paper_row", "knn_every", "snapshot_every")
"""Settings of a recipe that may differ between a method and what it is compared with: MTE, and what no weight depends on."""


def plain_hash(recipe: Mapping[str, Any]) -> str | None:
    """A hash of the recipe without ``NOT_OF_THE_METHOD``, equal for a method and the same method with MTE; None for none."""
    if not recipe:
        return None
    return hash_of({key: value for key, value in recipe.items() if key not in NOT_OF_THE_METHOD})
