"""The verbs ``list`` and ``doctor``."""

from typing import Annotated

import typer


def list_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="recipes, protocols, tasks, suites, methods or archs.")],
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Only names like this, e.g. 'vit_small*'.")] = "*",
    table: Annotated[int | None, typer.Option(help="Of recipes, those of this table of the paper, and what it prints.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Show what there is: recipes, protocols, tasks, suites, methods or architectures."""
    from mte_bench.catalogue import of_table, rows
    from mte_bench.console import show_json, show_table
    from mte_bench.errors import UserError

    if table is not None and what != "recipes":
        raise UserError(f"list {what} --table: only recipes belong to tables of the paper")
    found = rows(what, pattern) if table is None else of_table(table)
    if json:
        show_json(found)
        return
    columns = list(dict.fromkeys(key for row in found for key in row))
    show_table("", columns, [[row.get(column) for column in columns] for row in found])


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Look at this machine and installation and say what to mend.

    The exit code is 1 if something must be mended.
    """
    from mte_bench.console import log, show_json, show_table
    from mte_bench.doctor import examine

    findings = examine()
    ill = any(finding.mend for finding in findings)
    if json:
        show_json(findings)
    elif ill:
        show_table("", ["", "found", "to mend"], [[finding.name, finding.found, finding.mend or ""] for finding in findings])
    else:
        show_table("", ["", "found"], [[finding.name, finding.found] for finding in findings])
        log("nothing to mend")
    if ill:
        raise typer.Exit(1)
