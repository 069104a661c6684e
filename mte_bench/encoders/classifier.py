"""Classifiers that were trained together with their encoder: written beside it, found again, and put back on it.

Where one is found:

- ``classifier.safetensors`` beside ``encoder.safetensors``: of supervised and fine-tuned runs, with the names of its classes
- ``head.*`` (timm's Swin: ``head.fc.*``; a distilled DeiT also ``head_dist.*``) in another project's file, and in timm's weights
- ``heads.*`` in ``auxiliary.safetensors``: of supervised runs with MTE, the classifiers of the auxiliary tokens
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mte_bench.encoders.checkpoint import AUXILIARY_FORMAT, Checkpoint
from mte_bench.encoders.encoder import Encoder, Tokens
from mte_bench.encoders.heads import Fusion, FusionKind, StackedLinear
from mte_bench.encoders.tokens import MultiToken
from mte_bench.encoders.weight_files import write_safetensors
from mte_bench.errors import UserError

CLASSIFIER_FORMAT = "mte-bench-classifier/1"

Pool = Literal["token", "mean"]
"""What is classified: the global token after the final norm, or the mean of the patch tokens before it, under a norm of its own
(MAE)."""


class ImageClassifier(nn.Module):
    """Images to the scores of ``classes``.

    ``encoder.model``, ``fc_norm`` and ``head`` are named as in timm's model of this architecture with ``num_classes`` (and,
    for the mean of patches, ``global_pool="avg"``).
    """

    def __init__(self, encoder: Encoder, classes: int, pool: Pool = "token"):
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.fc_norm = nn.LayerNorm(encoder.width, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(encoder.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``b c h w``, normalised, to ``b classes``."""
        return self.scores(self.encoder(images))

    def scores(self, tokens: Tokens) -> Tensor:
        """What the encoder made of ``b`` images to ``b classes``."""
        pooled = tokens.global_token if self.pool == "token" else tokens.raw_patches.mean(1)
        return self.head(self.fc_norm(pooled))


class DistilledClassifier(ImageClassifier):
    """Of a distilled DeiT: the mean of what CLS and the distillation token say, each by a classifier of its own (DeiT)."""

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__(encoder, classes)
        self.head_dist = nn.Linear(encoder.width, classes)

    def scores(self, tokens: Tokens) -> Tensor:
        """As ``ImageClassifier.scores``."""
        assert tokens.prefix is not None
        return (self.head(tokens.prefix[:, 0]) + self.head_dist(tokens.prefix[:, 1])) / 2


class EnhancedClassifier(nn.Module):
    """Of supervised training with MTE: the global token's classifier, and the auxiliary tokens' fused ones (equation 7)."""

    def __init__(self, own: ImageClassifier, tokens: MultiToken, heads: StackedLinear, fusion: Fusion, fuse_global: bool):
        super().__init__()
        self.own, self.tokens, self.heads, self.fusion, self.fuse_global = own, tokens, heads, fusion, fuse_global

    def forward(self, images: Tensor) -> Tensor:
        """``b c h w``, normalised, to ``2 b classes``: the global token's scores, then the fused ones."""
        tokens, auxiliary = self.tokens(images)
        stacked = auxiliary.transpose(0, 1)
        t, b, _ = stacked.shape
        independent = len(self.heads.weight) == t
        fused = self.heads(stacked if independent else stacked.reshape(1, t * b, -1)).view(t, b, -1)
        if self.fuse_global:
            fused = torch.cat([fused, self.own.scores(tokens).unsqueeze(0)])
        # by itself where the auxiliary tokens are in its sight (Table 16): they are away when the encoder is used
        alone = self.own.scores(tokens) if self.tokens.auxiliary.settings.cut_attention else self.own(images)
        return torch.stack([alone, self.fusion(fused)])


class Trained(NamedTuple):
    """A checkpoint's classifier."""

    model: nn.Module
    """Images ``b c h w`` to scores ``b classes``; with several ``suffixes``, ``s b classes``. In evaluation mode, on the CPU."""
    suffixes: tuple[str, ...]
    """What the metrics of each are called beside the first ones': ``("",)``, or with MTE ``("", "_fused")``."""
    classes: tuple[str, ...] | None
    """The names of its classes; None where the file holds none."""
    outputs: int
    """How many classes it tells apart."""


