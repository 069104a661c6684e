"""Where and in what precision the computing is done."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from mte_bench.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` (CUDA, else MPS, else CPU) or a torch device string; raises ``UserError`` if it is not there.

    ``cuda`` under ``torchrun`` is each process's own GPU; raises ``UserError`` for a single one where there are several.
    """
    refuse_shared(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error
    return device


class Place(NamedTuple):
    """Which of the processes that ``torchrun`` started this one is; alone without it."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    local_processes: int = 1
    """Those on this machine."""

    @classmethod
    def of_this_process(cls) -> "Place":
        """As ``torchrun`` says in the environment."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, cls(), strict=True)))

    def own(self, device: torch.device) -> torch.device:
        """Of several GPUs, this process's share; any other device as it is."""
        if device.type != "cuda" or self.local_processes == 1:
            return device
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())


ALONE = Place()


def refuse_shared(name: str) -> None:
    """Raise ``UserError`` if the device ``name`` puts several processes of this machine on one GPU."""
    processes = Place.of_this_process().local_processes
    if name.startswith("cuda:") and processes > 1:
        raise UserError(f"--device {name}: one GPU for {processes} processes; leave --device at cuda, and each takes its own")


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device computes it natively (CUDA compute capability 8 and later), else float32."""
    if name == "auto":
        native = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if native else torch.float32
    if name not in PRECISIONS:
        raise UserError(f"precision '{name}': one of auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for ``dtype`` below float32, otherwise nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given: before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> bool:
    """Let ``peak_memory`` begin anew; returns whether the system could."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but still kept by the allocator, would count
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: of the device if it has its own, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux: unlike getrusage's, not what an earlier program had in this process's place
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
