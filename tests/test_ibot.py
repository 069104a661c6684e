"""iBOT: masks as its loader draws them, and when they begin. Its loss and steps are in ``test_equality.py``."""

import numpy as np
import pytest
import torch
from scipy import stats

from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from pretrain.masks import Masking, draw_mask
from pretrain.methods.ibot import IBOT

K = 48


def make_method(**values: object) -> IBOT:
    return IBOT(IBOT.Settings(prototypes=K, **values)).double()


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
