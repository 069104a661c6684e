"""MoCo v3: contrast within the batch (Chen et al. 2021). Constants: ``facebookresearch/moco-v3``."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.encoder import Encoder
from mte_bench.encoders.heads import Predictor, StackedMLP
from mte_bench.errors import UserError
from pretrain.methods.base import Method, full, gathered


class MoCoV3(Method):
    """Cross-entropy of finding an image's key, which the teacher makes of its other view, among those of the batch."""

    title = "MoCo v3"
    evaluates = "student"
    teacher_moves = "before"
    statistics_per_view = True

    class Settings(Method.Settings):
        """Defaults are the reference's for ViTs."""

        hidden: int = Field(4096, gt=0)
        output: int = Field(256, gt=0)
        layers: int = Field(3, ge=1)
        """Of the projection."""
        predictor_layers: int = Field(2, ge=1)
        temperature: float = Field(0.2, gt=0)
        freeze_patch_embedding: bool = True
        """Leave the patch convolution as it was drawn: training it makes ViTs unstable (section 4 of the paper)."""

    settings: Settings

    def init_encoder(self, encoder: Encoder) -> None:
        """Xavier's rule for everything linear, sines and cosines for positions; see ``moco_init``."""
        moco_init(encoder)
        if self.settings.freeze_patch_embedding:
            encoder.model.patch_embed.proj.requires_grad_(False)  # type: ignore[union-attr]

    def head(self, width: int, copies: int) -> nn.Module:
        """An MLP without biases, each layer with batch normalisation, the last one's without weights."""
        s = self.settings
        sizes = [width, *[s.hidden] * (s.layers - 1), s.output]
        return StackedMLP(copies, sizes, std=None, batch_norm=True, activation="relu", bias=False, last_norm=True)

    @property
    def output_width(self) -> int:
        """The projection's."""
        return self.settings.output

    def tail(self, student: bool) -> nn.Module:
        """The student's predictor, an MLP like the projection's; the teacher has none."""
        if not student:
            return nn.Identity()
        s = self.settings
        sizes = [s.output, *[s.hidden] * (s.predictor_layers - 1), s.output]
        return Predictor(sizes, std=None, batch_norm=True, activation="relu", bias=False, last_norm=True)

    def prediction(self, vectors: Tensor) -> Tensor:
        """The query, of unit length."""
        return F.normalize(full(vectors), dim=-1)

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """The key, of unit length."""
        return F.normalize(full(vectors), dim=-1)

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
