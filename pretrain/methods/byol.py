"""BYOL: a student predicts its teacher's projection of another view (Grill et al. 2020). Constants: DeepMind's ``byol``."""

from typing import Any

from torch import Tensor

from mte_bench.encoders.heads import StackedBatchNorm
from pretrain.methods.base import full
from pretrain.methods.predicting import Predicting


class BYOL(Predicting):
    """Squared distance of the student's normalised prediction from the teacher's normalised projection."""

    title = "BYOL"

    class Settings(Predicting.Settings):
        """Defaults are the reference's for ImageNet; three layers of projection are a common choice for ViTs."""

        last_norm: bool = False
        """Batch normalisation without weights of what both MLPs give, as in MoCo v3, and of the targets: short runs of small
        models otherwise shrink to what is easiest to predict. (Targets are normalised already, unless they are a mean of
        several projections: that has large values where these agree and small ones where they differ.)"""

    settings: Settings

    def __init__(self, values: "BYOL.Settings", classes: int = 0):
        super().__init__(values)
        self.target_norm = StackedBatchNorm(1, values.output, affine=False) if values.last_norm else None

    def mlp(self, layers: int) -> dict[str, Any]:
        """No bias in the last layer."""
        return {"bias": [True] * (layers - 1) + [False], "last_norm": self.settings.last_norm}

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """Of unit length."""
        if self.target_norm is not None:
            vectors = self.target_norm(full(vectors).unsqueeze(0)).squeeze(0)
        return super().target(vectors, epoch)

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """Squared distance, averaged over the batch; twice, as the reference adds up both directions."""
        return 2 * (prediction - target).square().sum(-1).mean()
