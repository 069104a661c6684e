"""How far features are from those of the projects whose checkpoints are read, by these projects' own code.

For each checkout that is given, its model code draws an encoder at random, writes a checkpoint as its training does, and
computes features; the same file is opened here, and the same features are computed from the same images. Sizes that the
encoder was not made for come to it in two ways: opened for the size, and opened as it is (a Swin only in the first, as the
reference too is built anew: windows are shifted only where there are several). Prints the table of
``docs/references.md`` and, as its last line, one JSON object. Everything runs on a CPU in float32; takes two minutes.

    git clone https://github.com/facebookresearch/dino && python -m benchmarks.references --reference dino=dino
    python -m benchmarks.references --reference ibot=PATH --reference mocov3=PATH ... --quick   # one image
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import timm.models.vision_transformer
import torch
from torch import Tensor, nn

from downstream.features import Pass, encode_batch
from downstream.knn import KNN
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.records import environment

Features = dict[str, Tensor]


class Case(NamedTuple):
    """One encoder of a reference."""

    title: str
    content: Any
    """The checkpoint, as its training writes it."""
    part: str
    """What of it is taken, as in FILE#PART; "" for what is taken by itself."""
    features: Callable[[Tensor], Features]
    """By the reference's code, from images ``b c h w``."""
    sizes: tuple[tuple[int, int], ...] = ((224, 224),)
    """Heights and widths; the first is the one that the encoder is made for."""


# What the references' code finds ----------------------------------------------------------------------------------------


