"""The verbs ``pretrain`` and ``analyze cost``."""

from typing import Annotated, Any

import typer


def pretrain(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (mte-bench list recipes) or a YAML file.")],
    data: Annotated[str, typer.Option(help="Source of the images, e.g. scenes or imagefolder:PATH.")],
    out: Annotated[str, typer.Option(help="Run folder; the same command goes on with an unfinished run in it.")],
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of initialisation, data order, views and stochastic depth.")
    ] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key=value, e.g. mte=true.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bfloat16 where native), float32, bfloat16, float16.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that make views, per training process.")] = 2,
    save_minutes: Annotated[float, typer.Option(min=0, help="Save within an epoch after so many minutes.")] = 10.0,
    allow_corrupt: Annotated[int, typer.Option(min=0, help="Go on with up to so many unreadable images.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print settings, steps, memory and time; train nothing.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two batches of everything, to see that it runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")] = False,
) -> Any:
    """Pre-train an encoder by a recipe, with or without MTE; returns the run's record."""
    from pathlib import Path

    from mte_bench import distributed
    from mte_bench.console import log, show_json, show_table
    from mte_bench.data.sources import open_source, take
    from mte_bench.device import pick_device, pick_precision
    from mte_bench.records import require_place
    from pretrain import mte
    from pretrain.methods import METHODS
    from pretrain.recipe import load_recipe
    from pretrain.trainer import Trainer

    settings = load_recipe(recipe, set_)
    rank, processes = distributed.start(device)
    try:
        # What can be refused is refused before the data is opened, which may take long.
        mte.check(settings, METHODS[settings.method], processes)
        where = pick_device(device)
        dtype = pick_precision(precision, where)
        require_place(out, "pretrain")
        images = open_source(data, "train")
        held_out = open_source(data, "val") if settings.knn_every or smoke else None
        if smoke:
            settings = settings.for_smoke(processes)
            images = take(images, "images", 2 * settings.batch_size)
            held_out = held_out and take(held_out, "images", 2 * settings.batch_size)
        trainer = Trainer(
            settings,
            images,
            Path(out),
            seed=seed,
            device=where,
            precision=dtype,
            workers=workers,
            held_out=held_out,
            allow_corrupt=allow_corrupt,
            save_minutes=save_minutes,
            recipe_name=Path(recipe).stem,
            process=(rank, processes),
        )
        if dry_run:
            from pretrain.estimate import estimate

            estimated = estimate(trainer)
            if json:
                show_json({"recipe": settings.model_dump(mode="json"), "estimate": estimated})
            else:
                import yaml

                print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
                show_table("Estimate", ["quantity", "value"], [list(item) for item in estimated.items()])
            return None
        record = trainer.run()
    finally:
        distributed.stop()
    if rank == 0:
        if json:
            show_json(record)
        else:
            rows: list[list[object]] = [
                ["loss (last epoch)", record.metrics["loss"].value],
                ["hours", record.cost.seconds / 3600],
                ["images/s", record.cost.images_per_second],
            ]
            show_table(f"{settings.title}, {settings.arch}, {settings.epochs} epochs on {data}", ["", "value"], rows)
            log(f"encoder: {Path(out) / 'encoder.safetensors'}")
    return record


def cost(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (mte-bench list recipes) or a YAML file.")],
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the record (default: none is written).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key=value, e.g. mte.pooled=2.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images of a step (default: 64 on CUDA, else 8).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto (bfloat16 where native), float32, bfloat16, float16.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Steps to time, after one that warms up.")] = 3,
    no_time: Annotated[bool, typer.Option("--no-time", help="Count only; measure no time and memory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")] = False,
) -> Any:
    """What a recipe costs with and without MTE: parameters, multiply-accumulates, memory and time, part by part."""
    from pretrain.cost import analyze_cost

    return analyze_cost(
        recipe,
        set_ or [],
        batch_size=batch_size,
        device=device,
        precision=precision,
        repeats=repeats,
        timed=not no_time,
        out=out,
        json=json,
    )