def save_classifier(
    path: str | Path, head: nn.Module, classes: Sequence[str], metadata: Mapping[str, Any], norm: nn.Module | None = None
) -> None:
    """Write the classifier ``head`` (Linear, or a ``StackedLinear`` of one copy) as ``head.weight`` and ``head.bias``, and the
    ``norm`` before it, if it has one of its own, as ``fc_norm.*``.

    These are the names that a timm model with ``num_classes`` has beside the encoder's. The classes stand in the header.
    """
    tensors = {f"head.{name}": tensor.squeeze(0) for name, tensor in head.state_dict().items()}
    tensors |= {f"fc_norm.{name}": tensor for name, tensor in (norm.state_dict().items() if norm else ())}
    write_safetensors(path, tensors, {**metadata, "format": CLASSIFIER_FORMAT, "classes": list(classes)})


def trained_classifier(checkpoint: Checkpoint) -> Trained:
    """The classifier that ``checkpoint`` brings, on its encoder.

    Raises ``UserError`` if it brings none, if the files of a run do not belong together, or if the classifier has a layer
    before the linear one (old ViTs of 21,843 classes).
    """
    name = checkpoint.subject.checkpoint
    if checkpoint.classifier is not None:
        tensors, metadata = checkpoint.read_beside(checkpoint.classifier, CLASSIFIER_FORMAT)
        own = _built(checkpoint, tensors, str(checkpoint.classifier))
        classes = tuple(json.loads(metadata["classes"]))
        if len(classes) != own.head.out_features:
            raise UserError(
                f"{checkpoint.classifier}: names {len(classes)} classes and scores {own.head.out_features}; train again"
            )
        enhanced = _enhanced(checkpoint, own)
        if enhanced is not None:
            return Trained(enhanced.eval(), ("", "_fused"), classes, len(classes))
        return Trained(own.eval(), ("",), classes, len(classes))
    tensors = {title.replace("head.fc.", "head."): tensor for title, tensor in checkpoint.head().items()}
    if "head.weight" not in tensors:
        raise UserError(
            f"{name}: brings no classifier; give a supervised or fine-tuned run, or weights with a head, or train one on the "
            "encoder by `linear`"
        )
    if any(title.startswith("pre_logits.") for title in checkpoint.dropped):
        raise UserError(f"{name}: its classifier has a layer before the linear one (pre_logits), which is not read here")
    own = _built(checkpoint, tensors, name)
    return Trained(own.eval(), ("",), None, own.head.out_features)


def _built(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], where: str) -> ImageClassifier:
    """The classifier of ``tensors``, under timm's names, on the encoder."""
    encoder, classes = checkpoint.encoder, len(tensors["head.weight"])
    model = (
        DistilledClassifier(encoder, classes)
        if isinstance(encoder.model, VisionTransformerDistilled)
        else ImageClassifier(encoder, classes, "mean" if "fc_norm.weight" in tensors else "token")
    )
    own = {title: tensor for title, tensor in model.state_dict().items() if not title.startswith("encoder.")}
    if own.keys() != tensors.keys() or any(own[title].shape != tensors[title].shape for title in own):
        found = ", ".join(f"{title} {'x'.join(map(str, tensor.shape))}" for title, tensor in tensors.items())
        wanted = ", ".join(f"{title} {'x'.join(map(str, tensor.shape))}" for title, tensor in own.items())
        raise UserError(f"{where}: its classifier ({found}) does not fit {encoder.spec.arch}, which wants {wanted}")
    model.load_state_dict(tensors, strict=False)
    return model


def _enhanced(checkpoint: Checkpoint, own: ImageClassifier) -> EnhancedClassifier | None:
    """``own`` beside the classifiers of the auxiliary tokens; None without such."""
    tokens = checkpoint.multi_token()
    if tokens is None or checkpoint.auxiliary is None:
        return None
    tensors, metadata = checkpoint.read_beside(checkpoint.auxiliary, AUXILIARY_FORMAT)

    def of(part: str) -> dict[str, Tensor]:
        start = f"heads.{part}."
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    weights = of("auxiliary") or of("global")  # one for all tokens is the global token's too
    copies, classes, width = weights["weight"].shape
    heads = StackedLinear(copies, width, classes)
    heads.load_state_dict(weights)
    # a file that says nothing of how its tokens are fused is of the default
    kind, fuse_global = metadata.get("fusion", "mean"), metadata.get("fuse_global") == "true"
    fusion = Fusion(cast(FusionKind, kind), tokens.auxiliary.settings.count + fuse_global, classes)
    if fusion.linear is not None:
        fusion.load_state_dict(of("fusion"))
    return EnhancedClassifier(own, tokens, heads, fusion, fuse_global)
