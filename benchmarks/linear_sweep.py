"""What a sweep of 45 learning rates costs at ImageNet's size: 1000 classes, features 1536 wide, batches of 1,024.

On kept features: a step of all heads, stacked, against torch's layers, losses and optimisers one after the other, as iBOT's
``eval_linear_multi.py`` has them; against a single head; and against the floor, the two matrix products of such a step alone.
On augmented views: a step of the sweep (both sets of heads) with its pass of a ViT-S/16 against the same with a single rate.
All in turns in one process; whole trainings are extrapolated from their steps. Ridge is extrapolated from one part of its pass.

    python benchmarks/linear_sweep.py            # three rounds
    python benchmarks/linear_sweep.py --quick    # batches of 128, one round
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from downstream.features import Pass, encode_batch
from downstream.linear.heads import Heads, HeadTrainer, fresh_heads
from downstream.linear.probe import IBOT_RATES
from downstream.linear.ridge import Moments
from mte_bench.device import forget_peak, peak_memory, pick_device, wait
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.encoders.initial import fresh_encoder
from mte_bench.records import environment

TRAIN, CLASSES, WIDTH, BATCH, EPOCHS = 1_281_167, 1000, 1536, 1024, 100
RIDGE_ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batches of 128, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = pick_device(given.device)
    batch, rounds = (128, 1) if given.quick else (BATCH, given.rounds)
    images = min(batch, 32 if device.type == "cpu" else BATCH)  # of the encoder, whose time grows with their number

    rates = torch.tensor(IBOT_RATES, device=device) * (batch / 256)
    x, y = torch.randn(batch, WIDTH, device=device), torch.randint(CLASSES, (batch,), device=device)
    steps = {
        "stacked": sweep_step(x, y, rates),
        "one after the other": peers_step(x, y, rates),
        "a single rate": sweep_step(x, y, rates[:1]),
        "floor": floor_step(x, len(rates)),
        "encoder": encoder_step(images, device),
    }
    taken = in_turns(steps, rounds, device)
    steps.clear()  # their memory would count
    taken["encoder"] = [seconds * batch / images for seconds in taken["encoder"]]

    def ratio(of: Callable[[int], float], to: Callable[[int], float]) -> float:
        return statistics.median(of(turn) / to(turn) for turn in range(rounds))

    seconds = {name: statistics.median(values) for name, values in taken.items()}
    ratios = {
        "stacked / one after the other": ratio(taken["stacked"].__getitem__, taken["one after the other"].__getitem__),
        "stacked / floor": ratio(taken["stacked"].__getitem__, taken["floor"].__getitem__),
        "stacked / a single rate": ratio(taken["stacked"].__getitem__, taken["a single rate"].__getitem__),
        "sweep on views / a single rate on views": ratio(
            lambda turn: taken["encoder"][turn] + 2 * taken["stacked"][turn],
            lambda turn: taken["encoder"][turn] + taken["a single rate"][turn],
        ),
    }
    memory = peak_of(sweep_step(x, y, rates), device)
    ridge = ridge_seconds(device)

    whole = EPOCHS * TRAIN / batch
    print(f"{'step of ' + str(batch):<22} {'s':>8}   {'100 epochs of ImageNet, h':>26}")
    for name, value in seconds.items():
        print(f"{name:<22} {value:8.3f}   {value * whole / 3600:26.1f}")
    print(f"{'ridge, all penalties':<22} {'':>8}   {ridge / 3600:26.3f}")
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    print(
        json.dumps(
            {
                "benchmark": "linear_sweep",
                "ratios": ratios,
                "floor": "two matrix products of 45,000 x 1536 x batch",
                "seconds_per_step": seconds,
                "sweep_hours": seconds["stacked"] * whole / 3600,
                "ridge_seconds": ridge,
                "peak_bytes_of_a_step": memory,
                "batch": batch,
                "rounds": rounds,
                "machine": environment()["device"],
            }
        )
    )


def in_turns(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step in each round; in turn, so that a slower machine is slower for all."""
    for name in ("a single rate", "floor", "encoder"):  # warm-up; the others are long enough to do without
        steps[name]()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            wait(device)
            began = time.perf_counter()
            step()
            wait(device)
            taken[name].append(time.perf_counter() - began)
    return taken


def sweep_step(x: torch.Tensor, y: torch.Tensor, rates: torch.Tensor) -> Callable[[], object]:
    """A step of all rates, stacked."""
    heads = fresh_heads(len(rates), CLASSES, WIDTH, 0.01, torch.Generator().manual_seed(0))
    trainer = HeadTrainer(Heads(*(part.to(x.device) for part in heads)))
    return lambda: trainer.step(x, y, rates)


def peers_step(x: torch.Tensor, y: torch.Tensor, rates: torch.Tensor) -> Callable[[], object]:
    """A step of all rates, a layer, a loss and an optimiser for each."""
    layers = [nn.Linear(WIDTH, CLASSES).to(x.device) for _ in rates]
    optimisers = [torch.optim.SGD(layer.parameters(), rate, 0.9) for layer, rate in zip(layers, rates.tolist(), strict=True)]

    def step() -> None:
        for layer, optimiser in zip(layers, optimisers, strict=True):
            loss = nn.functional.cross_entropy(layer(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return step


def floor_step(x: torch.Tensor, rates: int) -> Callable[[], object]:
    """The product forward and the product back."""
    weight, error = torch.randn(rates * CLASSES, WIDTH, device=x.device), torch.randn(rates * CLASSES, len(x), device=x.device)
    logits, gradient = torch.empty_like(error), torch.empty_like(weight)

    def step() -> None:
        torch.mm(weight, x.T, out=logits)
        torch.mm(error, x, out=gradient)

    return step


def encoder_step(images: int, device: torch.device) -> Callable[[], object]:
    """The features of ``images`` views."""
    encoder = fresh_encoder(EncoderSpec(arch="vit_small_patch16_224")).eval()
    views = torch.randn(images, 3, 224, 224, device=device)
    return lambda: encode_batch(encoder, views, ("cls-last4",), Pass(device=device))


def peak_of(step: Callable[[], object], device: torch.device) -> int | None:
    """The memory that a step needs, with its heads and what is there besides; None where the system cannot tell."""
    step()
    if not forget_peak(device):
        return None
    step()
    return peak_memory(device)


def ridge_seconds(device: torch.device) -> float:
    """Of a pass over the features, extrapolated, and the two solutions for all penalties."""
    x = torch.randn(RIDGE_ROWS, WIDTH, dtype=torch.float64, device=device)
    moments = Moments(WIDTH, CLASSES, device)
    began = time.perf_counter()
    moments.add(x, torch.arange(RIDGE_ROWS, device=device) % CLASSES)
    wait(device)
    adding = time.perf_counter() - began
    began = time.perf_counter()
    moments.solve([10.0**power for power in range(-7, 2)])
    wait(device)
    return adding * TRAIN / RIDGE_ROWS + 2 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
