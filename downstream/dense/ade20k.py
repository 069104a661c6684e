"""Semantic segmentation: UperNet with its auxiliary head, or a linear head on a frozen encoder, in mmseg.

Source: iBOT ``evaluation/semantic_segmentation`` (mmsegmentation 0.12) and MTE; the protocol files say which number is
whose. Any folders of images and label PNGs will do, see ``downstream.dense.pairs``.
"""

import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveInt, model_validator

from downstream.dense.batches import bgr, tested
from downstream.dense.pairs import VOID, LabelSettings, Pairs
from downstream.dense.pictures import Segmented, draw_segmentations
from downstream.dense.protocol import DenseProtocol
from downstream.dense.segmentation_metrics import class_table, counts_of, segmentation_metrics
from downstream.dense.task import Context, DenseTask, Outcome
from downstream.features import Pass
from mte_bench import distributed
from mte_bench.data.sources import ImageSet, Split
from mte_bench.dense.files import write_images
from mte_bench.dense.resampling import IMAGES_NAME, how_made
from mte_bench.dense.segmentation import SegmentedImages
from mte_bench.device import autocast
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.errors import UserError
from mte_bench.settings import Settings

Size = tuple[PositiveInt, PositiveInt]
PREDICTIONS = "predictions"
NORM = {"type": "BN", "requires_grad": True}  # over all processes on CUDA, see Runner


class Auxiliary(Settings):
    """A second, convolutional head on one of the four maps, only for training."""

    map: int = Field(ge=0, le=3)
    """Index of the map; 2 is the third tap, the output of the eighth block of twelve."""
    channels: PositiveInt
    convolutions: PositiveInt
    dropout: float = Field(ge=0, lt=1)
    weight: float = Field(gt=0)


class Head(Settings):
    """What makes classes of the four maps: UperNet, or a classifier of each pixel of them, resized and concatenated."""

    kind: Literal["upernet", "linear"]
    channels: PositiveInt | None = None
    """Of UperNet; null is the encoder's width."""
    pool_scales: tuple[PositiveInt, ...] = (1, 2, 3, 6)
    dropout: float = Field(ge=0, lt=1)
    auxiliary: Auxiliary | None = None


class Augmentation(Settings):
    """What is done to training images, in this order; what is smaller than the crop is then padded."""

    scale: Size
    """Longer and shorter side that an image is resized to fit into, times a uniform number in ``ratio``."""
    ratio: tuple[float, float]
    crop: PositiveInt
    largest_share: float = Field(gt=0, le=1)
    """Up to ten crops are tried until no class has more than this share of the pixels that count."""
    flip: float = Field(ge=0, le=1)
    photometric: bool
    """Random brightness, contrast, saturation and hue."""


class Test(Settings):
    """How label maps of whole images are made."""

    scale: Size
    """Longer and shorter side that an image is resized to fit into."""
    mode: Literal["slide", "whole"]
    crop: PositiveInt
    """Side of the sliding window."""
    stride: PositiveInt
    ratios: tuple[float, ...] = Field(default=(1.0,), min_length=1)
    """Sizes whose class probabilities are averaged; with several, no side becomes smaller than ``crop``."""
    flip: bool = False
    """Whether each is also done mirrored."""

    @model_validator(mode="after")
    def _overlapping(self) -> Self:
        if self.stride > self.crop:
            raise ValueError("stride must not be larger than crop")
        return self


class SegmentationProtocol(DenseProtocol):
    """Settings of ``ade20k``."""

    labels: LabelSettings
    head: Head
    augmentation: Augmentation
    test: Test


class View(NamedTuple):
    """One size of one image as the model takes it."""

    pixels: torch.Tensor
    """``3 h w``, bytes, BGR."""
    shape: tuple[int, int]
    """Of the image itself."""
    flip: bool


def model_config(
    p: SegmentationProtocol, backbone: dict[str, Any], widths: tuple[int, ...], classes: int, spec: EncoderSpec
) -> Any:
    """The configuration of mmseg's ``EncoderDecoder`` on ``backbone``, whose maps have ``widths`` channels."""
    shared = {"num_classes": classes, "norm_cfg": NORM, "align_corners": False}
    cross_entropy = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    head: dict[str, Any] = {"in_channels": list(widths), "in_index": list(range(len(widths))), "loss_decode": cross_entropy}
    head |= {"dropout_ratio": p.head.dropout, **shared}
    if p.head.kind == "upernet":
        head |= {"type": "UPerHead", "channels": p.head.channels or widths[-1], "pool_scales": p.head.pool_scales}
    else:
        head |= {"type": "FCNHead", "input_transform": "resize_concat", "channels": sum(widths)}
        head |= {"num_convs": 0, "concat_input": False}
    auxiliary = None
    if a := p.head.auxiliary:
        auxiliary = {"type": "FCNHead", "in_channels": widths[a.map], "in_index": a.map, "channels": a.channels}
        auxiliary |= {"num_convs": a.convolutions, "concat_input": False, "dropout_ratio": a.dropout, **shared}
        auxiliary |= {"loss_decode": {**cross_entropy, "loss_weight": a.weight}}
    size = (p.test.crop, p.test.crop)
    slide = {"mode": "slide", "crop_size": size, "stride": (p.test.stride, p.test.stride)}
    padding = {"size": size} if p.test.mode == "slide" else {"size_divisor": 32}
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": [255 * value for value in spec.mean],
            "std": [255 * value for value in spec.std],
            "bgr_to_rgb": True,
            "pad_val": 0,  # after normalising: the mean colour
            "seg_pad_val": VOID,
            "size": (p.augmentation.crop, p.augmentation.crop),
            "test_cfg": padding,
        },
        "backbone": backbone,
        "decode_head": head,
        "auxiliary_head": auxiliary,
        "train_cfg": {},
        "test_cfg": slide if p.test.mode == "slide" else {"mode": "whole"},
    }


