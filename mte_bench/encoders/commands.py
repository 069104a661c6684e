"""The verbs ``inspect`` and ``export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mte_bench.encoders.encoder import EncoderSpec

Checkpoint_ = Annotated[str, typer.Argument(metavar="CKPT", help="Run folder, file, timm:NAME or random:NAME.")]
ImageSize = Annotated[int | None, typer.Option("--image-size", help="Build it for this size instead of its own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def inspect(
    checkpoint: Checkpoint_,
    image_size: ImageSize = None,
    all_names: Annotated[bool, typer.Option("--all", help="Also list the names of weights dropped and missing.")] = False,
    json: AsJson = False,
) -> None:
    """Say what a checkpoint is: family, architecture, cost, and which weights were matched, dropped and missing."""
    import torch

    from mte_bench.console import show_json, show_table
    from mte_bench.encoders.checkpoint import open_checkpoint
    from mte_bench.encoders.cost import count_macs, count_parameters

    opened = open_checkpoint(checkpoint, allow_partial=True, image_size=image_size)
    encoder, spec, subject = opened.encoder, opened.encoder.spec, opened.subject
    with torch.no_grad():
        macs = count_macs(encoder, (1, 3, *spec.size)).total
    multi_token = opened.multi_token()
    names = {"matched": opened.matched, "dropped": opened.dropped, "missing": opened.missing}
    if json:
        show_json(
            {
                "subject": subject.model_dump(mode="json"),
                "spec": spec.model_dump(mode="json"),
                "width": encoder.width,
                "depth": len(encoder.block_list),
                "num_heads": encoder.num_heads,
                "parameters": count_parameters(encoder),
                "macs": macs,
                "auxiliary": list(multi_token.names) if multi_token else [],
                **names,
                "metadata": opened.metadata,
            }
        )
        return
    rows: list[tuple[str, Any]] = [
        ("family", subject.family),
        ("architecture", spec.arch + "".join(f", {key} {value}" for key, value in _changes(spec).items())),
        ("image size", _pixels(spec)),
        *([("positions at other sizes", f"as {spec.resize_positions} does")] if encoder.is_vit else []),
        ("width, depth, heads", f"{encoder.width}, {len(encoder.block_list)}, {encoder.num_heads}"),
        ("parameters", f"{count_parameters(encoder) / 1e6:.2f} M"),
        ("multiply-accumulates", f"{macs / 1e9:.3f} G"),
        ("auxiliary tokens", ", ".join(multi_token.names) if multi_token else "none"),
        ("mean, std", f"{_numbers(spec.mean)}, {_numbers(spec.std)}"),
        *((f"weights {kind}", str(len(found))) for kind, found in names.items()),
        ("sha256 of the weights", subject.sha256),
        *((key, str(value)) for key, value in opened.metadata.items() if key != "spec"),
    ]
    show_table(checkpoint, ["", "found"], rows)
    if all_names:
        for kind in ("dropped", "missing"):
            show_table(f"{kind} ({len(names[kind])})", ["name"], [(name,) for name in names[kind]])


def export(
    checkpoint: Checkpoint_,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    file_format: Annotated[
        str | None, typer.Option("--format", help="safetensors or pth; by default what --out ends in.")
    ] = None,
    image_size: ImageSize = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Export although weights are missing.")] = False,
) -> None:
    """Write the encoder as a plain timm state dict and say how to load it (with TokenLearner, it is more than timm's)."""
    from mte_bench.console import log
    from mte_bench.encoders.checkpoint import open_checkpoint, save_encoder
    from mte_bench.errors import UserError, did_you_mean
    from mte_bench.files import atomic

    wanted = file_format or out.suffix.removeprefix(".") or "safetensors"
    wanted = "pth" if wanted == "pt" and file_format is None else wanted
    if wanted not in ("safetensors", "pth"):
        raise UserError(f"--format {wanted}: unknown{did_you_mean(wanted, ('safetensors', 'pth'))}")
    opened = open_checkpoint(checkpoint, allow_partial=allow_partial, image_size=image_size)
    encoder, spec = opened.encoder, opened.encoder.spec
    if wanted == "pth" and spec.token_learner is not None:
        raise UserError("--format pth: has no place for the settings of TokenLearner, which timm has none of; write safetensors")
    if wanted == "safetensors":
        kept = {key: value for key, value in opened.metadata.items() if key not in ("format", "spec")}
        save_encoder(out, encoder, {"family": opened.family} | kept)
    else:
        import torch

        with atomic(out) as temporary:
            torch.save(encoder.model.state_dict(), temporary)
    if spec.token_learner is not None:
        print(f"mte_bench.encoders.checkpoint.open_checkpoint({str(out)!r})")
        log("timm has no TokenLearner: its model takes these weights only without those called token_learner.*")
        return
    arguments = "".join(f", {key}={value!r}" for key, value in spec.timm_arguments.items())
    print(f'timm.create_model("{spec.arch}", checkpoint_path="{out}"{arguments})')
    if spec.norm_eps is not None:
        log(f"timm's model has another eps in its LayerNorms than these weights were trained with, {spec.norm_eps:g}")
    log(f"images: {_pixels(spec)} pixels, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}")


def _changes(spec: "EncoderSpec") -> dict[str, Any]:
    """What of the architecture differs from what its name says."""
    learned = {} if spec.token_learner is None else {"token_learner": spec.token_learner.title}
    own = {"patch_size": spec.patch_size, "norm_eps": spec.norm_eps}
    return {key: value for key, value in own.items() if value is not None} | spec.options | learned


def _pixels(spec: "EncoderSpec") -> str:
    return str(spec.image_size) if isinstance(spec.image_size, int) else "{} x {}".format(*spec.image_size)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
