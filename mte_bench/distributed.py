"""One process, or several under ``torchrun``: the same command and the same numbers up to reduction order."""

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mte_bench.device import Place, refuse_shared

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that works alone, such as the first at k-NN: NCCL's ten minutes end before ImageNet's."""

V = TypeVar("V")


def start(device: str) -> tuple[int, int]:
    """Join the process group if ``torchrun`` started this process; returns (rank, processes).

    Raises ``UserError`` if ``device`` is one GPU for several processes.
    """
    refuse_shared(device)
    here = Place.of_this_process()
    if here.processes > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available() and device != "cpu"
        if cuda:
            torch.cuda.set_device(here.local_rank)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return place()


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def place() -> tuple[int, int]:
    """(rank, processes) of this process in the group that ``start`` joined, (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum of ``values`` over the processes, on ``device`` (the group's kind); ``values`` themselves without a group."""
    if not dist.is_initialized():
        return values
    values = values.to(device)
    dist.all_reduce(values)
    return values


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of ``values``, on the group's kind of device, over the processes, in place."""
    return summed(values, values.device).div_(place()[1])


def spread(model: nn.Module, **options: Any) -> nn.Module:
    """``model`` as it shares its gradients with the other processes' (``options`` are DDP's); itself without a group.

    Buffers stay each process's own: those there are come out of statistics that are shared already.
    """
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, **options) if dist.is_initialized() else model


def gathered(own: dict[int, V]) -> dict[int, V]:
    """The entries of all processes together; each must have keys of its own."""
    if not dist.is_initialized():
        return own
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {key: value for part in everyone for key, value in part.items()}
