"""How an evaluation sees an image: shorter side resized, centre cut out, normalised. And 8-bit views, normalised alike."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from mte_bench.settings import Settings

Channels = tuple[float, float, float]
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class EvaluationTransform(Settings):
    """Resize the shorter side to ``resize`` pixels, cut the central ``crop`` x ``crop``, subtract mean, divide by std.

    The values are torchvision's ``Resize``, ``CenterCrop``, ``ToTensor``, ``Normalize`` on PIL images, bit for bit.
    """

    resize: int = Field(256, gt=0)
    crop: int = Field(224, gt=0)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: Channels
    std: Channels
    decode: Literal["full", "reduced"] = Field("full", exclude_if=lambda decode: decode == "full")
    """``reduced`` takes other pixels: ``ImageSet.reduced`` to the size of ``resize``. What decodes has to see to it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} must not be larger than resize {self.resize}")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self

    @classmethod
    def for_size(cls, size: int, mean: Channels, std: Channels) -> Self:
        """The usual proportion, 256 to 224, for an encoder of ``size`` pixels."""
        return cls(resize=round(size * 256 / 224), crop=size, mean=mean, std=std)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image as a float32 tensor ``c h w`` with ``h = w = crop``."""
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if short != self.resize:
            longer = int(self.resize * long / short)
            size = (self.resize, longer) if width <= height else (longer, self.resize)
            image = image.resize(size, RESAMPLING[self.interpolation])
            width, height = size
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        pixels = np.asarray(image)[top : top + self.crop, left : left + self.crop]
        return torch.from_numpy(np.stack([table[pixels[..., c]] for c, table in enumerate(_tables(self.mean, self.std))]))

    def seen(self, image: Image.Image) -> NDArray[np.floating]:
        """What the encoder sees of an RGB image, for pictures: ``crop crop 3`` in [0, 1]."""
        pixels = self(image).permute(1, 2, 0).numpy() * np.array(self.std) + np.array(self.mean)
        return pixels.clip(0, 1)


@lru_cache(maxsize=8)
def _tables(mean: Channels, std: Channels) -> NDArray[np.float32]:
    """What each byte of each channel becomes (3, 256), in float32 arithmetic like torchvision's."""
    bytes_ = torch.arange(256, dtype=torch.float32).div(255)
    return bytes_.sub(torch.tensor(mean)[:, None]).div(torch.tensor(std)[:, None]).numpy()


def normalise(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """8-bit views (..., 3, h, w) as an encoder takes them: float32, (view / 255 - mean) / std, on the device they are on."""
    shape = (3, 1, 1)
    return (
        views.float()
        .div_(255)
        .sub_(views.new_tensor(mean, dtype=torch.float32).view(shape))
        .div_(views.new_tensor(std, dtype=torch.float32).view(shape))
    )
