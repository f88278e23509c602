"""Handle lack of memory: detect it, retry with smaller batches, and free caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakSet

import torch

Result = TypeVar("Result")
# Objects that cache what can be computed again; `forget()` frees their memory.
HOLDERS: WeakSet[Any] = WeakSet()
# Parts of the RuntimeError messages of main memory, of CUDA and of its libraries.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
# Logits computed at once: 64 MiB in float32, and a few copies of them while losses are computed.
LOGITS_AT_ONCE = 2**24


def out_of_memory(error: BaseException) -> bool:
    """True for the errors that mean that there is no memory for a tensor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )


def fits(work: Callable[[], None]) -> bool:
    """Run `work`; returns False if memory ran out. Changes that `work` made before that remain."""
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def in_batches(work: Callable[[slice], list[Result]], total: int, batch: int) -> list[Result]:
    """Call `work` on `batch` rows at a time; returns one result for each of the `total` rows.

    When memory runs out, the batch is halved and finished rows are kept. Raises the error of `work`
    if a single row does not fit.
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
        if results is None:  # not in the except clause, where the error keeps tensors alive
            batch = max(1, (rows.stop - rows.start) // 2)
            forget_freed_memory()
        else:
            out += results
    return out


def forget_freed_memory() -> None:
    """Free the caches of all `HOLDERS`, and the GPU memory that PyTorch's allocator keeps."""
    for holder in list(HOLDERS):
        holder.forget()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
