"""Peak memory of a function above the memory before it: of the process, and of tensors alone."""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memvec.errors import MemvecError

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_memory(work: Callable[[], Any]) -> int:
    """Peak bytes during `work()` above those before.

    On a GPU torch counts them. Elsewhere they are the resident memory of the process, which Linux
    counts.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        raise MemvecError(
            f"peak memory can be measured on a GPU or on Linux, not on {sys.platform}."
        )
    # memvec makes the allocator keep freed memory (memvec.machine). It is returned to the system
    # here, because work that fits into freed memory would seem to need none.
    ctypes.CDLL(None).malloc_trim(0)
    before = _kilobytes("VmRSS")
    CLEAR.write_text("5")  # sets the peak (VmHWM) to the present value
    work()
    return 1024 * (_kilobytes("VmHWM") - before)


def peak_tensors(work: Callable[[], Any]) -> int:
    """Peak bytes of tensors during `work()` above those before, as torch counts them."""
    if torch.cuda.is_available():
        return peak_memory(work)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    # `profile.events()` lacks the allocations outside of operators.
    events = profile.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def _kilobytes(name: str) -> int:
    """A field of the process's status, in kB (1024 bytes)."""
    (line,) = (row for row in STATUS.read_text().splitlines() if row.startswith(name + ":"))
    return int(line.split()[1])
