"""What pre-training by a recipe and using its encoder cost, with and without MTE (Table 12).

Parameters and multiply-accumulates are counted on the meta device, part by part; time and memory are measured: whole steps
of the engine on noise, and forward passes of the exported encoder.
"""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mte_bench import records
from mte_bench.console import log, show_json, show_table
from mte_bench.data.sources import ImageSet
from mte_bench.device import autocast, forget_peak, peak_memory, pick_device, pick_precision, wait
from mte_bench.encoders.cost import count_macs, count_parameters
from mte_bench.encoders.encoder import Encoder
from mte_bench.errors import UserError
from pretrain import mte
from pretrain.loader import Batch
from pretrain.masks import draw_mask
from pretrain.methods import METHODS, Method
from pretrain.recipe import Recipe, load_recipe
from pretrain.trainer import Trainer

BATCH, CUDA_BATCH = 8, 64
CLASSES = 1000
"""Of the labels that a supervised method is given."""
PARTS: dict[str, tuple[str, ...]] = {
    "TEN": ("auxiliary.ten",),
    "poolers": ("auxiliary.pool", "auxiliary.pooled_norm"),
    "heads": ("head", "heads", "fusion"),
    "prototypes or predictor": ("tail",),
    "companion": ("companion", "companion_head"),
}
"""Modules of a branch by what they are; the encoder and the auxiliary CLS tokens, which pass it, are counted apart."""


class Counts(NamedTuple):
    """Parameters of the student, and multiply-accumulates (MACs) of one network on one global view, part by part.

    A method with masks has its head on all patches as well, as in the paper's 6.1 G of iBOT.
    """

    parameters: dict[str, int]
    macs: dict[str, int]
    forward_macs: int
    """Of all parts."""
    step_macs: float
    """Of a training step on one image: the student on all views, backward as twice that, and the teacher's targets."""


class Measured(NamedTuple):
    """Of one variant: seconds of each repeat and the most memory, of the device or else of the whole process (None: unknown)."""

    seconds: list[float]
    memory_bytes: int | None


