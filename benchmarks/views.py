"""Making DINO's two global views: images per second of one core, against the same pipeline of torchvision transforms.

Ours and the peers work on the same images in turn, all to normalised floats; the first two peers make the same kind of
pixels (PIL's), the third works on tensors, with a resize that differs by a level here and there and a blur of 9 x 9 pixels.
The floor is reading and resizing alone: decode, crop, resize.

    python benchmarks/views.py            # 32, 64 pixels from memory; 500 x 375 JPEG to 224 pixels, decoding included
    python benchmarks/views.py --quick    # fewer images and rounds, the same table
"""

import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import transforms as v1

from mte_bench.data.draws import Draws
from mte_bench.data.transforms import normalise
from mte_bench.records import environment
from pretrain import pixels
from pretrain.recipe import View, Views
from pretrain.views import choose, crop, make_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Something with edges, smooth parts and grain."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    fine = Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    grain = draw.normal(0, 6, (height, width, 3))
    mixed = 0.7 * np.asarray(coarse) + 0.3 * np.asarray(fine) + grain
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def sometimes(probability: float, function: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Image.Image]:
    return lambda image: function(image) if random.random() < probability else image


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def of_images(t: object, view: View) -> Callable[[Image.Image], Tensor]:
    """The pipeline of a view by torchvision's transforms ``t`` (v1 or v2) on PIL images, blur and solarize as DINO's."""
    to_tensor = [t.ToTensor()] if t is v1 else [t.ToImage(), t.ToDtype(torch.float32, scale=True)]
    return t.Compose(
        [
            t.RandomResizedCrop(view.size, view.scale, view.ratio, InterpolationMode.BICUBIC),
            t.RandomHorizontalFlip(view.flip),
            t.RandomApply([t.ColorJitter(*view.jitter_strength)], view.jitter),
            t.RandomGrayscale(view.grayscale),
            sometimes(view.blur, blur),
            sometimes(view.solarize, ImageOps.solarize),
            *to_tensor,
            t.Normalize(MEAN, STD),
        ]
    )


def of_tensors(view: View) -> Callable[[Image.Image], Tensor]:
    """The pipeline of a view by torchvision's v2 transforms on uint8 tensors."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(view.size, view.scale, view.ratio, InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([v2.ColorJitter(*view.jitter_strength)], view.jitter),
            v2.RandomGrayscale(view.grayscale),
            v2.RandomApply([v2.GaussianBlur(9, view.blur_radius)], view.blur),
            v2.RandomSolarize(view.solarize_threshold, view.solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def in_turn(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each variant in each round; a round takes one after the other: a slower moment is slower for all."""
    for variant in variants.values():
        variant()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            started = time.process_time()
            variant()
            seconds[name].append(time.process_time() - started)
    return seconds


def speed_up(seconds: dict[str, list[float]], peer: str) -> float:
    """How many times faster than the peer ours is: the median over rounds."""
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[peer], seconds["ours"], strict=True))


def pipelines(size: int, images: list[Image.Image] | list[bytes], rounds: int) -> dict[str, list[float]]:
    """Processor seconds per round of ours, the peers and the floor for both global views of ``images`` (PIL, or JPEG files)."""
    views = Views(global1=View(size=size, blur=1.0), global2=View(size=size, blur=0.1, solarize=0.2))
    both = (views.global1, views.global2)
    draws = Draws(0)

    def opened() -> Iterable[Image.Image]:
        return (Image.open(io.BytesIO(item)).convert("RGB") if isinstance(item, bytes) else item for item in images)

    def ours() -> None:
        source = iter(opened())
        for start in range(0, len(images), BATCH):
            keys = [(0, index) for index in range(start, min(start + BATCH, len(images)))]
            (made,) = make_views((next(source) for _ in keys), keys, views, draws)
            normalise(made, MEAN, STD)

    def floor() -> None:
        for index, image in enumerate(opened()):
            for view, numbers in zip(both, draws.views(0, index, 2), strict=True):
                crop(image, view, choose(view, image.size, numbers))

    def peer(one: Callable[[View], Callable[[Image.Image], Tensor]]) -> Callable[[], object]:
        first, second = (one(view) for view in both)
        return lambda: [(first(image), second(image)) for image in opened()]

    return in_turn(
        {
            "ours": ours,
            "torchvision v1": peer(lambda view: of_images(v1, view)),
            "torchvision v2": peer(lambda view: of_images(v2, view)),
            "torchvision v2, tensors": peer(of_tensors),
            "floor": floor,
        },
        rounds,
    )


