"""A training step and a test image of ours beside a peer's, in turns: what the benchmarks of training tasks share."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from downstream.features import Pass
from mte_bench.device import wait
from mte_bench.records import environment

FLOOR = 1.05
"""The most that ours may take, times the peer's."""


class Pair(Protocol):
    """Ours and the peer, on the same images; a training step takes one of ``batches``, a test nothing."""

    how: Pass

    @property
    def batches(self) -> Sequence[Any]: ...

    def train_ours(self, batch: Any, /) -> None: ...

    def train_theirs(self, batch: Any, /) -> None: ...

    def test_ours(self) -> None: ...

    def test_theirs(self) -> None: ...


class Comparison:
    """The table of a benchmark, printed row by row, and its last line; ``step`` names what a training step is."""

    def __init__(self, benchmark: str, step: str, quick: bool):
        self.benchmark, self.step, self.quick = benchmark, step, quick
        self.ratios: dict[str, float] = {}
        print(f"{'':<44}{'ours, s':>8}{'peer, s':>10}{'ratio':>8}")

    def add(self, name: str, pair: Pair, rounds: int) -> None:
        """Measure ``pair``: median seconds of ours and of the peer, and the median of the rounds' ratios."""
        for what, ours, theirs, arguments in (
            (self.step, pair.train_ours, pair.train_theirs, [[batch] for batch in pair.batches]),
            ("a test image", pair.test_ours, pair.test_theirs, [[]]),
        ):
            times = [
                _turn(pair.how.device, ours, theirs, arguments[turn % len(arguments)], first=turn % 2 == 1)
                for turn in range(rounds + 1)
            ][1:]  # the first one warms up
            mine, peer = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(own / other for own, other in times)
            label = f"{name}: {what}"
            print(f"{label:<44}{mine:>8.3f}{peer:>10.3f}{ratio:>8.3f}", flush=True)
            self.ratios[label] = round(ratio, 3)

    def close(self) -> None:
        """The last line."""
        found = {
            "benchmark": self.benchmark,
            "ratios": self.ratios,
            "floor": FLOOR,
            "quick": self.quick,
            "machine": environment()["device"],
        }
        print(json.dumps(found))


def _turn(
    device: torch.device, ours: Callable[..., None], theirs: Callable[..., None], arguments: list[Any], first: bool
) -> tuple[float, float]:
    """Seconds of both, ours ``first`` or last."""
    if first:
        mine = _seconds(device, ours, arguments)
        return mine, _seconds(device, theirs, arguments)
    peer = _seconds(device, theirs, arguments)
    return _seconds(device, ours, arguments), peer


def _seconds(device: torch.device, function: Callable[..., None], arguments: list[Any]) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    began = clock()
    function(*arguments)
    wait(device)
    return clock() - began
