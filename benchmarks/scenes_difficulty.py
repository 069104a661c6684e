"""How hard the embedded data is: for raw pixels, for random encoders, for a small network that is trained with labels.

The data is meant to be out of reach of pixels (k-NN at most 45 % top-1) and of random encoders, and within reach of a
network that learns (at least 95 %). k-NN is DINO's: cosine similarity, weighted vote, k = 10, temperature 0.07, with all
training images as the bank. The network is a plain one of eight 3 x 3 convolutions, trained with labels, flips and shifts
for some minutes on other drawings of the same kind (more of them, the same val images).

    python benchmarks/scenes_difficulty.py            # 4,000 train, 1,000 val; 8,000 labelled images, 6 epochs
    python benchmarks/scenes_difficulty.py --quick    # 2,000 train, 500 val; 2,000 labelled images, 3 epochs
    python benchmarks/scenes_difficulty.py --picture docs/scenes.png    # only draws the grid of classes and examples
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from mte_bench.data.scenes import CLASSES, draw
from mte_bench.data.scenes_cache import SceneImages
from mte_bench.data.sources import Split, open_source
from mte_bench.encoders.encoder import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec, build_encoder
from mte_bench.files import atomic
from mte_bench.knn_bank import Bank
from mte_bench.knn_vote import search, vote
from mte_bench.records import environment

PIXELS_AT_MOST, NETWORK_AT_LEAST = 45.0, 95.0
VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3}  # that of the recipe dino_tiny_scenes


def load(spec: str, split: Split) -> tuple[Tensor, Tensor]:
    """Images (n 3 h w), normalised as encoders see them, and labels (n,)."""
    images = cast(SceneImages, open_source(spec, split))
    x = torch.from_numpy(np.array(images.pixels)).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return x.sub_(mean).div_(std), torch.from_numpy(images.labels)


def knn(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
    """Top-1 in percent."""
    similarities, indices = search(queries, Bank(bank.numpy()), 10)
    ranked = vote(similarities, labels[indices], len(CLASSES), [10], 0.07)[10]
    return 100 * (ranked[:, 0] == truth).double().mean().item()


@torch.inference_mode()
def random_encoder(seed: int, images: Tensor) -> Tensor:
    """The global tokens (n c) of a ViT with fresh weights."""
    torch.manual_seed(seed)
    spec = EncoderSpec(arch="vit_tiny_patch16_224", image_size=images.shape[-1], patch_size=8, options=VIT)
    encoder = build_encoder(spec).eval()
    return torch.cat([encoder(batch).global_token for batch in images.split(250)])


def network(width: int = 16) -> nn.Sequential:
    """Four times two convolutions and a pooling, then the mean."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (width, 2 * width, 4 * width, 8 * width):
        for _ in range(2):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(CLASSES)))


def train(images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> nn.Module:
    """The network after ``epochs`` of AdamW with a one-cycle rate."""
    torch.manual_seed(0)
    model = network().train()
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: len(images) // batch * batch].view(-1, batch):
            x = images[chosen]
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            dy, dx = torch.randint(-6, 7, (2,)).tolist()
            loss = F.cross_entropy(model(x.roll((dy, dx), (2, 3))), labels[chosen], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    found = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return 100 * (found == labels).double().mean().item()


def grid(path: Path, size: int = 72, examples: int = 9, gap: int = 3, margin: int = 128) -> None:
    """A picture of ``examples`` scenes of each class, one class in each row."""
    pitch = size + gap
    sheet = Image.new("RGB", (margin + examples * pitch + gap, len(CLASSES) * pitch + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, name in enumerate(CLASSES):
        top = gap + row * pitch
        pen.text((margin - 8, top + size // 2), name.replace("_", " "), fill="black", font=font, anchor="rm")
        for column in range(examples):
            scene = draw(0, "train", row + len(CLASSES) * column, size).image
            sheet.paste(Image.fromarray(scene), (margin + gap + column * pitch, top))
    with atomic(path) as temporary:
        sheet.quantize(128, dither=Image.Dither.FLOYDSTEINBERG).save(temporary, format="png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs")
    parser.add_argument("--epochs", type=int, help="epochs of the network")
    parser.add_argument("--picture", type=Path, help="draw the grid of classes there, and measure nothing")
    options = parser.parse_args()
    if options.picture:
        grid(options.picture)
        return
    bank_count, val_count, labelled, epochs = (2000, 500, 2000, 3) if options.quick else (4000, 1000, 8000, 6)
    epochs = options.epochs or epochs

    start = time.perf_counter()
    for index in range(200):
        draw(0, "train", index)
    milliseconds = (time.perf_counter() - start) / 200 * 1000

    pixels, random, counts = [], [], f"train={bank_count}&val={val_count}"
    for seed in range(1 if options.quick else 3):  # of the drawings, and of the encoders
        bank, labels = load(f"scenes?{counts}&seed={seed}", "train")
        val, truth = load(f"scenes?{counts}&seed={seed}", "val")
        pixels.append(knn(bank.flatten(1), labels, val.flatten(1), truth))
        random.append(knn(random_encoder(seed, bank), labels, random_encoder(seed, val), truth))
    start = time.perf_counter()
    val, truth = load(f"scenes?val={val_count}", "val")
    trained = accuracy(train(*load(f"scenes?train={labelled}", "train"), epochs), val, truth)
    seconds = time.perf_counter() - start

    rows = [
        ("k-NN on raw pixels", statistics.mean(pixels), f"at most {PIXELS_AT_MOST:.0f}"),
        ("k-NN on a random ViT", statistics.mean(random), ""),
        (f"network, {labelled} labels, {epochs} epochs", trained, f"at least {NETWORK_AT_LEAST:.0f}"),
    ]
    print(f"scenes, {bank_count} train, {val_count} val, {len(pixels)} seeds of k-NN; {milliseconds:.1f} ms to draw one")
    print(f"{'top-1, %':<36} {'value':>6}   wanted")
    for name, value, wanted in rows:
        print(f"{name:<36} {value:6.1f}   {wanted}")
    print(
        json.dumps(
            {
                "benchmark": "scenes_difficulty",
                "pixels_knn": [round(value, 2) for value in pixels],
                "random_vit_knn": [round(value, 2) for value in random],
                "network": round(trained, 2),
                "network_seconds": round(seconds),
                "floor": {"pixels_knn_at_most": PIXELS_AT_MOST, "network_at_least": NETWORK_AT_LEAST},
                "draw_milliseconds": round(milliseconds, 2),
                "machine": environment()["device"],
            }
        )
    )


if __name__ == "__main__":
    main()
