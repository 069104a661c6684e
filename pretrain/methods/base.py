"""What a method states. It knows one student vector and one teacher vector; which vectors they are is the engine's business."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mte_bench import settings
from mte_bench.encoders.encoder import Encoder, dino_init


class Method(nn.Module):
    """A self-supervised objective between the views of an image, seen by a student and its EMA teacher.

    A branch (student or teacher) maps tokens to vectors by ``head`` and then ``tail``. The engine computes
    ``prediction`` of each student vector and ``target`` of each teacher vector, and averages ``pair`` over all pairs
    of different views. State that is not a network (centres, queues) lives in buffers and goes into checkpoints.
    """

    title: ClassVar[str]
    evaluates: ClassVar[Literal["teacher", "student"]] = "teacher"
    """Which branch's encoder is exported and evaluated."""

    class Settings(settings.Settings):
        """Settings of the method; a subclass of its own in each method."""

    def __init__(self, values: "Method.Settings"):
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

    def prediction(self, vectors: Tensor) -> Tensor:
        """What ``pair`` takes of a student's vectors ``b k``."""
        return vectors

    def target(self, vectors: Tensor, epoch: int) -> Tensor:
        """What ``pair`` takes of a teacher's vectors ``b k``; called without gradient."""
        return vectors

    def pair(self, prediction: Tensor, target: Tensor, view: int) -> Tensor:
        """The loss between a student's and a teacher's view, a scalar; ``view`` is the teacher's (equation 1)."""
        raise NotImplementedError

    def update(self, vectors: list[Tensor]) -> None:
        """Take in the teacher's vectors (one ``b k`` per micro-batch, all views stacked), after the optimiser's step."""

    def without_gradient(self, branch: nn.Module, epoch: int) -> Iterable[nn.Parameter]:
        """The student's parameters that do not train in this epoch (0-based)."""
        return ()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average ``values`` over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


def full(values: Tensor) -> Tensor:
    """``values`` in at least float32: probabilities and centres are not computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
