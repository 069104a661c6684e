"""The options of the benchmarks that time a model in turns."""

import argparse
from typing import NamedTuple

import torch

from mte_bench.device import pick_device, pick_precision


class Turns(NamedTuple):
    """What to run: ``batch`` images at a time, ``rounds`` turns of every variant."""

    batch: int
    rounds: int
    device: torch.device
    precision: torch.dtype


def turns(about: str | None, cuda_batch: int, rounds: int) -> Turns:
    """Read the command line; ``rounds`` and, on a GPU, ``cuda_batch`` are what it may leave out."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 4, two rounds")
    parser.add_argument("--batch", type=int, help="images at a time")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    given = parser.parse_args()
    device = pick_device(given.device)
    batch = given.batch or (4 if given.quick else 16 if device.type == "cpu" else cuda_batch)
    return Turns(batch, given.rounds or (2 if given.quick else rounds), device, pick_precision(given.precision, device))
