"""iBOT: DINO, and the same between masked patches (Zhou et al. 2022). Constants: ``main_ibot.py`` of bytedance/ibot.

One prototype layer serves the global token and the patches, as in every published run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.masks import Masking
from pretrain.methods.base import full
from pretrain.methods.dino import DINO, move_centre


class IBOT(DINO):
    """DINO's loss, plus the cross-entropy of each masked patch with the teacher's view of it."""

    title = "iBOT"

    class Settings(DINO.Settings):
        """Defaults are the published runs'."""

        prototypes: int = 8192
        norm_last_layer: bool = False
        teacher_temperature: float = 0.07
        warmup_teacher_temperature_epochs: int = 30
        masking: Masking = Masking()
        patch_weight: float = 1.0
        """Weight of the patches' loss beside the global token's."""

    settings: Settings
    patch_centre: Tensor

    def __init__(self, values: Settings, classes: int = 0):
        super().__init__(values)
        self.register_buffer("patch_centre", torch.zeros(1, values.prototypes))

    @property
    def masking(self) -> Masking:
        """Half the views whole, the others without 10 to 50 % of their patches."""
        return self.settings.masking

    def patch_loss(self, student: Tensor, teacher: Tensor, masks: Tensor, epoch: int) -> Tensor:
        """Cross-entropy, averaged over each image's masked patches, then over all images (0 for one without any)."""
        s = self.settings
        temperature = self.temperature(max(0, epoch - s.masking.start_epoch))  # its own warm-up begins with the masks
        prediction = self.prediction(student)
        target = F.softmax((full(teacher[masks]) - self.patch_centre) / temperature, dim=-1)
        share = (1 / masks.sum(1).clamp(min=1).to(target.dtype)).unsqueeze(1).expand(masks.shape)[masks]
        return -((target * prediction).sum(-1) * share).sum() / len(masks) * s.patch_weight

    def update(self, vectors: list[Tensor], patches: list[Tensor]) -> None:
        """Move both centres."""
        super().update(vectors, patches)
        if patches:
            move_centre(self.patch_centre, patches, self.settings.centre_momentum)
