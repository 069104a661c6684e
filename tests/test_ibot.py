"""iBOT: masks as its loader draws them, its patch loss against lightly's, and a whole step from the formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.loss import IBOTPatchLoss
from scipy import stats
from test_mte import TINY, perturbed

from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from pretrain import mte
from pretrain.masks import Masking, draw_mask
from pretrain.methods.ibot import IBOT
from pretrain.recipe import Recipe

K = 48


def make_method(**values: object) -> IBOT:
    return IBOT(IBOT.Settings(prototypes=K, **values)).double()


@pytest.mark.parametrize("epoch", [0, 3, 9])
def test_patch_loss_gradient_and_centre_equal_lightly(epoch: int) -> None:
    torch.manual_seed(0)
    method = make_method(warmup_teacher_temperature_epochs=6)
    peer = IBOTPatchLoss(K).double()
    temperature = np.linspace(0.04, 0.07, 6)[min(epoch, 5)]
    for _ in range(3):
        masks = torch.rand(5, 3, 4) < 0.4
        masks[2] = False  # an image without masks adds nothing, and counts
        teacher = torch.randn(5, 12, K, dtype=torch.float64)
        student = torch.randn(int(masks.sum()), K, dtype=torch.float64)
        ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        flat = masks.flatten(1)
        loss = method.patch_loss(ours, teacher, flat, epoch)
        peer.center.center = method.patch_centre.clone()  # lightly's sees masked patches only
        expected = peer(teacher[flat], theirs, masks, teacher_temp=float(temperature))
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # lightly's temperature is float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
        centre = 0.9 * method.patch_centre + 0.1 * teacher.mean(1).mean(0)
        method.update([torch.randn(10, K, dtype=torch.float64)], [teacher])
        torch.testing.assert_close(method.patch_centre, centre, rtol=1e-12, atol=1e-12)


def test_patches_warm_up_from_the_first_mask_on() -> None:
    """The reference's schedule: constant until masks begin, then the whole warm-up."""
    method = make_method(masking={"start_epoch": 4}, warmup_teacher_temperature_epochs=3)
    expected = np.concatenate((np.ones(4) * 0.04, np.linspace(0.04, 0.07, 3), np.ones(3) * 0.07))
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 12, K, dtype=torch.float64).unbind(0)
    masks = torch.ones(1, 12, dtype=torch.bool)
    for epoch, temperature in enumerate(expected):
        target = torch.softmax(teacher / float(temperature), -1)
        loss = -(target * torch.log_softmax(student / 0.1, -1)).sum(-1).mean()
        torch.testing.assert_close(method.patch_loss(student, teacher.unsqueeze(0), masks, epoch), loss, rtol=1e-12, atol=0)


def draw(masking: Masking, count: int, rows: int = 14, columns: int = 14, epoch: int = 0) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.stack([draw_mask(masking, rows, columns, epoch, generator) for _ in range(count)])


def test_half_the_masks_are_empty_and_the_shares_of_the_others_uniform() -> None:
    shares = draw(Masking(shape="random"), 4000).mean((1, 2))
    masked = shares[shares > 0]
    assert stats.binomtest(len(masked), 4000, 0.5).pvalue > 1e-3
    noise = np.random.default_rng(1).uniform(0, 1 / 196, len(masked))  # whole patches only: the share is rounded down
    assert stats.kstest(masked + noise, stats.uniform(0.1, 0.4).cdf).pvalue > 1e-3


@pytest.mark.parametrize("ratio", [0.1, 0.237, 0.5])
def test_random_masks_have_the_exact_count_and_block_masks_never_more(ratio: float) -> None:
    counts = draw(Masking(shape="random", ratios=((ratio, 0),)), 200).sum((1, 2))
    assert set(counts) == {int(ratio * 196)}
    blocks = draw(Masking(ratios=((ratio, 0),)), 400)
    counts = blocks.sum((1, 2))
    assert counts.max() <= ratio * 196 and counts.mean() > 0.85 * ratio * 196
    neighbours = (blocks[:, 1:] & blocks[:, :-1]).sum() / blocks[:, 1:].sum()
    scattered = draw(Masking(shape="random", ratios=((ratio, 0),)), 400)
    assert neighbours > 0.7 > (scattered[:, 1:] & scattered[:, :-1]).sum() / scattered[:, 1:].sum()


