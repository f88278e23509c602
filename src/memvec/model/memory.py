"""Memory: kept between steps (on Linux with glibc), and what to do when there is none left.

By default glibc gives every freed block above 128 KiB-32 MiB back to the kernel and asks for
zeroed pages again at the next step; in a training-like loop this costs up to half of the time.
`mallopt` turns that off for the running process, with no environment variable and no other
allocator to install. Memory then stays at its high-water mark until the process ends.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

Result = TypeVar("Result")
# Objects that hold memory for what can be made again, and give it up when asked to `forget()`.
HOLDERS: WeakSet[Any] = WeakSet()
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
LARGEST_INT = 2**31 - 1
# Logits held at once: 64 MiB in float32, a few times that while they are scored.
LOGITS_AT_ONCE = 2**24


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks; True where it took the setting. Safe to call often."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, or a statically linked interpreter
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: LARGEST_INT, M_TOP_PAD: 256 * 2**20}
    return all(mallopt(option, value) == 1 for option, value in settings.items())


def out_of_memory(error: BaseException) -> bool:
    """True for what a device or the system says when a tensor finds no room."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def fits(work: Callable[[], None]) -> bool:
    """Do it; False if memory ran out. What had been measured by then stays measured."""
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def in_batches(work: Callable[[slice], list[Result]], total: int, batch: int) -> list[Result]:
    """`work` on `batch` rows at a time, one result for each of the `total` rows.

    Where memory runs out the batch is halved, and what is done stays. Raises what `work` raised if
    one row alone does not fit.
    """
    out: list[Result] = []
    while len(out) < total:
        rows = slice(len(out), min(len(out) + batch, total))
        results: list[Result] | None = None
        try:
            results = work(rows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or batch == 1:
                raise
        if results is None:  # outside of the except clause, which holds on to what it failed with
            batch = max(1, (rows.stop - rows.start) // 2)
            forget_freed_memory()
        else:
            out += results
    return out


def forget_freed_memory() -> None:
    """Let a GPU's allocator give back what a failed step left in pieces, and all `HOLDERS`."""
    import torch

    for holder in list(HOLDERS):
        holder.forget()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
