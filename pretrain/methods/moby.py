"""MoBY: MoCo's contrast with BYOL's asymmetry, for Swin (Xie et al. 2021). Constants: ``SwinTransformer/Transformer-SSL``."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mte_bench.errors import UserError
from pretrain.methods.base import gathered
from pretrain.methods.predicting import Predicting


class MoBY(Predicting):
    """Cross-entropy of finding an image's key, which the teacher makes of its other view, among those of earlier images."""

    title = "MoBY"
    teacher_moves = "before"

    class Settings(Predicting.Settings):
        """Defaults are the reference's."""

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

    def fits(self, batch_size: int, part: int) -> None:
        """A queue is replaced batch by batch."""
        if self.settings.queue % batch_size:
            raise UserError(f"batch_size {batch_size}: must divide method_settings.queue, {self.settings.queue}; change either")

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
