"""Seconds to decode a passage: in one forward pass, and token by token, on the same machine.

Mezentsev & Oseledets (arXiv 2505.21189) print how many times faster one forward pass is than
autoregressive decoding. Both are timed for one passage at a time, of the same number of tokens,
with `memvec.decoding.decode_ids`, the decoder that all of memvec uses. The time does not depend on
the tokens.
"""

from __future__ import annotations

import statistics
import time

from jaxtyping import Float
from torch import Tensor

from memvec.decoding import decode_ids
from memvec.model.lm import FrozenLM

REPEATS = 5  # timings of the one forward pass, which is short


def decode_seconds(lm: FrozenLM, vectors: Float[Tensor, "2 D"], tokens: int) -> tuple[float, float]:
    """Seconds to decode `tokens` tokens: (in one forward pass, token by token).

    The first is the median of REPEATS timings; each way is timed after a warm-up.
    """
    batch = vectors[None]
    decode_ids(lm, batch, [tokens])
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        decode_ids(lm, batch, [tokens])
        times.append(time.perf_counter() - began)
    ordinary = lm.read_as("prefix")
    decode_ids(ordinary, batch, [min(tokens, 2)])
    began = time.perf_counter()
    decode_ids(ordinary, batch, [tokens])
    return statistics.median(times), time.perf_counter() - began
