"""MTE's auxiliary tokens: auxiliary CLS tokens enhanced by TEN, and adaptively pooled tokens (arXiv 2411.15787).

They exist during pre-training only; the encoder that is kept never depends on them. Each point that the paper leaves
open is a setting here, with the reason for its default.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.attention import Sight
from mte_bench.encoders.correlation import weighted_pooling
from mte_bench.encoders.encoder import Encoder, Tokens
from mte_bench.encoders.heads import Prototypes, StackedMLP
from mte_bench.encoders.token_learner import TokenLearner
from mte_bench.errors import UserError
from mte_bench.settings import Settings

Pooling = Literal["shared-pointwise", "independent", "scalar", "average", "max", "tokenlearner", "tokenlearner-v1.1"]


class AuxiliarySettings(Settings):
    """How many auxiliary tokens there are and how they are made."""

    auxiliary_cls: int = Field(4, ge=0)
    """Auxiliary CLS tokens. Four is where the paper's curve saturates (Fig. 15); a Swin has none."""
    pooled: int = Field(6, ge=0)
    """Pooled tokens. Six is where the paper's curve saturates (Fig. 15)."""
    ten: bool = True
    """Whether auxiliary CLS tokens pass TEN (Table 13)."""
    pooling: Pooling = "shared-pointwise"
    """How pooled tokens weigh the patches. ``shared-pointwise``: one 1x1 convolution, then a depth-wise one with a kernel
    per token and channel; the literal reading of "a point-wise convolution and an depth-wise convolution", and the only
    full-shape weighting that meets the printed 6.4 G. ``independent``: both convolutions per token. ``scalar``: per
    token a depth-wise convolution, then 1x1 to one map. ``average`` and ``max`` have no weights (Table 15).
    ``tokenlearner`` and ``tokenlearner-v1.1`` are a peer's (``token_learner.py``); no other ``pool_`` setting but
    ``pool_input`` applies to them."""
    kernel: int = Field(11, ge=1)
    """Side of the depth-wise kernel: 11, as in Conv2Former, which the paper cites (and "an" fits eleven)."""
    pool_activation: Literal["gelu", "none"] = "gelu"
    """Between the two convolutions; GELU is Conv2Former's order."""
    pool_normalise: Literal["none", "sigmoid", "softmax"] = "none"
    """Of the weights; the cited convolutional modulations multiply raw weights."""
    pool_bias: bool = True
    """Biases in the convolutions, which keep PyTorch's initialisation: no source says otherwise."""
    pool_input: Literal["normalised", "raw"] = "normalised"
    """Patch tokens after or before the final norm; the paper calls the transformer's outputs patch tokens."""
    pooled_norm: bool = True
    """LayerNorm on pooled tokens: at initialisation they are one to two orders of magnitude smaller than a
    normalised CLS token, so that a mean over projections would ignore them."""
    cls_std: float = Field(0.02, gt=0)
    """Standard deviation of the auxiliary CLS tokens' truncated normal initialisation, DINO's rule for CLS. They get no
    position embedding: a learned token absorbs it."""
    sight: Sight = "everything"
    """What auxiliary queries see besides the patches: section 3.4 forbids only the other direction."""
    cut_attention: bool = True
    """Global and patch queries never see auxiliary tokens; False joins them into the sequence (Table 16)."""
    ten_depth: int = Field(1, ge=1)
    """Layers of TEN: the paper says "a multi-head cross-attention layer"."""
    ten_heads: int | None = None
    """Attention heads of TEN; null takes the encoder's."""
    ten_mlp_ratio: float = Field(4.0, gt=0)
    """Width of TEN's MLP relative to the tokens'; 4 fits the printed 6.4 G."""
    ten_input: Literal["raw", "normalised"] = "raw"
    """Patch tokens that TEN attends to: before the final norm, TEN has norms of its own and so leaves the encoder's
    norm untouched by auxiliary statistics."""

    @property
    def count(self) -> int:
        """Auxiliary tokens of both kinds."""
        return self.auxiliary_cls + self.pooled


