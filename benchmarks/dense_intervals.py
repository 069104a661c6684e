"""What the interval of mAP costs: COCO's twelve numbers of resampled images, against pycocotools' accumulate() on each resample.

Made-up matches of the size of COCO's val split: 100 detections in each image, 7 objects, 80 classes of which some are
frequent, 70 % of the objects found at IoU .50, fewer above. One kind (boxes; masks take as long again). The peer gets the
matches of 250 images ready, ours those too, and both must agree; then ours is timed on all images. The floor is what no way
of weighting detections can do without: each detection's weight in each resample, summed up along the scores, twice (all
sizes, and each detection under its own size). Processor time of one thread.

    python benchmarks/dense_intervals.py            # 5,000 images, 1,000 resamples
    python benchmarks/dense_intervals.py --quick    # 1,000 images, 200 resamples
"""

import argparse
import contextlib
import io
import json
import time
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from mte_bench.dense.detection import IOUS, NAMES, SIZES, DetectedImages, Matches, Objects
from mte_bench.dense.resampling import Weights, draw_weights
from mte_bench.device import peak_memory, pick_device
from mte_bench.records import environment

CLASSES, PER_IMAGE, OBJECTS, FOUND = 80, 100, 7.2, 0.7
PEER_IMAGES, PEER_DRAWS = 250, 3


def made_up(images: int) -> DetectedImages:
    """Matches that nobody made."""
    rng = np.random.default_rng(0)
    frequency = 0.5 / CLASSES + 0.5 * (1 / np.arange(1, CLASSES + 1)) / (1 / np.arange(1, CLASSES + 1)).sum()
    count, total = int(OBJECTS * images), PER_IMAGE * images
    there = Objects(np.sort(rng.integers(0, images, count)), rng.choice(CLASSES, count, p=frequency), np.zeros(count, np.int64))
    sizes = rng.choice([1, 2, 3], count, p=[0.41, 0.34, 0.25])
    objects = there._replace(counted=1 | 1 << sizes)
    rows, labels = rng.integers(0, images, total), rng.choice(CLASSES, total, p=frequency)
    own, best, scores = rng.choice([1, 2, 3], total), np.full(total, -1), rng.random(total) ** 3
    hits = rng.permutation(total)[: int(FOUND * count)]
    which = rng.permutation(count)[: len(hits)]
    rows[hits], labels[hits], own[hits] = objects.rows[which], objects.labels[which], sizes[which]
    best[hits], scores[hits] = rng.integers(0, IOUS, len(hits)), rng.random(len(hits)) ** 0.7
    found, ignored = np.zeros((2, total), np.int64)
    for size in range(len(SIZES)):
        for t in range(IOUS):
            found |= (best >= t).astype(np.int64) << (IOUS * size + t)
            ignored |= ((own != size) & (size > 0)).astype(np.int64) << (IOUS * size + t)
    order = np.argsort(rows, kind="stable")
    names, classes = tuple(f"{i:06}" for i in range(images)), tuple(map(str, range(CLASSES)))
    matches = {"bbox": Matches(found[order], ignored[order])}
    return DetectedImages(names, classes, objects, rows[order], labels[order], scores[order], matches)


def peer(images: DetectedImages) -> tuple[COCOeval, list[list[Any]]]:
    """pycocotools' evaluation, and its matches of each class and size: a list over images, as ``evaluate`` leaves them."""
    evaluation, n = COCOeval(), len(images.names)
    evaluation.params.imgIds, evaluation.params.catIds = list(range(n)), list(range(CLASSES))
    evaluation._paramsEval = evaluation.params
    bits = images.matches["bbox"]
    table: list[list[Any]] = []
    for label in range(CLASSES):
        detections = [np.flatnonzero((images.labels == label) & (images.rows == row)) for row in range(n)]
        objects = [np.flatnonzero((images.objects.labels == label) & (images.objects.rows == row)) for row in range(n)]
        for size in range(len(SIZES)):
            shifts = (IOUS * size + np.arange(IOUS))[:, None]
            cells: list[Any] = []
            for mine, theirs in zip(detections, objects, strict=True):
                mine = mine[np.argsort(-images.scores[mine], kind="stable")]
                empty = not len(mine) and not len(theirs)
                cells.append(None if empty else {
                    "dtScores": images.scores[mine],
                    "dtMatches": bits.found[mine] >> shifts & 1,
                    "dtIgnore": (bits.ignored[mine] >> shifts & 1).astype(bool),
                    "gtIgnore": 1 - (images.objects.counted[theirs] >> size & 1),
                })  # fmt: skip
            table.append(cells)
    return evaluation, table


def numbers(evaluation: COCOeval, table: list[list[Any]], weights: Weights) -> tuple[float, list[float]]:
    """Seconds of ``accumulate`` on the images drawn so often, and the twelve numbers in percent."""
    drawn = np.repeat(np.arange(len(weights)), weights)
    evaluation.evalImgs = [cells[row] for cells in table for row in drawn]
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.process_time()
        evaluation.accumulate()
        seconds = time.process_time() - began
        evaluation.summarize()
    return seconds, [100 * float(value) for value in evaluation.stats]


def floor(images: DetectedImages, weights: Weights, cells: int = 1_000_000) -> float:
    """Seconds for drawing each detection's weight and summing it up along the scores, by class; twice."""
    order = np.lexsort((-images.scores, images.labels))
    ends = np.searchsorted(images.labels[order], np.arange(CLASSES + 1))
    began = time.process_time()
    for _ in range(2):
        for start, end in pairwise(ends):
            rows, step = images.rows[order[start:end]], max(1, cells // (end - start + 1))
            for first in range(0, len(weights), step):
                np.cumsum(np.take(weights[first : first + step], rows, axis=1), axis=1, dtype=np.int32)
    return time.process_time() - began


def timed(images: DetectedImages, weights: Weights) -> tuple[float, dict[str, Any]]:
    began = time.process_time()
    found = images.measure(weights).overall
    return time.process_time() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 images, 200 resamples")
    quick = parser.parse_args().quick
    images, draws = (1000, 200) if quick else (5000, 1000)

    few = made_up(PEER_IMAGES)
    evaluation, table = peer(few)
    weights = draw_weights(few.names, draws)
    apart, theirs = 0.0, []
    ours, found = timed(few, weights)
    for draw in range(PEER_DRAWS):
        seconds, expected = numbers(evaluation, table, weights[draw])
        theirs.append(seconds)
        apart = max(apart, *(abs(found[f"bbox_{name}"][draw] - value) for name, value in zip(NAMES, expected, strict=True)))
    many = made_up(images)
    weights = draw_weights(many.names, draws)
    least = floor(many, weights)
    seconds, _ = timed(many, weights)
    memory = peak_memory(pick_device("cpu"))

    print(f"{PEER_IMAGES} images, a resample: ours {1e3 * ours / draws:.2f} ms, pycocotools {1e3 * np.mean(theirs):.0f} ms")
    print(f"{images:,} images, {draws:,} resamples: ours {seconds:.1f} s, floor {least:.1f} s, peak memory {memory / 1e9:.2f} GB")
    print(f"largest difference from pycocotools' numbers: {apart:.1e} percentage points")
    ratios = {"to pycocotools": ours / draws / float(np.mean(theirs)), "to the floor": seconds / least}
    result = {"benchmark": "dense_intervals", "ratios": ratios, "floor": 1, "seconds": seconds, "memory_bytes": memory}
    print(json.dumps({**result, "apart": apart, "images": images, "resamples": draws, "machine": environment()["device"]}))


if __name__ == "__main__":
    main()
