"""What a method states. It knows one student vector and one teacher vector; which vectors they are is the engine's business."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mte_bench import settings
from mte_bench.encoders.encoder import Encoder
from mte_bench.encoders.initial import dino_init
from pretrain.masks import Masking


class Method(nn.Module):
    """An objective between the views of an image, seen by a student and its EMA teacher.

    A branch (student or teacher) maps tokens to vectors by ``head`` and then ``tail``. The engine computes
    ``prediction`` of each student vector and ``target`` of each teacher vector, and averages ``pair`` over all pairs
    of different views. State that is not a network (centres, queues) lives in buffers and goes into checkpoints.
    What most methods do without has a default here that does nothing.
    """

    title: ClassVar[str]
    evaluates: Literal["teacher", "student"] = "teacher"
    """Which branch's encoder is exported and evaluated; may depend on the settings."""
    teacher_moves: ClassVar[Literal["before", "after"]] = "after"
    """Whether the teacher takes its EMA step before a step's targets are computed, or after the optimiser's step."""
    statistics_per_view: ClassVar[bool] = False
    """Whether each view passes heads and tail alone, so that batch normalisation sees one view at a time."""
    labelled: ClassVar[bool] = False
    """Whether the target is the images' labels: there is one view, and a teacher's vectors are never asked for."""

    class Settings(settings.Settings):
        """Settings of the method; a subclass of its own in each method."""

    def __init__(self, values: "Method.Settings", classes: int = 0):
        """``classes`` of the data (0 where there are none) is for methods that learn from labels."""
        super().__init__()
        self.settings = values

    def init_encoder(self, encoder: Encoder) -> None:
        """Initialise the student's encoder in place; DINO's rule unless a method has its own."""
        dino_init(encoder)

    def head(self, width: int, copies: int) -> nn.Module:
        """Projection: ``copies`` independent heads, ``copies b width`` to ``copies b d`` (``output_width`` is d)."""
        raise NotImplementedError

    @property
    def output_width(self) -> int:
        """Width of a projection, which fusing keeps."""
        raise NotImplementedError

    def tail(self, student: bool) -> nn.Module:
        """What follows a (fused) projection ``b d``: prototypes, a predictor, or nothing."""
        raise NotImplementedError

    def companion(self, encoder: Encoder, drop_path: float) -> nn.Module | None:
        """A network that makes a second vector ``b c`` of an image's ``Tokens``, which then leads the global one; or None.

        It has a head of its own; the teacher's is the target, the student's global and companion vectors both chase it.
        """
        return None

    @property
    def masking(self) -> Masking | None:
        """How patches of the student's global views are masked; None for not at all."""
        return None

    def patch_loss(self, student: Tensor, teacher: Tensor, masks: Tensor, epoch: int) -> Tensor:
        """The loss of one view's masked patches; only asked for with ``masking``.

        ``masks`` is ``b n``, ``student`` (``m k``) holds the vectors of the masked patches in its order, ``teacher``
        (``b n k``) those of all patches.
        """
        raise NotImplementedError

    def labels(self, views: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What the images ``views`` (``v b c h w``) become, and their targets; only asked for if ``labelled``."""
        raise NotImplementedError

    def fits(self, batch_size: int, part: int) -> None:
        """Raise a ``UserError`` for a global batch that the method cannot work with; ``part`` of its images pass at once."""

    def prediction(self, vectors: Tensor) -> Tensor:
        """What ``pair`` takes of a student's vectors ``b k``."""
        return vectors

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """What ``pair`` takes of a teacher's vectors ``b k``; called without gradient."""
        return vectors

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """The loss between a student's and a teacher's view, a scalar; ``view`` is the teacher's (equation 1)."""
        raise NotImplementedError

    def update(self, vectors: list[Tensor], patches: list[Tensor]) -> None:
        """Take in the teacher's vectors, after the optimiser's step.

        One ``b k`` per micro-batch, all views stacked; with ``masking`` also, for each micro-batch and view, the mean ``1 k``
        of the patches' (all of them would not fit into memory).
        """

    def without_gradient(self, branch: nn.Module, epoch: int) -> Iterable[nn.Parameter]:
        """The student's parameters that do not train in this epoch (0-based)."""
        return ()


def mean_over_rows(values: Tensor) -> Tensor:
    """``1 k``: the mean of ``values`` (``... k``) over all but the last dimension, in at least float32."""
    precision = torch.promote_types(values.dtype, torch.float32)
    return values.flatten(0, -2).mean(0, keepdim=True, dtype=precision)


def gathered(values: Tensor) -> tuple[Tensor, int]:
    """``values`` (``b k``) of all processes, stacked in the order of their ranks, and where this process's begin. No gradient."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values, 0
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts), torch.distributed.get_rank() * len(values)


def full(values: Tensor) -> Tensor:
    """``values`` in at least float32: probabilities and centres are not computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