class TENLayer(nn.Module):
    """Cross-attention from auxiliary CLS tokens to patch tokens, then an MLP; pre-norm, with residuals."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.norm_query = nn.LayerNorm(width, eps=1e-6)
        self.norm_patches = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, aux: Tensor, patches: Tensor) -> Tensor:
        """``aux`` (``b a c``) enhanced by ``patches`` (``b n c``)."""
        b, a, c = aux.shape
        q = self.query(self.norm_query(aux)).view(b, a, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(self.norm_patches(patches)).view(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        aux = aux + self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, a, c))
        return aux + self.mlp(self.norm_mlp(aux))


class AdaptivePooling(nn.Module):
    """Pooled tokens: each weighs the patch map element-wise by weights that are computed from it, then averages."""

    def __init__(self, width: int, settings: AuxiliarySettings):
        super().__init__()
        self.settings = settings
        tokens, kernel, bias = settings.pooled, settings.kernel, settings.pool_bias
        maps = width * tokens

        def depthwise(inputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, maps, kernel, padding="same", groups=inputs, bias=bias)

        self.pointwise: nn.Conv2d | None = None
        self.depthwise: nn.Conv2d | None = None
        self.learner: TokenLearner | None = None
        self.by_weights = False
        """Whether to compute every weight, as the definition says, also where there is a quicker way to the same tokens."""
        if settings.pooling == "shared-pointwise":
            self.pointwise, self.depthwise = nn.Conv2d(width, width, 1, bias=bias), depthwise(width)
        elif settings.pooling == "independent":
            self.pointwise, self.depthwise = nn.Conv2d(width, maps, 1, bias=bias), depthwise(maps)
        elif settings.pooling == "scalar":
            self.depthwise, self.pointwise = depthwise(width), nn.Conv2d(maps, tokens, 1, groups=tokens, bias=bias)
        elif settings.pooling.startswith("tokenlearner"):
            self.learner = TokenLearner(width, tokens, "v1" if settings.pooling == "tokenlearner" else "v1.1")

    def _activate(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.settings.pool_activation == "gelu" else x

    def weights(self, feature_map: Tensor) -> Tensor:
        """Weights of ``feature_map`` (``b c h w``) as ``b t c h w``, or ``b t 1 h w`` where channels share them."""
        b, c, h, w = feature_map.shape
        tokens = self.settings.pooled
        if self.learner is not None:  # sums over positions; a mean follows here
            return self.learner.weights(feature_map.flatten(2).transpose(1, 2), (h, w)).view(b, tokens, 1, h, w) * (h * w)
        if self.pointwise is None or self.depthwise is None:
            return feature_map.new_ones(b, tokens, 1, h, w)
        if self.settings.pooling == "scalar":  # the grouped 1x1 wants one token's channels side by side
            maps = self.depthwise(feature_map).view(b, c, tokens, h, w).transpose(1, 2).flatten(1, 2)
            weights = self.pointwise(self._activate(maps)).unsqueeze(2)
        elif self.settings.pooling == "independent":
            weights = self.depthwise(self._activate(self.pointwise(feature_map))).view(b, tokens, c, h, w)
        else:
            weights = self.depthwise(self._activate(self.pointwise(feature_map))).view(b, c, tokens, h, w).transpose(1, 2)
        if self.settings.pool_normalise == "sigmoid":
            return weights.sigmoid()
        if self.settings.pool_normalise == "softmax":  # the mean that follows divides by the positions
            return weights.flatten(3).softmax(-1).view_as(weights) * (h * w)
        return weights

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """``patches`` (``b n c``) on a ``grid`` to pooled tokens ``b t c``."""
        settings = self.settings
        if settings.pooling == "max":
            return patches.amax(1, keepdim=True).expand(-1, settings.pooled, -1)
        if settings.pooling == "average":
            return patches.mean(1, keepdim=True).expand(-1, settings.pooled, -1)
        if self.learner is not None:
            return self.learner(patches, grid)
        feature_map = patches.transpose(1, 2).unflatten(2, grid)
        if settings.pooling == "shared-pointwise" and settings.pool_normalise == "none" and not self.by_weights:
            assert self.pointwise is not None and self.depthwise is not None
            modulation = self._activate(self.pointwise(feature_map))
            return weighted_pooling(feature_map, modulation, self.depthwise.weight, self.depthwise.bias)
        return (self.weights(feature_map) * feature_map.unsqueeze(1)).mean((3, 4))


class AuxiliaryTokens(nn.Module):
    """The auxiliary part of MTE: everything between the encoder's tokens and the projection heads."""

    def __init__(self, encoder: Encoder, settings: AuxiliarySettings):
        super().__init__()
        self.settings = settings
        width = encoder.width
        self.cls: nn.Parameter | None = None
        if settings.auxiliary_cls:
            self.cls = nn.Parameter(torch.empty(settings.auxiliary_cls, width))
            nn.init.trunc_normal_(self.cls, std=settings.cls_std)
            heads = settings.ten_heads or encoder.num_heads
            if width % heads:
                raise UserError(f"ten_heads {heads}: must divide the encoder's width, {width}")
            self.ten = nn.ModuleList(
                TENLayer(width, heads, settings.ten_mlp_ratio) for _ in range(settings.ten_depth if settings.ten else 0)
            )
            self.cls_norm = nn.LayerNorm(width, eps=1e-6)
            for module in self.ten.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        if settings.pooled:
            self.pool = AdaptivePooling(width, settings)
            self.pooled_norm = nn.LayerNorm(width, eps=1e-6) if settings.pooled_norm else nn.Identity()

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each auxiliary token, in their order."""
        cls = [f"CLS {index + 1}" for index in range(self.settings.auxiliary_cls)]
        return (*cls, *(f"pooled {index + 1}" for index in range(self.settings.pooled)))

    def encoder_tokens(self, encoder: Encoder, images: Tensor, **how: Any) -> Tokens:
        """The encoder's tokens of ``images``, with the auxiliary CLS tokens in the sequence; ``how`` goes to the encoder."""
        settings = self.settings
        return encoder(images, auxiliary=self.cls, sight=settings.sight, cut_attention=settings.cut_attention, **how)

    def pooled_from(self, tokens: Tokens) -> Tensor:
        """The patch tokens ``b n c`` that are pooled."""
        return tokens.patches if self.settings.pool_input == "normalised" else tokens.raw_patches

    def encode(self, encoder: Encoder, images: Tensor, **how: Any) -> tuple[Tokens, Tensor]:
        """Tokens of ``images`` and the auxiliary tokens ``b t c``, ready for their heads; ``how`` goes to the encoder."""
        settings = self.settings
        tokens = self.encoder_tokens(encoder, images, **how)
        parts = []
        if self.cls is not None:
            aux = tokens.auxiliary
            seen = tokens.raw_patches if settings.ten_input == "raw" else tokens.patches
            for layer in self.ten:
                aux = layer(aux, seen)
            parts.append(self.cls_norm(aux))
        if settings.pooled:
            parts.append(self.pooled_norm(self.pool(self.pooled_from(tokens), tokens.grid)))
        return tokens, torch.cat(parts, dim=1)