@contextmanager
def reachable(root: Path) -> Iterator[None]:
    """Lets ``root`` be imported from, in the surroundings that its code was written for, and leaves nothing of it behind."""
    known = set(sys.modules)
    block = timm.models.vision_transformer.Block
    old_helpers: Any = types.ModuleType("timm.models.layers.helpers")
    old_helpers.to_2tuple = timm.layers.to_2tuple
    stand_ins: dict[str, Any] = {"timm.models.layers.helpers": old_helpers}
    if (root / "models").is_dir():
        stand_ins["models"] = types.ModuleType("models")  # its own __init__ would import the parts that need a GPU
        stand_ins["models"].__path__ = [str(root / "models")]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "path", [str(root), *sys.path]))
        stack.enter_context(mock.patch.dict(sys.modules, stand_ins))
        stack.enter_context(mock.patch.object(np, "float", float, create=True))  # gone from NumPy since
        registry = importlib.import_module("timm.models.registry")
        stack.enter_context(mock.patch.object(registry, "register_model", lambda function: function))  # timm keeps its own
        stack.enter_context(
            mock.patch.object(timm.models.vision_transformer, "Block", lambda *a, qk_scale=None, **k: block(*a, **k))
        )
        stack.enter_context(mock.patch.object(timm.models.vision_transformer.VisionTransformer, "num_tokens", 1, create=True))
        yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(root)):
            del sys.modules[name]


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """``model`` in evaluation mode with weights that are not at their initial values; fixed tables stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    return model.eval()


def prefixed(prefix: str, *modules: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for module in modules for name, tensor in module.state_dict().items()}


def of_layers(layers: list[Tensor]) -> Features:
    """From the normed tokens after the last four blocks, CLS first."""
    cls, mean = [tokens[:, 0] for tokens in layers], layers[-1][:, 1:].mean(1)
    return {
        "global": cls[-1],
        "cls-last4": torch.cat(cls, 1),
        "cls+patch-mean": torch.cat([cls[-1], mean], 1),
        "cls-last4+patch-mean": torch.cat([*cls, mean], 1),
        "patches": layers[-1][:, 1:].flatten(1),
    }


# The references ---------------------------------------------------------------------------------------------------------

SQUARE_AND_NOT = ((224, 224), (96, 96), (160, 256))


def dino(root: Path) -> Iterator[Case]:
    code = importlib.import_module("vision_transformer")
    teacher, student = drawn(code.vit_small(16)), drawn(code.vit_small(16), 1)
    head = code.DINOHead(384, 64)
    content = {
        "student": prefixed("module.backbone.", student) | prefixed("module.head.", head),
        "teacher": prefixed("backbone.", teacher) | prefixed("head.", head),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
    }
    for part, model in (("", teacher), ("student", student)):
        yield Case(
            f"ViT-S/16, {part or 'teacher'}",
            content,
            part,
            lambda images, model=model: of_layers(model.get_intermediate_layers(images, 4)) | {"global": model(images)},
            SQUARE_AND_NOT,
        )


def ibot(root: Path) -> Iterator[Case]:
    code = importlib.import_module("models.vision_transformer")
    swin_code = importlib.import_module("models.swin_transformer")
    head = importlib.import_module("models.head").iBOTHead(384, 64, patch_out_dim=64, shared_head=True)
    teacher, student = drawn(code.vit_small(16)), drawn(code.vit_small(16, masked_im_modeling=True), 1)
    content = {
        "student": prefixed("module.backbone.", student) | prefixed("module.head.", head),
        "teacher": prefixed("backbone.", teacher) | prefixed("head.", head),
        "epoch": 800,
    }
    raw = code.vit_small(16, use_mean_pooling=True).eval()  # the final norm is the identity
    raw.load_state_dict(teacher.state_dict(), strict=False)

    def features(images: Tensor) -> Features:
        patches = raw.get_intermediate_layers(images, 1)[-1][:, 1:]
        attention = raw.get_last_selfattention(images)[:, :, 0, 1:].mean(1)
        found = of_layers(teacher.get_intermediate_layers(images, 4)) | {"patch-mean": patches.mean(1)}
        for kind, sign in (("patches-top7", 1), ("patches-bottom7", -1)):
            chosen = (sign * attention).topk(7, dim=-1)[1].unsqueeze(-1).repeat(1, 1, 384)
            found[kind] = patches.gather(1, chosen).mean(1)
        return found

    yield Case("ViT-S/16, teacher", content, "", features, SQUARE_AND_NOT)
    by_student: Callable[[Tensor], Features] = lambda images: of_layers(student.get_intermediate_layers(images, 4))  # noqa: E731
    yield Case("ViT-S/16, student", content, "student", by_student, SQUARE_AND_NOT)
    swin = drawn(swin_code.swin_tiny(window_size=7, num_classes=0))

    def swin_features(images: Tensor) -> Features:
        pooled = swin.get_intermediate_layers(images, 4, return_patch_avgpool=True)
        return {"global": swin(images), "pooled-last4": torch.cat(pooled, 1)}

    yield Case("Swin-T/7, teacher", {"teacher": prefixed("backbone.", swin) | prefixed("head.", head)}, "", swin_features)


def mocov3(root: Path) -> Iterator[Case]:
    model = drawn(importlib.import_module("vits").vit_small())
    model.head = nn.Linear(384, 8)
    content = {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": prefixed("module.base_encoder.", model) | prefixed("module.momentum_encoder.", model),
    }

    def features(images: Tensor) -> Features:
        return {"global": model.forward_features(images)[:, 0]}

    yield Case("ViT-S/16 of 12 heads", content, "", features)


def mae(root: Path) -> Iterator[Case]:
    pretraining = importlib.import_module("models_mae")
    code, positions = importlib.import_module("models_vit"), importlib.import_module("util.pos_embed")
    small = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    model = drawn(pretraining.MaskedAutoencoderViT(**small, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2))
    content = {"model": model.state_dict(), "epoch": 799, "args": argparse.Namespace(model="mae")}

    def features(images: Tensor) -> Features:
        model, weights = code.VisionTransformer(img_size=images.shape[2], num_classes=0, **small).eval(), dict(content["model"])
        positions.interpolate_pos_embed(model, weights)
        model.load_state_dict(weights, strict=False)
        return {"global": model.forward_features(images)}

    yield Case("ViT-S/16, encoder and decoder", content, "", features, ((224, 224), (96, 96), (384, 384)))


def moby(root: Path) -> Iterator[Case]:
    code = importlib.import_module("models.swin_transformer")
    online, target = drawn(code.SwinTransformer(num_classes=0)), drawn(code.SwinTransformer(num_classes=0), 1)
    content = {
        "model": prefixed("encoder.", online) | prefixed("encoder_k.", target) | {"queue1": torch.zeros(4, 4)},
        "epoch": 299,
    }

    def at(size: int, own: nn.Module) -> Any:
        model, weights = code.SwinTransformer(img_size=size, num_classes=0).eval(), own.state_dict()
        model.load_state_dict({name: tensor for name, tensor in weights.items() if "attn_mask" not in name}, strict=False)
        return model

    for part, own in (("", online), ("encoder_k", target)):
        yield Case(
            f"Swin-T/7, {part or 'encoder'}",
            content,
            part,
            lambda images, own=own: {"global": at(images.shape[2], own)(images)},
            ((224, 224), (448, 448)),
        )


def dinov2(root: Path) -> Iterator[Case]:
    code = importlib.import_module("dinov2.models.vision_transformer")
    small = partial(code.vit_small, patch_size=14, init_values=1.0)
    # the released ones as its hub builds them
    plain = drawn(small(img_size=518, block_chunks=0))
    registers = drawn(
        small(img_size=518, block_chunks=0, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0)
    )
    chunked = drawn(small(img_size=224, block_chunks=4), 1)
    at_518, at_224 = ((518, 518), (224, 224), (140, 224)), ((224, 224), (98, 98))
    for title, model, content, sizes in (
        ("ViT-S/14", plain, plain.state_dict(), at_518),
        ("ViT-S/14 with 4 registers", registers, registers.state_dict(), at_518),
        ("ViT-S/14, training, in chunks", chunked, {"teacher": prefixed("backbone.", chunked)}, at_224),
    ):

        def features(images: Tensor, model: Any = model) -> Features:
            layers = model.get_intermediate_layers(images, 4, return_class_token=True)
            return of_layers([torch.cat([cls.unsqueeze(1), patches], 1) for patches, cls in layers])

        yield Case(title, content, "", features, sizes)


def deit(root: Path) -> Iterator[Case]:
    code = importlib.import_module("models")
    small = drawn(code.deit_small_patch16_224(num_classes=0))
    distilled = drawn(code.deit_small_distilled_patch16_224(num_classes=0))
    third = drawn(importlib.import_module("models_v2").deit_small_patch16_LS(num_classes=0))
    yield Case("DeiT-S", {"model": small.state_dict()}, "", lambda images: {"global": small.forward_features(images)[:, 0]})
    yield Case("DeiT-S, distilled", {"model": distilled.state_dict()}, "", lambda images: {"global": distilled(images)})
    yield Case("DeiT III-S", {"model": third.state_dict()}, "", lambda images: {"global": third.forward_features(images)})


REFERENCES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "dino": dino,
    "ibot": ibot,
    "mocov3": mocov3,
    "mae": mae,
    "moby": moby,
    "dinov2": dinov2,
    "deit": deit,
}


# The comparison ---------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """The largest absolute difference, and the largest of the reference's values."""

    difference: float
    largest: float


