"""Fine-tuning on iNaturalist: accuracy of species, of each taxonomic rank above them, and of common and rare classes.

A prediction is right at a rank if the predicted species belongs to the same taxon there as the true one. Classes with
more training images than ``shots[1]`` are many-shot, those with fewer than ``shots[0]`` few-shot, the others medium-shot,
and each of the three counts its classes alike, however many val images they have (Liu et al., "Large-Scale Long-Tailed
Recognition in an Open World", CVPR 2019: 20 and 100).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from downstream.evaluate import percentage
from downstream.finetune import Answers, Measured, Tuning, accuracy
from downstream.tuning.protocol import FinetuneProtocol
from mte_bench.files import write_json
from mte_bench.records import Metric
from mte_bench.statistics import bootstrap_ci

CLASSES = "classes.json"


class INatProtocol(FinetuneProtocol):
    """Fine-tuning, and where many-shot and few-shot classes begin."""

    shots: tuple[int, int] = Field(description="Few-shot classes have fewer training images than the first, many-shot more.")


def measure(protocol: INatProtocol, answers: Answers) -> Measured:
    """Top-1, top-5, the mean over classes, each rank, and many, medium and few shot; ``classes.json`` has every class."""
    found = accuracy(protocol, answers)
    metrics, predictions = dict(found.metrics), dict(found.predictions)
    labels, first, train = answers.labels, answers.ranked[:, 0], answers.train
    correct = first == labels
    metrics["top1_mean_over_classes"] = over_classes(correct, labels)
    for rank, taxa in numbered_taxa(dict(train.taxonomy)).items():
        same = taxa[first] == taxa[labels]
        metrics[f"top1_{rank}"] = percentage(same)
        predictions[f"prediction:top1_{rank}"] = np.where(same, labels, first)
    counts = np.bincount(train.labels, minlength=len(train.classes))
    for shots, members in shot_groups(counts, protocol.shots).items():
        inside = members[labels]
        if inside.any():
            metrics[f"top1_{shots}_shot"] = over_classes(correct[inside], labels[inside])
    write_json(answers.folder / CLASSES, by_class(correct, labels, counts, answers))
    return Measured(metrics, predictions, {"classes": CLASSES})


def numbered_taxa(taxonomy: dict[str, tuple[str, ...]]) -> dict[str, NDArray[np.int64]]:
    """For each rank, the number of every class's taxon. Taxa of one name in different wider ones are different.

    Ranks at which all classes are one taxon, where nothing can be wrong, are left out.
    """
    numbered = {}
    above: list[tuple[str, ...]] = []
    for rank, names in taxonomy.items():
        if rank != "supercategory":  # a rough group, not above the kingdoms
            above.append(names)
        paths = list(zip(*(above if rank != "supercategory" else [names]), strict=True))
        number = {path: index for index, path in enumerate(dict.fromkeys(paths))}
        if len(number) > 1:
            numbered[rank] = np.array([number[path] for path in paths])
    return numbered


def shot_groups(counts: NDArray[np.int64], shots: tuple[int, int]) -> dict[str, NDArray[np.bool_]]:
    """Which classes have many, medium and few training images, from their ``counts`` (``classes``)."""
    few, many = counts < shots[0], counts > shots[1]
    return {"many": many, "medium": ~(many | few), "few": few}


def over_classes(correct: NDArray[np.bool_], labels: NDArray[np.int64]) -> Metric:
    """The mean over the classes among ``labels`` of the share of their images (``n``) that are right, in percent."""
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    weighted = correct * (len(labels) / len(counts) / counts[place])
    low, high = bootstrap_ci(weighted)
    return Metric(value=100 * float(weighted.mean()), ci95=(100 * low, min(100.0, 100 * high)), n=len(labels))


def by_class(
    correct: NDArray[np.bool_], labels: NDArray[np.int64], counts: NDArray[np.int64], answers: Answers
) -> list[dict[str, Any]]:
    """A row per class: name, ranks, images to train and to evaluate on, and top-1 in percent (null without any)."""
    train = answers.train
    images = np.bincount(labels, minlength=len(counts))
    right = np.bincount(labels, weights=correct, minlength=len(counts))
    return [
        {
            "name": name,
            **{rank: taxa[index] for rank, taxa in train.taxonomy.items()},
            "train": int(counts[index]),
            "val": int(images[index]),
            "top1": round(100 * float(right[index] / images[index]), 3) if images[index] else None,
        }
        for index, name in enumerate(train.classes)
    ]


INAT = Tuning("inat", INatProtocol, "inat-vits-2018", measure, kinds=("inat",))
