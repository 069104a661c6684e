"""What is fine-tuned: an encoder with a classifier, and which learning rate and weight decay each of its parameters has."""

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from downstream.tuning.protocol import FinetuneProtocol
from mte_bench.encoders.classifier import ImageClassifier
from mte_bench.encoders.encoder import EncoderSpec, build_encoder
from mte_bench.training.seeded import seeded

MODEL = "encoder.model."
"""Before timm's own name of a parameter."""


class Classifier(ImageClassifier):
    """A fresh classifier of ``classes`` on the weights (``state``) of the timm model in an encoder of ``spec``."""

    def __init__(self, spec: EncoderSpec, state: dict[str, Tensor], classes: int, protocol: FinetuneProtocol):
        super().__init__(build_encoder(spec, protocol.drop_path), classes, protocol.pool)
        self.encoder.model.load_state_dict(state)
        with seeded(protocol.seed):
            nn.init.trunc_normal_(self.head.weight, std=protocol.head_std)
        nn.init.zeros_(self.head.bias)
        if self.pool == "mean":  # what comes after the patches that are averaged; a frozen parameter needs no gradient from DDP
            cast(nn.Module, self.encoder.model.norm).requires_grad_(False)

    def forward(self, images: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """``b c h w`` to ``b classes``, with the draws of stochastic depth (``paths b``) if there are any."""
        self.encoder.use_drop_path(drop_path)
        return super().forward(images)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Which layer a parameter belongs to, as timm's layer decay asks for it: 0 is what comes before the blocks, then
        each block, then the final norm and the head, which timm itself would separate. Source: iBOT ``optim_factory.py``.

        What merges a Swin's patches belongs to the block before it.
        """
        depths = [len(stage.blocks) for stage in self.encoder.model.layers] if self._is_swin else []  # type: ignore[union-attr]
        last = len(self.encoder.block_list) + 1

        def layer(name: str) -> int:
            if match := re.match(MODEL + r"blocks\.(\d+)\.", name):
                return int(match[1]) + 1
            if match := re.match(MODEL + r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name):
                before = sum(depths[: int(match[1])])
                return before if match[2] is None else before + int(match[2]) + 1
            return last if name.startswith((f"{MODEL}norm.", "fc_norm.", "head.")) else 0

        return layer

    @property
    def _is_swin(self) -> bool:
        return isinstance(self.encoder.model, SwinTransformer)

    def parameter_groups(self, protocol: FinetuneProtocol) -> list[dict[str, Any]]:
        """timm's groups, each with ``params``, ``lr_scale`` and ``weight_decay``."""
        model: Any = self.encoder.model
        return param_groups_layer_decay(
            self,
            weight_decay=protocol.weight_decay,
            no_weight_decay_list=[MODEL + name for name in model.no_weight_decay()],
            layer_decay=protocol.layer_decay,
        )


def build_optimiser(model: Classifier, protocol: FinetuneProtocol, device: torch.device) -> torch.optim.AdamW:
    """AdamW; ``set_rate`` gives each group its share of the learning rate."""
    return torch.optim.AdamW(model.parameter_groups(protocol), lr=0.0, betas=protocol.betas, fused=device.type in ("cpu", "cuda"))


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the head's learning rate and, by its ``lr_scale``, that of every group."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"]
