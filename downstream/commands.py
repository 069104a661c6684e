"""The verbs of this package."""

from typing import Annotated, Any

import typer

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="Run folder, checkpoint file, timm:NAME or random:NAME.")]
Others = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="CKPT", help="Another encoder, features side by side (repeatable): an ensemble."),
]
Source = Annotated[str, typer.Option("--data", metavar="SOURCE", help="Source of the images, e.g. scenes or imagefolder:PATH.")]
Out = Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the record (default: in the run folder or runs/).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the protocol.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="Of the encoder: auto (bfloat16 where native), float32, bfloat16, float16.")]
FeatureDtype = Annotated[str, typer.Option(help="How features are kept: auto (16 bits if --precision is), float32, float16.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images per forward pass (default: 256 on CUDA, else 64).")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that decode images (default: by the number of cores).")]
Cache = Annotated[str | None, typer.Option(metavar="DIR", help="Folder that keeps features (default: the user's cache).")]
SaveMinutes = Annotated[float, typer.Option(min=0, help="Save within an epoch after so many minutes.")]
AllowCorrupt = Annotated[int, typer.Option(min=0, help="Leave out up to so many unreadable images of each split.")]
AllowPartial = Annotated[bool, typer.Option("--allow-partial", help="Accept a checkpoint that lacks weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print settings, counts and estimates; evaluate nothing.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Two batches of everything, to see that it runs.")]


def knn(
    checkpoint: Checkpoint,
    data: Source,
    others: Others = None,
    out: Out = None,
    protocol: Annotated[str, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file.")] = "knn",
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    feature_dtype: FeatureDtype = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    cache: Cache = None,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """k-NN accuracy of an encoder's features: the vote of the most similar train images. Nothing is trained."""
    options = dict(locals())
    from downstream.knn import KNN_TASK

    return _evaluate(KNN_TASK, **options)


def linear(
    checkpoint: Checkpoint,
    data: Source,
    others: Others = None,
    out: Out = None,
    protocol: Annotated[str, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file.")] = "linear-fast",
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    feature_dtype: FeatureDtype = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    cache: Cache = None,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """Accuracy of a linear classifier on an encoder's features."""
    options = dict(locals())
    from downstream.linear import LINEAR
    from mte_bench import distributed

    distributed.start(device)
    try:
        return _evaluate(LINEAR, **options)
    finally:
        distributed.stop()


def retrieval(
    checkpoint: Checkpoint,
    data: Source,
    others: Others = None,
    out: Out = None,
    protocol: Annotated[str, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file.")] = "retrieval",
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    cache: Cache = None,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """Do an encoder's nearest images show the same class? Recall, mean average precision, and a picture of neighbours."""
    options = dict(locals())
    from downstream.retrieval import RETRIEVAL

    return _evaluate(RETRIEVAL, **options)


def classify(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    protocol: Annotated[str, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file.")] = "classify",
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """Accuracy of the classifier that a checkpoint brings: a supervised or fine-tuned run, or weights with a head."""
    options = dict(locals())
    from downstream.classify import classify
    from downstream.evaluate import Request

    return classify(Request(set=tuple(options.pop("set_") or ()), **options))


def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A YAML file, or a name (mte-bench list suites).")],
    checkpoints: Annotated[list[str] | None, typer.Argument(metavar="CKPT", help="In place of the suite's own.")] = None,
    data: Annotated[str | None, typer.Option(metavar="SOURCE", help="In place of the suite's own.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of all records (default: runs/SUITE).")] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Submit to SLURM instead: workers=8, partition=gpu, timeout_min=120 ..."),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_size: BatchSize = None,
    workers: Workers = None,
    cache: Cache = None,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Annotated[bool, typer.Option("--json", help="Print every cell with its record as JSON on stdout.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells, what is done and estimates.")] = False,
    smoke: Smoke = False,
) -> None:
    """Evaluate many checkpoints on many tasks: each pair once, features shared, one table.

    The same command again does what is not done yet; several at once, also under torchrun or on several machines that
    share DIR, divide the work. The exit code is 1 if something failed.
    """
    options = dict(locals())
    from downstream.suites.run import run_suite

    if run_suite(**options):
        raise typer.Exit(1)


def _evaluate(task: Any, *, set_: list[str] | None, others: list[str] | None, **options: Any) -> Any:
    from downstream.evaluate import Request, evaluate

    return evaluate(task, Request(set=tuple(set_ or ()), others=tuple(others or ()), **options))


def finetune(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    protocol: Annotated[str, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file.")] = "vits",
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    save_minutes: SaveMinutes = 10.0,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """Accuracy of an encoder that is trained further with a classifier; the same command goes on where it stopped."""
    options = dict(locals())
    from downstream.finetune import FINETUNE, tune

    return tune(FINETUNE, *_tuning(**options))


def inat(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="inat:PATH?year=2018, the competition's layout.")],
    out: Out = None,
    protocol: Annotated[str, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file.")] = "vits-2018",
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    save_minutes: SaveMinutes = 10.0,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """Fine-tuning on iNaturalist: accuracy per class, per taxonomic rank, and of common and rare classes."""
    options = dict(locals())
    from downstream.finetune import tune
    from downstream.inaturalist import INAT

    return tune(INAT, *_tuning(**options))


def _tuning(*, set_: list[str] | None, save_minutes: float, **options: Any) -> tuple[Any, float]:
    from downstream.evaluate import Request

    return Request(set=tuple(set_ or ()), **options), save_minutes


Finished = Annotated[
    str, typer.Argument(metavar="CKPT", help="An encoder, or the folder of a finished run, which is only tested.")
]
Pictures = Annotated[int, typer.Option(min=0, help="Images in the picture.")]
DenseProtocol = Annotated[str | None, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file [vitb].")]


def ade20k(
    checkpoint: Finished,
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="ade20k:PATH: images/ and annotations/ with label PNGs.")],
    out: Out = None,
    protocol: DenseProtocol = None,
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    save_minutes: SaveMinutes = 10.0,
    pictures: Pictures = 4,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """Semantic segmentation with UperNet, or a linear head: mIoU. The same command goes on where it stopped."""
    options = dict(locals())
    from downstream.dense.ade20k import ADE20K

    return _dense(ADE20K, **options)


def coco(
    checkpoint: Finished,
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="coco:PATH?year=2017: annotations/ and the images.")],
    out: Out = None,
    protocol: DenseProtocol = None,
    set_: Set = None,
    device: Device = "auto",
    precision: Precision = "auto",
    workers: Workers = None,
    save_minutes: SaveMinutes = 10.0,
    pictures: Pictures = 4,
    allow_corrupt: AllowCorrupt = 0,
    allow_partial: AllowPartial = False,
    json: Json = False,
    dry_run: DryRun = False,
    smoke: Smoke = False,
) -> Any:
    """Detection and instance segmentation with Cascade Mask R-CNN: box and mask mAP. Goes on where it stopped."""
    options = dict(locals())
    from downstream.dense.coco import COCO

    return _dense(COCO, **options)


def _dense(task: Any, *, set_: list[str] | None, protocol: str | None, save_minutes: float, pictures: int, **options: Any) -> Any:
    from downstream.dense.task import run_dense
    from downstream.evaluate import Request

    return run_dense(task, Request(set=tuple(set_ or ()), protocol=protocol or "", **options), save_minutes, pictures)
