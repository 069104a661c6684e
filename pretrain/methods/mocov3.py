"""MoCo v3: contrast within the batch (Chen et al. 2021). Constants: ``facebookresearch/moco-v3``."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.encoder import Encoder
from mte_bench.errors import UserError
from pretrain.methods.base import gathered
from pretrain.methods.predicting import Predicting


class MoCoV3(Predicting):
    """Cross-entropy of finding an image's key, which the teacher makes of its other view, among those of the batch."""

    title = "MoCo v3"
    teacher_moves = "before"

    class Settings(Predicting.Settings):
        """Defaults are the reference's for ViTs."""

        layers: int = Field(3, ge=1)
        temperature: float = Field(0.2, gt=0)
        freeze_patch_embedding: bool = True
        """Leave the patch convolution as it was drawn: training it makes ViTs unstable (section 4 of the paper)."""

    settings: Settings

    def init_encoder(self, encoder: Encoder) -> None:
        """Xavier's rule for everything linear, sines and cosines for positions; see ``moco_init``."""
        moco_init(encoder)
        if self.settings.freeze_patch_embedding:
            encoder.model.patch_embed.proj.requires_grad_(False)  # type: ignore[union-attr]

    def mlp(self, layers: int) -> dict[str, Any]:
        """No biases, and batch normalisation after the last layer, too, that one without weights."""
        return {"bias": False, "last_norm": True}

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """Cross-entropy over the keys of all processes (of this micro-batch) times twice the temperature.

        Twice, as the reference adds up both directions.
        """
        keys, first = gathered(target)
        own = torch.arange(first, first + len(prediction), device=keys.device)
        temperature = self.settings.temperature
        return 2 * (2 * temperature) * F.cross_entropy(prediction @ keys.T / temperature, own)


def moco_init(encoder: Encoder) -> None:
    """Draw the weights as MoCo v3 does: Linear layers and the patch convolution by Xavier's uniform rule, where queries,
    keys and values are matrices of their own; biases 0; CLS token with std 1e-6; positions fixed (``sine_cosine``).

    What an architecture does not have is left out, what only others have (a Swin's relative positions) stays as built.
    Raises ``UserError`` for a ViT whose width is no multiple of 4.
    """
    model = encoder.model
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for matrix in module.weight.detach().chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(matrix)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches: nn.Conv2d = model.patch_embed.proj  # type: ignore[union-attr, assignment]
    nn.init.xavier_uniform_(patches.weight.detach().flatten(1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for name in ("cls_token", "reg_token", "dist_token"):
        if isinstance(token := getattr(model, name, None), nn.Parameter):
            nn.init.normal_(token, std=1e-6)
    if isinstance(positions := getattr(model, "pos_embed", None), nn.Parameter):
        rows, columns = model.patch_embed.grid_size  # type: ignore[union-attr, misc]
        table = sine_cosine(rows, columns, positions.shape[-1])
        with torch.no_grad():
            positions.zero_()[:, positions.shape[1] - rows * columns :] = table.to(positions)
        positions.requires_grad_(False)


def sine_cosine(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Tensor:
    """Positions ``rows*columns width``: sine and cosine of the row, then of the column, at ``width / 4`` frequencies."""
    if width % 4:
        raise UserError(f"arch_options.embed_dim {width}: must be a multiple of 4 for MoCo v3's table of positions")
    frequencies = temperature ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (row, column)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
