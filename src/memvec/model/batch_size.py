"""The number of slots that fit into the memory of a device."""

from __future__ import annotations

import torch

from memvec.machine import free_memory
from memvec.model.estimate import Facts, facts_of, max_batch_size
from memvec.model.lm import FrozenLM

SLOTS = 32  # maximum number of slots
# On a GPU, more slots are allowed up to this number of positions (slots x inputs). With 32 slots of
# a 1B model, an H100 is idle for four fifths of the time at 32 tokens, because kernels are launched
# too slowly, and for a third at 512 tokens (docs/log.md).
POSITIONS = 16_384


def default_batch_size(
    lm: FrozenLM, tokens: int, vectors: int = 1, facts: Facts | None = None
) -> int:
    """Number of slots B for passages of T = `tokens` and K = `vectors`.

    A step needs at most a quarter of the free memory, by the estimate of memvec.model.estimate
    (measurements: docs/log.md). The maximum is SLOTS, or on a GPU the number of slots with
    POSITIONS positions, if that is larger. `facts` are those of the module that computes the steps;
    without them, they are measured on this model.
    """
    limit = SLOTS
    if lm.device.type == "cuda":
        kept, used = torch.cuda.memory_reserved(lm.device), torch.cuda.memory_allocated(lm.device)
        free = torch.cuda.mem_get_info(lm.device)[0] + kept - used  # the allocator's free blocks
        limit = max(SLOTS, POSITIONS // (tokens + vectors))
    else:
        free = free_memory()
    tokens = max(1, tokens)
    facts = facts or facts_of(lm, tokens)
    share = (free - facts.copies) / 4
    return min(limit, max_batch_size(facts, free=share, tokens=tokens, vectors=vectors))
