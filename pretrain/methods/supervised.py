"""Learning from labels, with DeiT's and MAE's means against overfitting (DeiT ``main.py``, timm ``Mixup``)."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mte_bench.encoders.heads import StackedLinear
from mte_bench.errors import UserError
from mte_bench.training.mixing import mix
from pretrain.methods.base import Method, full


class Supervised(Method):
    """Cross-entropy with the images' labels, smoothed and mixed."""

    title = "Supervised"
    labelled = True

    class Settings(Method.Settings):
        """Defaults are DeiT's, which MAE shares."""

        smoothing: float = Field(0.1, ge=0, lt=1)
        """Label smoothing."""
        mixup: float = Field(0.8, ge=0)
        """Both parameters of mixup's beta distribution; 0 for none."""
        cutmix: float = Field(1.0, ge=0)
        """Both parameters of CutMix's beta distribution; 0 for none."""
        cutmix_share: float = Field(0.5, ge=0, le=1)
        """Share of CutMix where there are both."""
        evaluate_ema: bool = False
        """Keep and evaluate the moving average of the weights, as MAE does, and not the weights themselves."""

    settings: Settings

    def __init__(self, values: Settings, classes: int = 0):
        super().__init__(values)
        if not classes:
            raise UserError("method supervised: the data has no labels; give a source with classes, or another method")
        self.classes = classes
        self.evaluates = "teacher" if values.evaluate_ema else "student"

    def head(self, width: int, copies: int) -> nn.Module:
        """Classifiers."""
        head = StackedLinear(copies, width, self.classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        return head

    @property
    def output_width(self) -> int:
        """Classes."""
        return self.classes

    def tail(self, student: bool) -> nn.Module:
        """Nothing: fused classifiers are the mean of their scores."""
        return nn.Identity()

    @property
    def _mixes(self) -> bool:
        return self.settings.mixup > 0 or self.settings.cutmix > 0

    def fits(self, batch_size: int, part: int) -> None:
        """Mixing pairs the images that pass at once, so there must be an even number."""
        if self._mixes and part % 2:
            spread = "" if part == batch_size else f" makes micro-batches of {part}"
            raise UserError(f"batch_size {batch_size}{spread}: mixup and CutMix pair images; make it even, or set both to 0")

    def labels(self, views: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mixed images, and the smoothed and mixed labels ``b classes``.

        One draw from ``seed`` holds for all of ``views``, a process's micro-batch, whose i-th image is mixed with the i-th
        from its end; so this, unlike all else, depends on how a batch is spread over processes.
        """
        s = self.settings
        mixed, targets = mix(
            views.flatten(0, 1),  # the one view of each image
            labels,
            self.classes,
            seed,
            mixup=s.mixup,
            cutmix=s.cutmix,
            cutmix_share=s.cutmix_share,
            smoothing=s.smoothing,
        )
        return mixed.view_as(views), targets

    def prediction(self, vectors: Tensor) -> Tensor:
        """Log-probabilities of the classes."""
        return F.log_softmax(full(vectors), dim=-1)

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """Probabilities of the classes: what the fused classifiers teach the global token (equation 9)."""
        return F.softmax(full(vectors), dim=-1)

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """Cross-entropy, averaged over the batch."""
        return -(target * prediction).sum(-1).mean()