def with_and_without(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe without MTE, and with its own settings of MTE or, if it has none, the defaults."""
    values = recipe.model_dump(mode="json")
    own = {} if recipe.mte is None else recipe.mte.model_dump(mode="json")
    return {
        "plain": Recipe.check({**values, "mte": None}, "recipe"),
        "mte": Recipe.check({**values, "mte": own}, "recipe"),
    }


def count(recipe: Recipe, by_definition: bool = True) -> Counts:
    """Count a recipe. ``by_definition`` pools by the convolutions that define the weights, as a reader of the paper counts;
    otherwise by the one correlation per channel that is computed here in their place."""
    method, student, teacher = _on_meta(recipe, by_definition)
    masking = method.masking is not None
    views = recipe.views
    one = (1, 1, 3, views.global1.size, views.global1.size)
    alone = count_macs(lambda view: student.encoder(view[0]), one).total
    counted = count_macs(lambda view: student([view], of_patches=masking), one)
    shapes = [(1 if method.labelled else 2, *one[1:])]
    if views.local_count and not method.labelled:
        shapes.append((views.local_count, 1, 3, views.local.size, views.local.size))

    def student_macs(of_patches: bool) -> int:
        wants = mte.student_wants(recipe)
        return count_macs(lambda *groups: student(groups, of_fused=wants, of_patches=of_patches), *shapes).total

    forward: float = student_macs(False)
    if method.masking:  # of the patches, only the hidden ones pass the student's head
        hidden = statistics.mean(mean for mean, _ in method.masking.ratios)
        forward += hidden * (student_macs(True) - forward)
    targets = 0
    if not method.labelled:
        targets = count_macs(lambda *groups: mte.teacher_vectors(teacher, groups, recipe, masking), *shapes).total
    parameters = {"encoder": count_parameters(student.encoder)}
    macs = {"encoder": alone}
    if student.auxiliary is not None and student.auxiliary.cls is not None:
        parameters["auxiliary CLS"] = student.auxiliary.cls.numel() + count_parameters(student.auxiliary.cls_norm)
        macs["auxiliary CLS"] = counted.modules["Branch.encoder"] - alone
    for part, names in PARTS.items():
        found = [module for name in names if (module := _module(student, name)) is not None]
        if found:
            parameters[part] = sum(map(count_parameters, found))
            macs[part] = sum(_macs_at(counted.modules, f"Branch.{name}") for name in names)
    rest = count_parameters(student) - sum(parameters.values())
    if rest:
        parameters["mask token"], macs["mask token"] = rest, 0
    return Counts(parameters, macs, counted.total, 3 * forward + targets)


def _on_meta(recipe: Recipe, by_definition: bool) -> tuple[Method, mte.Branch, mte.Branch]:
    kind = METHODS[recipe.method]
    with torch.device("meta"):
        method = kind(kind.Settings.check(recipe.method_settings, "method_settings"), CLASSES)
        student, teacher = mte.Branch(recipe, method, student=True).eval(), mte.Branch(recipe, method, student=False).eval()
    for branch in (student, teacher):
        branch.requires_grad_(False)
        if branch.auxiliary is not None and branch.auxiliary.settings.pooled:
            branch.auxiliary.pool.by_weights = by_definition
    return method, student, teacher


def _module(branch: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        found = getattr(branch, part, None)
        if not isinstance(found, nn.Module):
            return None
        branch = found
    return branch


def _macs_at(modules: dict[str, int], name: str) -> int:
    """MACs of the module called ``name``; where it is a mere list, which is never called, of its children."""
    if name in modules:
        return modules[name]
    return sum(macs for other, macs in modules.items() if other.rpartition(".")[0] == name)


class Blank(ImageSet):
    """Stands for images that are never read."""

    def __init__(self, images: int):
        self.source, self.split, self.fingerprint = "noise", "none", "none"
        self.classes = tuple(map(str, range(CLASSES)))
        self.labels = np.arange(images) % CLASSES


def measure(
    recipe: Recipe, batch_size: int, repeats: int, device: torch.device, precision: torch.dtype
) -> tuple[Measured, Measured]:
    """Measure training steps on ``batch_size`` images, and forward passes of the exported encoder on as many.

    The step is in the middle of the run, where nothing is frozen any more. Each first one warms up and is not counted.
    """
    step, encoder = _training(recipe, batch_size, repeats, device, precision)
    reset = _forget(device)  # of the rest of the engine nothing is left
    images = torch.randn(batch_size, 3, recipe.image_size, recipe.image_size, device=device)

    def encode() -> None:
        with torch.inference_mode(), autocast(device, precision):
            encoder(images)

    return step, _repeated(encode, repeats, device, reset)


def _training(
    recipe: Recipe, batch_size: int, repeats: int, device: torch.device, precision: torch.dtype
) -> tuple[Measured, Encoder]:
    small = recipe.model_copy(update={"batch_size": batch_size, "accumulate": 1})
    reset = _forget(device)
    trainer = Trainer(small, Blank(batch_size), Path(), device=device, precision=precision)
    trainer.step = trainer.total_steps // 2
    batch = _batch(trainer)
    step = _repeated(lambda: trainer.take_step(trainer.student, iter([batch])), repeats, device, reset)
    return step, trainer.evaluated.encoder.eval()


def _forget(device: torch.device) -> bool:
    gc.collect()
    return forget_peak(device)


def _repeated(function: Callable[[], Any], repeats: int, device: torch.device, reset: bool) -> Measured:
    seconds = []
    for _ in range(1 + repeats):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return Measured(seconds[1:], peak_memory(device) if reset else None)


def _batch(trainer: Trainer) -> Batch:
    """Noise, with labels and masks as the method wants them."""
    recipe, method = trainer.recipe, trainer.method
    views, b = recipe.views, recipe.batch_size
    generator = torch.Generator().manual_seed(0)

    def noise(count: int, size: int) -> Tensor:
        return torch.randint(0, 256, (count, b, 3, size, size), generator=generator, dtype=torch.uint8)

    groups = [noise(1 if method.labelled else 2, views.global1.size)]
    if views.local_count and not method.labelled:
        groups.append(noise(views.local_count, views.local.size))
    masks = None
    if method.masking:
        grid = trainer.student.encoder.grid(views.global1.size)
        chance = np.random.default_rng(0)
        drawn = [draw_mask(method.masking, *grid, recipe.epochs, chance).reshape(-1) for _ in range(2 * b)]
        masks = torch.from_numpy(np.stack(drawn)).view(2, b, -1)
    return Batch(groups, torch.arange(b) % CLASSES, torch.arange(b), masks, {})


def analyze_cost(
    name: str,
    assignments: list[str],
    *,
    batch_size: int | None,
    device: str,
    precision: str,
    repeats: int,
    timed: bool,
    out: str | None,
    json: bool,
) -> records.Record:
    """Count and measure recipe ``name`` with and without MTE, show it, and write the record if ``out`` says where."""
    began = time.monotonic()
    where = pick_device(device)
    dtype = pick_precision(precision, where)
    if out:
        records.require_place(out, "cost")
    recipe = load_recipe(name, assignments)
    variants = with_and_without(recipe)
    for variant in variants.values():
        mte.check(variant, METHODS[recipe.method])
    counts = {key: count(variant) for key, variant in variants.items()}
    executed = {key: count(variant, by_definition=False) for key, variant in variants.items()}
    images = batch_size or (CUDA_BATCH if where.type == "cuda" else BATCH)
    if images < 2:
        raise UserError(f"--batch-size {images}: a training step needs two images at least")
    measured: dict[str, tuple[Measured, Measured]] = {}
    for key, variant in variants.items() if timed else ():
        log(f"{key}: {1 + repeats} steps of {images} images on {where}")
        measured[key] = measure(variant, images, repeats, where, dtype)

    metrics: dict[str, records.Metric] = {}
    for key in variants:
        values: dict[str, tuple[float, int]] = {
            "parameters": (sum(counts[key].parameters.values()), 0),
            "encoder_parameters": (counts[key].parameters["encoder"], 0),
            "forward_macs": (counts[key].forward_macs, 0),
            "forward_macs_computed": (executed[key].forward_macs, 0),
            "step_macs": (counts[key].step_macs, 0),
            "step_macs_computed": (executed[key].step_macs, 0),
            "inference_macs": (counts[key].macs["encoder"], 0),
        }
        for what, result in zip(("step", "inference"), measured.get(key, ()), strict=False):
            values[f"{what}_seconds"] = (statistics.mean(result.seconds), repeats)
            if result.memory_bytes is not None:
                values[f"{what}_memory_bytes"] = (result.memory_bytes, 1)
        metrics |= {f"{what}_{key}": records.Metric(value=value, n=n) for what, (value, n) in values.items()}
    record = records.make_record(
        task="cost",
        protocol=records.Protocol(name="cost", settings={"batch_size": images, "repeats": repeats, "timed": timed}),
        subject=records.Subject(
            checkpoint=f"recipe {name}",
            sha256=recipe.hash,
            family="recipe",
            arch=recipe.arch,
            image_size=recipe.image_size,
            patch_size=recipe.patch_size,
            arch_options=recipe.arch_options
            | ({} if recipe.token_learner is None else {"token_learner": recipe.token_learner.title}),
            method=recipe.method,
            mte=recipe.mte is not None,
            recipe=Path(name).stem,
            recipe_hash=recipe.hash,
        ),
        data=records.Data(source="noise", split="none", images={"step": images}, fingerprint="none"),
        metrics=metrics,
        cost=records.Cost(seconds=round(time.monotonic() - began, 3)),
        details={
            "recipes": {key: variant.model_dump(mode="json") for key, variant in variants.items()},
            "parts": {key: {"parameters": found.parameters, "macs": found.macs} for key, found in counts.items()},
            "seconds": {key: {"step": step.seconds, "inference": use.seconds} for key, (step, use) in measured.items()},
            "precision": str(dtype).removeprefix("torch."),
            "device": str(where),
        },
    )
    if json:
        show_json(record)
    else:
        _show(record, recipe, counts, measured)
    if out:
        log(f"record: {records.write_record(out, record)}")
    return record


def _show(
    record: records.Record, recipe: Recipe, counts: dict[str, Counts], measured: dict[str, tuple[Measured, Measured]]
) -> None:
    title = f"{METHODS[recipe.method].title}, {recipe.arch}, one network on one view of {recipe.views.global1.size} pixels"
    columns = ["", "M parameters", "with MTE", "G MACs", "with MTE"]
    pair = counts["plain"], counts["mte"]
    names = list(dict.fromkeys([*pair[1].parameters, *pair[0].parameters]))
    rows: list[list[object]] = []
    for name in names:
        scaled = [_scaled(found.parameters.get(name), 1e6) for found in pair] + [
            _scaled(found.macs.get(name), 1e9) for found in pair
        ]
        rows.append([name, *scaled])
    total = [_scaled(sum(found.parameters.values()), 1e6) for found in pair] + [
        _scaled(found.forward_macs, 1e9) for found in pair
    ]
    show_table(title, columns, [*rows, ["all", *total]])

    views = "1 view" if METHODS[recipe.method].labelled else f"2 + {recipe.views.local_count} views"
    batch = record.data.images["step"]
    quantities = {
        "G MACs of one view, pooling as computed here": ("forward_macs_computed", 1e9),
        f"G MACs of a training step per image ({views})": ("step_macs", 1e9),
        "G MACs of that step, pooling as computed here": ("step_macs_computed", 1e9),
        "G MACs of the exported encoder": ("inference_macs", 1e9),
        f"s of a training step on {batch} images": ("step_seconds", 1),
        "GiB of memory while training": ("step_memory_bytes", 2**30),
        f"s of the exported encoder on {batch} images": ("inference_seconds", 1),
        "GiB of memory of the exported encoder": ("inference_memory_bytes", 2**30),
    }
    rows = []
    for text, (name, unit) in quantities.items():
        if f"{name}_plain" not in record.metrics:
            continue
        plain, with_mte = (record.metrics[f"{name}_{key}"].value / unit for key in ("plain", "mte"))
        cells: list[object] = [f"{plain:.4g}", f"{with_mte:.4g}"]
        if name.endswith("_seconds"):
            which = name.startswith("inference")
            cells = [f"{value:.3f} ± {_spread(measured[key][which])}" for key, value in (("plain", plain), ("mte", with_mte))]
        rows.append([text, *cells, f"{with_mte / plain:.3f}"])
    spread = "; ± is the standard deviation over repeats" if measured else ""
    show_table(f"All together{spread}", ["", "plain", "with MTE", "ratio"], rows)


def _spread(measured: Measured) -> str:
    return f"{statistics.stdev(measured.seconds):.3f}" if len(measured.seconds) > 1 else "?"


def _scaled(value: float | None, unit: float) -> str | None:
    return None if value is None else f"{value / unit:.4g}"
