"""Mixup, CutMix and label smoothing (timm ``Mixup``), with draws of their own."""

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from mte_bench.training.seeded import seeded


def mix(
    images: Tensor, labels: Tensor, classes: int, seed: int, *, mixup: float, cutmix: float, cutmix_share: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Images mixed in pairs (``b c h w``; the i-th with the i-th from the end) and the mixed, smoothed labels ``b classes``.

    ``mixup`` and ``cutmix`` are both parameters of their beta distributions, 0 for none; ``cutmix_share`` is the share of
    CutMix where there are both. One draw from ``seed`` holds for all images, so this depends on which of them pass at once.
    """
    if not mixup and not cutmix:
        return images, mixup_target(labels, classes, smoothing=smoothing)
    mixing = Mixup(mixup, cutmix, switch_prob=cutmix_share, label_smoothing=smoothing, num_classes=classes)
    with seeded(seed):
        mixed, targets = mixing(images, labels)
    return mixed, targets
