"""JPEGs decoded at reduced scale (``--set decode=reduced``) against whole ones: time, and how far the features are.

Images of ``--data`` are resaved as JPEGs with a shorter side of ``--side`` pixels. Timed are decoding and transforming, in
turns, by the processor time of one thread; the peer is torchvision's way (PIL, ``Resize``, ``CenterCrop``, ``ToTensor``,
``Normalize``) with whole images. Features of both are compared image by image (cosine), and by k-NN: reduced on reduced, and
reduced queries in the bank of whole images, as somebody would mix them by mistake.

    python benchmarks/decoding.py --checkpoint runs/cifar10/dino-mte-seed0     # imagenette, enlarged to 448 pixels
    python benchmarks/decoding.py --side 1024 --images 64 --bank 64 --checkpoint random:vit_small_patch16_224
    python benchmarks/decoding.py --quick
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
from torchvision import transforms

from downstream.features import Pass, extract
from downstream.knn import KNN
from mte_bench.data.sources import ImageSet, Split, open_source, take
from mte_bench.data.transforms import EvaluationTransform
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.records import environment

K = 10
TIMED = 32


def resaved(folder: Path, data: str, split: Split, count: int, side: int) -> ImageSet:
    """``count`` images of ``data`` with a shorter side of ``side`` pixels, as JPEGs in class folders."""
    source = take(open_source(data, split), "images", count)
    for index in range(len(source)):
        image = source.image(index)
        scale = side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        path = folder / split / source.classes[source.labels[index]] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return open_source(str(folder), split)


def top1(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, wanted: np.ndarray) -> float:
    """k-NN accuracy in percent."""
    (ranked,) = KNN(k=(min(K, len(bank)),)).fit(bank, labels).predict(queries).values()
    return float(100 * (ranked[:, 0] == wanted).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="48 images, 96 in the bank, one round")
    parser.add_argument("--data", default=".data/imagenette112", help="labelled images")
    parser.add_argument("--side", type=int, default=448, help="shorter side of the JPEGs in pixels")
    parser.add_argument("--images", type=int, help="of val")
    parser.add_argument("--bank", type=int, help="of train")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--checkpoint", default="random:vit_tiny_patch16_224?image_size=64&patch_size=8&depth=4")
    given = parser.parse_args()
    images, bank = given.images or (48 if given.quick else 1000), given.bank or (96 if given.quick else 2000)
    rounds = given.rounds or (1 if given.quick else 5)
    opened = open_checkpoint(given.checkpoint)
    spec = opened.encoder.spec
    whole = EvaluationTransform.for_size(spec.side, spec.mean, spec.std)
    reduced = whole.model_copy(update={"decode": "reduced"})
    theirs = transforms.Compose(
        [
            transforms.Resize(whole.resize, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(whole.crop),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, val = (
            resaved(folder / "data", given.data, split, n, given.side) for split, n in (("train", bank), ("val", images))
        )
        smaller = val.reduced(whole.resize)
        paths = [folder / "data" / val.name(index) for index in range(min(TIMED, len(val)))]
        ready = [val.image(index) for index in range(len(paths))]

        def torchvision(index: int) -> None:
            with Image.open(paths[index]) as image:
                theirs(image.convert("RGB"))

        variants: dict[str, Callable[[int], object]] = {
            "whole": lambda index: whole(val.image(index)),
            "reduced": lambda index: reduced(smaller.image(index)),
            "torchvision, whole": torchvision,
            "transform alone": lambda index: whole(ready[index]),
        }
        taken: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant, run in variants.items():
                began = time.process_time()
                for index in range(len(paths)):
                    run(index)
                taken[variant].append((time.process_time() - began) / len(paths))
        size, less = ready[0].size, smaller.image(0).size

        def features(split: ImageSet, transform: EvaluationTransform) -> np.ndarray:
            how = Pass(cache=folder / "cache")
            return np.array(extract(opened.encoder, opened.sha256, split, transform, how=how).arrays["global"])

        found = {transform.decode: [features(split, transform) for split in (train, val)] for transform in (whole, reduced)}

    cosine = torch.cosine_similarity(*(torch.from_numpy(both[1]).double() for both in found.values()), dim=1)
    accuracy = {
        "whole": top1(found["full"][0], train.labels, found["full"][1], val.labels),
        "reduced": top1(found["reduced"][0], train.labels, found["reduced"][1], val.labels),
        "reduced in a bank of whole": top1(found["full"][0], train.labels, found["reduced"][1], val.labels),
    }
    milliseconds = {variant: 1000 * statistics.median(times) for variant, times in taken.items()}
    ratios = {
        f"{variant} / reduced": statistics.median(t / r for t, r in zip(times, taken["reduced"], strict=True))
        for variant, times in taken.items()
        if variant != "reduced"
    }
    print(f"{len(val)} JPEGs such as {size[0]} x {size[1]} for {whole.resize} pixels, decoded at {less[0]} x {less[1]}")
    for variant, value in milliseconds.items():
        print(f"{variant:<28} {value:8.2f} ms an image")
    for variant, value in accuracy.items():
        print(f"{variant:<28} {value:8.2f} % top-1, k-NN of {K} in {len(train)} images")
    print(f"cosine of whole and reduced: median {cosine.median():.4f}, smallest {cosine.min():.4f}")
    print(
        json.dumps(
            {
                "benchmark": "decoding",
                "ratios": {name: round(value, 3) for name, value in ratios.items()},
                "floor": "transform alone",
                "milliseconds": {name: round(value, 3) for name, value in milliseconds.items()},
                "top1": accuracy,
                "cosine": {"median": float(cosine.median()), "smallest": float(cosine.min())},
                "images": len(val),
                "bank": len(train),
                "size": size,
                "decoded": less,
                "checkpoint": given.checkpoint,
                "machine": environment()["device"],
            }
        )
    )


if __name__ == "__main__":
    main()
