"""A training step and a test image of the dense tasks, against the same models in plain mmseg and mmdet.

The peers have OpenMMLab's own ViT (mmseg's, for both tasks: mmdet has none) or Swin (of each its own) as the backbone, the same
heads and losses, and are stepped as mmengine's loop does (``train_step``, ``test_step``). Behind mmseg's ViT are our adaptors
too. Batches are made beforehand; ours and the peer's take turns on the same ones. On a CPU the seconds are the processor's.

    python benchmarks/dense_step.py            # ViT-S/16 at 256 pixels, Swin-T at 256 pixels; narrow heads
    python benchmarks/dense_step.py --quick    # ViT-Ti/16 and a narrow Swin at 128 pixels, a minute
"""

import argparse
import importlib
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from beside_peer import Comparison
from torch import nn

from downstream.dense import ade20k, coco, coco_settings, openmmlab
from downstream.dense.batches import Batch, bgr
from downstream.dense.task import DenseTask
from downstream.evaluate import load_protocol
from downstream.features import Pass
from mte_bench.data.scenes_formats import write_scenes
from mte_bench.data.sources import open_source
from mte_bench.device import pick_device
from mte_bench.encoders.encoder import EncoderSpec
from mte_bench.encoders.initial import fresh_encoder

BATCH = 2


class Size:
    """What is measured on: pixels, and the widths of the ViT and of the Swin."""

    def __init__(self, quick: bool):
        self.pixels = 128 if quick else 256
        self.vit, self.heads = (192, 3) if quick else (384, 6)
        self.swin, self.depths = (48, (2, 2, 2, 2)) if quick else (96, (2, 2, 6, 2))
        self.rounds = 5 if quick else 15


def protocols(size: Size) -> tuple[ade20k.SegmentationProtocol, coco_settings.DetectionProtocol]:
    p, scale = size.pixels, f"[{4 * size.pixels},{size.pixels}]"
    shared = (f"batch_size={BATCH}", f"test.scale={scale}")
    sizes = (f"augmentation.crop={p}", f"augmentation.scale={scale}", f"test.crop={p}", f"test.stride={2 * p // 3}")
    segmentation = load_protocol(ade20k.ADE20K, "tiny", (*shared, *sizes))[1]
    shapes = (f"augmentation.shorts=[{p}]", f"augmentation.crop_shorts=[{p}]", f"augmentation.crop=[{p},{p}]")
    others = ("test.score=0", f"augmentation.longest={2 * p}", "joining.drop_path=0.2")
    return segmentation, load_protocol(coco.COCO, "tiny", (*shared, *shapes, *others))[1]


class WithAdaptors(nn.Module):
    """mmseg's ViT, its four maps through our adaptors."""

    def __init__(self, size: Size, drop_path: float):
        from mmseg.models.backbones import VisionTransformer

        from downstream.dense.adapter import adaptors

        super().__init__()
        self.vit = VisionTransformer(
            img_size=(size.pixels, size.pixels), patch_size=16, embed_dims=size.vit, num_layers=12, num_heads=size.heads,
            out_indices=(3, 5, 7, 11), drop_path_rate=drop_path, norm_cfg={"type": "LN", "eps": 1e-6},
        )  # fmt: skip
        self.adaptors = adaptors(size.vit)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(adapt(x) for adapt, x in zip(self.adaptors, self.vit(images), strict=True))


def peer_swin(package: openmmlab.Package, size: Size, drop_path: float) -> nn.Module:
    backbones = importlib.import_module(f"{package}.models.backbones")
    return backbones.SwinTransformer(embed_dims=size.swin, depths=size.depths, num_heads=(3, 6, 12, 24), drop_path_rate=drop_path)