def operations(size: int, count: int, rounds: int) -> dict[str, float]:
    """How many times faster than torchvision's hue shift and PIL's blur ours are, on ``count`` images at once."""
    images = [picture(seed, size, size) for seed in range(count)]
    planes = np.ascontiguousarray(np.stack([np.asarray(image) for image in images]).transpose(3, 0, 1, 2))
    turns, radii = np.linspace(-0.1, 0.1, count), np.linspace(0.1, 2, count)
    shifts = np.array([int(turn * 255) & 255 for turn in turns], np.uint8)
    hue = {
        "ours": lambda: pixels.hue(planes, shifts),
        "peer": lambda: [v1.F.adjust_hue(image, turn) for image, turn in zip(images, turns, strict=True)],
    }
    smooth = {
        "ours": lambda: pixels.gaussian_blur(planes, radii.astype(np.float32)),
        "peer": lambda: [i.filter(ImageFilter.GaussianBlur(radius)) for i, radius in zip(images, radii.tolist(), strict=True)],
    }
    return {name: speed_up(in_turn(variants, rounds), "peer") for name, variants in (("hue", hue), ("blur", smooth))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 9
    scale = 1 if options.quick else 4
    torch.manual_seed(0)
    random.seed(0)
    cases = {
        "32": pipelines(32, [picture(seed, 32, 32) for seed in range(64 * scale)], rounds),
        "64": pipelines(64, [picture(seed, 64, 64) for seed in range(64 * scale)], rounds),
        "jpeg-224": pipelines(224, [as_jpeg(picture(seed, 500, 375)) for seed in range(16 * scale)], rounds),
    }
    images = {"32": 64 * scale, "64": 64 * scale, "jpeg-224": 16 * scale}
    ratios: dict[str, dict[str, float]] = {}
    print(f"{'views':<10} {'variant':<24} {'images/s':>9} {'ours is faster by':>18}   (one core, median of {rounds})")
    for case, seconds in cases.items():
        ratios[case] = {name: round(speed_up(seconds, name), 3) for name in seconds if name not in ("ours", "floor")}
        for name, times in seconds.items():
            ratio = f"{ratios[case][name]:.2f}" if name in ratios[case] else ""
            print(f"{case:<10} {name:<24} {images[case] / statistics.median(times):9.0f} {ratio:>18}")
    pixelwise = {f"{size}": operations(size, count, 3 * rounds) for size, count in ((32, 64), (64, 32), (224, 2))}
    for size, faster in pixelwise.items():
        print(f"{size:<10} {'hue':<24} {'':>9} {faster['hue']:18.2f}\n{size:<10} {'blur':<24} {'':>9} {faster['blur']:18.2f}")
    print(
        json.dumps(
            {
                "benchmark": "views",
                "ratios": ratios,
                "operations": {size: {k: round(v, 3) for k, v in faster.items()} for size, faster in pixelwise.items()},
                "images_per_second": {case: round(images[case] / statistics.median(s["ours"]), 1) for case, s in cases.items()},
                "floor": {case: round(images[case] / statistics.median(s["floor"]), 1) for case, s in cases.items()},
                "machine": environment()["device"],
            }
        )
    )


if __name__ == "__main__":
    main()