class MultiToken(nn.Module):
    """An encoder together with its auxiliary tokens, as pre-training saw it: for the analyses."""

    def __init__(self, encoder: Encoder, auxiliary: AuxiliaryTokens):
        super().__init__()
        self.encoder = encoder
        self.auxiliary = auxiliary

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each auxiliary token."""
        return self.auxiliary.names

    def forward(self, images: Tensor) -> tuple[Tokens, Tensor]:
        """The encoder's tokens and the auxiliary tokens ``b t c``."""
        return self.auxiliary.encode(self.encoder, images)

    def pooling_maps(self, images: Tensor) -> Tensor:
        """Weight maps of the pooled tokens, ``b t h w``: absolute weights, averaged over channels."""
        if not self.auxiliary.settings.pooled:
            raise UserError("pooling maps: this checkpoint was pre-trained without pooled tokens (pooled: 0)")
        if not self.encoder.keeps_patches:
            raise UserError("pooling maps: TokenLearner left no patches, so that the weights lie nowhere on the image")
        tokens = self.auxiliary.encoder_tokens(self.encoder, images)
        patches = self.auxiliary.pooled_from(tokens)
        return self.auxiliary.pool.weights(patches.transpose(1, 2).unflatten(2, tokens.grid)).abs().mean(2)


class TokenHeads(nn.Module):
    """The projection heads of the global and the auxiliary tokens, and the prototypes that they share (DINO, iBOT, HSSL)."""

    def __init__(self, of_global: StackedMLP, of_auxiliary: StackedMLP, prototypes: Prototypes):
        super().__init__()
        self.of_global, self.of_auxiliary, self.prototypes = of_global, of_auxiliary, prototypes

    def forward(self, global_token: Tensor, auxiliary: Tensor) -> Tensor:
        """The projections ``b 1+t d`` of the global token (``b c``) and of the auxiliary ones (``b t c``)."""
        b, t, _ = auxiliary.shape
        stacked = auxiliary.transpose(0, 1)
        independent = self.of_auxiliary.copies == t
        projected = self.of_auxiliary(stacked if independent else stacked.reshape(1, t * b, -1)).view(t, b, -1)
        return torch.cat([self.of_global(global_token.unsqueeze(0)), projected]).transpose(0, 1)

    def assign(self, projections: Tensor) -> Tensor:
        """Each image's prototype: ``b d`` to ``b``, the highest score."""
        return self.prototypes(projections).argmax(1)
