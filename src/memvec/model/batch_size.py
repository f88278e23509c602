"""How many passages fit a device at once."""

from __future__ import annotations

from pathlib import Path

import torch

from memvec.model.estimate import facts_of, max_batch_size
from memvec.model.lm import FrozenLM


def default_batch_size(lm: FrozenLM, tokens: int, vectors: int = 1) -> int:
    """Slots that fill the machine without filling its memory (see docs/log.md): at most 32, with
    activations in a quarter of the free memory (memvec.model.estimate)."""
    if lm.device.type == "cuda":
        free = torch.cuda.mem_get_info(lm.device)[0]
    else:
        free = free_memory()
    tokens = max(1, tokens)
    return min(
        32, max_batch_size(facts_of(lm, tokens), free=free / 4, tokens=tokens, vectors=vectors)
    )


def free_memory() -> int:
    """Free bytes of this computer; 4 GiB where the system does not say."""
    try:
        with Path("/proc/meminfo").open() as info:
            kibibytes = next(line for line in info if line.startswith("MemAvailable")).split()[1]
        return int(kibibytes) * 1024
    except (OSError, StopIteration):
        return 4 * 2**30
