"""Settings of ``coco`` and the configuration of mmdet's Cascade Mask R-CNN that they make.

Source: iBOT ``evaluation/object_detection`` (mmdet 2, Swin's fork); its numbers stand in the protocol files. What is written
here is what all configurations of this detector in mmdet have in common.
"""

from typing import Any

from pydantic import Field, PositiveInt

from downstream.dense.protocol import DenseProtocol
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.settings import Settings

Size = tuple[PositiveInt, PositiveInt]
Box = tuple[float, float, float, float]
NORM = {"type": "BN", "requires_grad": True}  # over all processes on CUDA, see Runner
MAP_STRIDES = [4, 8, 16, 32]


class Rpn(Settings):
    """The region proposal network on the pyramid's five maps."""

    scales: tuple[float, ...]
    """Side of an anchor in strides of its map."""
    ratios: tuple[float, ...]
    strides: tuple[PositiveInt, ...]
    box_std: Box
    smooth_l1_beta: float = Field(gt=0)
    positive_iou: float
    negative_iou: float
    least_positive_iou: float
    """An object's best anchor is positive from here on."""
    samples: PositiveInt
    positive_share: float
    nms: float
    train_proposals: PositiveInt
    test_proposals: PositiveInt


class Stage(Settings):
    """One of the cascade's stages."""

    weight: float
    iou: float
    """What is an object, and what is not."""
    box_std: Box


class Heads(Settings):
    """Box heads of all stages and the mask head."""

    stages: tuple[Stage, ...] = Field(min_length=1)
    samples: PositiveInt
    positive_share: float
    convolutions: PositiveInt
    channels: PositiveInt
    """Of the shared convolutions and of the mask head's."""
    hidden: PositiveInt
    """Width of the box heads' fully connected layer."""
    class_agnostic: bool
    """Whether one box serves all classes."""
    giou_weight: float
    box_cells: PositiveInt
    mask_cells: PositiveInt
    mask_convolutions: PositiveInt
    sampling_ratio: int = Field(ge=0)
    """Points along the side of a cell of RoIAlign; 0 takes as many as there are pixels."""


class Augmentation(Settings):
    """What is done to training images: mirrored, then one of two ways, at even chances.

    (a) resized so that the shorter side is one of ``shorts``, the longer at most ``longest``; (b) resized to one of
    ``crop_shorts``, cropped to sides drawn between the two of ``crop``, then as (a).
    """

    flip: float = Field(ge=0, le=1)
    shorts: tuple[PositiveInt, ...] = Field(min_length=1)
    longest: PositiveInt
    crop_shorts: tuple[PositiveInt, ...] = Field(min_length=1)
    crop: Size


class Test(Settings):
    """What is detected in whole images."""

    scale: Size
    """Longer and shorter side that an image is resized to fit into."""
    score: float = Field(ge=0, le=1)
    """The least that counts."""
    nms: float
    detections: PositiveInt
    """The most per image."""
    mask_threshold: float


class DetectionProtocol(DenseProtocol):
    """Settings of ``coco``."""

    pyramid: PositiveInt
    """Channels of the feature pyramid."""
    rpn: Rpn
    heads: Heads
    augmentation: Augmentation
    least_side: int = Field(ge=0)
    """Images with a shorter side are not trained on."""
    test: Test


def model_config(p: DetectionProtocol, backbone: dict[str, Any], widths: tuple[int, ...], classes: int, spec: EncoderSpec) -> Any:
    """The configuration of mmdet's ``CascadeRCNN`` with masks on ``backbone``, whose maps have ``widths`` channels."""
    return {
        "type": "CascadeRCNN",
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "mean": [255 * value for value in spec.mean],
            "std": [255 * value for value in spec.std],
            "bgr_to_rgb": True,
            "pad_mask": True,
            "pad_size_divisor": 32,
        },
        "backbone": backbone,
        "neck": {"type": "FPN", "in_channels": list(widths), "out_channels": p.pyramid, "num_outs": len(p.rpn.strides)},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": p.pyramid,
            "feat_channels": p.pyramid,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": list(p.rpn.scales),
                "ratios": list(p.rpn.ratios),
                "strides": list(p.rpn.strides),
            },
            "bbox_coder": _coder(p.rpn.box_std),
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
            "loss_bbox": {"type": "SmoothL1Loss", "beta": p.rpn.smooth_l1_beta, "loss_weight": 1.0},
        },
        "roi_head": _roi_head(p, classes),
        "train_cfg": _train_cfg(p),
        "test_cfg": {
            "rpn": _proposals(p.rpn.test_proposals, p.rpn.nms),
            "rcnn": {
                "score_thr": p.test.score,
                "nms": {"type": "nms", "iou_threshold": p.test.nms},
                "max_per_img": p.test.detections,
                "mask_thr_binary": p.test.mask_threshold,
            },
        },
    }


