"""HSSL: its companion against timm's ConvNeXt blocks, the ramp of stochastic depth, and whole steps from the formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from test_mte import TINY, perturbed
from test_trainer import CPU, assert_same_end, by_one_and_by_two_processes, first_gradients, folder  # noqa: F401 - a fixture
from timm.models.convnext import ConvNeXtBlock

from mte_bench.data.sources import open_source
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from pretrain import mte
from pretrain.methods.hssl import HSSL
from pretrain.recipe import Recipe
from pretrain.trainer import Trainer

VIT = EncoderSpec(arch="vit_tiny_patch16_224", image_size=32, patch_size=8, options={"embed_dim": 24, "depth": 4, "num_heads": 2})


def make_method(**values: object) -> HSSL:
    return HSSL(HSSL.Settings(**{"prototypes": 64, "hidden": 32, "bottleneck": 16, **values}))


def test_companion_equals_timm_s_blocks_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(VIT).double()
    companion = make_method().companion(encoder, 0.0).double()
    peers = [ConvNeXtBlock(24, ls_init_value=None, norm_layer=torch.nn.LayerNorm).double() for _ in range(3)]
    with torch.no_grad():
        for ours, theirs in zip(companion.blocks, peers, strict=True):
            for parameter in ours.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            theirs.conv_dw.load_state_dict(ours.depthwise.state_dict())
            theirs.norm.load_state_dict(ours.norm.state_dict())
            theirs.mlp.fc1.load_state_dict(ours.mlp[0].state_dict())
            theirs.mlp.fc2.load_state_dict(ours.mlp[2].state_dict())
            assert theirs.norm.eps == ours.norm.eps == 1e-5
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    ours, theirs = (encoder(images), encoder(images))
    x = theirs.raw_patches.transpose(1, 2).reshape(3, 24, 4, 4)
    x = peers[0](x) - x  # without its shortcut
    x = peers[2](peers[1](x)).mean((2, 3))
    expected = F.layer_norm(x, (24,), companion.norm.weight, companion.norm.bias, 1e-6)
    found = companion(ours)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(found)
    weights = [block.depthwise.weight for block in companion.blocks]
    (gradient,) = torch.autograd.grad((found * direction).sum(), encoder.model.pos_embed, retain_graph=True)
    (reference,) = torch.autograd.grad((expected * direction).sum(), encoder.model.pos_embed, retain_graph=True)
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)
    ours_ = torch.autograd.grad((found * direction).sum(), weights)
    theirs_ = torch.autograd.grad((expected * direction).sum(), [peer.conv_dw.weight for peer in peers])
    for a, b in zip(ours_, theirs_, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


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


def project(head: torch.nn.Module, x: torch.Tensor, copy: int = 0) -> torch.Tensor:
    for index, layer in enumerate(head.layers):
        x = x @ layer.weight[copy].T + layer.bias[copy]
        x = F.gelu(x) if index < 2 else x
    return x


def scores(branch: mte.Branch, projected: torch.Tensor) -> torch.Tensor:
    weight = branch.tail.weight_v / branch.tail.weight_v.norm(dim=1, keepdim=True) * branch.tail.weight_g
    return (projected / projected.norm(dim=-1, keepdim=True)) @ weight.T


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("local", [0, 2])
def test_a_whole_step_from_the_formula(local: int, enhanced: bool) -> None:
    recipe = Recipe(**{**TINY, "method": "hssl", "mte": {"auxiliary_cls": 2, "pooled": 1, "kernel": 3} if enhanced else None})
    torch.manual_seed(0)
    method = make_method()
    student, teacher = perturbed(recipe, method)
    method.double()
    method.centre.normal_()
    method.patch_centre.normal_()
    groups = [torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)]
    groups += [torch.randn(local, 4, 3, 16, 16, dtype=torch.float64)] if local else []
    masks = torch.rand(2, 4, 16) < 0.3

    def outputs(branch: mte.Branch, view: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        how = {} if mask is None else {"masks": mask, "mask_token": branch.mask_token}
        if enhanced:
            tokens, auxiliary = branch.auxiliary.encode(branch.encoder, view, **how)
        else:
            tokens = branch.encoder(view, **how)
        companion = project(branch.companion_head, branch.companion(tokens))
        found = {
            "base": scores(branch, project(branch.head, tokens.global_token)),
            "companion": scores(branch, companion),
            "patches": scores(branch, project(branch.head, tokens.patches)),
        }
        if enhanced:  # the companion's projection is one more member
            members = [project(branch.heads, auxiliary[:, token], token) for token in range(3)] + [companion]
            found["fused"] = scores(branch, sum(members) / 4)
        return found

    epoch, temperature = 5, float(np.linspace(0.04, 0.07, 30)[5])
    views = [view for group in groups for view in group]
    own = [outputs(student, view, masks[i] if i < 2 else None) for i, view in enumerate(views)]
    with torch.no_grad():
        other = [outputs(teacher, view, None) for view in groups[0]]
    leading = "fused" if enhanced else "companion"
    target = [torch.softmax((one[leading] - method.centre) / temperature, -1) for one in other]
    target2 = [torch.softmax((one["patches"] - method.patch_centre) / temperature, -1) for one in other]

    def cross_entropy(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -(target * torch.log_softmax(logits / 0.1, -1)).sum(-1)

    def over_pairs(key: str) -> torch.Tensor:
        pairs = [(q, v) for q in range(2) for v in range(len(views)) if v != q]
        return sum(cross_entropy(target[q], own[v][key]).mean() for q, v in pairs) / len(pairs)

    patch = sum(
        ((cross_entropy(target2[q], own[q]["patches"]) * masks[q]).sum(-1) / masks[q].sum(-1).clamp(min=1)).mean() for q in (0, 1)
    )
    base = (over_pairs("base") + over_pairs("companion")) / 2
    expected = ((over_pairs("fused") + base) / 2 if enhanced else base) + patch / 2
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    vectors = mte.teacher_vectors(teacher, groups, recipe, patches=True)
    targets = mte.targets(method, vectors, epoch, recipe)
    found = mte.loss(method, student(groups, None, masks), targets, recipe, masks, epoch)
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-10, atol=0)
    ours = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys() == {name for name, p in student.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        exact = (1e-7, 1e-10) if name != "encoder.model.pos_embed" else (1e-5, 1e-6)  # timm interpolates it in float32
        torch.testing.assert_close(ours[name], gradient, rtol=exact[0], atol=exact[1], msg=name)

    centre = 0.9 * method.centre + 0.1 * torch.cat([one[leading] for one in other]).mean(0, keepdim=True)
    method.update([torch.cat(mte.lead(vectors))], [torch.stack(vectors.of_patches)])
    torch.testing.assert_close(method.centre, centre, rtol=1e-10, atol=1e-12)


RUN: dict[str, Any] = {
    **TINY,
    "method": "hssl",
    "drop_path": 0.3,
    "epochs": 2,
    "batch_size": 8,
    "views": {"global1": {"size": 32}, "global2": {"size": 32}, "local": {"size": 16}, "local_count": 1},
    "mte": {"auxiliary_cls": 1, "pooled": 1, "kernel": 3},
    "optimiser": {"lr": 1e-4, "warmup_epochs": 0},
}


def make(folder: Path, out: Path, **changes: Any) -> Trainer:  # noqa: F811
    recipe = Recipe(**{**RUN, **changes})
    return Trainer(recipe, open_source(str(folder), "train"), out, device=CPU, workers=0, save_minutes=0.0)


def test_a_stopped_run_goes_on_exactly_and_keeps_the_encoder_alone(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    make(folder, tmp_path / "whole").run()
    trainer = make(folder, tmp_path / "stopped")
    step = trainer._step

    def until(*arguments: Any) -> Any:
        if trainer.step == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    trainer._step = until
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    make(folder, tmp_path / "stopped").run()
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    plain = build_encoder(VIT.model_copy(update={"options": TINY["arch_options"]}))
    assert safetensors.torch.load_file(tmp_path / "whole" / "encoder.safetensors").keys() == plain.model.state_dict().keys()


def test_accumulated_micro_batches_give_the_same_gradients(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """So masks and the companion's stochastic depth are an image's own, not a micro-batch's."""
    whole = first_gradients(make(folder, tmp_path / "1"))
    parts = first_gradients(make(folder, tmp_path / "4", accumulate=4))
    assert whole.keys() == parts.keys() and any(name.startswith("companion.blocks.2") for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    one, two = by_one_and_by_two_processes(RUN, folder, tmp_path)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
