"""Projection heads. Independent heads of several tokens are one module with stacked weights, computed as batched products."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

FusionKind = Literal["mean", "sum", "normalised-mean", "concat"]


class StackedLinear(nn.Module):
    """``copies`` independent linear layers; ``weight`` is ``copies out in``, ``bias`` ``copies out``."""

    def __init__(self, copies: int, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(copies, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``copies b in`` to ``copies b out``: each copy on its own rows."""
        if len(self.weight) == 1:
            return F.linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        # weights on the left: their gradient then comes out in their own layout and need not be transposed
        if self.bias is None:
            return torch.bmm(self.weight, x.transpose(1, 2)).transpose(1, 2)
        return torch.baddbmm(self.bias.unsqueeze(2), self.weight, x.transpose(1, 2)).transpose(1, 2)


class StackedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of ``copies`` independent heads in one pass: each copy has statistics of its own.

    Under several processes the statistics are those of all their rows, on any device; they need not have equally many
    (iBOT's masked patches). A single row or none changes no running statistics; alone, it passes by them.
    """

    def __init__(self, copies: int, channels: int, affine: bool = True):
        super().__init__(copies * channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """``copies b c`` to ``copies b c``."""
        copies, b, c = x.shape
        rows = x.transpose(0, 1).reshape(b, copies * c)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.training and several:
            rows = self._over_processes(rows)
        elif self.training and b < 2:
            rows = F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            rows = super().forward(rows)
        return rows.view(b, copies, c).transpose(0, 1)

    def _over_processes(self, rows: Tensor) -> Tensor:
        full = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        sums = all_reduce(torch.cat([full.sum(0), full.new_full((1,), len(rows))]))
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        centred = full - mean  # before squaring: where rows differ little, a difference of squares would be noise
        variance = all_reduce(centred.square().sum(0)) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            momentum = (self.momentum or 0.1) * (count > 1)
            for running, found in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1).clamp(min=1))):
                running.add_(momentum * (found - running))
        normed = centred * torch.rsqrt(variance + self.eps)
        return (normed * self.weight + self.bias if self.affine else normed).to(rows.dtype)


class StackedMLP(nn.Module):
    """``copies`` independent MLPs, by default with GELU between their layers, as DINO's head before its prototypes.

    ``batch_norm`` puts batch normalisation before each activation, ``last_norm`` one without weights after the last
    layer (MoCo v3). ``bias`` says for each layer whether it has one. Weights are drawn truncated normal with ``std`` or,
    if that is None, by nn.Linear's rule, biases then too.
    """

    def __init__(
        self,
        copies: int,
        sizes: Sequence[int],
        std: float | None = 0.02,
        batch_norm: bool = False,
        activation: Literal["gelu", "relu"] = "gelu",
        bias: bool | Sequence[bool] = True,
        last_norm: bool = False,
    ):
        super().__init__()
        self.copies = copies
        biases = [bias] * (len(sizes) - 1) if isinstance(bias, bool) else bias
        self.layers = nn.ModuleList(
            StackedLinear(copies, *pair, bias=own) for pair, own in zip(pairwise(sizes), biases, strict=True)
        )
        self.norms = nn.ModuleList(StackedBatchNorm(copies, size) if batch_norm else nn.Identity() for size in sizes[1:-1])
        self.last_norm = StackedBatchNorm(copies, sizes[-1], affine=False) if last_norm else nn.Identity()
        self.activation = F.gelu if activation == "gelu" else F.relu
        for layer in cast(list[StackedLinear], list(self.layers)):
            bound = layer.weight.shape[2] ** -0.5
            if std is not None:
                nn.init.trunc_normal_(layer.weight, std=std)
                continue
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound)

    @classmethod
    def like(cls, weights: Mapping[str, Tensor], activation: Literal["gelu", "relu"]) -> "StackedMLP":
        """The MLP whose ``state_dict`` is ``weights``; only the activation does not show in it."""
        count = sum(name.endswith(".weight") and name.startswith("layers.") for name in weights)
        shapes = [weights[f"layers.{index}.weight"].shape for index in range(count)]
        mlp = cls(
            shapes[0][0],
            [shapes[0][2], *(shape[1] for shape in shapes)],
            batch_norm="norms.0.weight" in weights,
            activation=activation,
            bias=[f"layers.{index}.bias" in weights for index in range(count)],
            last_norm="last_norm.running_mean" in weights,
        )
        mlp.load_state_dict(weights)
        return mlp

    def forward(self, x: Tensor) -> Tensor:
        """``copies b in`` to ``copies b out``."""
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = self.activation(norm(layer(x)))
        return self.last_norm(self.layers[-1](x))


class Predictor(StackedMLP):
    """A single MLP, ``b in`` to ``b out``; options are those of ``StackedMLP``."""

    def __init__(self, sizes: Sequence[int], **options: Any):
        super().__init__(1, sizes, **options)

    def forward(self, x: Tensor) -> Tensor:
        """``b in`` to ``b out``."""
        return super().forward(x.unsqueeze(0)).squeeze(0)


class Prototypes(nn.Module):
    """L2 normalisation, then a weight-normalised linear layer without bias. Source: DINO's ``last_layer``.

    ``frozen_norm`` keeps the prototypes' lengths (``weight_g``) at 1.
    """

    def __init__(self, inputs: int, prototypes: int, frozen_norm: bool):
        super().__init__()
        self.frozen_norm = frozen_norm
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not frozen_norm)
        self.weight_v = nn.Parameter(torch.empty(prototypes, inputs))
        # nn.Linear's rule, which the reference leaves in place: weight_norm sees what it drew
        nn.init.uniform_(self.weight_v, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """``b in`` to logits ``b prototypes``."""
        weight = F.normalize(self.weight_v, dim=1)
        if not self.frozen_norm:
            weight = weight * self.weight_g
        return F.linear(F.normalize(x, dim=-1), weight)


class Fusion(nn.Module):
    """The projections of all auxiliary tokens become one fused vector."""

    def __init__(self, kind: FusionKind, tokens: int, width: int):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(tokens * width, width) if kind == "concat" else None

    def forward(self, projections: Tensor) -> Tensor:
        """``t b d`` to ``b d``."""
        if self.linear is not None:
            return self.linear(projections.transpose(0, 1).flatten(1))
        if self.kind == "sum":
            return projections.sum(0)
        return (F.normalize(projections, dim=-1) if self.kind == "normalised-mean" else projections).mean(0)
