"""The paper's numbers, and when one of them may stand beside a number measured here."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mte_bench.records import Record
from reports.naming import architecture_title, data_key, method_key

COLUMNS = {"knn": "knn_top1", "linear": "linear_top1"}
"""The paper's column of each task."""


@cache
def paper() -> dict[str, Any]:
    """The contents of ``paper.yaml``; tables by their id."""
    values = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))
    values["tables"] = {table["id"]: table for table in values["tables"]}
    return values


def printed(record: Record, recipe: Mapping[str, Any]) -> float | None:
    """What the paper prints in Table 5 or 6 for the method, architecture and epochs of ``record``.

    None unless data, protocol and pre-training are the paper's too; ``recipe`` (the resolved settings, empty if unknown)
    tells whether local views were used.
    """
    if not recipe or not _same_evaluation(record):
        return None
    subject = record.subject
    views = recipe.get("views", {}).get("local_count")
    for name, conditions in paper()["comparable"]["tables"].items():
        if views != conditions["local_views"]:
            continue
        for row in paper()["tables"][name]["rows"]:
            architecture = row["architecture"] or row.get("architecture_inherited")
            same = (
                method_key(row["method"]) == method_key(subject.method or "")
                and row["method"].endswith("+MTE") == subject.mte
                and architecture == architecture_title(subject)
                and row["epochs"] == subject.epochs
            )
            if same:
                return row[COLUMNS[record.task]]
    return None


def _same_evaluation(record: Record) -> bool:
    known, data, subject = paper()["comparable"], record.data, record.subject
    protocol = known["protocols"].get(record.task)
    return (
        protocol is not None
        and record.protocol.name == protocol["name"]
        and all(record.protocol.settings.get(key) == value for key, value in protocol["settings"].items())
        and data.subset is None
        and data.classes == known["data"]["classes"]
        and data.images.get("train") == known["data"]["train"]
        and data.images.get("val") == known["data"]["val"]
        and data_key(data.source) == data_key(subject.pretrain_data or "")
        and subject.image_size == known["image_size"]
    )