def blocks_of_the_reference(share: float, generator: np.random.Generator, size: int = 14) -> np.ndarray:
    """The published procedure, with sides rounded and strictly smaller than the grid."""
    mask, wanted = np.zeros((size, size), bool), share * size * size
    while mask.sum() < wanted:
        remaining, before = wanted - mask.sum(), mask.sum()
        for _ in range(10):
            area = (size // 3) ** 2 + generator.random() * (remaining - (size // 3) ** 2)
            aspect = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
            if w < size and h < size:
                top, left = generator.integers(0, size - h + 1), generator.integers(0, size - w + 1)
                new = h * w - mask[top : top + h, left : left + w].sum()
                if 0 < new <= remaining:
                    mask[top : top + h, left : left + w] = True
                    break
        if mask.sum() == before:
            break
    return mask


def test_block_masks_are_distributed_as_the_reference_s() -> None:
    generator = np.random.default_rng(5)
    theirs = np.stack([blocks_of_the_reference(0.35, generator) for _ in range(1500)])
    ours = draw(Masking(ratios=((0.35, 0),)), 1500)
    for statistic in (
        lambda masks: masks.sum((1, 2)),
        lambda masks: (masks[:, 1:] & masks[:, :-1]).sum((1, 2)),
        lambda masks: masks[:, :7, :7].sum((1, 2)),
        lambda masks: masks.any(2).sum(1),
    ):
        assert stats.ks_2samp(statistic(ours), statistic(theirs)).pvalue > 1e-3
    assert abs(ours.mean(0) - theirs.mean(0)).max() < 0.1  # where in the grid


def test_nothing_is_masked_before_its_epoch() -> None:
    masking = Masking(ratios=((0.4, 0),), start_epoch=3)
    assert not draw(masking, 20, epoch=2).any() and draw(masking, 20, epoch=3).any((1, 2)).all()


def test_a_swin_s_masks_cover_whole_cells_of_32_pixels() -> None:
    torch.manual_seed(0)
    spec = EncoderSpec(arch="swin_tiny_patch4_window7_224", options={"embed_dim": 12, "depths": (1, 1, 1, 1)})
    encoder = build_encoder(spec).double().eval()
    assert encoder.grid(224) == (7, 7) and encoder.embedded_width == 12
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    masks = torch.rand(2, 49) < 0.4
    token = torch.randn(1, 12, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    encoder.model.layers[0].blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(images), encoder(images, masks=masks, mask_token=token)
    changed = (seen[0] != seen[1]).all(-1)
    cells = masks.view(2, 7, 1, 7, 1).expand(2, 7, 8, 7, 8).reshape(2, 56, 56)
    assert torch.equal(changed, cells) and torch.equal(seen[1][cells], token.expand(int(cells.sum()), -1))
    other = images.clone()  # what lies under a mask cannot be seen
    other[cells.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).expand_as(other)] = 7.0
    found = [encoder(some, masks=masks, mask_token=token).global_token for some in (images, other)]
    assert torch.equal(*found)


def embedded(branch: mte.Branch, images: torch.Tensor, masks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS and patches of a ViT, step by step, with masked embeddings put in by hand."""
    model = branch.encoder.model
    patch = model.patch_embed.proj
    x = F.conv2d(images, patch.weight, patch.bias, stride=patch.stride).flatten(2).transpose(1, 2)
    if masks is not None:
        x = x * ~masks.unsqueeze(-1) + branch.mask_token * masks.unsqueeze(-1)
    positions = model.pos_embed
    if x.shape[1] + 1 != positions.shape[1]:
        return (branch.encoder(images).global_token, x)  # a local view; positions are interpolated, nothing is masked
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + positions
    x = model.norm(model.blocks(x))
    return x[:, 0], x[:, 1:]


def scores(branch: mte.Branch, x: torch.Tensor) -> torch.Tensor:
    """Head and prototypes, written out."""
    for index, layer in enumerate(branch.head.layers):
        x = x @ layer.weight[0].T + layer.bias[0]
        x = F.gelu(x) if index < 2 else x
    weight = branch.tail.weight_v / branch.tail.weight_v.norm(dim=1, keepdim=True) * branch.tail.weight_g
    return (x / x.norm(dim=-1, keepdim=True)) @ weight.T


@pytest.mark.parametrize("local", [0, 2])
def test_a_whole_step_from_the_formula(local: int) -> None:
    recipe = Recipe(**{**TINY, "method": "ibot", "method_settings": {**TINY["method_settings"], "patch_weight": 1.0}})
    torch.manual_seed(0)
    method = IBOT(IBOT.Settings(**recipe.method_settings))
    student, teacher = perturbed(recipe, method)
    method.double()
    method.centre.normal_()
    method.patch_centre.normal_()
    groups = [torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)]
    groups += [torch.randn(local, 4, 3, 16, 16, dtype=torch.float64)] if local else []
    masks = torch.rand(2, 4, 16) < 0.3
    masks[0, 1] = False

    epoch, temperature = 2, float(np.linspace(0.04, 0.07, 30)[2])
    views = [view for group in groups for view in group]
    s = [embedded(student, view, masks[i] if i < 2 else None) for i, view in enumerate(views)]
    with torch.no_grad():
        t = [embedded(teacher, view, None) for view in groups[0]]
        target = [torch.softmax((scores(teacher, cls) - method.centre) / temperature, -1) for cls, _ in t]
        target2 = [torch.softmax((scores(teacher, patches) - method.patch_centre) / temperature, -1) for _, patches in t]
    cls_terms, patch_terms = [], []
    for q in range(2):
        for v in range(len(views)):
            if v != q:
                cls_terms.append(-(target[q] * torch.log_softmax(scores(student, s[v][0]) / 0.1, -1)).sum(-1).mean())
        each = -(target2[q] * torch.log_softmax(scores(student, s[q][1]) / 0.1, -1)).sum(-1)
        patch_terms.append(((each * masks[q]).sum(-1) / masks[q].sum(-1).clamp(min=1)).mean())
    expected = sum(cls_terms) / len(cls_terms) + sum(patch_terms) / 2
    assert len(cls_terms) == 2 * (1 + local)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    vectors = mte.teacher_vectors(teacher, groups, recipe, patches=True)
    own = student(groups, None, masks)
    found = mte.loss(method, own, mte.targets(method, vectors, epoch, recipe), recipe, masks, epoch)
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-10, atol=0)
    ours = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys() and "mask_token" in ours
    for name, gradient in gradients.items():
        exact = (1e-8, 1e-11) if name != "encoder.model.pos_embed" else (1e-5, 1e-6)  # timm interpolates it in float32
        torch.testing.assert_close(ours[name], gradient, rtol=exact[0], atol=exact[1], msg=name)
