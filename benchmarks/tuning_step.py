"""A fine-tuning step and a test image, against timm's own model trained by a plain loop.

The peer is timm's model of the same architecture with its own classifier and stochastic depth, timm's Mixup and parameter groups
by layer decay, and torch's AdamW: what timm's training script does with a batch. Ours and the peer take turns on the same
batches; on a CPU the seconds are the processor's.

    python benchmarks/tuning_step.py            # ViT-S/16 and Swin-T at 224 pixels, batch 8
    python benchmarks/tuning_step.py --quick    # batch 2, half a minute
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from beside_peer import Comparison
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay

from downstream.evaluate import evaluation_transform, load_protocol
from downstream.features import Pass
from downstream.finetune import FINETUNE
from downstream.tuning.tuner import Batch, Tuner
from mte_bench.data.sources import open_source
from mte_bench.device import pick_device
from mte_bench.encoders.checkpoint import open_checkpoint

ARCHS = {"ViT-S/16": ("vits", "vit_small_patch16_224"), "Swin-T": ("swint", "swin_tiny_patch4_window7_224")}
"""What is measured: its protocol, and its name in timm."""

PIXELS = 224


class Pair:
    """Ours and the peer, on the same images."""

    def __init__(self, name: str, arch: str, batch: int, folder: Path, how: Pass):
        _, protocol = load_protocol(FINETUNE, name, (f"batch_size={batch}",))
        train, val = (open_source(f"scenes?train=40&val=10&size={PIXELS}", split) for split in ("train", "val"))
        checkpoint = open_checkpoint(f"random:{arch}?image_size={PIXELS}")
        transform = evaluation_transform(checkpoint, protocol)
        self.how = how
        self.tuner = Tuner(protocol, checkpoint, train, val, folder, how=how, transform=transform, identity={}, metadata={})
        self.batches = [batch for batch, _ in zip(self.tuner.batches(), range(4), strict=False)]
        classes = len(train.classes)
        self.peer = timm.create_model(arch, img_size=PIXELS, num_classes=classes, drop_path_rate=protocol.drop_path).to(
            how.device
        )
        groups = param_groups_layer_decay(self.peer, protocol.weight_decay, layer_decay=protocol.layer_decay)
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=protocol.betas)
        self.mixing = Mixup(protocol.mixup, protocol.cutmix, label_smoothing=protocol.smoothing, num_classes=classes)
        self.loss = SoftTargetCrossEntropy()
        self.image = transform(val.image(0))[None]

    def train_ours(self, batch: Batch) -> None:
        self.tuner.take_step(self.tuner.model, iter([batch._replace(images=batch.images.clone())]))  # mixing writes into them

    def train_theirs(self, batch: Batch) -> None:
        self.peer.train()
        images, targets = self.mixing(batch.images.clone().to(self.how.device), batch.labels.to(self.how.device))
        loss = self.loss(self.peer(images), targets)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        loss.item()

    def test_ours(self) -> None:
        self._test(self.tuner.model)

    def test_theirs(self) -> None:
        self._test(self.peer)

    def _test(self, model: Any) -> None:
        model.eval()
        with torch.inference_mode():
            model(self.image.to(self.how.device)).argmax().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    how, rounds = Pass(device=pick_device(given.device)), given.rounds or (5 if given.quick else 15)
    table = Comparison("tuning_step", "a fine-tuning step", given.quick)
    for name, (protocol, arch) in ARCHS.items():
        with tempfile.TemporaryDirectory() as scratch:
            pair = Pair(protocol, arch, 2 if given.quick else 8, Path(scratch), how)
            table.add(name, pair, rounds)
    table.close()


if __name__ == "__main__":
    main()
