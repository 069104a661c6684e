"""What ``mte-bench doctor`` looks at: versions, device, threads, memory, disk, and what is known to go wrong."""

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from mte_bench.errors import UserError
from mte_bench.files import cache_folder
from mte_bench.settings import Settings

GB = 10**9
ENOUGH_DISK = 2 * GB  # a run of the small recipes, its evaluations and its cached features
ENOUGH_SHARED_MEMORY = 256 * 10**6  # a few batches of 224-pixel views on their way from the loader's workers


class Finding(Settings):
    """One thing that was looked at; ``mend`` says what to do if it is not as it must be."""

    name: str
    found: str
    mend: str | None = None


def examine() -> list[Finding]:
    """Everything, in the order in which one would look."""
    return [*_versions(), *_compute(), *_memory(), *_extras(), *_folders()]


def _versions() -> Iterator[Finding]:
    yield Finding(name="mte-bench", found=f"{version('mte-bench')}, in {Path(__file__).resolve().parent.parent}")
    yield Finding(name="python", found=f"{platform.python_version()}, {sys.executable}")
    import torch

    yield Finding(name="torch", found=torch.__version__)
    yield _torchvision(torch.__version__)
    for package in ("timm", "numpy", "scikit-learn", "pillow", "pydantic", "pyarrow"):
        yield Finding(name=package, found=version(package))


def _torchvision(torch_version: str) -> Finding:
    """torchvision's compiled part loads only beside the torch that it was built for: same index, matching release."""
    found, mend = version("torchvision"), None
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = f"cannot be imported beside torch {torch_version} ({reason}); install both anew, from the same index"
    return Finding(name="torchvision", found=found, mend=mend)


def _compute() -> Iterator[Finding]:
    import torch

    from mte_bench.device import pick_device, pick_precision

    device = pick_device()
    precision = str(pick_precision("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}, {_gb(free)} of {_gb(total)} free"
    else:
        name = {"mps": "Apple GPU", "cpu": platform.machine() + " CPU"}.get(device.type, device.type)
    yield Finding(name="device", found=f"{device.type} ({name}), precision {precision}")

    cores, threads = _cores(), torch.get_num_threads()
    mend = f"more threads than cores slow everything down; set OMP_NUM_THREADS={max(1, round(cores))}"
    yield Finding(name="threads", found=f"{threads} threads on {cores:g} cores", mend=mend if threads > cores + 1 else None)

    try:
        import faiss
    except ImportError as error:
        yield Finding(name="faiss", found="–", mend=f"cannot be imported ({error}); install faiss-cpu")
    else:
        gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
        yield Finding(name="faiss", found=f"{faiss.__version__}, {f'{gpus} GPUs' if gpus else 'CPU'}")


def _cores() -> float:
    """The cores that this process may use: its affinity, and the quota of its container if it has one."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() and period.strip().isdigit() else cores


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        total = min(total, int(limit))
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = f", {_gb(min(total, 1024 * int(available[1])))} available" if available else ""
    yield Finding(name="memory", found=f"{_gb(total)}{free}", mend="the quickstart needs 4 GB" if total < 4 * GB else None)

    shared = Path("/dev/shm")
    if shared.is_dir():
        free_shared = shutil.disk_usage(shared).free
        mend = "too small for loader workers; enlarge it (docker: --shm-size=1g) or use --workers 0"
        yield Finding(name="shared memory", found=_gb(free_shared), mend=mend if free_shared < ENOUGH_SHARED_MEMORY else None)


def _extras() -> Iterator[Finding]:
    """The optional parts: information, never an error."""
    parts: dict[str, list[str]] = {}
    for requirement in requires("mte-bench") or []:
        name, part = re.match(r"[\w.-]+", requirement), re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if name and part:
            parts.setdefault(part[1], []).append(name[0])
    for extra, packages in parts.items():
        missing = [package for package in packages if not _installed(package)]
        found = f"without {', '.join(missing)}" if 0 < len(missing) < len(packages) else "no" if missing else "installed"
        yield Finding(name=f"extra {extra}", found=found)


def _folders() -> Iterator[Finding]:
    for name, folder in (("cache", cache_folder()), ("this folder", Path.cwd()), ("temporary", Path(tempfile.gettempdir()))):
        mend = None
        try:
            free = _writable(folder)
        except (UserError, OSError) as error:
            yield Finding(name=name, found=str(folder), mend=f"cannot be written ({getattr(error, 'strerror', None) or error})")
            continue
        if free < ENOUGH_DISK:
            mend = f"make room: less than {_gb(ENOUGH_DISK)} are free"
        yield Finding(name=name, found=f"{folder}, {_gb(free)} free", mend=mend)


def _writable(folder: Path) -> int:
    """Write and remove a file in ``folder``; the bytes free there. Folders made on the way are removed again."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"mte-bench")
        return shutil.disk_usage(folder).free
    finally:
        for parent in made:
            parent.rmdir()


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"
