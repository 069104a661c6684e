"""Extraction of features, from JPEG files to kept features, against the encoder's bare forward pass on ready tensors.

The peer is what the encoder does with batches that are already in memory. The floor is what the same cores could do at
best: they decode and transform every image and encode it, one after the other, with nothing between. Where decoding runs
on cores that the encoder leaves idle (an accelerator, or ``--workers`` with cores to spare) extraction may lie above it.
All three run in turn, on the same images; extraction writes to a cache of its own that is removed. One thread of a CPU without
decoding processes is timed by the processor time it takes, all else by the clock on the wall.

    python benchmarks/extraction.py                        # JPEG of 500 x 375 drawn for it, ViT-S/16 at 224 pixels
    python benchmarks/extraction.py --data .data/imagenette112
    python benchmarks/extraction.py --quick                # two batches, one round
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from downstream.features import Pass, extract
from mte_bench.data.sources import ImageSet, open_source, take
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.device import autocast, pick_device, pick_precision, wait
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.records import environment


def photographs(folder: Path, count: int, data: str) -> ImageSet:
    """``count`` images of ``data``, resized to 500 x 375 and saved as JPEG: about the size and weight of ImageNet's."""
    source = open_source(data, "val")
    for index in range(count):
        image = source.image(index % len(source)).resize((500, 375), Image.Resampling.BICUBIC)
        path = folder / "val" / str(index % 2) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return open_source(str(folder), "val")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two batches of 16, one round")
    parser.add_argument(
        "--data", default="coco:.data/coco_mini", help="images that are resaved as 500 x 375 (default: COCO-mini)"
    )
    parser.add_argument("--as-they-are", action="store_true", help="use the files of --data and resave nothing")
    parser.add_argument("--images", type=int, help="how many")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--checkpoint", default="random:vit_small_patch16_224")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    given = parser.parse_args()

    device = pick_device(given.device)
    precision = pick_precision(given.precision, device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and not given.workers
    clock = time.process_time if alone else time.perf_counter
    batch = given.batch or (16 if given.quick else 64 if device.type == "cpu" else 256)
    count = given.images or (2 if given.quick else 4 if device.type == "cpu" else 40) * batch
    rounds = given.rounds or (1 if given.quick else 5)
    opened = open_checkpoint(given.checkpoint)
    encoder, spec = opened.encoder.to(device), opened.encoder.spec
    transform = EvaluationTransform.for_size(spec.side, spec.mean, spec.std)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = given.data if given.as_they_are else None
        images = take(open_source(source, "val"), "images", count) if source else photographs(folder, count, given.data)
        ready = torch.stack([transform(images.image(index)) for index in range(batch)])

        def forward(tensors: torch.Tensor) -> None:
            with torch.inference_mode(), autocast(device, precision):
                encoder(tensors.to(device)).global_token.float().cpu()

        def bare() -> None:
            for start in range(0, count, batch):
                forward(ready[: count - start])

        def decoded_in_turn() -> None:
            for start in range(0, count, batch):
                last = min(start + batch, count)
                forward(torch.stack([transform(images.image(index)) for index in range(start, last)]))

        def decoding() -> None:
            for index in range(count):
                transform(images.image(index))

        caches = iter(range(10**9))

        def extraction() -> None:
            how = Pass(device, precision, batch, given.workers, cache=folder / f"cache{next(caches)}")
            extract(opened.encoder, opened.sha256, images, transform, how=how)

        variants: dict[str, Callable[[], None]] = {
            "bare forward": bare,
            "decode, then forward": decoded_in_turn,
            "extraction": extraction,
            "decoding alone": decoding,
        }
        taken: dict[str, list[float]] = {variant: [] for variant in variants}
        forward(ready)  # warms up
        for _ in range(rounds):  # in turn, so that a slower machine is slower for all
            for variant, run in variants.items():
                wait(device)
                began = clock()
                run()
                wait(device)
                taken[variant].append(clock() - began)
        pixels = np.median([images.image(index).size for index in range(min(count, 32))], axis=0)

    bare_times = taken["bare forward"]
    ratios = {name: statistics.median(b / t for b, t in zip(bare_times, times, strict=True)) for name, times in taken.items()}
    threads, size = torch.get_num_threads(), f"{pixels[0]:.0f} x {pixels[1]:.0f}"
    print(f"{count} JPEGs of {size}, batch {batch}, {threads} threads, {given.workers} workers, {rounds} rounds")
    print(f"{'variant':<22} {'images/s':>9} {'of bare':>8}")
    for variant, times in taken.items():
        print(f"{variant:<22} {count / statistics.median(times):9.1f} {ratios[variant]:8.3f}")
    print(
        json.dumps(
            {
                "benchmark": "extraction",
                "ratios": {
                    "extraction": ratios["extraction"],
                    "over_floor": ratios["extraction"] / ratios["decode, then forward"],
                },
                "floor": ratios["decode, then forward"],
                "images_per_second": {name: count / statistics.median(times) for name, times in taken.items()},
                "images": count,
                "batch": batch,
                "workers": given.workers,
                "threads": threads,
                "precision": str(precision).removeprefix("torch."),
                "machine": environment()["device"],
            }
        )
    )


if __name__ == "__main__":
    main()
