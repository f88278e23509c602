"""Cut a document into passages by information, so that each one fits its vectors.

A vector holds bits, not tokens: a dull page packs more tokens into it than a list of names. The
cutter walks through the document, asks the frozen model how many bits each next token costs *from
the start of the passage* (that is how it will be decoded), and ends the passage when the budget of
its vectors is spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from memvec import metrics
from memvec.errors import MemvecError, check_minimum
from memvec.model.heads import at_states
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class Cutter:
    """Cuts token ids into passages of at most `bits` bits, or of exactly `tokens` tokens.

    A passage has at least one token, however many bits it costs, and the last passage of `tokens`
    has those that are left. `max_tokens`: the largest number of tokens in a passage (the model's
    context less the vectors). Raises ValueError unless one of `bits` and `tokens` is given, and
    MemvecError if `tokens` is below 1 or above `max_tokens`.
    """

    def __init__(
        self,
        lm: FrozenLM,
        *,
        bits: float | None = None,
        tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if (bits is None) == (tokens is None):
            raise ValueError("give either bits or tokens")
        check_minimum(1, tokens=tokens)
        if tokens is not None and max_tokens is not None and tokens > max_tokens:
            raise MemvecError(f"{tokens} tokens do not fit the context: at most {max_tokens}.")
        self.lm, self.bits, self.tokens = lm, bits, tokens
        self.max_tokens = max_tokens or 10**9

    def cut(self, ids: Sequence[int], document: int = 0, min_tokens: int = 1) -> Iterator[Passage]:
        """The passages of a document, lazily, front to back.

        None is shorter than `min_tokens`, unless the document is: a shorter rest joins the passage
        before it, or takes tokens of it where both together do not fit.
        """
        start, window = 0, 64
        while start < len(ids):
            if self.tokens is not None:
                n = min(self.tokens, len(ids) - start)
            else:
                n, window = self._fitting(ids, start, window)
            n = max(n, min_tokens)
            if 0 < (left := len(ids) - start) - n < min_tokens:
                n = left if left <= self.max_tokens else left - min_tokens
            yield Passage(tuple(ids[start : start + n]), document, start)
            start += n

    def _fitting(self, ids: Sequence[int], start: int, window: int) -> tuple[int, int]:
        """How many tokens from `start` fit the budget of bits, and the next window (tokens)."""
        assert self.bits is not None
        while True:
            window = min(window, self.max_tokens)
            span = list(ids[start : start + window])
            total = surprisals(self.lm, span).cumsum(0)
            n = int((total <= self.bits).sum())
            if n < len(span) or len(span) < window or window == self.max_tokens:
                return max(n, 1), max(16, 2 * n)
            window *= 2


@torch.no_grad()
def surprisals(lm: FrozenLM, ids: Sequence[int]) -> torch.Tensor:
    """Bits of each token of a text under the model alone, (T) float64; the first one follows BOS.

    For a model without a BOS the first token costs log2 V.
    """
    table = torch.tensor([list(ids)], device=lm.device)
    given = [] if lm.bos_id is not None else [math.log2(lm.vocab_size)]
    if len(given) == len(ids):
        return torch.tensor(given, dtype=torch.float64)
    states = lm.states(None, table, "first-token" if given else "bos")
    (bits,) = at_states(lm, states, table[:, len(given) :], metrics.surprisal)
    return torch.cat([torch.tensor(given, dtype=torch.float64), bits[0].double()])
