"""The paper's numbers, and when one of them may stand beside a number measured here: ``paper.yaml`` holds both."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mte_bench.files import hash_of
from mte_bench.naming import architecture_title, method_key
from mte_bench.records import Data, Record

Values = Mapping[str, Any]


@cache
def paper() -> dict[str, Any]:
    """The contents of ``paper.yaml``; tables by their id."""
    values = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
    values["tables"] = {table["id"]: table for table in values["tables"]}
    return values


def printed(record: Record, metric: str, pretraining: Record | None) -> float | None:
    """What the paper prints where ``metric`` of ``record`` stands in its tables of methods (3 to 7, 9 to 11).

    None unless data, protocol and pre-training are the paper's too; ``pretraining`` is the record of the run that the encoder
    comes from, and None if there is no such record.
    """
    if pretraining is None or not _same_encoder(pretraining):
        return None
    for column, table in _columns(record, metric, pretraining):
        for row in table["rows"]:
            meant = column.get("architecture") in (None, _read(row, "architecture"))
            meant = meant and row.get("image_size_inferred") == column.get("image_size")
            if meant and _same_row({**column.get("unprinted", {}), **row}, record, pretraining):
                return row[column["column"]]
    return None


def printed_in(ablation: Values, row: int, record: Record, metric: str, pretraining: Record | None) -> float | None:
    """What the paper prints for ``metric`` in a row (counted from 0) of the table that ``ablation`` describes, or None."""
    if pretraining is None or "recipe" not in ablation:
        return None
    recipe = pretraining.protocol.settings
    tokens = recipe.get("mte")
    if not _holds(ablation["recipe"], recipe) or not (
        tokens is None or _holds(ablation.get("mte", {}), tokens, ablation["settings"])
    ):
        return None
    for column, table in _columns(record, metric, pretraining):
        if table["id"] == ablation["table"]:
            return table["rows"][row][column["column"]]
    return None


def same_data(name: str, data: Data) -> bool:
    """Whether ``data`` is the whole of the paper's set ``name``, by its numbers of classes and images.

    What trains nothing has no images to train on; it must have those of val.
    """
    known = paper()["comparable"]["data"][name]
    same = data.classes == known["classes"] and "val" in data.images
    return data.subset is None and same and all(known.get(split) == count for split, count in data.images.items())


def _columns(record: Record, metric: str, pretraining: Record) -> Iterator[tuple[Values, Values]]:
    """The printed columns of the metric, protocol and data of ``record`` and of its pre-training's data, each with its table."""
    known = paper()["comparable"]
    protocol = _protocol(record, known["free_settings"])
    views = pretraining.protocol.settings.get("views", {}).get("local_count")
    for column in known["columns"]:
        if column["metric"] != metric or column["protocol"] != protocol or not same_data(column["data"], record.data):
            continue
        trained_on = "imagenet300" if column["data"] == "imagenet300" else "imagenet"
        for name, local_views in column["tables"].items():
            if views == local_views and _same_training_data(trained_on, pretraining.data):
                yield column, paper()["tables"][name]


def _protocol(record: Record, free: list[str]) -> str:
    """Name, version and settings, as ``paper.yaml`` writes them."""
    settings = {key: value for key, value in record.protocol.settings.items() if key not in free}
    return f"{record.protocol.name}@{record.protocol.version} {hash_of(settings, 8)}"


def _same_training_data(name: str, data: Data) -> bool:
    known = paper()["comparable"]["data"][name]
    return data.subset is None and (data.classes, data.images.get("train")) == (known["classes"], known["train"])


def _same_encoder(pretraining: Record) -> bool:
    known, subject = paper()["comparable"], pretraining.subject
    recipe = pretraining.protocol.settings
    tokens = recipe.get("mte")
    expected = known["mte_swin" if subject.arch.startswith("swin") else "mte"]
    same_tokens = tokens is None or _holds(expected, tokens)
    return subject.image_size == known["image_size"] and recipe.get("token_learner") is None and same_tokens


def _holds(expected: Values, settings: Values, but: list[str] | tuple[str, ...] = ()) -> bool:
    """Whether ``settings`` are as ``expected``, apart from some keys and from settings that the run did not know yet."""
    return all(key in but or settings.get(key, value) == value for key, value in expected.items())


def _same_row(row: Values, record: Record, pretraining: Record) -> bool:
    subject = pretraining.subject
    method = method_key(subject.method or "")
    architecture, epochs = (_read(row, *keys) for keys in (("architecture",), ("epochs", "epoch_dagger")))
    architecture = paper()["comparable"]["architectures"].get(method, {}).get(architecture, architecture)
    return (
        method_key(row["method"]) == method
        and row.get("with_mte", row["method"].endswith("+MTE")) == subject.mte
        and row.get("models", 1) == max(1, len(record.subject.parts))
        and (architecture, epochs) == (architecture_title(subject), subject.epochs)
    )


def _read(row: Values, *keys: str) -> Any:
    """A cell of a row under one of ``keys``: as it is printed, as it is merged with the one above, or as the prose has it."""
    found = (row.get(f"{key}{ending}") for key in keys for ending in ("", "_inherited", "_inferred"))
    return next((value for value in found if value is not None), None)