def transforms(p: DetectionProtocol) -> list[dict[str, Any]]:
    """The configurations of mmdet's transforms of training images."""
    a = p.augmentation

    def resize(shorts: tuple[int, ...]) -> dict[str, Any]:
        return {"type": "RandomChoiceResize", "scales": [(short, a.longest) for short in shorts], "keep_ratio": True}

    crop = {"type": "RandomCrop", "crop_type": "absolute_range", "crop_size": a.crop, "allow_negative_crop": True}
    return [
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomFlip", "prob": a.flip},
        {"type": "RandomChoice", "transforms": [[resize(a.shorts)], [resize(a.crop_shorts), crop, resize(a.shorts)]]},
        {"type": "PackDetInputs"},
    ]


def _roi_head(p: DetectionProtocol, classes: int) -> dict[str, Any]:
    h = p.heads
    cross_entropy = {"type": "CrossEntropyLoss", "loss_weight": 1.0}

    def extractor(cells: int) -> dict[str, Any]:
        align = {"type": "RoIAlign", "output_size": cells, "sampling_ratio": h.sampling_ratio}
        return {"type": "SingleRoIExtractor", "roi_layer": align, "out_channels": p.pyramid, "featmap_strides": MAP_STRIDES}

    def box_head(stage: Stage) -> dict[str, Any]:
        return {
            "type": "ConvFCBBoxHead",
            "num_shared_convs": h.convolutions,
            "num_shared_fcs": 1,
            "in_channels": p.pyramid,
            "conv_out_channels": h.channels,
            "fc_out_channels": h.hidden,
            "roi_feat_size": h.box_cells,
            "num_classes": classes,
            "bbox_coder": _coder(stage.box_std),
            "reg_class_agnostic": h.class_agnostic,
            "reg_decoded_bbox": True,  # GIoU is of boxes, not of their codes
            "norm_cfg": NORM,
            "loss_cls": {**cross_entropy, "use_sigmoid": False},
            "loss_bbox": {"type": "GIoULoss", "loss_weight": h.giou_weight},
        }

    return {
        "type": "CascadeRoIHead",
        "num_stages": len(h.stages),
        "stage_loss_weights": [stage.weight for stage in h.stages],
        "bbox_roi_extractor": extractor(h.box_cells),
        "bbox_head": [box_head(stage) for stage in h.stages],
        "mask_roi_extractor": extractor(h.mask_cells),
        "mask_head": {
            "type": "FCNMaskHead",
            "num_convs": h.mask_convolutions,
            "in_channels": p.pyramid,
            "conv_out_channels": h.channels,
            "num_classes": classes,
            "loss_mask": {**cross_entropy, "use_mask": True},
        },
    }


def _train_cfg(p: DetectionProtocol) -> dict[str, Any]:
    def part(ious: tuple[float, float, float], low_quality: bool, samples: int, share: float, add_truth: bool) -> dict[str, Any]:
        names = ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")
        assigner = {"type": "MaxIoUAssigner", **dict(zip(names, ious, strict=True)), "match_low_quality": low_quality}
        sampler = {"type": "RandomSampler", "num": samples, "pos_fraction": share, "neg_pos_ub": -1}
        sampler["add_gt_as_proposals"] = add_truth
        return {"assigner": {**assigner, "ignore_iof_thr": -1}, "sampler": sampler, "pos_weight": -1, "debug": False}

    rpn_ious = (p.rpn.positive_iou, p.rpn.negative_iou, p.rpn.least_positive_iou)
    mask = {"mask_size": 2 * p.heads.mask_cells}  # the mask head doubles its resolution
    return {
        "rpn": {**part(rpn_ious, True, p.rpn.samples, p.rpn.positive_share, False), "allowed_border": 0},
        "rpn_proposal": _proposals(p.rpn.train_proposals, p.rpn.nms),
        "rcnn": [
            {**part((stage.iou,) * 3, False, p.heads.samples, p.heads.positive_share, True), **mask} for stage in p.heads.stages
        ],
    }


def _proposals(count: int, nms: float) -> dict[str, Any]:
    return {"nms_pre": count, "max_per_img": count, "nms": {"type": "nms", "iou_threshold": nms}, "min_bbox_size": 0}


def _coder(std: Box) -> dict[str, Any]:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(std)}