def compare(case: Case, file: Path, count: int) -> Iterator[tuple[str, dict[str, Difference]]]:
    """For each size, and there for each kind of feature, the larger difference of the two ways to that size."""
    torch.save(case.content, file)
    text = f"{file}#{case.part}" if case.part else str(file)
    own = open_checkpoint(text)
    assert own.encoder.spec.size == case.sizes[0], f"{case.title}: recognised as of size {own.encoder.spec.image_size}"
    for height, width in case.sizes:
        images = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), redirect_stdout(sys.stderr):
            expected = case.features(images)
        encoders = [own.encoder] if own.encoder.is_vit or (height, width) == case.sizes[0] else []
        if (height, width) != case.sizes[0]:
            encoders.append(open_checkpoint(f"{text}?image_size=[{height},{width}]").encoder)
        found = [encode_batch(encoder, images, tuple(expected), Pass()) for encoder in encoders]
        differences = {}
        for kind, values in expected.items():
            largest = max(float((torch.from_numpy(one[kind]) - values).abs().max()) for one in found)
            differences[kind] = Difference(largest, float(values.abs().max()))
        yield f"{height} x {width}", differences


def knn(root: Path) -> Iterator[tuple[str, int, tuple[float, float], tuple[float, float]]]:
    """Top-1 and top-5 of DINO's ``knn_classifier`` and of ours on the same features, for each k."""
    classifier = importlib.import_module("eval_knn").knn_classifier
    generator = torch.Generator().manual_seed(0)
    for classes, width, spread in ((100, 384, 4.0), (1000, 64, 1.2)):
        centres = torch.randn(classes, width, generator=generator)
        labels = [torch.randint(classes, (n,), generator=generator) for n in (10_000, 1_000)]
        bank, asked = (
            nn.functional.normalize(centres[own] + spread * torch.randn(len(own), width, generator=generator)) for own in labels
        )
        k = (10, 20, 100, 200)
        ranked = KNN(k, 0.07).fit(bank.numpy(), labels[0].numpy()).predict(asked.numpy())
        for count in k:
            hits = ranked[count] == labels[1].numpy()[:, None]
            ours = (100 * float(hits[:, 0].mean()), 100 * float(hits.any(1).mean()))
            theirs = classifier(bank, labels[0], asked, labels[1], count, 0.07, num_classes=classes)
            yield f"{classes} classes, width {width}", count, theirs, ours


