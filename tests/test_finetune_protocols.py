"""Learning from labels is set up as in the references, line by line: settings, schedules, layers and augmentation."""

import math
import random
import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler

from downstream.evaluate import evaluation_transform, load_protocol
from downstream.finetune import FINETUNE
from downstream.inaturalist import INAT
from downstream.tuning.classifier import MODEL, Classifier, build_optimiser, set_rate
from downstream.tuning.protocol import Augmentation, FinetuneProtocol, learning_rate
from mte_bench.encoders.checkpoint import open_checkpoint
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from pretrain.recipe import load_recipe

MIXED = {"mixup": 0.8, "cutmix": 1.0, "cutmix_share": 0.5, "smoothing": 0.1}
COMMON = {**MIXED, "weight_decay": 0.05, "betas": (0.9, 0.999), "auto_augment": "rand-m9-mstd0.5-inc1", "seed": 0}
COMMON |= {"crop_interpolation": "bicubic", "crop_scale": (0.08, 1.0), "evaluates": "weights", "reports": "best"}
IBOT = {**COMMON, "batch_size": 1024, "lr_per": None, "min_lr": 1e-6, "warmup_epochs": 20, "warmup_from": 0, "schedule": "beit"}
IBOT |= {"erase": 0.25, "repeats": 1, "pool": "token", "head_std": 0.02 * 0.001, "ema": None, "interpolation": "bilinear"}
MTE_S = {**IBOT, "lr": 2e-3, "epochs": 200, "layer_decay": 0.75, "drop_path": 0.1, "image_size": 224, "resize": None}
MTE_B = {**MTE_S, "epochs": 100, "layer_decay": 0.6, "drop_path": 0.2}
MAE = {**COMMON, "batch_size": 1024, "lr": 5e-4, "lr_per": 256, "min_lr": 1e-6, "warmup_epochs": 5, "warmup_from": 0}
MAE |= {"schedule": "mae", "layer_decay": 0.65, "drop_path": 0.1, "erase": 0.25, "head_std": 2e-5, "pool": "mean"}
MAE |= {"interpolation": "bicubic", "epochs": 100, "repeats": 1, "ema": None, "color_jitter": 0}
INATURALIST = {**COMMON, "epochs": 360, "batch_size": 768, "lr_per": 512, "layer_decay": 1, "warmup_epochs": 5}
INATURALIST |= {"warmup_from": 1e-6, "min_lr": 1e-5, "schedule": "deit", "drop_path": 0.1, "erase": 0.1, "color_jitter": 0.4}
INATURALIST |= {"repeats": 3, "ema": 0.99996, "pool": "token", "head_std": 0.02, "interpolation": "bicubic"}
INATURALIST |= {"image_size": 224, "resize": None, "shots": (20, 100)}
SHEET: dict[str, tuple[dict[str, Any], float]] = {  # settings, learning rate of the head at the end of the warm-up
    "finetune-vits": (MTE_S, 2e-3),
    "finetune-vits-printed": ({**MTE_S, "epochs": 100}, 2e-3),
    "finetune-vits-384": ({**MTE_S, "image_size": 384, "resize": 384}, 2e-3),
    "finetune-vitb": (MTE_B, 2e-3),
    "finetune-vitb-printed": ({**MTE_B, "epochs": 200}, 2e-3),
    "finetune-vitb-ibot": ({**MTE_B, "layer_decay": 0.65}, 2e-3),
    "finetune-vitb-384": ({**MTE_B, "image_size": 384, "resize": 384}, 2e-3),
    "finetune-vitb-mae": (MAE, 2e-3),
    "inat-vits-2018": ({**INATURALIST, "lr": 5e-5}, 7.5e-5),
    "inat-vits-2019": ({**INATURALIST, "lr": 2.5e-5}, 3.75e-5),
    "inat-vitb": ({**INATURALIST, "lr": 7.5e-6}, 1.125e-5),
}


def protocol(name: str, *changes: str) -> FinetuneProtocol:
    return load_protocol(INAT if name.startswith("inat") else FINETUNE, name, changes)[1]


@pytest.mark.parametrize("name", SHEET)
def test_settings_are_those_of_the_references(name: str) -> None:
    found, (settings, peak) = protocol(name), SHEET[name]
    values = found.model_dump()
    assert {key: values[key] for key in settings} == {k: pytest.approx(v) if k == "head_std" else v for k, v in settings.items()}
    assert found.peak_lr == pytest.approx(peak) and found.accumulate == 1 and found.evaluate_every == 1


