"""A CUDA device for machines without one: tensors that say they are on it and are computed on the CPU.

As on a real one, an operation on tensors of both devices, or with a generator of the other, is an error, and autocast
takes effect. What is not seen: kernels, streams, memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
UNDERNEATH = torch.device("lazy", 0)
"""What autograd takes the device for: it would ask CUDA for streams."""
aten = torch.ops.aten
MOVES = {
    aten._to_copy.default,
    aten.copy_.default,
    aten._foreach_copy_.default,
    aten._has_compatible_shallow_copy_type.default,
}
TAKES_CPU_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnCUDA(torch.Tensor):
    """``inner``, a tensor on the CPU, as if it were on ``CUDA``."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnCUDA":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=UNDERNEATH,
        )
        tensor.inner = inner
        return tensor

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:  # type: ignore[override]
        return OnCUDA(torch.tensor(data, dtype=dtype or self.dtype, device="cpu"))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.inner.tolist()

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def _without_lists(index: Any) -> Any:
    """``index`` with tensors for lists, which torch would make out of sight."""
    if isinstance(index, tuple):
        return tuple(_without_lists(one) for one in index)
    return torch.tensor(index, device="cpu") if isinstance(index, list) else index


class _Device(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # with it, torch does not look for a driver when it is asked for CUDA

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def _compute(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnCUDA)]
    asked = kwargs.get("device")
    on_cuda = bool(there) if asked is None else torch.device(asked).type in (CUDA.type, UNDERNEATH.type)
    if function not in MOVES:
        elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnCUDA) and tensor.ndim]
        if there and elsewhere and not (function in TAKES_CPU_INDICES and isinstance(args[0], OnCUDA)):
            raise RuntimeError(f"{function}: tensors on the CPU {[tuple(t.shape) for t in elsewhere]} beside others on CUDA")
        if on_cuda and any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise RuntimeError(f"{function}: a generator of the CPU for a tensor on CUDA")
    elif function is not aten._to_copy.default:
        on_cuda = isinstance(tree_leaves(args)[0], OnCUDA)
    if asked is not None and on_cuda:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    owners = {id(tensor.inner): tensor for tensor in there}
    bare = tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnCUDA) else leaf, (args, kwargs))
    found = function(*bare[0], **bare[1])

    def owned(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not on_cuda:
            return leaf
        return owners[id(leaf)] if id(leaf) in owners else OnCUDA(leaf)

    return tree_map(owned, found)


@contextmanager
def cuda() -> Iterator[torch.device]:
    """Within, there is such a device."""
    of_the_driver = {"synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": 0}
    with (
        mock.patch.multiple(
            torch.cuda, device_count=lambda: 1, **{name: lambda *_, found=found: found for name, found in of_the_driver.items()}
        ),
        mock.patch("torch.inference_mode", torch.no_grad),  # wrappers have no inference tensors
        sdpa_kernel(SDPBackend.MATH),
        _Device(),
    ):
        yield CUDA