def commit(root: Path) -> str:
    """The commit of a checkout."""
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", action="append", default=[], metavar="NAME=PATH", help=f"a checkout of {', '.join(REFERENCES)}"
    )
    parser.add_argument("--quick", action="store_true", help="one image instead of four")
    given = parser.parse_args()
    roots = dict(text.partition("=")[::2] for text in given.reference)
    if not roots or not set(roots) <= set(REFERENCES):
        parser.error(f"give checkouts as --reference NAME=PATH; NAME is one of {', '.join(REFERENCES)}")

    rows: list[dict[str, Any]] = []
    votes: list[dict[str, Any]] = []
    print("| reference | checkpoint | image | features | largest difference | of values up to |\n|---|---|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, place in roots.items():
            root = Path(place).resolve()
            with reachable(root):
                torch.manual_seed(0)
                for case in REFERENCES[name](root):
                    for size, found in compare(case, Path(folder) / "checkpoint.pth", 1 if given.quick else 4):
                        difference, largest = (max(values) for values in zip(*found.values(), strict=True))
                        kinds = ", ".join(f"`{kind}`" for kind in found)
                        where = f"{name} {commit(root)} | {case.title} | {size}"
                        print(f"| {where} | {kinds} | {difference:.0e} | {largest:.1f} |", flush=True)
                        rows += [
                            {
                                "reference": name,
                                "checkpoint": case.title,
                                "size": size,
                                "kind": kind,
                                "difference": one.difference,
                            }
                            for kind, one in found.items()
                        ]
                if name == "dino":
                    for data, k, theirs, ours in knn(root):
                        votes.append({"data": data, "k": k, "theirs": theirs, "ours": ours})
    if votes:
        print("\n| k-NN | k | DINO's top-1, top-5 | ours |\n|---|---:|---:|---:|")
    for vote in votes:
        shown = [f"{top1:.2f}, {top5:.2f}" for top1, top5 in (vote["theirs"], vote["ours"])]
        print(f"| {vote['data']} | {vote['k']} | {' | '.join(shown)} |")
    worst = max(row["difference"] for row in rows)
    print(
        json.dumps(
            {
                "benchmark": "references",
                "differences": rows,
                "largest": worst,
                "floor": 0,
                "knn": votes,
                "machine": environment()["device"],
            }
        )
    )


if __name__ == "__main__":
    main()
