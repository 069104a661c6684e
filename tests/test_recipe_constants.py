"""Every constant of the paper's recipes, as the references' code and papers state it: written down a second time, from there.

A recipe's files inherit and default; here each row stands as a whole, and nothing may be in a recipe that is not in its row.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from pretrain.methods import METHODS
from pretrain.recipe import load_recipe

# DINO main_dino.py and utils.py; without local views its authors advise crops from 0.14 on. MTE's table 5 is without.
CROP = {
    "size": 224, "scale": (0.14, 1.0), "ratio": (3 / 4, 4 / 3), "interpolation": "bicubic", "flip": 0.5, "jitter": 0.8,
    "jitter_strength": (0.4, 0.4, 0.2, 0.1), "grayscale": 0.2, "blur": 1.0, "blur_radius": (0.1, 2.0), "solarize": 0.0,
    "solarize_threshold": 128, "auto_augment": None, "erase": 0.0,
}  # fmt: skip
DINO: dict[str, Any] = {
    "method": "dino", "arch": "vit_small_patch16_224", "image_size": 224, "patch_size": None, "arch_options": {},
    "init": "dino", "token_learner": None, "drop_path": 0.1, "epochs": 100, "batch_size": 1024, "accumulate": 1, "repeats": 1,
    "momentum": (0.996, 1.0), "mte": None, "knn_every": None,
    "method_settings": {
        "prototypes": 65536, "hidden": 2048, "bottleneck": 256, "batch_norm_in_head": False, "norm_last_layer": False,
        "student_temperature": 0.1, "teacher_temperature": 0.07, "warmup_teacher_temperature": 0.04,
        "warmup_teacher_temperature_epochs": 30, "centre_momentum": 0.9, "freeze_last_layer": 1,
    },
    "views": {
        "global1": CROP, "global2": {**CROP, "blur": 0.1, "solarize": 0.2}, "local_count": 0,
        "local": {**CROP, "size": 96, "scale": (0.05, 0.4), "blur": 0.5},
    },
    "optimiser": {
        "lr": 5e-4, "lr_per": 256, "min_lr": 1e-6, "warmup_epochs": 10, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "clip": 3.0, "clip_norm": "tensor", "decay": "weights", "warmup_from": 0.0,
        "min_lr_scaled": False, "warmup_cuts": False,
    },
}  # fmt: skip


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``base`` with other values at ``a__b__c=value``."""
    found = dict(base)
    for path, value in changes.items():
        key, _, rest = path.partition("__")
        found[key] = changed(found[key], **{rest: value}) if rest else value
    return found