SCRATCH: dict[str, dict[str, Any]] = {  # section 7.1: training from scratch, which is a recipe and no protocol
    "supervised_vits16_300ep": {
        "peak": 1e-3, "end": 1e-5, "start": 1e-6, "batch_size": 1024, "warmup_epochs": 5, "weight_decay": 0.05,
        "betas": (0.9, 0.999), "erase": 0.25, "repeats": 3, "ema": 0.99996, "evaluate_ema": False,
    },
    "supervised_vitb16_300ep": {
        "peak": 1.6e-3, "end": 1e-6, "start": 0, "batch_size": 4096, "warmup_epochs": 20, "weight_decay": 0.3,
        "betas": (0.9, 0.95), "erase": 0, "repeats": 1, "ema": 0.9999, "evaluate_ema": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCRATCH)
def test_recipes_from_scratch_are_those_of_deit_and_mae(name: str) -> None:
    recipe, expected = load_recipe(name), SCRATCH[name]
    optimiser, view, scale = recipe.optimiser, recipe.views.global1, recipe.batch_size / recipe.optimiser.lr_per
    found = {
        "peak": optimiser.lr * scale, "end": optimiser.min_lr, "start": optimiser.warmup_from * scale,
        "batch_size": recipe.batch_size, "warmup_epochs": optimiser.warmup_epochs, "weight_decay": optimiser.weight_decay,
        "betas": optimiser.betas, "erase": view.erase, "repeats": recipe.repeats, "ema": recipe.momentum[0],
        "evaluate_ema": recipe.method_settings["evaluate_ema"],
    }  # fmt: skip
    assert found == {key: pytest.approx(value) for key, value in expected.items()}
    assert {key: recipe.method_settings[key] for key in MIXED} == MIXED
    assert (recipe.epochs, recipe.drop_path, view.auto_augment) == (300, 0.1, "rand-m9-mstd0.5-inc1")
    assert (optimiser.decay, optimiser.clip, optimiser.weight_decay_end) == ("layers", None, optimiser.weight_decay)


EPOCHS, STEPS = 40, 7


def rates(name: str, *changes: str) -> list[float]:
    settings = protocol(name, f"epochs={EPOCHS}", *changes)
    return [learning_rate(settings, step, STEPS) for step in range(EPOCHS * STEPS)]


def test_ibots_rate_is_beits_array() -> None:
    warm, rest = 20 * STEPS, np.arange(20 * STEPS)
    falling = 1e-6 + 0.5 * (2e-3 - 1e-6) * (1 + np.cos(np.pi * rest / len(rest)))
    np.testing.assert_allclose(rates("vits"), np.concatenate([np.linspace(0, 2e-3, warm), falling]), rtol=1e-12, atol=1e-18)


def test_maes_rate_is_its_formula_of_the_fractional_epoch() -> None:
    def rate(epoch: float) -> float:
        if epoch < 5:
            return 2e-3 * epoch / 5
        return 1e-6 + (2e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / (EPOCHS - 5)))

    expected = [rate(step / STEPS) for step in range(EPOCHS * STEPS)]
    np.testing.assert_allclose(rates("vitb-mae"), expected, rtol=1e-12)


