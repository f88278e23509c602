"""How many slots fit into the memory of a device."""

from __future__ import annotations

import torch

from memvec.machine import free_memory
from memvec.model.estimate import Facts, facts_of, max_batch_size
from memvec.model.lm import FrozenLM


def default_batch_size(
    lm: FrozenLM, tokens: int, vectors: int = 1, facts: Facts | None = None
) -> int:
    """Number of slots B for passages of T = `tokens` and K = `vectors`.

    At most 32, and so many that a step needs at most a quarter of the free memory, as
    memvec.model.estimate counts it (measurements: docs/log.md). `facts` are those of
    the model or copy that computes the steps; default: measured on this model.
    """
    if lm.device.type == "cuda":
        kept, used = torch.cuda.memory_reserved(lm.device), torch.cuda.memory_allocated(lm.device)
        free = torch.cuda.mem_get_info(lm.device)[0] + kept - used  # the allocator's free blocks
    else:
        free = free_memory()
    tokens = max(1, tokens)
    facts = facts or facts_of(lm, tokens)
    share = (free - facts.copies) / 4
    return min(32, max_batch_size(facts, free=share, tokens=tokens, vectors=vectors))
