"""What a run shows and keeps while it goes: a live line on stderr, ``curves.jsonl`` and TensorBoard."""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from mte_bench.console import log
from mte_bench.files import write_text

CURVES = "curves.jsonl"


class Curves:
    """Appends JSON lines (and TensorBoard scalars) of means over the steps since the last line.

    A mean that is not finite, such as of gradient norms where float16 overflowed, is null in the JSON, which has no such numbers.

    Going on after a stop drops the lines that lie beyond the state that was saved.
    """

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / CURVES
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in lines))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.sums: dict[str, float] = defaultdict(float)
        self.count = 0

    def add(self, values: dict[str, float]) -> None:
        """Take in one step's values."""
        self.count += 1
        for key, value in values.items():
            self.sums[key] += value

    def write(self, step: int, epoch: float, seconds: float) -> None:
        """Write the means since the last line, if there were any steps; ``seconds`` is what training took so far."""
        if self.count:
            means = {key: value / self.count for key, value in self.sums.items()}
            self.line({"step": step, "epoch": epoch, "seconds": seconds, **means})
            self.sums.clear()
            self.count = 0

    def line(self, values: dict[str, Any]) -> None:
        """Write one line as it is."""
        self.file.write(json.dumps({key: _short(value) for key, value in values.items()}, allow_nan=False) + "\n")
        self.file.flush()
        for key, value in values.items():
            if key not in ("step", "epoch", "seconds"):
                self.writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        """Flush and close both files."""
        self.file.close()
        self.writer.close()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line that a kill cut in two


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


class LiveLine:
    """One line about the run: redrawn in place on a terminal, written anew every ``seconds`` otherwise."""

    def __init__(self, total: int, seconds: float = 15.0, silent: bool = False):
        self.total, self.silent = total, silent
        self.terminal = sys.stderr.isatty()
        self.interval = 0.2 if self.terminal else seconds
        self.started = self.shown = time.monotonic()
        self.images = self.steps = 0
        self.waiting = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal and not self.silent and self.steps:
            print(file=sys.stderr)

    @property
    def images_per_second(self) -> float:
        """Mean since the start (or going on)."""
        return self.images / max(time.monotonic() - self.started, 1e-9)

    @property
    def waiting_share(self) -> float:
        """Share of the time spent waiting for data."""
        return self.waiting / max(time.monotonic() - self.started, 1e-9)

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """``batches``, adding the time spent waiting for each to the waiting time."""
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.waiting += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def step(self, step: int, epoch: float, images: int, loss: float, memory: int) -> None:
        """Take in one optimiser step and show the line if it is time."""
        self.steps += 1
        self.images += images
        now = time.monotonic()
        if self.silent or (now - self.shown < self.interval and step < self.total):
            return
        self.shown = now
        left = (self.total - step) * (now - self.started) / self.steps
        text = (
            f"epoch {epoch:6.2f}  step {step}/{self.total}  loss {loss:.4f}  {self.images_per_second:.0f} images/s  "
            f"data wait {100 * self.waiting_share:.0f} %  {memory / 2**30:.2f} GiB  {_duration(left)} left"
        )
        if self.terminal:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        else:
            log(text)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
