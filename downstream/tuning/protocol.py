"""The settings of fine-tuning, its learning rate, and how an image is augmented."""

from collections.abc import Callable
from typing import Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from downstream.task import ImageProtocol
from mte_bench.encoders.classifier import Pool
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.training.schedules import cosine, warmup_cosine
from mte_bench.training.seeded import seeded

SMOKE_BATCH = 8


class FinetuneProtocol(ImageProtocol):
    """All that determines a fine-tuning, apart from encoder and data."""

    interpolation: Literal["bicubic", "bilinear"]
    """With which evaluation resizes."""
    pool: Pool
    """What is classified."""
    head_std: float = Field(gt=0)
    """Of the truncated normal distribution from which the classifier's weights are drawn; its biases are 0."""
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    """Images of one optimiser step, over all processes and accumulated micro-batches."""
    accumulate: int = Field(ge=1)
    """Micro-batches of a step and process: more of them need less memory. Mixing pairs images within one."""
    repeats: int = Field(ge=1)
    """Repeated augmentation: each image of an epoch comes so many times in a row, augmented differently; the epoch keeps its
    length (DeiT)."""
    lr: float = Field(gt=0)
    """Learning rate of the head; what lies below has less of it by ``layer_decay``."""
    lr_per: int | None
    """The number of images per step for which ``lr`` is meant (linear scaling); null takes it for ``batch_size`` as it is, so
    that another batch size needs another ``lr``."""
    min_lr: float = Field(ge=0)
    """Where the cosine ends; not scaled."""
    warmup_epochs: float = Field(ge=0)
    warmup_from: float = Field(ge=0)
    """Where the warm-up starts; not scaled."""
    schedule: Literal["beit", "mae", "deit"]
    """See ``learning_rate``."""
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    """On all but biases, 1-D parameters, tokens and position tables."""
    layer_decay: float = Field(gt=0, le=1)
    """Factor of the learning rate from each layer to the one below; 1 for none."""
    drop_path: float = Field(ge=0, lt=1)
    """Stochastic depth of the last block; that of the others rises linearly from 0 at the first."""
    crop_scale: tuple[float, float]
    """Range of a random crop's share of the image."""
    crop_interpolation: Literal["bicubic", "bilinear", "random"]
    auto_augment: str | None
    """RandAugment in timm's notation, e.g. ``rand-m9-mstd0.5-inc1``."""
    color_jitter: float = Field(ge=0)
    """Of brightness, contrast and saturation; timm does not jitter where there is RandAugment."""
    erase: float = Field(ge=0, le=1)
    """Probability of random erasing, pixel by pixel."""
    mixup: float = Field(ge=0)
    """Both parameters of mixup's beta distribution; 0 for none."""
    cutmix: float = Field(ge=0)
    """Both parameters of CutMix's beta distribution; 0 for none."""
    cutmix_share: float = Field(ge=0, le=1)
    """Share of CutMix where there are both."""
    smoothing: float = Field(ge=0, lt=1)
    """Label smoothing."""
    ema: float | None = Field(gt=0, lt=1)
    """Decay per step of a moving average of all weights; null keeps none."""
    evaluates: Literal["weights", "ema"]
    """What is evaluated after an epoch. An average that is not, is evaluated once, at the end, as ``top1_ema``."""
    evaluate_every: int = Field(gt=0)
    """Epochs from one evaluation on val to the next; the last epoch is always evaluated."""
    reports: Literal["best", "last"]
    """Which evaluated epoch the record is about: the best on val, as the references have it, which is optimistic, or the last."""
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be divisible by accumulate {self.accumulate}")
        if self.evaluates == "ema" and self.ema is None:
            raise ValueError("evaluates=ema needs a decay: set ema, e.g. to 0.9999")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be two numbers above 0 and at most 1, the smaller first")
        return self

    def for_smoke(self) -> Self:
        """One epoch of small batches."""
        return self.model_copy(update={"epochs": 1, "batch_size": SMOKE_BATCH, "accumulate": 1})

    @property
    def peak_lr(self) -> float:
        """The learning rate of the head at the end of the warm-up."""
        return self.lr * (self.batch_size / self.lr_per if self.lr_per else 1)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


def learning_rate(protocol: FinetuneProtocol, step: int, steps_per_epoch: int) -> float:
    """The head's learning rate in ``step`` (from 0): a linear warm-up and half a cosine, in one of three forms.

    ``beit`` (iBOT): step by step; the line includes the peak, which the cosine then starts from once more. ``mae``: step by
    step; the line ends a step before the peak. ``deit``: epoch by epoch; the warm-up hides the beginning of a cosine
    over all epochs; and because DeiT hands its scheduler the epoch that has ended, each epoch has the rate that timm's
    scheduler gives the one before it, so that the first value serves twice and the last never. iBOT's ``eval_cls.py`` is so too.
    """
    peak, end, start = protocol.peak_lr, protocol.min_lr, protocol.warmup_from
    if protocol.schedule == "deit":
        epoch, warmup = max(step // steps_per_epoch - 1, 0), protocol.warmup_epochs
        return start + epoch * (peak - start) / warmup if epoch < warmup else cosine(epoch, protocol.epochs, peak, end)
    total, steps = protocol.epochs * steps_per_epoch, protocol.warmup_epochs * steps_per_epoch
    if protocol.schedule == "beit":
        return warmup_cosine(step, total, peak, end, int(steps), start)
    return start + step * (peak - start) / steps if step < steps else cosine(step - steps, total - steps, peak, end)


class Augmentation:
    """timm's training transform, with the draws of (seed, epoch, place) whatever process makes them."""

    def __init__(self, protocol: FinetuneProtocol, spec: EncoderSpec):
        from timm.data import create_transform

        self.seed = protocol.seed
        self.transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=spec.side,
            is_training=True,
            scale=protocol.crop_scale,
            interpolation=protocol.crop_interpolation,
            auto_augment=protocol.auto_augment,
            color_jitter=protocol.color_jitter or None,
            re_prob=protocol.erase,
            re_mode="pixel",
            mean=spec.mean,
            std=spec.std,
        )

    def __call__(self, image: Image.Image, epoch: int, place: int) -> Tensor:
        """An RGB image as the encoder takes it: float32 ``c h w``, normalised."""
        (seed,) = np.random.SeedSequence([self.seed, epoch, place]).generate_state(1, np.uint64)
        with seeded(int(seed)):
            return self.transform(image)
