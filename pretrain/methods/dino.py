"""DINO: self-distillation with no labels (Caron et al. 2021). Constants: ``main_dino.py`` of facebookresearch/dino."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench import distributed
from mte_bench.encoders.heads import Prototypes, StackedMLP
from mte_bench.training.schedules import teacher_temperature
from pretrain.methods.base import Method, full, mean_over_rows


class DINO(Method):
    """Cross-entropy between the teacher's centred, sharpened prototype scores and the student's."""

    title = "DINO"

    class Settings(Method.Settings):
        """Defaults are the reference's "vanilla" run."""

        prototypes: int = Field(65536, gt=0)
        hidden: int = Field(2048, gt=0)
        bottleneck: int = Field(256, gt=0)
        batch_norm_in_head: bool = False
        """Batch normalisation in the MLP (the reference's ``use_bn_in_head``): small models and runs need it to leave
        the uniform start."""
        norm_last_layer: bool = True
        """Keep the prototypes' lengths at 1; false trains them."""
        student_temperature: float = Field(0.1, gt=0)
        teacher_temperature: float = Field(0.04, gt=0)
        """After the warm-up."""
        warmup_teacher_temperature: float = Field(0.04, gt=0)
        warmup_teacher_temperature_epochs: int = Field(0, ge=0)
        centre_momentum: float = Field(0.9, ge=0, lt=1)
        freeze_last_layer: int = Field(1, ge=0)
        """Epochs in which the prototypes do not train."""

    settings: Settings
    centre: Tensor

    def __init__(self, values: Settings, classes: int = 0):
        super().__init__(values)
        self.register_buffer("centre", torch.zeros(1, values.prototypes))

    def head(self, width: int, copies: int) -> nn.Module:
        """The three-layer MLP to the bottleneck."""
        s = self.settings
        return StackedMLP(copies, [width, s.hidden, s.hidden, s.bottleneck], batch_norm=s.batch_norm_in_head)

    @property
    def output_width(self) -> int:
        """The bottleneck."""
        return self.settings.bottleneck

    def tail(self, student: bool) -> nn.Module:
        """L2 normalisation and prototypes."""
        return Prototypes(self.settings.bottleneck, self.settings.prototypes, self.settings.norm_last_layer)

    def prediction(self, vectors: Tensor) -> Tensor:
        """Log-probabilities of the student's prototypes."""
        return F.log_softmax(full(vectors) / self.settings.student_temperature, dim=-1)

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """Probabilities of the teacher's prototypes: centred, then sharpened by this epoch's temperature."""
        return F.softmax((full(vectors) - self.centre) / self.temperature(epoch), dim=-1)

    def temperature(self, epoch: int) -> float:
        """The teacher's in this epoch."""
        s = self.settings
        return teacher_temperature(
            epoch, s.warmup_teacher_temperature, s.teacher_temperature, s.warmup_teacher_temperature_epochs
        )

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """Cross-entropy, averaged over the batch."""
        return -(target * prediction).sum(-1).mean()

    def update(self, vectors: list[Tensor], patches: list[Tensor]) -> None:
        """Move the centre towards the mean of the teacher's raw scores over views, batch and processes."""
        move_centre(self.centre, vectors, self.settings.centre_momentum)

    def without_gradient(self, branch: nn.Module, epoch: int) -> Iterable[nn.Parameter]:
        """The prototypes, for the first epochs."""
        if epoch >= self.settings.freeze_last_layer:
            return ()
        return (parameter for tail in branch.tails for parameter in tail.parameters())  # type: ignore[union-attr]


def move_centre(centre: Tensor, scores: list[Tensor], momentum: float) -> None:
    """Move ``centre`` (``1 k``) towards the mean of ``scores`` (each ``... k``), equal micro-batches, over all processes."""
    mean = torch.stack([mean_over_rows(part) for part in scores]).mean(0)
    centre.lerp_(distributed.mean(mean), 1 - momentum)
