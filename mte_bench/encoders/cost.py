"""What a network costs: multiply-accumulates (MACs) and parameters, counted without computing anything."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Macs(NamedTuple):
    """Multiply-accumulates of one call."""

    total: int
    modules: dict[str, int]
    """By module path below the called module (``model.blocks.0.mlp``); a module's count contains its children's."""


def count_macs(function: Callable[..., Any], *shapes: Sequence[int]) -> Macs:
    """MACs of ``function`` called with one tensor of each of ``shapes``, e.g. ``count_macs(encoder, (1, 3, 224, 224))``.

    Counted are matrix products, convolutions (a padded border counts in full) and both products of attention, a masked
    position like any other; norms, activations and other element-wise work are not. If ``function`` calls ``backward``,
    that is counted too. Nothing is computed and no weight is copied: a module is called with stand-ins on the meta
    device for its weights; what another callable closes over must lie on the meta device already
    (``with torch.device("meta"):``).
    """
    inputs = [torch.empty(tuple(shape), device="meta") for shape in shapes]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # as plain products, whatever fused kernel a device would choose
        if isinstance(function, nn.Module):
            state = {name: tensor.to("meta") for name, tensor in [*function.named_parameters(), *function.named_buffers()]}
            functional_call(function, state, tuple(inputs))
        else:
            function(*inputs)
    root = f"{type(function).__name__}."
    by_module = {
        name.removeprefix(root): sum(operators.values()) // 2  # the counter's convention: two operations each
        for name, operators in counter.get_flop_counts().items()
        if name.startswith(root) or not isinstance(function, nn.Module)
    }
    by_module.pop("Global", None)
    return Macs(counter.get_total_flops() // 2, by_module)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
