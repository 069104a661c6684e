"""The verb ``analyze``: each analysis is one command, one record and one picture."""

from typing import Annotated, Any, Literal

import typer

from downstream.commands import (
    AllowCorrupt,
    AllowPartial,
    BatchSize,
    Cache,
    Checkpoint,
    Device,
    DryRun,
    Json,
    Out,
    Precision,
    Set,
    Smoke,
    Source,
    Workers,
)

Count = Annotated[int | None, typer.Option(min=4, help="Val images to measure on (default: the protocol's).")]
Bank = Annotated[int | None, typer.Option(min=4, help="Train images to look up in (default: the protocol's, 50000).")]
Images = Annotated[int | None, typer.Option(min=1, help="Images in the picture (default: 6).")]
Protocol = Annotated[str, typer.Option(help="Name of a protocol (mte-bench list protocols) or a YAML file.")]
Between = Annotated[
    Literal["tokens", "layers"] | None,
    typer.Option(help="What to compare (default: tokens where there are auxiliary ones, else layers)."),
]

analyze = typer.Typer(help="Look into an encoder: its tokens, layers, attention and pooling maps.", no_args_is_help=True)


@analyze.command()
def cka(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    between: Between = None,
    count: Count = None,
    protocol: Protocol = "cka",
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
    """How alike tokens or layers see the same images: linear CKA of all pairs, as a heat map."""
    options = dict(locals())
    from downstream.analysis.cka import CKA

    return _study(CKA, **options)


@analyze.command()
def pooling(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    images: Images = None,
    count: Count = None,
    protocol: Protocol = "pooling",
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
    """Where the pooled tokens of MTE look: kernels and weight maps over images."""
    options = dict(locals())
    from downstream.analysis.pooling import POOLING

    return _study(POOLING, **options)


@analyze.command()
def attention(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    images: Images = None,
    count: Count = None,
    protocol: Protocol = "attention",
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
    """Where a ViT's CLS token looks: attention of the last block's heads over images."""
    options = dict(locals())
    from downstream.analysis.attention import ATTENTION

    return _study(ATTENTION, **options)


@analyze.command(name="per-class")
def per_class(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    count: Count = None,
    bank: Bank = None,
    protocol: Protocol = "per-class",
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
    """Which token knows which class: k-NN accuracy of each token, class by class."""
    options = dict(locals())
    from downstream.analysis.per_class import PER_CLASS

    return _study(PER_CLASS, **options)


@analyze.command()
def pairs(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    count: Count = None,
    bank: Bank = None,
    protocol: Protocol = "pairs",
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
    """What two tokens know together: accuracy of each pair against its better half, by k-NN and a linear probe."""
    options = dict(locals())
    from downstream.analysis.pairs import PAIRS

    return _study(PAIRS, **options)


@analyze.command(name="patch-knn")
def patch_knn(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    protocol: Protocol = "knn-patches",
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
    """k-NN on the mean of the patches that CLS attends to most or least, of all of them, and on the global token."""
    options = dict(locals())
    from downstream.commands import knn

    return knn(**options)


@analyze.command(name="token-quality")
def token_quality(
    checkpoint: Checkpoint,
    data: Source,
    others: Annotated[
        list[str] | None, typer.Option("--with", metavar="RUN", help="Another run, drawn beside the first (repeatable).")
    ] = None,
    out: Out = None,
    count: Count = None,
    bank: Annotated[int | None, typer.Option(min=4, help="Train images to learn from (default: the protocol's, 10000).")] = None,
    protocol: Protocol = "token-quality",
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
    """How good each kind of token is along pre-training: k-NN and linear probe at every snapshot of a run."""
    options = dict(locals())
    from downstream.analysis.token_quality import token_quality

    return token_quality(_request(**options))


@analyze.command(name="pseudo-labels")
def pseudo_labels(
    checkpoint: Checkpoint,
    data: Source,
    out: Out = None,
    count: Count = None,
    protocol: Protocol = "pseudo-labels",
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
    """How well the prototypes that tokens choose agree with the classes: NMI, ARI, matched accuracy."""
    options = dict(locals())
    from downstream.analysis.pseudo_labels import PSEUDO_LABELS

    return _study(PSEUDO_LABELS, **options)


def _study(analysis: Any, *, images: int | None = None, **options: Any) -> Any:
    from downstream.analysis.study import study

    return study(analysis, _request(**options), images)


def _request(*, set_: list[str] | None, others: list[str] | None = None, **options: Any) -> Any:
    from downstream.evaluate import Request

    given = {key: options.pop(key, None) for key in ("count", "bank", "between")}
    assignments = [*(set_ or ()), *(f"{key}={value}" for key, value in given.items() if value is not None)]
    return Request(set=tuple(assignments), others=tuple(others or ()), **options)