def transforms(p: SegmentationProtocol) -> list[dict[str, Any]]:
    """The configurations of mmseg's transforms of training images."""
    a = p.augmentation
    return [
        {"type": "RandomResize", "scale": a.scale, "ratio_range": a.ratio, "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (a.crop, a.crop), "cat_max_ratio": a.largest_share, "ignore_index": VOID},
        {"type": "RandomFlip", "prob": a.flip},
        *([{"type": "PhotoMetricDistortion"}] if a.photometric else []),
        {"type": "PackSegInputs"},
    ]


class Views:
    """The sizes of an image that are segmented, as ``View`` (picklable, for worker processes)."""

    def __init__(self, test: Test):
        self.test = test

    def __call__(self, image: Image.Image) -> list[View]:
        """One view, or as many as there are ratios, times two with flip."""
        import mmcv

        pixels, t = bgr(image), self.test
        views = []
        for ratio in t.ratios:
            scale = tuple(int(side * ratio) for side in t.scale)
            if (
                len(t.ratios) > 1
            ):  # as iBOT's resize for several scales: the shorter side alone decides, and is no less than the crop
                short = max(min(scale), t.crop)
                scale = tuple(short * side / min(pixels.shape[:2]) for side in pixels.shape[:2])
            resized = mmcv.imrescale(pixels, scale)
            for flip in (False, True) if t.flip else (False,):
                turned = resized[:, ::-1] if flip else resized
                views.append(View(torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1))), pixels.shape[:2], flip))
        return views


def segment(model: Any, views: list[View], how: Pass) -> NDArray[np.int64]:
    """The class of each pixel, ``h w``, from the mean probabilities over all ``views`` of an image."""
    from mmseg.structures import SegDataSample

    total: Any = 0
    with torch.inference_mode(), autocast(how.device, how.precision):
        for view in views:
            shape = tuple(view.pixels.shape[1:])
            flipped = {"flip": view.flip, "flip_direction": "horizontal"}
            sample = SegDataSample(metainfo={"ori_shape": view.shape, "img_shape": shape, "pad_shape": shape, **flipped})
            data = model.data_preprocessor({"inputs": [view.pixels], "data_samples": [sample]}, False)
            logits = model(**data, mode="predict")[0].seg_logits.data.float()
            if len(views) == 1:
                return logits.argmax(0).cpu().numpy()
            total = total + logits.softmax(0)
    return total.argmax(0).cpu().numpy()


def evaluate(model: Any, p: SegmentationProtocol, val: Pairs, context: Context) -> Outcome:
    """Segment all images, write a PNG of each (numbers as in the data's own) and what each adds to the numbers."""
    rank = context.process[0]
    folder = context.folder / PREDICTIONS
    unfinished = context.folder / f".{PREDICTIONS}"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    distributed.barrier()
    counts: dict[int, NDArray[np.int64]] = {}
    lost: dict[int, str] = {}
    for index, views in tested(val.images, Views(p.test), context.how, context.process, lost):
        found = segment(model, views, context.how)
        counts[index] = counts_of(found, val.labels(index), len(val.classes))
        png = unfinished / val.label_path(index).relative_to(val.label_root)
        png.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(p.labels.written(found.astype(np.uint8))).save(png)
    counts, lost = distributed.gathered(counts), distributed.gathered(lost)
    if rank:
        return Outcome({}, {}, {}, [])
    if not counts:
        raise UserError(f"{val.images.source}: none of the {len(val.images)} val images can be read")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)
    names = tuple(val.images.name(index) for index in sorted(counts))
    images = SegmentedImages(names, val.classes, np.stack([counts[index] for index in sorted(counts)]))
    write_images(context.folder / IMAGES_NAME, images)
    files = {"predictions": PREDICTIONS}
    if context.shown:
        files["picture"] = "segmentations.png"
        chosen = np.linspace(0, len(counts) - 1, min(context.shown, len(counts))).round().astype(int)
        shown = [_segmented(val, sorted(counts)[place], folder) for place in chosen]
        draw_segmentations(context.folder / files["picture"], shown, val.classes, f"{len(shown)} of {len(counts)} val images")
    details = {"per_class": class_table(images), "interval": how_made(images)}
    return Outcome(segmentation_metrics(images), details, files, sorted(lost.values()))


def _segmented(val: Pairs, index: int, folder: Path) -> Segmented:
    with Image.open(folder / val.label_path(index).relative_to(val.label_root)) as file:
        prediction = np.asarray(file) - np.uint8(val.settings.reduce_zero_label)
    name = val.images.name(index).rpartition("/")[2]
    return Segmented(name, np.asarray(val.images.image(index)), val.labels(index), prediction)


def _open(p: SegmentationProtocol, spec: str, split: Split, images: ImageSet) -> Pairs:
    return Pairs(spec, p.labels, images)


ADE20K = DenseTask("ade20k", "mmseg", SegmentationProtocol, "ade20k-vitb", _open, model_config, transforms, evaluate)
