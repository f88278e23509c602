"""What memvec asks of the system: versions, memory, and torch without what a caller has set."""

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
UNKNOWN = 4 * 2**30  # bytes that are taken to be free where the system does not say
# Files of a control group, by which a container may have less memory than its machine: the limit,
# what is used, and the row of memory.stat that counts cached files, which are given up first.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
LARGEST_INT = 2**31 - 1


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, processor and threads of this process, for the record of what it makes.

    The GPU is the one that `device` names, else the first one.
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
    """Context manager and decorator that sets aside what a caller has set for all of torch.

    Inference mode leaves no gradients, autocast and float32 products of fewer bits round what is
    measured and certified, and another default dtype or device makes tensors that do not go with
    those of the model.
    """
    import torch

    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_whole_products())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # else every call of torch would be slower
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """Within, float32 products have all their bits: not TF32 of a GPU, nor bfloat16 of a CPU."""
    import torch

    backends: Any = torch.backends
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [kind.fp32_precision for kind in products]
    if not {"tf32", "bf16"} & set(before):
        yield
        return
    older_name = "highest"
    with contextlib.suppress(RuntimeError):  # where it is set by the newer names alone
        older_name = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older_name)
        for kind, precision in zip(products, before, strict=True):
            kind.fp32_precision = precision


def free_memory() -> int:
    """Available main memory, bytes, within the limits of this process's control groups."""
    free = []
    try:
        lines = (ROOT / "proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        free += _left_in_groups()
    except (OSError, ValueError):  # another system, or one that hides this
        pass
    return max(0, min(free, default=UNKNOWN))


def _left_in_groups() -> Iterator[int]:
    """Bytes that are left of each limit on the groups that this process is in."""
    for line in (ROOT / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = ROOT / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used, cached = VERSION_1 if controllers else VERSION_2
        inside = PurePosixPath(path.lstrip("/"))
        # A container sees its own group where it is mounted, whatever the path says.
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
