"""What changes over a run: pure functions of the global step, or of the epoch. Source: DINO ``utils.py``, ``main_dino.py``.

Nothing is stored, so a run that goes on needs only its step.
"""

import math


def cosine(step: float, total: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 towards ``end``, which would be reached at step ``total``."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(step, total) / total))


def warmup_cosine(step: int, total: int, peak: float, end: float, warmup: int, start: float = 0.0) -> float:
    """A line from ``start`` to ``peak`` over ``warmup`` steps, then ``cosine`` from ``peak`` to ``end`` over the others.

    As in DINO the line includes both its ends, so ``peak`` is given twice: at step ``warmup - 1`` and at step ``warmup``.
    A run shorter than its warm-up ends on the line.
    """
    if step < warmup:
        return _line(step, warmup, start, peak)
    return cosine(step - warmup, total - warmup, peak, end)


def teacher_temperature(epoch: int, warmup: float, final: float, warmup_epochs: int) -> float:
    """A line from ``warmup`` to ``final`` over ``warmup_epochs`` epochs (both ends included), then ``final``."""
    return _line(epoch, warmup_epochs, warmup, final) if epoch < warmup_epochs else final


def _line(index: int, count: int, start: float, end: float) -> float:
    """The ``index``-th of ``count`` evenly spaced values from ``start`` to ``end``; a single one is ``start``."""
    if index and index == count - 1:
        return end
    return start + index * ((end - start) / max(count - 1, 1))
