"""The evaluation transform against torchvision's, bit for bit."""

from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from mte_bench.data.transforms import EvaluationTransform
from mte_bench.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("extent", [(500, 375), (211, 300), (64, 64), (256, 256), (256, 401), (33, 257), (1000, 257)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (73, 64), (37, 32), (224, 224), (65, 64)])
def test_equals_torchvision(
    extent: tuple[int, int], resize: int, crop: int, interpolation: Literal["bicubic", "bilinear"]
) -> None:
    width, height = extent
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, InterpolationMode(interpolation)),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )(image)
    ours = EvaluationTransform(resize=resize, crop=crop, interpolation=interpolation, mean=MEAN, std=STD)(image)
    assert ours.dtype == torch.float32 and ours.shape == (3, crop, crop) and ours.is_contiguous()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (384, 439), (64, 73), (32, 37), (112, 128)])
def test_the_usual_proportion(size: int, resize: int) -> None:
    transform = EvaluationTransform.for_size(size, MEAN, STD)
    assert (transform.resize, transform.crop, transform.interpolation) == (resize, size, "bicubic")


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UserError, match="crop 224 must not be larger than resize 200"):
        EvaluationTransform.check({"resize": 200, "mean": MEAN, "std": STD}, "transform")
