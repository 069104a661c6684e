"""What BYOL, MoCo v3 and MoBY share: a projection, a student that predicts its teacher's, both of unit length."""

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.heads import Predictor, StackedMLP
from pretrain.methods.base import Method, full


class Predicting(Method):
    """Heads that are MLPs with batch normalisation and ReLU, the student's followed by a predictor of the same kind."""

    evaluates = "student"
    statistics_per_view = True

    class Settings(Method.Settings):
        """Defaults are the widths that all three references have."""

        hidden: int = Field(4096, gt=0)
        output: int = Field(256, gt=0)
        layers: int = Field(2, ge=1)
        """Of the projection."""
        predictor_layers: int = Field(2, ge=1)

    settings: Settings

    def mlp(self, layers: int) -> dict[str, Any]:
        """In what an MLP of so many layers differs from others: ``bias`` and ``last_norm`` of ``StackedMLP``."""
        return {}

    def head(self, width: int, copies: int) -> nn.Module:
        """The projection."""
        s = self.settings
        sizes = [width, *[s.hidden] * (s.layers - 1), s.output]
        return StackedMLP(copies, sizes, std=None, batch_norm=True, activation="relu", **self.mlp(s.layers))

    @property
    def output_width(self) -> int:
        """The projection's."""
        return self.settings.output

    def tail(self, student: bool) -> nn.Module:
        """The student's predictor; the teacher has none."""
        if not student:
            return nn.Identity()
        s = self.settings
        sizes = [s.output, *[s.hidden] * (s.predictor_layers - 1), s.output]
        return Predictor(sizes, std=None, batch_norm=True, activation="relu", **self.mlp(s.predictor_layers))

    def prediction(self, vectors: Tensor) -> Tensor:
        """Of unit length."""
        return F.normalize(full(vectors), dim=-1)

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """Of unit length."""
        return F.normalize(full(vectors), dim=-1)