class Pair:
    """Ours and the peer of one task, on the same images."""

    def __init__(self, task: DenseTask[Any, Any], protocol: Any, folder: Path, spec: EncoderSpec, peer: nn.Module, how: Pass):
        from mmengine.optim import OptimWrapper

        from downstream.dense.adapter import Backbone
        from downstream.dense.runner import Runner

        source = f"{task.name}:{folder}"
        train, val = (task.open(protocol, source, split, open_source(source, split)) for split in ("train", "val"))
        transform = openmmlab.build_transforms(task.package, task.transforms(protocol))
        joining = {key: getattr(protocol.joining, key) for key in type(protocol.joining).model_fields}
        backbone = Backbone(fresh_encoder(spec), **joining)
        ours, theirs = (self.model(task, protocol, b, backbone.widths, val.classes, spec, how) for b in (backbone, peer))
        self.runner = Runner(protocol, ours, train, transform, folder, how=how, identity={})
        self.batches = [batch for batch, _ in zip(self.runner.batches(), range(4), strict=False)]
        self.theirs = theirs
        self.wrapper = OptimWrapper(torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.05))
        self.how, self.image, self.task, self.test = how, val.images.image(0), task, protocol.test
        resize = {"type": "Resize", "scale": protocol.test.scale, "keep_ratio": True}
        pack = {"type": "PackDetInputs" if task.name == "coco" else "PackSegInputs"}
        self.prepare = openmmlab.build_transforms(task.package, [resize, pack])

    @staticmethod
    def model(task: Any, protocol: Any, backbone: nn.Module, widths: Any, classes: Any, spec: EncoderSpec, how: Pass) -> Any:
        config = task.config(protocol, {"type": lambda: backbone}, widths, len(classes), spec)
        return openmmlab.build_model(task.package, config).to(how.device)

    def train_ours(self, batch: Batch) -> None:
        self.runner.take_step(self.runner.model, iter([batch]))

    def train_theirs(self, batch: Batch) -> None:
        data = {key: [one[key] for one in batch.packed] for key in ("inputs", "data_samples")}
        self.theirs.train()
        self.theirs.train_step(data, self.wrapper)

    def test_ours(self) -> None:
        self.runner.model.eval()
        if self.task.name == "coco":
            coco.detect(self.runner.model, coco.Resize(self.test)(self.image), self.how)
        else:
            ade20k.segment(self.runner.model, ade20k.Views(self.test)(self.image), self.how)

    def test_theirs(self) -> None:
        pixels = bgr(self.image)
        packed = self.prepare({"img": pixels, "ori_shape": pixels.shape[:2], "img_shape": pixels.shape[:2]})
        self.theirs.eval()
        with torch.inference_mode():
            self.theirs.test_step({key: [value] for key, value in packed.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller encoders and images, fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    size, how = Size(given.quick), Pass(device=pick_device(given.device))
    segmentation, detection = protocols(size)
    vit = EncoderSpec(
        arch="vit_tiny_patch16_224", image_size=size.pixels, options={"embed_dim": size.vit, "num_heads": size.heads}
    )
    swin = EncoderSpec(arch="swin_tiny_patch4_window7_224", options={"embed_dim": size.swin, "depths": list(size.depths)})
    table = Comparison("dense_step", "a training step", given.quick)
    with tempfile.TemporaryDirectory() as scratch:
        for package in ("mmseg", "mmdet"):
            openmmlab.require(package)  # type: ignore[arg-type]
        folders = [write_scenes(Path(scratch) / name, name, train=8, val=1, size=size.pixels) for name in ("ade20k", "coco")]
        tasks: list[tuple[str, DenseTask[Any, Any], Any, Path]] = [
            ("UperNet", ade20k.ADE20K, segmentation, folders[0]),
            ("Cascade Mask R-CNN", coco.COCO, detection, folders[1]),
        ]
        for (name, task, protocol, folder), spec in itertools.product(tasks, (vit, swin)):
            drop_path = protocol.joining.drop_path
            peer = WithAdaptors(size, drop_path) if spec is vit else peer_swin(task.package, size, drop_path)
            kind = "ViT" if spec is vit else "Swin"
            if spec is swin:
                protocol = protocol.model_copy(update={"optimiser": protocol.optimiser.model_copy(update={"layer_decay": 1.0})})
            pair = Pair(task, protocol, folder, spec, peer, how)
            table.add(f"{name}, {kind}", pair, given.rounds or size.rounds)
    table.close()


if __name__ == "__main__":
    main()
