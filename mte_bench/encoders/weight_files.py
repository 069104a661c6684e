"""Files of weights, written and read without ever running code from them: safetensors, and torch's pickles."""

import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mte_bench.errors import UserError
from mte_bench.files import atomic


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write atomically, the same bytes for the same content; metadata that are no strings become JSON, None is left out."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in metadata.items()
        if value is not None
    }
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, texts)
    # The library writes the metadata in an order that changes from process to process.
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(memoryview(data)[8 + size :])


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in a safetensors file's header; ``UserError`` if it is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; ``UserError`` if it is no such file."""
    metadata = read_metadata(path)
    try:
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


class _Ignored:
    """Stands for an object in a checkpoint that is no weight; whatever it is made of is forgotten."""

    def __new__(cls, *arguments: Any) -> "_Ignored":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# Harmless things that training scripts leave beside the weights. Their own code is not even imported.
_LEFT_BEHIND: list[Any] = [
    (_Ignored, "argparse.Namespace"),
    (_Ignored, "pathlib.PosixPath"),
    (_Ignored, "pathlib.WindowsPath"),
    (_Ignored, "pathlib._local.PosixPath"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (OrderedDict, "yacs.config.CfgNode"),
]


def read_pickle(path: Path) -> Mapping[str, Any]:
    """What a torch file holds; only tensors and plain data, never code."""
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        with torch.serialization.safe_globals(_LEFT_BEHIND), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle's protocol, when the file is something else
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # bytes that are no checkpoint can make the reader fail in any way
        code = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise UserError(
                f"{path}: unpickling it would run {code[1]}, which is refused; save its state dict alone, or as safetensors"
            ) from error
        raise UserError(f"{path}: not a checkpoint, or cut short; give its state dict as .pth or .safetensors") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content
