"""The verb ``data``: write the embedded data to disk, look at a source."""

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(no_args_is_help=True, help="Write the embedded data in the layout of a real data set; look at a source.")


@data.command()
def write(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="What to write: scenes.")],
    out: Annotated[Path, typer.Option("--out", help="A new or empty folder.")],
    format: Annotated[str, typer.Option("--format", help="imagefolder, inat, coco or ade20k.")] = "imagefolder",
    train: Annotated[int, typer.Option("--train", help="Training images.")] = 4000,
    val: Annotated[int, typer.Option("--val", help="Validation images.")] = 1000,
    size: Annotated[int | None, typer.Option("--size", help="Shorter side in pixels (64; coco and ade20k: 160).")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other images.")] = 0,
    things: Annotated[int | None, typer.Option("--things", help="At most per image of coco and ade20k (6); 1 is large.")] = None,
) -> None:
    """Draw the embedded data into a folder."""
    from mte_bench.console import log
    from mte_bench.data.scenes_formats import write_scenes
    from mte_bench.errors import UserError, did_you_mean

    if what != "scenes":
        raise UserError(f"data write: nothing is called '{what}'{did_you_mean(what, ['scenes'])}")
    folder = write_scenes(out, format, train, val, size, seed, things)
    log(f"wrote {train} + {val} images; use them as --data {format}:{folder}")


@data.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="scenes, a folder, or KIND:PATH?OPTION=VALUE.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the splits of a source: images, classes, fingerprint.

    A missing split is a remark; it is an error only if both are missing.
    """
    from mte_bench.console import log, show_json, show_table
    from mte_bench.data.sources import SPLITS, describe
    from mte_bench.errors import UserError

    rows: list[dict[str, object]] = []
    missing: list[str] = []
    for split in SPLITS:
        try:
            rows.append(describe(source, split))
        except UserError as error:
            missing.append(str(error))
    if not rows:
        raise UserError(missing[0])
    if json:
        show_json(rows)
        return
    show_table(source, list(rows[0]), [[_short(value) for value in row.values()] for row in rows])
    for remark in missing:
        log(remark)


def _short(value: object) -> object:
    if not isinstance(value, list):
        return value
    return ", ".join(map(str, value[:3])) + (f", ... ({len(value)})" if len(value) > 3 else "") or None
