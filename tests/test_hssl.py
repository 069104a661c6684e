"""HSSL: the ramp of stochastic depth over both networks, and what a run keeps. Its steps are in ``test_equality.py``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from pretrain import mte
from pretrain.methods.hssl import HSSL
from pretrain.recipe import Recipe
from tiny import TINY, first_gradients, make

VIT = EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"embed_dim": 24, "depth": 4, "num_heads": 2})


def make_method(**values: object) -> HSSL:
    return HSSL(HSSL.Settings(**{"prototypes": 64, "hidden": 32, "bottleneck": 16, **values}))


def test_the_ramp_of_stochastic_depth_runs_over_both_networks() -> None:
    recipe = Recipe(**{**TINY, "arch_options": VIT.options, "method": "hssl", "drop_path": 0.3})
    method = make_method()
    student, teacher = (mte.Branch(recipe, method, student=student) for student in (True, False))
    ramp = np.linspace(0, 0.3, 4 + 3)
    # a transformer's block draws twice; what has rate 0 (the first) or no shortcut (the companion's first) draws never
    expected = [rate for rate in ramp[1:4] for _ in range(2)] + list(ramp[5:])
    assert [path.rate for path in student.encoder.drop_paths] == pytest.approx(expected)
    assert teacher.encoder.drop_paths == []
    drawn = student.encoder.draw_drop_path(20_000, torch.Generator().manual_seed(0))
    assert drawn is not None and drawn.shape == (8, 20_000)
    dropped = (drawn == 0).double().mean(1).numpy()
    np.testing.assert_allclose(dropped, expected, atol=0.015)
    np.testing.assert_allclose(drawn.mean(1).numpy(), 1, atol=0.02)


def test_a_dropped_companion_block_is_its_shortcut() -> None:
    torch.manual_seed(0)
    recipe = Recipe(**{**TINY, "method": "hssl", "drop_path": 0.3})
    student = mte.Branch(recipe, make_method(), student=True).double()
    count = len(student.encoder.drop_paths)
    images = torch.randn(1, 3, 3, 32, 32, dtype=torch.float64)
    keep = torch.ones(count, 3, dtype=torch.float64)
    keep[-2:, 1] = 0  # both companion blocks, of the second image
    all_kept = student([images], [torch.ones_like(keep)]).of_companion[0]
    some_kept = student([images], [keep]).of_companion[0]
    assert torch.equal(all_kept[[0, 2]], some_kept[[0, 2]]) and not torch.allclose(all_kept[1], some_kept[1])
    with torch.no_grad():
        for block in student.companion.blocks[1:]:
            block.mlp[2].weight.zero_()
            block.mlp[2].bias.zero_()
    without = student([images], [torch.ones_like(keep)]).of_companion[0]
    torch.testing.assert_close(some_kept[1], without[1], rtol=1e-12, atol=1e-12)


RUN: dict[str, Any] = {
    "method": "hssl",
    "method_settings": {"prototypes": 64, "hidden": 32, "bottleneck": 16},
    "drop_path": 0.3,
    "epochs": 2,
    "mte": {"auxiliary_cls": 1, "pooled": 1, "kernel": 3},
    "optimiser": {"lr": 1e-4, "warmup_epochs": 0},
}


def test_a_run_keeps_the_encoder_alone(folder: Path, tmp_path: Path) -> None:
    make(folder, tmp_path, **RUN).run()
    plain = build_encoder(VIT.model_copy(update={"options": TINY["arch_options"]}))
    assert safetensors.torch.load_file(tmp_path / "encoder.safetensors").keys() == plain.model.state_dict().keys()


def test_accumulated_micro_batches_give_the_same_gradients(folder: Path, tmp_path: Path) -> None:
    """So masks and the companion's stochastic depth are an image's own, not a micro-batch's."""
    whole = first_gradients(make(folder, tmp_path / "1", **RUN))
    parts = first_gradients(make(folder, tmp_path / "4", accumulate=4, **RUN))
    assert whole.keys() == parts.keys() and any(name.startswith("companion.blocks.2") for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
