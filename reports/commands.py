"""The ``report`` verb."""

from typing import Annotated, Any

import typer


def report(
    runs: Annotated[list[str], typer.Argument(help="Folders (or record.json files); every record below them is read.")],
    out: Annotated[str, typer.Option(help="Folder for report.md, report.json and figures/; may be one of RUNS.")],
    no_pictures_of_images: Annotated[
        bool, typer.Option("--no-pictures-of-images", help="Leave out pictures that show the data's images.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the summary of all cells as JSON on stdout.")] = False,
) -> Any:
    """Write a report (markdown and pictures) from the records of runs."""
    from mte_bench.console import log, show_json, show_table
    from reports.naming import data_title
    from reports.report import write_report

    written = write_report(runs, out, pictures_of_images=not no_pictures_of_images)
    for line in written.unusable:
        log(f"left out: {line}")
    if json:
        show_json(written.summary)
    else:
        for part in written.sections:
            columns = ["method", "architecture", "epochs", *(measure.title for measure in part.data.measures)]
            rows = [
                [row.title, row.architecture, row.epochs, *(cell.value and cell.value.value for cell in cells)]
                for row, cells in part.cells
            ]
            show_table(f"{data_title(part.data.record.data.source)}, top-1 in percent", columns, rows)
    count = f", {len(written.unusable)} files left out" if written.unusable else ""
    log(f"{written.page} ({written.summary['records']} records{count})")
    return written
