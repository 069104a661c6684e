"""The protocols of COCO and ADE20K against the sheet: every constant, in the configuration that the models are built from."""

from typing import Any

import pytest

from downstream.dense import ade20k, coco, coco_settings
from downstream.dense.protocol import DenseProtocol
from downstream.dense.task import DenseTask
from downstream.evaluate import load_protocol
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.errors import UserError

SPEC = EncoderSpec(arch="vit_base_patch16_224")
BACKBONE: dict[str, Any] = {"type": "given"}


def protocol(task: DenseTask[Any, Any], name: str) -> Any:
    return load_protocol(task, name)[1]


def at(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = config[int(part)] if part.isdigit() else config[part]
    return config


@pytest.mark.parametrize(("name", "width"), [("vitb", 768), ("vits", 384)])
def test_the_detector_is_the_sheets(name: str, width: int) -> None:
    config = coco_settings.model_config(protocol(coco.COCO, name), BACKBONE, (width,) * 4, 80, SPEC)
    one_box_head = {
        "type": "ConvFCBBoxHead",
        "num_shared_convs": 4,
        "num_shared_fcs": 1,
        "in_channels": 256,
        "conv_out_channels": 256,
        "fc_out_channels": 1024,
        "roi_feat_size": 7,
        "num_classes": 80,
        "reg_class_agnostic": False,
        "reg_decoded_bbox": True,
        "norm_cfg": {"type": "BN", "requires_grad": True},
        "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
        "loss_bbox": {"type": "GIoULoss", "loss_weight": 10.0},
    }
    stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    for head, std in zip(at(config, "roi_head.bbox_head"), stds, strict=True):
        assert head.pop("bbox_coder") == {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": std}
        assert head == one_box_head
    expected = {
        "type": "CascadeRCNN",
        "data_preprocessor.pad_size_divisor": 32,
        "neck": {"type": "FPN", "in_channels": [width] * 4, "out_channels": 256, "num_outs": 5},
        "rpn_head.anchor_generator.scales": [8],
        "rpn_head.anchor_generator.ratios": [0.5, 1.0, 2.0],
        "rpn_head.anchor_generator.strides": [4, 8, 16, 32, 64],
        "rpn_head.bbox_coder.target_stds": [1.0] * 4,
        "rpn_head.loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0},
        "rpn_head.loss_bbox": {"type": "SmoothL1Loss", "beta": 1 / 9, "loss_weight": 1.0},
        "roi_head.num_stages": 3,
        "roi_head.stage_loss_weights": [1, 0.5, 0.25],
        "roi_head.bbox_roi_extractor.roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
        "roi_head.bbox_roi_extractor.featmap_strides": [4, 8, 16, 32],
        "roi_head.mask_roi_extractor.roi_layer": {"type": "RoIAlign", "output_size": 14, "sampling_ratio": 0},
        "roi_head.mask_head.num_convs": 4,
        "roi_head.mask_head.conv_out_channels": 256,
        "roi_head.mask_head.num_classes": 80,
        "train_cfg.rpn.assigner.pos_iou_thr": 0.7,
        "train_cfg.rpn.assigner.neg_iou_thr": 0.3,
        "train_cfg.rpn.assigner.min_pos_iou": 0.3,
        "train_cfg.rpn.assigner.match_low_quality": True,
        "train_cfg.rpn.sampler.num": 256,
        "train_cfg.rpn.sampler.pos_fraction": 0.5,
        "train_cfg.rpn.allowed_border": 0,
        "train_cfg.rpn_proposal.nms_pre": 2000,
        "train_cfg.rpn_proposal.max_per_img": 2000,
        "train_cfg.rpn_proposal.nms": {"type": "nms", "iou_threshold": 0.7},
        "test_cfg.rpn.max_per_img": 1000,
        "test_cfg.rpn.nms": {"type": "nms", "iou_threshold": 0.7},
        "test_cfg.rcnn.score_thr": 0.05,
        "test_cfg.rcnn.nms": {"type": "nms", "iou_threshold": 0.5},
        "test_cfg.rcnn.max_per_img": 100,
        "test_cfg.rcnn.mask_thr_binary": 0.5,
    }
    assert {path: at(config, path) for path in expected} == expected
    for part, iou in zip(at(config, "train_cfg.rcnn"), (0.5, 0.6, 0.7), strict=True):
        assert {part["assigner"][key] for key in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")} == {iou}
        assert (part["assigner"]["match_low_quality"], part["mask_size"]) == (False, 28)
        assert part["sampler"] == {
            "type": "RandomSampler",
            "num": 512,
            "pos_fraction": 0.25,
            "neg_pos_ub": -1,
            "add_gt_as_proposals": True,
        }


def test_the_detector_sees_images_as_the_sheet_says() -> None:
    p = protocol(coco.COCO, "vitb")
    shorts = [(short, 1333) for short in range(480, 801, 32)]
    load, flip, choice, pack = coco_settings.transforms(p)
    assert (load["type"], flip, pack["type"]) == ("LoadAnnotations", {"type": "RandomFlip", "prob": 0.5}, "PackDetInputs")
    (resize,), (first, crop, again) = choice["transforms"]
    assert resize == again == {"type": "RandomChoiceResize", "scales": shorts, "keep_ratio": True}
    assert first["scales"] == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop["crop_type"], crop["crop_size"], crop["allow_negative_crop"]) == ("absolute_range", (384, 600), True)
    assert p.test.scale == (1333, 800)


@pytest.mark.parametrize(("name", "joining", "decay", "batch"), [
    ("vitb", {"drop_path": 0.2, "position_size": (672, 1092)}, 0.75, 16),
    ("vits", {"drop_path": 0.1, "position_size": (800, 1008)}, 0.8, 32),
])  # fmt: skip
def test_the_detectors_training_is_the_sheets(name: str, joining: dict[str, Any], decay: float, batch: int) -> None:
    p = protocol(coco.COCO, name)
    expected = {"taps": (3, 5, 7, 11), "tap_norm": False, "adapt": True, "frozen": False, "checkpointing": True, **joining}
    assert p.joining.model_dump() == expected
    o = p.optimiser
    assert (o.lr, o.betas, o.weight_decay, o.layer_decay, o.spared) == (1e-4, (0.9, 0.999), 0.05, decay, "vectors")
    assert (p.epochs, p.batch_size, p.accumulate) == (12, batch, 1)
    per_epoch = 7329
    rates = {step: p.rate(step, per_epoch) for step in (0, 250, 500, 8 * per_epoch - 1, 8 * per_epoch, 11 * per_epoch)}
    assert rates == pytest.approx({0: 0.001, 250: 0.5005, 500: 1, 8 * per_epoch - 1: 1, 8 * per_epoch: 0.1, 11 * per_epoch: 0.01})


def test_the_swin_detector_has_no_layer_decay() -> None:
    p = protocol(coco.COCO, "swint")
    assert (p.joining.drop_path, p.optimiser.layer_decay) == (0.2, 1.0)
    assert p.optimiser.spared == ("relative_position_bias_table", "norm")
    assert (p.optimiser.lr, p.batch_size, p.epochs, p.optimiser.milestones) == (1e-4, 16, 12, (8, 11))


@pytest.mark.parametrize(("name", "width"), [("vitb", 768), ("vits", 384), ("vitb-ibot", 768), ("vitb-ms", 768)])
def test_upernet_is_the_sheets(name: str, width: int) -> None:
    config = ade20k.model_config(protocol(ade20k.ADE20K, name), BACKBONE, (width,) * 4, 150, SPEC)
    cross_entropy = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}
    batch_norm = {"type": "BN", "requires_grad": True}
    assert config["decode_head"] == {
        "type": "UPerHead",
        "in_channels": [width] * 4,
        "in_index": [0, 1, 2, 3],
        "pool_scales": (1, 2, 3, 6),
        "channels": width,
        "dropout_ratio": 0.1,
        "num_classes": 150,
        "norm_cfg": batch_norm,
        "align_corners": False,
        "loss_decode": cross_entropy,
    }
    assert config["auxiliary_head"] == {
        "type": "FCNHead",
        "in_channels": width,
        "in_index": 2,
        "channels": 256,
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0.1,
        "num_classes": 150,
        "norm_cfg": batch_norm,
        "align_corners": False,
        "loss_decode": {**cross_entropy, "loss_weight": 0.4},
    }
    assert config["test_cfg"] == {"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)}
    preprocessing = config["data_preprocessor"]
    assert preprocessing["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessing["std"] == pytest.approx([58.395, 57.12, 57.375])
    assert (preprocessing["size"], preprocessing["pad_val"], preprocessing["seg_pad_val"]) == ((512, 512), 0, 255)


@pytest.mark.parametrize(("name", "lr", "decay"), [
    ("vitb", 8e-5, 0.9), ("vitb-ibot", 8e-5, 0.65), ("vits", 3e-5, 0.9), ("vitb-ms", 3e-5, 0.9),
])  # fmt: skip
def test_upernets_training_is_the_sheets(name: str, lr: float, decay: float) -> None:
    p = protocol(ade20k.ADE20K, name)
    assert (p.joining.taps, p.joining.tap_norm, p.joining.drop_path) == ((3, 5, 7, 11), True, 0.1)
    assert (p.joining.adapt, p.joining.frozen, p.joining.position_size) == (True, False, (512, 512))
    o = p.optimiser
    assert (o.lr, o.layer_decay, o.betas, o.weight_decay, o.spared) == (lr, decay, (0.9, 0.999), 0.05, "vectors")
    assert (p.steps, p.epochs, p.batch_size, p.labels.reduce_zero_label) == (160_000, None, 16, True)
    halfway = 80_000
    expected = {0: 1e-6, 750: (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6)), halfway: 0.5, 159_999: 1 / 160_000}
    assert {step: p.rate(step, 1263) for step in expected} == pytest.approx(expected)
    assert ade20k.transforms(p) == [
        {"type": "RandomResize", "scale": (2048, 512), "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": (512, 512), "cat_max_ratio": 0.75, "ignore_index": 255},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]
    several = name == "vitb-ms"
    assert p.test.ratios == ((0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if several else (1.0,))
    assert p.test.flip == several


def test_the_linear_head_is_the_sheets() -> None:
    p = protocol(ade20k.ADE20K, "linear")
    head = ade20k.model_config(p, BACKBONE, (768,) * 4, 150, SPEC)["decode_head"]
    assert (head["type"], head["input_transform"], head["channels"], head["num_convs"]) == ("FCNHead", "resize_concat", 3072, 0)
    assert (head["concat_input"], head["dropout_ratio"]) == (False, 0)
    assert (p.joining.frozen, p.joining.adapt, p.joining.tap_norm, p.head.auxiliary) == (True, False, True, None)
    assert (p.optimiser.lr, p.optimiser.weight_decay, p.optimiser.layer_decay, p.optimiser.spared) == (8e-4, 0.05, 1.0, ())


def test_settings_that_contradict_each_other_are_refused() -> None:
    for words, change in {
        "either epochs or steps": "epochs=3",
        "stride": "test.stride=600",
        "did you mean 'steps'": "stepz=3",
    }.items():
        with pytest.raises(UserError, match=words):
            load_protocol(ade20k.ADE20K, "vitb", (change,))


def test_a_smoke_run_takes_two_steps_of_two_images() -> None:
    p: DenseProtocol = protocol(ade20k.ADE20K, "vitb").for_smoke()
    assert (p.total_steps(1), p.batch_size) == (2, 2)
