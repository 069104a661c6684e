"""The kinds of tables that a report has, in the order of the paper's: which tasks are in one, and what is a column there."""

from typing import NamedTuple

from mte_bench.records import Record

HEADLINES = {
    "knn": ("top1_k10", "k-NN"),
    "linear": ("top1", "linear"),
    "retrieval": ("recall_1", "retrieval"),
    "finetune": ("top1", "fine-tuned"),
    "classify": ("top1", "own classifier"),
    "inat": ("top1", "fine-tuned on iNaturalist"),
    "coco": ("bbox_mAP", "box mAP"),
    "ade20k": ("mIoU", "mIoU"),
}
"""The metric that stands for a task in tables, and the task's name there; of other tasks, and where a protocol has other
metrics, it is the first one."""

FURTHER = {
    "linear": {"top1_best_on_val": "linear, best on val"},
    "classify": {"top1_fused": "fused classifiers"},
    "inat": {"top1_mean_over_classes": "mean over classes"},
    "coco": {"segm_mAP": "mask mAP"},
}
"""Metrics that have columns of their own beside a task's headline, where a record has them, and the columns' names."""

OF_MTE_ALONE = ("top1_fused",)
"""Metrics of auxiliary tokens: a plain encoder cannot have them, and so there is nothing to compare them with."""


class Topic(NamedTuple):
    """Tasks whose tables stand together."""

    title: str
    tasks: tuple[str, ...]
    """Empty: every other."""
    paper: str
    """The paper's tables of the same; "" if there is none."""
    data: tuple[str, ...]
    """The paper's sets of images there, as ``paper.yaml`` names them."""


TOPICS = (
    Topic("k-NN, linear probing and retrieval", ("knn", "linear", "retrieval"), "Tables 5 and 6", ("imagenet", "imagenet300")),
    Topic("Fine-tuning", ("finetune",), "Table 7", ("imagenet",)),
    Topic("Supervised classification", ("classify",), "Tables 8 and 14", ("imagenet",)),
    Topic("Fine-tuning on iNaturalist", ("inat",), "Table 9", ("inat18", "inat19")),
    Topic("Detection and instance segmentation", ("coco",), "Table 10", ("coco",)),
    Topic("Semantic segmentation", ("ade20k",), "Table 11", ("ade20k",)),
    Topic("Other tasks", (), "", ()),
)


def topic_of(task: str) -> Topic:
    """Where the tables of ``task`` stand."""
    return next(topic for topic in TOPICS if task in topic.tasks or not topic.tasks)


def is_evaluation(record: Record) -> bool:
    """Whether a record belongs into the tables: one with predictions, image by image, or of a task known to have them."""
    return record.task in HEADLINES or record.predictions is not None


def headline(record: Record) -> str:
    """The metric that stands for a record; "" if it has none.

    Of several kinds of feature it is the first but the global token's, which the task's usual protocol measures.
    """
    known = HEADLINES.get(record.task, ("", ""))[0]
    if known in record.metrics or not record.metrics:
        return known
    others = [name for name in record.metrics if name.startswith("top1") and not name.endswith("_global")]
    return next(iter(others or record.metrics))
