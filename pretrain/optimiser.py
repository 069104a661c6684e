"""AdamW as DINO uses it, and the EMA of the teacher, all by multi-tensor operations."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mte_bench.encoders.heads import StackedLinear
from mte_bench.training.schedules import cosine, warmup_cosine
from pretrain.recipe import Optimiser


def build_optimiser(student: nn.Module, settings: Optimiser, device: torch.device) -> torch.optim.AdamW:
    """AdamW with two groups: weights (``decayed``), and biases and 1-D parameters, which have no weight decay.

    Stacked biases of independent heads are biases too, whatever their number of dimensions.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (plain if _undecayed(name, parameter, settings.decay) else decayed).append(parameter)
    groups = [{"params": decayed, "decayed": True}, {"params": plain, "weight_decay": 0.0, "decayed": False}]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=device.type in ("cpu", "cuda"))


def _undecayed(name: str, parameter: nn.Parameter, decay: str) -> bool:
    if decay == "all":
        return False
    token = decay == "layers" and name.endswith(("_token", "pos_embed", "auxiliary.cls"))
    return token or parameter.ndim == 1 or name.endswith(("bias", "relative_position_bias_table"))


def learning_rate(step: int, total: int, steps_per_epoch: int, settings: Optimiser, batch_size: int) -> float:
    """The rate of ``step`` in a run of ``total`` steps."""
    scale = batch_size / settings.lr_per
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    peak, end = settings.lr * scale, settings.min_lr * (scale if settings.min_lr_scaled else 1)
    if settings.warmup_cuts:
        start = settings.warmup_from * scale
        return start + step * (peak - start) / warmup if step < warmup else cosine(step, total, peak, end)
    return warmup_cosine(step, total, peak, end, warmup, settings.warmup_from * scale)


def set_rates(optimiser: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimiser.param_groups:
        group["lr"] = lr
        if group["decayed"]:
            group["weight_decay"] = weight_decay


def clip_per_tensor(modules: nn.Module, limit: float) -> Tensor:
    """Scale each parameter tensor's gradient to an L2 norm of at most ``limit``, in place; returns the largest norm.

    Each head of a stack counts as the tensor that it would be alone. Source: DINO's ``clip_gradients``, with its 1e-6.
    """
    gradients: list[Tensor] = []
    for module in modules.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.grad is not None:
                gradients.extend(parameter.grad.unbind(0) if isinstance(module, StackedLinear) else [parameter.grad])
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind(0)))
    return norms.max()


def clip_whole(modules: nn.Module, limit: float) -> Tensor:
    """Scale all gradients to a joint L2 norm of at most ``limit``, in place; returns that norm."""
    return nn.utils.clip_grad_norm_([p for p in modules.parameters() if p.grad is not None], limit)


class EMA:
    """Moves a teacher's parameters towards the student's of the same names."""

    def __init__(self, teacher: nn.Module, student: nn.Module):
        students = dict(student.named_parameters())
        pairs = [(p, students[name]) for name, p in teacher.named_parameters() if name in students]
        self.teacher: list[Tensor] = [teacher_parameter for teacher_parameter, _ in pairs]
        self.student: list[Tensor] = [student_parameter for _, student_parameter in pairs]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """``teacher = momentum * teacher + (1 - momentum) * student``."""
        torch._foreach_lerp_(self.teacher, self.student, 1 - momentum)


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leave ``parameters`` out of the coming step, as if they were frozen."""
    for parameter in parameters:
        parameter.grad = None