def test_deits_rate_is_timms_scheduler_called_as_deit_does() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-5 * 768 / 512)
    scheduler = CosineLRScheduler(optimiser, EPOCHS, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    expected = []
    for epoch in range(EPOCHS):
        expected += [optimiser.param_groups[0]["lr"]] * STEPS
        scheduler.step(epoch)
    np.testing.assert_allclose(rates("inat-vits-2018"), expected, rtol=1e-12)


NARROW = {"embed_dim": 96}  # names and depth are those of ViT-B, and its weights drawn in a moment


def classifier(arch: str, name: str, **options: Any) -> Classifier:
    spec = EncoderSpec(arch=arch, options=options)
    return Classifier(spec, build_encoder(spec).model.state_dict(), 5, protocol(name))


def by_name(model: Classifier, settings: FinetuneProtocol) -> dict[str, tuple[float, float]]:
    """(share of the learning rate, weight decay) of every parameter, under timm's own names."""
    names = {id(parameter): name.removeprefix(MODEL) for name, parameter in model.named_parameters()}
    optimiser = build_optimiser(model, settings, torch.device("cpu"))
    set_rate(optimiser, 0.5)
    return {names[id(p)]: (g["lr"] / 0.5, g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}


def test_layer_decay_of_every_parameter_of_vit_b() -> None:
    found = by_name(classifier("vit_base_patch16_224", "vitb", **NARROW), protocol("vitb"))
    assert len(found) == 4 + 12 * 12 + 2 + 2
    for name, (scale, decay) in found.items():
        block = re.match(r"blocks\.(\d+)", name)
        power = 12 - int(block[1]) if block else 0 if name.startswith(("head", "norm")) else 13
        assert scale == pytest.approx(0.6**power, rel=1e-12), name
        plain = name in ("pos_embed", "cls_token") or name.endswith("bias") or "norm" in name
        assert decay == (0 if plain else 0.05), name

    # timm's own grouping counts the final norm to the last block; all else is the same.
    model = timm.create_model("vit_base_patch16_224", num_classes=5, **NARROW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.6)
    theirs = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert theirs.keys() == found.keys()
    assert {name for name in theirs if theirs[name] != pytest.approx(found[name])} == {"norm.weight", "norm.bias"}


def test_layer_decay_of_a_swin_counts_blocks_over_stages() -> None:
    """iBOT's rule; what merges patches stands at the end of a stage there, at the beginning of the next one in timm."""
    found = by_name(classifier("swin_tiny_patch4_window7_224", "swint", embed_dim=24), protocol("swint"))
    depths = (2, 2, 6, 2)
    for name, (scale, decay) in found.items():
        stage = re.match(r"layers\.(\d+)\.(blocks\.(\d+))?", name)
        layer = 0 if name.startswith("patch_embed") else 13
        if stage:
            before = sum(depths[: int(stage[1])])
            layer = before + int(stage[3]) + 1 if stage[3] else before
        assert scale == pytest.approx(0.75 ** (13 - layer), rel=1e-12), name
        assert decay == (0 if name.endswith(("bias", "bias_table")) or "norm" in name else 0.05), name
    assert {round(math.log(scale, 0.75)) for scale, _ in found.values()} == set(range(14))


def test_without_layer_decay_all_have_one_rate() -> None:
    settings = protocol("inat-vits-2018")
    assert {scale for scale, _ in by_name(classifier("vit_tiny_patch16_224", "inat-vits-2018"), settings).values()} == {1.0}


def test_the_head_starts_small_and_stochastic_depth_rises_to_the_last_block() -> None:
    model = classifier("vit_base_patch16_224", "vitb", **NARROW)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1) and not model.head.bias.any()
    assert classifier("vit_tiny_patch16_224", "inat-vits-2018").head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert [path.rate for path in model.encoder.drop_paths[::2]] == pytest.approx([0.2 * block / 11 for block in range(1, 12)])


@pytest.mark.parametrize(
    ("name", "resize", "crop", "interpolation"),
    [("vits", 256, 224, "bilinear"), ("vits-384", 384, 384, "bilinear"), ("vitb-mae", 256, 224, "bicubic")],
)
def test_evaluation_sees_images_as_the_references_do(name: str, resize: int, crop: int, interpolation: str) -> None:
    settings = protocol(name)
    checkpoint = open_checkpoint("random:vit_tiny_patch16_224?embed_dim=24&depth=1", image_size=settings.image_size)
    assert checkpoint.encoder.spec.image_size == crop
    found = evaluation_transform(checkpoint, settings)
    assert (found.resize, found.crop, settings.interpolation) == (resize, crop, interpolation)


def test_augmentation_is_timms_and_depends_on_seed_epoch_and_place_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    spec = EncoderSpec(arch="vit_tiny_patch16_224", image_size=48)
    augmentation = Augmentation(protocol("vits"), spec)
    reference = create_transform(
        48, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.25,
        re_mode="pixel", re_count=1, mean=spec.mean, std=spec.std,
    )  # fmt: skip
    assert str(augmentation.transform) == str(reference)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    views = [augmentation(image, epoch, place) for epoch in range(3) for place in range(3)]
    assert before[0] == random.getstate() and before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())
    assert all(view.shape == (3, 48, 48) and view.dtype == torch.float32 for view in views)
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = [Augmentation(protocol("vits"), spec)(image, epoch, place) for epoch in (2, 1, 0) for place in (2, 1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(views, reversed(again), strict=True))
    assert not torch.equal(Augmentation(protocol("vits", "seed=1"), spec)(image, 0, 0), views[0])
