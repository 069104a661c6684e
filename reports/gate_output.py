"""What a check says: on the terminal, as JUnit, and as markdown for the summary page of a run on GitHub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mte_bench.console import show_table
from mte_bench.errors import UserError
from mte_bench.files import write_text
from reports.gate import Status, Verdict
from reports.markdown import MISSING, Table, interval, number, plain_text, plus_minus, probability

COLUMNS = ("", "cell", "baseline", "now", "change [95 %]", "tolerance", "McNemar p", "remark")


def show(verdicts: Sequence[Verdict], title: str) -> None:
    """The table on stdout, what failed first."""
    columns = [column or "result" for column in COLUMNS]
    show_table(title, columns, [[verdict.status.value, *_cells(verdict)] for verdict in verdicts])


def outcome(verdicts: Sequence[Verdict]) -> str:
    """One line."""
    failed = sum(verdict.status.failed for verdict in verdicts)
    counts = {status: sum(verdict.status is status for verdict in verdicts) for status in Status}
    listed = ", ".join(f"{count} {status.value}" for status, count in counts.items() if count)
    return f"{'FAILED' if failed else 'passed'}: {failed} of {len(verdicts)} cells fail ({listed or 'none'})"


def _cells(verdict: Verdict) -> list[str]:
    change = verdict.change
    return [
        verdict.name,
        number(verdict.before),
        number(verdict.now),
        MISSING if change is None else f"{plus_minus(change)} {interval(verdict.interval, signed=True)}",
        f"{verdict.tolerance:g}",
        probability(verdict.p_value),
        verdict.reason,
    ]


def values(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """As plain values, for JSON."""
    return [
        {
            "cell": verdict.name,
            "task": verdict.task,
            "status": verdict.status.value,
            "failed": verdict.status.failed,
            "baseline": verdict.before,
            "now": verdict.now,
            "change": verdict.change,
            "ci95": verdict.interval,
            "mcnemar_p": verdict.p_value,
            "tolerance": verdict.tolerance,
            "remark": verdict.reason,
        }
        for verdict in verdicts
    ]


def write_junit(path: str | Path, verdicts: Sequence[Verdict]) -> None:
    """One test case for each cell, as CI systems read it."""
    failed = sum(verdict.status.failed for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "mte-bench check", **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", {"classname": verdict.task, "name": _printable(verdict.name)})
        titles = [column for column in COLUMNS if column]
        text = _printable("\n".join(f"{title}: {cell}" for title, cell in zip(titles, _cells(verdict), strict=True)))
        if verdict.status.failed:
            failure = ElementTree.SubElement(case, "failure", {"type": verdict.status.value, "message": _message(verdict)})
            failure.text = text
        else:
            ElementTree.SubElement(case, "system-out").text = f"{verdict.status.value}\n{text}"
    ElementTree.indent(root)
    write_text(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _message(verdict: Verdict) -> str:
    if verdict.change is None:
        return _printable(f"{verdict.status.value}: {verdict.reason}")
    return f"{verdict.status.value} by {-verdict.change:.2f} points, tolerance {verdict.tolerance:g}"


def _printable(text: str) -> str:
    """``text`` without the control characters that XML has no way to write."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)


def append_summary(path: str | Path, verdicts: Sequence[Verdict]) -> None:
    """Append the table as markdown, as ``$GITHUB_STEP_SUMMARY`` wants it; raises ``UserError`` if that cannot be done."""
    rows = tuple(
        (f"{'❌' if verdict.status.failed else '✅'} {verdict.status.value}", *map(plain_text, _cells(verdict)))
        for verdict in verdicts
    )
    table = Table(COLUMNS, rows, "llrrrrrl")
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"### mte-bench check: {outcome(verdicts)}\n\n{table.markdown()}\n\n")
    except OSError as error:
        raise UserError(f"{path}: the summary cannot be written ({error.strerror}); choose another --summary") from error
