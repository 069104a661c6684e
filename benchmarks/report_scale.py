"""What a report of many records costs: 200 runs (600 records, with curves), and 10,000 records, against only reading their files.

The records are made up: seven methods with and without MTE from several recipes and seeds, each pre-trained, evaluated by k-NN
and by a linear classifier on 1,000 images, with predictions beside them. Each report is written in a process of its own, whose
processor time (one core; an idle machine takes as long by the clock) and peak memory are told.

    python benchmarks/report_scale.py            # 600 and 10,000 records
    python benchmarks/report_scale.py --quick    # 600 and 1,500 records
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mte_bench.files import hash_of
from mte_bench.records import Cost, Data, Metric, Protocol, Record, Subject, environment, make_record
from mte_bench.statistics import bootstrap_ci
from reports.report import write_report

METHODS = ("dino", "ibot", "byol", "mocov3", "moby", "hssl", "supervised")
IMAGES, CLASSES, SEEDS = 1000, 10, 10
DATA: dict[str, Any] = {"source": "scenes", "classes": CLASSES, "images": {"train": 4000, "val": IMAGES}}
TASKS = {"knn": "top1_k10", "linear": "top1"}


def records(here: dict[str, Any]) -> Iterator[tuple[str, Record, int]]:
    """Folder, record and number of right images of one run after the other, without end: more recipes as more are asked for."""
    common: dict[str, Any] = {"environment": here, "command": "mte-bench made-up", "created": "2026-11-21T10:00:00+00:00"}
    for number, method, mte in ((n, m, e) for n in range(10_000) for m, e in product(METHODS, (False, True))):
        recipe = {"method": method, "lr": number / 1000, "views": {"local_count": 0}, "mte": {"pooled": 6} if mte else None}
        for seed in range(SEEDS):
            who = Subject(
                checkpoint=f"runs/{method}",
                sha256=hash_of([recipe, seed], 64),
                family="mte-bench",
                arch="vit_tiny_patch16_224",
                image_size=64,
                method=method,
                mte=mte,
                epochs=30,
                seed=seed,
                recipe=f"{method}_made_up",
                recipe_hash=hash_of(recipe),
                pretrain_data="scenes",
            )
            run = f"{method}-{number}-{'mte' if mte else 'plain'}-{seed}"
            accuracy = 0.4 + 0.03 * mte + 0.02 * METHODS.index(method) + 0.002 * seed
            right = round(accuracy * IMAGES)
            ends = tuple(100 * end for end in bootstrap_ci(np.arange(IMAGES) < right))
            top1 = Metric(value=100 * right / IMAGES, ci95=ends, n=IMAGES)
            for task, settings in (("pretrain", recipe), ("knn", {"k": [10]}), ("linear", {"epochs": 100})):
                pretrained = task == "pretrain"
                yield (
                    run if pretrained else f"{run}/{task}",
                    make_record(
                        task=task,
                        protocol=Protocol(name=f"{method}_made_up" if pretrained else task, settings=settings),
                        subject=who,
                        data=Data(split="val", fingerprint="5ce9" * 4, **DATA),
                        metrics={"loss": Metric(value=3.0, n=20)} if pretrained else {TASKS[task]: top1},
                        cost=Cost(seconds=100, images_per_second=100, peak_memory_bytes=1 << 30),
                        predictions=None if pretrained else "predictions.parquet",
                        **common,
                    ),
                    right,
                )


def write_runs(root: Path, count: int, curves: bool) -> None:
    """``count`` records below ``root``, with predictions, and a curve for each pre-training."""
    noise = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    names = [f"val/{index:06}" for index in range(IMAGES)]
    steps = [{"step": step, "epoch": step / 10, "loss": 8 * 0.99**step} for step in range(1, 301)]
    steps += [{"step": 10 * epoch, "epoch": epoch, "knn_top1": 20 + epoch} for epoch in range(5, 31, 5)]
    curve = "".join(json.dumps(line) + "\n" for line in steps)
    for place, record, right in islice(records(environment()), count):
        folder = root / place
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(record.model_dump_json(indent=2))
        if record.predictions:
            wrong = noise.permutation(IMAGES)[right:]
            predicted = labels.copy()
            predicted[wrong] = (labels[wrong] + 1) % CLASSES
            columns = {"name": names, "label": labels, f"prediction:{TASKS[record.task]}": predicted}
            pq.write_table(pa.table(columns), folder / "predictions.parquet")
        elif curves:
            (folder / "curves.jsonl").write_text(curve)


def read_only(root: Path) -> float:
    """Seconds of the processor for parsing every record and reading every file of predictions: what no report can do without."""
    began = time.process_time()
    for path in sorted(root.rglob("record.json")):
        json.loads(path.read_text())
    for path in sorted(root.rglob("predictions.parquet")):
        pq.read_table(path, use_threads=False)
    return time.process_time() - began


def report(root: Path, out: Path, answers: "multiprocessing.Queue[tuple[float, float, float]]") -> None:
    """Write the report; seconds of the processor, those of reading alone, and peak memory in bytes."""
    floor = read_only(root)
    began = time.process_time()
    write_report([root], out)
    seconds = time.process_time() - began
    answers.put((seconds, floor, peak_memory()))


def peak_memory() -> int:
    """Bytes; ``mte_bench.device`` has it too, but would bring torch, which no report needs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="600 and 1,500 records")
    quick = parser.parse_args().quick

    found: dict[str, dict[str, float]] = {}
    spawned = multiprocessing.get_context("spawn")
    print(f"{'records':>8} {'CPU s':>7} {'reading':>8} {'ratio':>6} {'memory':>9} {'html':>9}")
    for count, curves in ((600, True), (1500 if quick else 10_000, False)):
        with tempfile.TemporaryDirectory() as folder:
            root, out = Path(folder) / "runs", Path(folder) / "report"
            write_runs(root, count, curves)
            answers: multiprocessing.Queue[tuple[float, float, float]] = spawned.Queue()
            process = spawned.Process(target=report, args=(root, out, answers))
            process.start()
            seconds, floor, memory = answers.get()
            process.join()
            size = (out / "report.html").stat().st_size
        found[str(count)] = {"seconds": seconds, "reading": floor, "ratio": seconds / floor, "memory_bytes": memory}
        print(f"{count:8,} {seconds:7.1f} {floor:8.1f} {seconds / floor:6.1f} {memory / 1e6:6.0f} MB {size / 1e6:6.1f} MB")
    ratios = {count: values["ratio"] for count, values in found.items()}
    machine = environment()["device"]
    print(json.dumps({"benchmark": "report_scale", "ratios": ratios, "floor": 1, "reports": found, "machine": machine}))


if __name__ == "__main__":
    main()
