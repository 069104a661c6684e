"""The regression gate: each cell of a baseline against what was measured now.

A cell fails when it fell by more than the tolerance **and** McNemar's test says that the fall is not chance (two-sided
p < 0.05). The test is exact in the numbers of images that changed sides, no random number enters the verdict, and equal
predictions can never fail. mIoU and mAP are no shares of right images: there the paired interval of the change takes the
place of the test (95 % over images, the same 1,000 resamples for both, which the images' names decide), and a change is more than
chance if 0 lies outside. Where images cannot be paired the tolerance alone decides. A cell that is gone, or was measured by
another protocol or on other data, fails too: nothing can be said of it. New cells are named and do not fail.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from mte_bench.dense.resampling import interval_of
from mte_bench.statistics import mcnemar, paired_bootstrap
from reports.baseline import Baseline, Cell, repeats

LEVEL = 0.05
_ROUNDING = 1e-9  # percentage points: a fall of exactly the tolerance is no more than it


class Status(StrEnum):
    """What became of a cell."""

    FELL = "fell"
    MISSING = "missing"
    PROTOCOL = "other protocol"
    DATA = "other data"
    CHANCE = "within chance"
    SAME = "ok"
    BETTER = "better"
    NEW = "new"

    @property
    def failed(self) -> bool:
        """Whether it fails the gate."""
        return self in (Status.FELL, Status.MISSING, Status.PROTOCOL, Status.DATA)


@dataclass(frozen=True)
class Verdict:
    """One cell: values in percent, the rest in percentage points. ``change`` is now minus baseline."""

    name: str
    task: str
    status: Status
    reason: str
    before: float | None
    now: float | None
    tolerance: float
    interval: tuple[float, float] | None = None
    """Of the change, 95 % over images, paired."""
    p_value: float | None = None

    @property
    def change(self) -> float | None:
        """None unless the two values are comparable."""
        if self.before is None or self.now is None or self.status in (Status.PROTOCOL, Status.DATA):
            return None
        return self.now - self.before


def check(baseline: Baseline, now: Sequence[Cell]) -> list[Verdict]:
    """A verdict on every cell of ``baseline`` and on every new one, those that fail first."""
    pairs = _matched(baseline.cells, now)
    called = {id(cell): cell.name for cell in (*baseline.cells, *now)}
    for cells in (baseline.cells, now):
        for cell, repeat in zip(cells, repeats(cells), strict=True):
            called[id(cell)] += f" (repeat {repeat + 1})" if repeat else ""
    found = []
    for before, after in pairs:
        known = before or after
        assert known is not None
        found.append(replace(judge(before, after, baseline.tolerance_of(known.task)), name=called[id(known)]))
    return sorted(found, key=lambda verdict: list(Status).index(verdict.status))


def judge(before: Cell | None, now: Cell | None, tolerance: float, seed: int = 0) -> Verdict:
    """The verdict on one cell, which may be missing on one side; ``seed`` is that of the interval, which decides nothing."""
    cell = before or now
    assert cell is not None
    values = (None if before is None else before.value, None if now is None else now.value)
    known = Verdict(cell.name, cell.task, Status.SAME, "", *values, tolerance)
    if now is None:
        return replace(known, status=Status.MISSING, reason="in the baseline, and not among the records")
    if before is None:
        return replace(known, status=Status.NEW, reason="not in the baseline")
    if before.protocol != now.protocol:
        return replace(known, status=Status.PROTOCOL, reason=f"was {before.protocol}, is {now.protocol}")
    if before.place != now.place:
        return replace(known, status=Status.DATA, reason=f"was {_data(before)}, is {_data(now)}")
    remark = "" if before.recipe_hash == now.recipe_hash else "the recipe's settings have changed"
    fall = before.value - now.value
    more = fall > tolerance + _ROUNDING
    sure = _sure(before, now, seed)
    if sure is None:
        missing = any(cell.right is None and cell.drawn is None for cell in (before, now))
        why = "no predictions image by image" if missing else "predictions are of other images"
        status = Status.FELL if more else Status.SAME
        return replace(known, status=status, reason=_joined(f"{why}: judged by the tolerance alone", remark))
    known = replace(known, interval=sure.interval, p_value=sure.p_value, reason=remark)
    if more:
        return replace(known, status=Status.FELL if sure.changed else Status.CHANCE)
    better = -fall > tolerance + _ROUNDING and sure.changed
    return replace(known, status=Status.BETTER if better else Status.SAME)


class Sure(NamedTuple):
    """What the images say of a change."""

    changed: bool
    """Whether it is more than chance."""
    interval: tuple[float, float] | None
    p_value: float | None = None


def _sure(before: Cell, now: Cell, seed: int) -> Sure | None:
    """None where images cannot be paired."""
    if before.images is None or before.images != now.images:
        return None
    right, drawn = (before.bits(), now.bits()), (before.draws(), now.draws())
    if right[0] is not None and right[1] is not None:
        p_value = mcnemar(right[1], right[0])
        low, high = paired_bootstrap(right[1], right[0], seed)[1:]
        return Sure(p_value < LEVEL, (100 * low, 100 * high), p_value)
    if drawn[0] is None or drawn[1] is None:
        return None
    if (ends := interval_of(drawn[1] - drawn[0], now.value - before.value)) is not None:
        return Sure(not ends[0] <= 0 <= ends[1], ends)
    return None


def _data(cell: Cell) -> str:
    subset = f" ({cell.subset})" if cell.subset else ""
    return f"{cell.data.partition('?')[0]}{subset} {cell.fingerprint}"


def _joined(*remarks: str) -> str:
    return "; ".join(remark for remark in remarks if remark)


def _matched(before: Sequence[Cell], now: Sequence[Cell]) -> list[tuple[Cell | None, Cell | None]]:
    """Pairs of the same cell: exactly the same first, then what has another recipe, protocol or data and no rival."""
    keys: tuple[tuple[Callable[[Cell], tuple[object, ...]], bool], ...] = (
        (lambda cell: (*cell.role, *cell.place, cell.recipe_hash), True),
        (lambda cell: (*cell.role[:3], *cell.role[5:], *cell.place, cell.recipe_hash), True),  # data under another name
        (lambda cell: (*cell.role, *cell.place), False),
        (lambda cell: cell.role, False),
    )
    left, right = list(before), list(now)
    pairs: dict[int, Cell] = {}
    for key, several in keys:
        ours, theirs = _grouped(left, key), _grouped(right, key)
        for name in ours.keys() & theirs.keys():
            if several or len(ours[name]) == len(theirs[name]) == 1:
                pairs |= {id(cell): other for cell, other in zip(ours[name], theirs[name], strict=False)}
        taken = set(map(id, pairs.values()))
        left, right = [cell for cell in left if id(cell) not in pairs], [cell for cell in right if id(cell) not in taken]
    return [*((cell, pairs.get(id(cell))) for cell in before), *((None, cell) for cell in right)]


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], tuple[object, ...]]) -> dict[tuple[object, ...], list[Cell]]:
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups
