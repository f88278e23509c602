"""Corrections: tokens of a passage that the vectors miss and the file lists.

The last few tokens of a nearly full vector need the most steps, or never become right. A listed
token costs two or three bytes. Decoding feeds it back in place of the arg-max, so later tokens
follow the true text. All other tokens must come from the vectors, with the required margin. At
least one token of a passage is never listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

# (position in the passage, token id) pairs, by rising position
Corrections = tuple[tuple[int, int], ...]


def pick(
    margins: Float[Tensor, " n"], ids: Sequence[int], margin_asked: float, limit: int
) -> Corrections:
    """Up to `limit` corrections, at positions whose margin is below `margin_asked` (logits).

    Wrong tokens are listed first, from front to back, since this gives the longest horizon; then
    right tokens, smallest margin first. Never are all n positions listed. `margins` are the
    teacher-forced margins of the last n of the passage's `ids`. A margin of 0 is a tie and never
    suffices, even if 0 is required.
    """
    given, values = len(ids) - len(margins), margins.tolist()
    short = [i for i, m in enumerate(values) if not (m >= margin_asked and m > 0)]
    short.sort(key=lambda i: (1, values[i], i) if values[i] > 0 else (0, 0.0, i))
    listed = sorted(short[: min(limit, len(values) - 1)])
    return tuple((given + i, ids[given + i]) for i in listed)


def fixed_tokens(
    corrections: Sequence[Iterable[tuple[int, int]]], columns: int, *, skip: int = 0
) -> Int[Tensor, "B T"]:
    """The listed tokens as a table; column t is position `skip` + t, and -1 means no correction."""
    tokens = torch.full((len(corrections), columns), -1, dtype=torch.long)
    for row, listed in zip(tokens, corrections, strict=True):
        for position, token in listed:
            if 0 <= position - skip < columns:
                row[position - skip] = token
    return tokens


def size(passages: Sequence[Iterable[tuple[int, int]]]) -> int:
    """Bytes of the corrections of all passages, as variable-length integers (LEB128).

    For each passage: v(count) + the sum over its corrections of v(positions skipped since the last
    one) + v(token id), where v(x) = ceil(bits of x / 7), at least 1. 0 if none has corrections.
    """
    lists = [list(listed) for listed in passages]
    if not any(lists):
        return 0
    total = 0
    for listed in lists:
        total += _bytes_of(len(listed))
        last = -1
        for position, token in listed:
            total += _bytes_of(position - last - 1) + _bytes_of(token)
            last = position
    return total


def _bytes_of(number: int) -> int:
    return max(1, -(-number.bit_length() // 7))