# iBOT main_ibot.py; clipping at 0.3 as MTE's first author prints it for S/16 (HSSL docs/SERE.md, SERE README)
MASKING = {"shape": "block", "ratios": ((0.0, 0.0), (0.3, 0.2)), "start_epoch": 0}
IBOT = changed(
    DINO,
    method="ibot",
    method_settings={**DINO["method_settings"], "prototypes": 8192, "masking": MASKING, "patch_weight": 1.0},
    optimiser__clip=0.3,
)
# what BYOL, MoCo v3 and MoBY share: crops from 0.08 on, no clipping, a constant weight decay, momentum from 0.99
PREDICTING = changed(
    DINO,
    views__global1__scale=(0.08, 1.0),
    views__global2__scale=(0.08, 1.0),
    optimiser__clip=None,
    momentum=(0.99, 1.0),
)
BYOL = changed(
    PREDICTING,
    method="byol",
    drop_path=0.0,
    method_settings={"hidden": 4096, "output": 256, "layers": 2, "predictor_layers": 2, "last_norm": False},
    optimiser__weight_decay=0.05,
    optimiser__weight_decay_end=0.05,
)
MOCO = changed(  # MoCo v3 main_moco.py, builder.py, vits.py, CONFIG.md
    PREDICTING,
    method="mocov3",
    arch_options={"num_heads": 12},
    drop_path=0.0,
    epochs=300,
    batch_size=4096,
    method_settings={
        "hidden": 4096, "output": 256, "layers": 3, "predictor_layers": 2, "temperature": 0.2, "freeze_patch_embedding": True,
    },
    views__global1__interpolation="bilinear",
    views__global2__interpolation="bilinear",
    optimiser__lr=1.5e-4,
    optimiser__min_lr=0.0,
    optimiser__warmup_epochs=40,
    optimiser__weight_decay=0.1,
    optimiser__weight_decay_end=0.1,
    optimiser__decay="all",
)  # fmt: skip
MOBY = changed(  # Transformer-SSL config.py, moby.py, lr_scheduler.py, optimizer.py, data/build.py
    PREDICTING,
    method="moby",
    arch="swin_tiny_patch4_window7_224",
    drop_path=0.2,
    batch_size=512,
    method_settings={"hidden": 4096, "output": 256, "layers": 2, "predictor_layers": 2, "temperature": 0.2, "queue": 4096},
    views__global1__interpolation="bilinear",
    views__global2__interpolation="bilinear",
    optimiser__lr=1e-3,
    optimiser__lr_per=512,
    optimiser__min_lr=5e-6,
    optimiser__min_lr_scaled=True,
    optimiser__warmup_epochs=5,
    optimiser__warmup_from=5e-7,
    optimiser__warmup_cuts=True,
    optimiser__weight_decay=0.05,
    optimiser__weight_decay_end=0.05,
    optimiser__clip=5.0,
    optimiser__clip_norm="whole",
)
HSSL = changed(IBOT, method="hssl", method_settings={**IBOT["method_settings"], "companion_blocks": 3, "companion_kernel": 7})
IBOT_MULTICROP = changed(  # SERE README
    IBOT, views__local_count=10, views__global1__scale=(0.4, 1.0), views__global2__scale=(0.4, 1.0)
)
PLAIN = {"scale": (0.08, 1.0), "jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "auto_augment": "rand-m9-mstd0.5-inc1"}
DEIT = changed(  # DeiT main.py, datasets.py; its warm-up starts at 1e-6, which is 5e-7 for every 512 images
    DINO,
    method="supervised",
    epochs=300,
    repeats=3,
    momentum=(0.99996, 0.99996),
    knn_every=10,
    method_settings={"smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "cutmix_share": 0.5, "evaluate_ema": False},
    views__global1={**CROP, **PLAIN, "erase": 0.25},
    views__global2=None,
    optimiser__lr_per=512,
    optimiser__min_lr=1e-5,
    optimiser__warmup_epochs=5,
    optimiser__warmup_from=5e-7,
    optimiser__warmup_cuts=True,
    optimiser__weight_decay=0.05,
    optimiser__weight_decay_end=0.05,
    optimiser__clip=None,
    optimiser__decay="layers",
)
MAE = changed(  # MAE's table 11 and issues 28 and 41
    DEIT,
    arch="vit_base_patch16_224",
    batch_size=4096,
    repeats=1,
    momentum=(0.9999, 0.9999),
    method_settings__evaluate_ema=True,
    views__global1__erase=0.0,
    optimiser__lr=1e-4,
    optimiser__lr_per=256,
    optimiser__min_lr=1e-6,
    optimiser__warmup_epochs=20,
    optimiser__warmup_from=0.0,
    optimiser__warmup_cuts=False,
    optimiser__betas=(0.9, 0.95),
    optimiser__weight_decay=0.3,
    optimiser__weight_decay_end=0.3,
)
# MTE, sections 3 and 4: four auxiliary CLS tokens, six pooled ones, independent heads, half of each loss
TOKENS = {
    "auxiliary_cls": 4, "pooled": 6, "ten": True, "pooling": "shared-pointwise", "kernel": 11, "pool_activation": "gelu",
    "pool_normalise": "none", "pool_bias": True, "pool_input": "normalised", "pooled_norm": True, "cls_std": 0.02,
    "sight": "everything", "cut_attention": True, "ten_depth": 1, "ten_heads": None, "ten_mlp_ratio": 4.0, "ten_input": "raw",
    "heads": "independent", "fusion": "mean", "fuse_global": False, "tails": "shared", "statistics": "target", "weights": None,
    "local_views": "both", "target": "fused", "frozen": False, "label_weight": 0.0,
}  # fmt: skip
ROWS = {
    "dino_vits16_100ep": DINO,
    "dino_vits16_300ep": changed(DINO, epochs=300),
    "dino_vits16_800ep": changed(DINO, epochs=800),
    "dino_swint_100ep": changed(DINO, arch="swin_tiny_patch4_window7_224"),
    "ibot_vits16_100ep": IBOT,
    "ibot_vits16_300ep": changed(IBOT, epochs=300),
    "ibot_vits16_800ep": changed(IBOT, epochs=800),
    "ibot_vits16_multicrop_100ep": IBOT_MULTICROP,
    "ibot_vitb16_multicrop_100ep": changed(
        IBOT_MULTICROP,
        arch="vit_base_patch16_224",
        method_settings__norm_last_layer=True,
        method_settings__freeze_last_layer=3,
        method_settings__warmup_teacher_temperature_epochs=50,
        views__global1__scale=(0.32, 1.0),
        views__global2__scale=(0.32, 1.0),
        views__local__scale=(0.05, 0.32),
        optimiser__lr=7.5e-4,
        optimiser__min_lr=2e-6,
    ),
    "byol_vits16_100ep": BYOL,
    "mocov3_vits16_300ep": MOCO,
    "moby_swint_100ep": MOBY,
    "moby_swint_300ep": changed(MOBY, epochs=300),
    "hssl_vits16_100ep": HSSL,
    "supervised_vits16_300ep": DEIT,
    "supervised_vitb16_300ep": MAE,
}


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_of_the_paper_has_the_constants_of_its_sources(name: str) -> None:
    for assignments, mte in (([], None), (["mte=true"], TOKENS)):
        recipe = load_recipe(name, assignments)
        found = recipe.model_dump(exclude={"description", "paper_row", "snapshot_every"})
        settings = METHODS[recipe.method].Settings.check(recipe.method_settings, name)
        found["method_settings"] = settings.model_dump()
        if mte and recipe.arch.startswith("swin"):  # which has no CLS token
            mte = {**mte, "auxiliary_cls": 0}
        if recipe.views.local_count == 0:  # then how they would be made is of no matter
            del found["views"]["local"]
        expected = flat(changed(ROWS[name], mte=mte))
        assert dict(flat(found)) == {key: value for key, value in expected if recipe.views.local_count or ".local." not in key}


def flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """``a.b.c`` and its value, for every value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}{key}.")
        else:
            yield path + key, value
