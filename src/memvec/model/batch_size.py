"""How many slots fit into the memory of a device."""

from __future__ import annotations

import torch

from memvec.machine import free_memory
from memvec.model.estimate import Facts, facts_of, max_batch_size
from memvec.model.lm import FrozenLM

SLOTS = 32
# Of a step, on a GPU. An H100 that computes 32 slots of 32 tokens of a 1B model waits for four
# fifths of the time until it is told what to do, and with 512 tokens for a third (docs/log.md).
POSITIONS = 16_384


def default_batch_size(
    lm: FrozenLM, tokens: int, vectors: int = 1, facts: Facts | None = None
) -> int:
    """Number of slots B for passages of T = `tokens` and K = `vectors`.

    So many that a step needs at most a quarter of the free memory, as memvec.model.estimate counts
    it (measurements: docs/log.md); at most SLOTS, or on a GPU as many as have POSITIONS together,
    if that is more. `facts` are those of the model or copy that computes the steps; default:
    measured on this model.
    """
    most = SLOTS
    if lm.device.type == "cuda":
        kept, used = torch.cuda.memory_reserved(lm.device), torch.cuda.memory_allocated(lm.device)
        free = torch.cuda.mem_get_info(lm.device)[0] + kept - used  # the allocator's free blocks
        most = max(SLOTS, POSITIONS // (tokens + vectors))
    else:
        free = free_memory()
    tokens = max(1, tokens)
    facts = facts or facts_of(lm, tokens)
    share = (free - facts.copies) / 4
    return min(most, max_batch_size(facts, free=share, tokens=tokens, vectors=vectors))
