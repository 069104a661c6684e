"""BYOL: a student predicts its teacher's projection of another view (Grill et al. 2020). Constants: DeepMind's ``byol``."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.heads import Predictor, StackedMLP
from pretrain.methods.base import Method, full


class BYOL(Method):
    """Squared distance of the student's normalised prediction from the teacher's normalised projection."""

    title = "BYOL"
    evaluates = "student"
    statistics_per_view = True

    class Settings(Method.Settings):
        """Defaults are the reference's for ImageNet."""

        hidden: int = Field(4096, gt=0)
        output: int = Field(256, gt=0)
        layers: int = Field(2, ge=1)
        """Of the projection; three is a common choice for ViTs."""
        predictor_layers: int = Field(2, ge=1)
        last_norm: bool = False
        """Batch normalisation without weights of what both MLPs give, as in MoCo v3: short runs of small models otherwise
        shrink to what is easiest to predict."""

    settings: Settings

    def head(self, width: int, copies: int) -> nn.Module:
        """An MLP with batch normalisation and ReLU, without bias in its last layer."""
        s = self.settings
        sizes = [width, *[s.hidden] * (s.layers - 1), s.output]
        bias = [True] * (s.layers - 1) + [False]
        return StackedMLP(copies, sizes, std=None, batch_norm=True, activation="relu", bias=bias, last_norm=s.last_norm)

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
        bias = [True] * (s.predictor_layers - 1) + [False]
        return Predictor(sizes, std=None, batch_norm=True, activation="relu", bias=bias, last_norm=s.last_norm)

    def prediction(self, vectors: Tensor) -> Tensor:
        """Of unit length."""
        return F.normalize(full(vectors), dim=-1)

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """Of unit length."""
        return F.normalize(full(vectors), dim=-1)

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """Squared distance, averaged over the batch; twice, as the reference adds up both directions."""
        return 2 * (prediction - target).square().sum(-1).mean()
