"""TokenLearner: a few learned tokens in place of a patch map, v1 and v1.1, and TokenFuser (arXiv 2106.11297).

Each learned token is a sum of the patch tokens, weighted by a map over the positions that is computed from them. Inside
a ViT, few tokens make the blocks that follow cheap; at its end, they are a peer of MTE's adaptively pooled tokens. What
the paper leaves open follows its authors' code (``google-research/scenic``, ``token_learner``); its dropout, 0 there by
default, and two biases that what follows cancels are left out.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.settings import Settings

Version = Literal["v1", "v1.1"]
HIDDEN = 64
"""Width of the MLPs that compute maps."""


class TokenLearnerSettings(Settings):
    """Learned tokens inside a ViT. The CLS token stays beside them."""

    tokens: int = Field(8, ge=1)
    """Learned tokens; the paper takes 8 or 16."""
    after: int = Field(6, ge=1)
    """Blocks that still see all patches. In the middle, about half of the compute is saved; before the last quarter, a
    fourth of it."""
    version: Version = "v1.1"
    """v1.1 is the one that its authors recommend."""
    fuser: bool = False
    """Whether TokenFuser gives each later block's result back to all patches, which the next block's learner then reads.
    Without it, the learned tokens take the patches' place from there to the end."""

    @property
    def title(self) -> str:
        """As tables print it: ``8 after 6``."""
        extras = [self.version] * (self.version != "v1.1") + ["fuser"] * self.fuser
        return " ".join([f"{self.tokens} after {self.after}", *extras])


class TokenLearner(nn.Module):
    """Learned tokens from a patch map: ``tokens`` weight maps, and for each the weighted sum of the patches.

    v1: LayerNorm, four 3x3 convolutions without bias, GELU between them, sigmoid; v1.1: LayerNorm, an MLP, softmax over
    the positions. The patches that are summed are those before the LayerNorm.
    """

    def __init__(self, width: int, tokens: int, version: Version):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.version = version
        if version == "v1":
            inputs = [width, tokens, tokens, tokens]
            convolutions = [nn.Conv2d(size, tokens, 3, padding=1, bias=False) for size in inputs]
            for size, convolution in zip(inputs, convolutions, strict=True):
                nn.init.normal_(convolution.weight, std=(9 * size) ** -0.5)  # as in the source, LeCun's rule
            self.convolutions = nn.ModuleList(convolutions)
        else:
            self.mlp = _mlp(width, tokens, bias=False)  # the softmax would cancel it

    def weights(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Weight maps ``b s n`` of ``patches`` (``b n c``) on ``grid``: each in (0, 1) for v1, summing to 1 for v1.1."""
        normed = self.norm(patches)
        if self.version == "v1.1":
            return self.mlp(normed).transpose(1, 2).softmax(-1)
        maps = normed.transpose(1, 2).unflatten(2, grid)
        for index, convolution in enumerate(self.convolutions):
            maps = convolution(F.gelu(maps) if index else maps)
        return maps.flatten(2).sigmoid()

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """``patches`` (``b n c``) on ``grid`` to learned tokens ``b s c``."""
        return self.weights(patches, grid) @ patches


class TokenFuser(nn.Module):
    """What learned tokens, after a block, give back to each patch: the tokens, mixed, each through the patch's own gate.

    The mixing starts at zero, so that a fresh one adds nothing.
    """

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.norm_tokens = nn.LayerNorm(width, eps=1e-6)
        self.mix = nn.Linear(tokens, tokens, bias=False)  # the LayerNorm would cancel it
        self.norm_mixed = nn.LayerNorm(width, eps=1e-6)
        self.norm_patches = nn.LayerNorm(width, eps=1e-6)
        self.gates = _mlp(width, tokens)
        nn.init.zeros_(self.mix.weight)

    def forward(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """What is added to ``patches`` (``b n c``, those that the ``tokens``, ``b s c``, were learned from)."""
        mixed = self.norm_mixed(self.mix(self.norm_tokens(tokens).transpose(1, 2)).transpose(1, 2))
        return self.gates(self.norm_patches(patches)).sigmoid() @ mixed


class TokenLearning(nn.Module):
    """The learners of a ViT, and the fusers if there are any, by the index of the block that they come before and after."""

    def __init__(self, width: int, depth: int, settings: TokenLearnerSettings):
        super().__init__()
        self.tokens = settings.tokens
        self.has_fusers = settings.fuser
        at = [str(index) for index in (range(settings.after, depth) if settings.fuser else (settings.after,))]
        self.learners = nn.ModuleDict({index: TokenLearner(width, settings.tokens, settings.version) for index in at})
        self.fusers = nn.ModuleDict({index: TokenFuser(width, settings.tokens) for index in at if settings.fuser})

    def before(self, block: int) -> bool:
        """Whether tokens are learned just before ``block``."""
        return str(block) in self.learners

    def learn(self, block: int, x: Tensor, prefix: int, length: int, grid: tuple[int, int]) -> Tensor:
        """The sequence ``x`` (``b n c``) with learned tokens in place of its patches, which are ``x[:, prefix:length]``."""
        learned = self.learners[str(block)](x[:, prefix:length], grid)
        return torch.cat([x[:, :prefix], learned, x[:, length:]], dim=1)

    def fuse(self, block: int, x: Tensor, prefix: int, patches: Tensor) -> Tensor:
        """The sequence ``x`` after ``block`` with ``patches``, enriched, in place of the learned tokens."""
        end = prefix + self.tokens
        enriched = patches + self.fusers[str(block)](x[:, prefix:end], patches)
        return torch.cat([x[:, :prefix], enriched, x[:, end:]], dim=1)


def _mlp(width: int, tokens: int, bias: bool = True) -> nn.Sequential:
    """``bias`` is the last layer's. Weights are drawn by Xavier's rule, as in the source: with std 0.02 all maps would
    start even, and all tokens alike."""
    mlp = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, tokens, bias=bias))
    for parameter in mlp.parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    return mlp
