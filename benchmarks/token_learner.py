"""What TokenLearner saves: the forward pass of a ViT-S/16 at 224 pixels with 8 learned tokens, against the plain one.

Every variant encodes the same images in turn. The floor is the ratio of multiply-accumulates.

    python benchmarks/token_learner.py            # batch 16 on a CPU, 256 on an accelerator
    python benchmarks/token_learner.py --quick    # batch 4, two rounds
"""

import json
import statistics
import time

import torch
from torch import Tensor

from mte_bench.device import autocast, wait
from mte_bench.encoders.cost import count_macs
from mte_bench.encoders.encoder import Encoder, EncoderSpec
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.encoders.token_learner import TokenLearnerSettings
from mte_bench.records import environment
from options import turns

VARIANTS = {
    "plain": None,
    "8 after 6": TokenLearnerSettings(tokens=8, after=6),
    "8 after 6, v1": TokenLearnerSettings(tokens=8, after=6, version="v1"),
    "8 after 9": TokenLearnerSettings(tokens=8, after=9),
    "8 after 6, fuser": TokenLearnerSettings(tokens=8, after=6, fuser=True),
}


def main() -> None:
    batch, rounds, device, precision = turns(__doc__, cuda_batch=256, rounds=7)

    encoders = {
        name: fresh_encoder(EncoderSpec(arch="vit_small_patch16_224", token_learner=settings)).eval().to(device)
        for name, settings in VARIANTS.items()
    }
    images = torch.randn(batch, 3, 224, 224, device=device)

    def seconds(encoder: Encoder, images: Tensor) -> float:
        wait(device)
        began = time.perf_counter()
        with torch.inference_mode(), autocast(device, precision):
            encoder(images)
        wait(device)
        return time.perf_counter() - began

    for encoder in encoders.values():
        seconds(encoder, images)
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):  # in turn, so that a slower machine is slower for all
        for name, encoder in encoders.items():
            taken[name].append(seconds(encoder, images))
    macs = {name: count_macs(encoder, (1, 3, 224, 224)).total for name, encoder in encoders.items()}
    floors = {name: macs[name] / macs["plain"] for name in macs}
    ratios = {name: statistics.median(t / p for t, p in zip(times, taken["plain"], strict=True)) for name, times in taken.items()}
    print(f"{'variant':<17} {'G MACs':>7} {'floor':>7} {'s/pass':>8} {'ratio':>7}   (batch {batch}, median of {rounds})")
    for name, times in taken.items():
        print(f"{name:<17} {macs[name] / 1e9:7.3f} {floors[name]:7.3f} {statistics.median(times):8.3f} {ratios[name]:7.3f}")
    print(
        json.dumps(
            {
                "benchmark": "token_learner",
                "ratios": ratios,
                "floors": floors,
                "batch": batch,
                "rounds": rounds,
                "precision": str(precision).removeprefix("torch."),
                "machine": environment()["device"],
            }
        )
    )


if __name__ == "__main__":
    main()
