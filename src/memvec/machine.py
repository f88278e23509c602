"""System information (versions, memory), and torch with its default global settings."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from memvec import __version__

if TYPE_CHECKING:
    import torch

ROOT = Path("/")
UNKNOWN = 4 * 2**30  # free bytes to assume if the system does not report them
# Files of a control group, which limits the memory of a container (versions 1 and 2): the limit,
# the used memory, and the row in memory.stat of cached files, which the kernel can free.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
LARGEST_INT = 2**31 - 1


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, hardware, threads and date, for the records of results.

    `gpu` is the GPU that `device` names, else the first GPU, else None.
    """
    import torch
    import transformers

    index = device.index or 0 if device is not None and device.type == "cuda" else 0
    gpu = torch.cuda.get_device_name(index) if torch.cuda.is_available() else None
    return {
        "memvec": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Context manager and decorator: torch with its default global settings, restored afterwards.

    A caller may have set others, which memvec cannot use. Inference mode computes no gradients.
    Autocast and TF32 change the rounding of what is measured and certified. Tensors of another
    default dtype or device do not fit those of the model.
    """
    import torch

    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_whole_products())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # a device context slows down every torch call
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """Context manager: float32 matrix products in full precision, without TF32 or bfloat16."""
    import torch

    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [kind.fp32_precision for kind in products]
    if not {"tf32", "bf16"} & set(before):
        yield
        return
    older_name = "highest"
    with contextlib.suppress(RuntimeError):  # raised if only `fp32_precision` was set
        older_name = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older_name)
        for kind, precision in zip(products, before, strict=True):
            kind.fp32_precision = precision


def free_memory() -> int:
    """Available main memory (bytes), within the limits of this process's control groups."""
    free = []
    try:
        lines = (ROOT / "proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        free += _left_in_groups()
    except (OSError, ValueError):  # not Linux, or not readable
        pass
    return max(0, min(free, default=UNKNOWN))


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes that remain within each memory limit on this process's control groups."""
    for line in (ROOT / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = ROOT / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used, cached = VERSION_1 if controllers else VERSION_2
        inside = PurePosixPath(path.lstrip("/"))
        # In a container, its own group may be mounted at a parent of this path.
        for folder in (mounted / part for part in (inside, *inside.parents)):
            try:
                rows = (folder / "memory.stat").read_text().splitlines()
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                yield left + int(dict(row.split() for row in rows)[cached])
            except (OSError, ValueError, KeyError):  # no such group here, or no limit ("max")
                continue


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks (Linux); True if it accepted. Repeated calls do nothing.

    By default glibc returns every freed block above a limit (128 KiB to 32 MiB) to the kernel and
    requests zeroed pages again at the next step, which costs up to half of the time of a training
    loop. `mallopt` turns this off for the running process; it needs no environment variable and no
    other allocator. The process then keeps its largest amount of memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, or a statically linked interpreter
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST_INT, M_TOP_PAD: 256 * 2**20}
    return all(mallopt(option, value) == 1 for option, value in settings.items())
