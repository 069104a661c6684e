"""HSSL: iBOT whose global target comes from a small network of another architecture (Li et al. 2023, arXiv 2310.05108).

Constants: the authors' code for a ViT base and a ConvNeXt companion (``vision_transformer_hssl.py``, ``main_hssl.py``).
"""

from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.encoder import Encoder, SharedDropPath, Tokens
from pretrain.methods.ibot import IBOT


class HSSL(IBOT):
    """iBOT whose global token and whose companion network's vector both chase the teacher's companion vector."""

    title = "HSSL"

    class Settings(IBOT.Settings):
        """Defaults are the published run's."""

        companion_blocks: int = Field(3, gt=0)
        companion_kernel: int = Field(7, ge=1)
        """Side of the depth-wise kernels; odd, so that the map keeps its size."""

    settings: Settings

    def companion(self, encoder: Encoder, drop_path: float) -> nn.Module:
        """ConvNeXt blocks on the encoder's patch map; the ramp of stochastic depth then runs over both networks' blocks."""
        s = self.settings
        depth = len(encoder.block_list)
        last = depth + s.companion_blocks - 1
        for path in encoder.drop_paths:  # timm's ramp ends at the encoder's last block
            path.rate *= (depth - 1) / last
        rates = [drop_path * (depth + index) / last for index in range(s.companion_blocks)]
        return Companion(encoder.width, rates, s.companion_kernel)


class Companion(nn.Module):
    """ConvNeXt blocks on an encoder's patch tokens before its final norm, averaged over the map, then a norm of its own.

    ``rates`` are the blocks' rates of stochastic depth. The first block has no shortcut (and so nothing to drop): the
    authors want the two networks' features to differ.
    """

    def __init__(self, width: int, rates: list[float], kernel: int):
        super().__init__()
        self.blocks = nn.ModuleList(ConvNeXtBlock(width, kernel, rate, shortcut=index > 0) for index, rate in enumerate(rates))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tokens) -> Tensor:
        """``Tokens`` of ``b`` images to their vectors ``b c``."""
        x = tokens.raw_patches.transpose(1, 2).unflatten(2, tokens.grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """Depth-wise convolution, norm and an MLP on each position; no layer scale. Linear weights truncated normal, std 0.02."""

    def __init__(self, width: int, kernel: int, rate: float, shortcut: bool):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding="same", groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.shortcut = shortcut
        self.drop_path = SharedDropPath(rate) if shortcut and rate else nn.Identity()
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``b c h w`` to the same shape."""
        y: Tensor = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self.drop_path(y) if self.shortcut else y
