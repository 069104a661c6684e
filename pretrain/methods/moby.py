"""MoBY: MoCo's contrast with BYOL's asymmetry, for Swin (Xie et al. 2021). Constants: ``SwinTransformer/Transformer-SSL``."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.heads import Predictor, StackedMLP
from mte_bench.errors import UserError
from pretrain.methods.base import Method, full, gathered


class MoBY(Method):
    """Cross-entropy of finding an image's key, which the teacher makes of its other view, among those of earlier images."""

    title = "MoBY"
    evaluates = "student"
    teacher_moves = "before"
    statistics_per_view = True

    class Settings(Method.Settings):
        """Defaults are the reference's."""

        hidden: int = Field(4096, gt=0)
        output: int = Field(256, gt=0)
        layers: int = Field(2, ge=1)
        """Of the projection."""
        predictor_layers: int = Field(2, ge=1)
        temperature: float = Field(0.2, gt=0)
        queue: int = Field(4096, gt=0)
        """Keys that each of the two views' queues holds; a multiple of the batch size."""

    settings: Settings
    queues: Tensor
    oldest: Tensor

    def __init__(self, values: Settings, classes: int = 0):
        super().__init__(values)
        self.register_buffer("queues", F.normalize(torch.randn(2, values.queue, values.output), dim=-1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def head(self, width: int, copies: int) -> nn.Module:
        """An MLP with batch normalisation and ReLU."""
        s = self.settings
        sizes = [width, *[s.hidden] * (s.layers - 1), s.output]
        return StackedMLP(copies, sizes, std=None, batch_norm=True, activation="relu")

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
        return Predictor(sizes, std=None, batch_norm=True, activation="relu")

    def fits(self, batch_size: int, part: int) -> None:
        """A queue is replaced batch by batch."""
        if self.settings.queue % batch_size:
            raise UserError(f"batch_size {batch_size}: must divide method_settings.queue, {self.settings.queue}; change either")

    def prediction(self, vectors: Tensor) -> Tensor:
        """The query, of unit length."""
        return F.normalize(full(vectors), dim=-1)

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """The key, of unit length."""
        return F.normalize(full(vectors), dim=-1)

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """Cross-entropy over the key and the queue of its view; twice, as the reference adds up both directions."""
        own = (prediction * target).sum(-1, keepdim=True)
        others = prediction @ self.queues[view].T
        scores = torch.cat([own, others], dim=1) / self.settings.temperature
        return 2 * F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))

    def update(self, vectors: list[Tensor], patches: list[Tensor]) -> None:
        """Replace each queue's oldest keys by its view's, of all processes."""
        for micro_batch in vectors:
            keys = torch.stack([gathered(self.target(view, 0))[0] for view in micro_batch.chunk(2)])
            rows = (self.oldest + torch.arange(keys.shape[1], device=keys.device)) % self.settings.queue
            self.queues[:, rows] = keys.to(self.queues)
            self.oldest.add_(keys.shape[1]).remainder_(self.settings.queue)
