"""Cut a document into passages by information, so that the vectors can hold each passage.

A vector holds a number of bits, not of tokens: it holds more tokens of predictable text. From the
start of a passage, the cutter sums the bits that each token costs under the frozen model. The
passage ends before the sum exceeds the bits that its vectors can hold. The sum begins anew with
each passage, because each passage is decoded without the text in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from memvec import metrics
from memvec.errors import MemvecError, check_minimum
from memvec.model.heads import at_states
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class Cutter:
    """Cuts token ids into passages of at most `bits` bits, or of `tokens` tokens each.

    The last passage may be shorter than `tokens`. `max_tokens` is the maximum number of tokens of a
    passage (the model's context without the vectors). No passage is shorter than `min_tokens`,
    whatever its bits, unless the document is. A shorter remainder is appended to the passage before
    it; if the result is longer than `max_tokens`, the remainder takes tokens from that passage
    instead. `known` may be set to lengths that are already known, in tokens: (document, start) ->
    length. Raises ValueError unless exactly one of `bits` and `tokens` is given, and MemvecError if
    `tokens` is below 1 or above `max_tokens`.
    """

    def __init__(
        self,
        lm: FrozenLM,
        *,
        bits: float | None = None,
        tokens: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 1,
    ) -> None:
        if (bits is None) == (tokens is None):
            raise ValueError("give either bits or tokens")
        check_minimum(1, tokens=tokens)
        if tokens is not None and max_tokens is not None and tokens > max_tokens:
            raise MemvecError(f"{tokens} tokens do not fit the context: at most {max_tokens}.")
        self.lm, self.bits, self.tokens = lm, bits, tokens
        self.max_tokens, self.min_tokens = max_tokens or 10**9, min_tokens
        self.known: Mapping[tuple[int, int], int] = {}

    def cut(self, ids: Sequence[int], document: int = 0) -> Iterator[Passage]:
        """Yield the passages of the document of this number, from front to back."""
        start, window = 0, 64
        while start < len(ids):
            if self.tokens is not None:
                n = min(self.tokens, len(ids) - start)
            elif not (n := self.known.get((document, start), 0)):
                n, window = self._fitting(ids, start, window)
            n = max(n, self.min_tokens)
            if 0 < (remaining := len(ids) - start) - n < self.min_tokens:
                n = remaining if remaining <= self.max_tokens else remaining - self.min_tokens
            yield Passage(tuple(ids[start : start + n]), document, start)
            start += n

    def _fitting(self, ids: Sequence[int], start: int, window: int) -> tuple[int, int]:
        """The number of tokens from `start` that fit into `bits`, and the next window (tokens)."""
        assert self.bits is not None
        while True:
            window = min(window, self.max_tokens)
            span = list(ids[start : start + window])
            total = surprisals(self.lm, span).cumsum(0)
            n = int((total <= self.bits).sum())
            if n < len(span) or len(span) < window or window == self.max_tokens:
                return max(n, 1), max(16, n + n // 2)
            window *= 2


@torch.no_grad()
def surprisals(lm: FrozenLM, ids: Sequence[int]) -> torch.Tensor:
    """Bits of each token of a text under the model alone, (T,) float64; the text is read after BOS.

    For a model without a BOS, the first token costs log2 V bits.
    """
    table = torch.tensor([list(ids)], device=lm.device)
    given = [] if lm.bos_id is not None else [math.log2(lm.vocab_size)]
    if len(given) == len(ids):
        return torch.tensor(given, dtype=torch.float64)
    states = lm.states(None, table, "first-token" if given else "bos")
    (bits,) = at_states(lm, states, table[:, len(given) :], metrics.surprisal)
    return torch.cat([torch.tensor(given, dtype=torch.float64), bits[0].double()])
