"""Corrections: positions of a passage whose token is listed, because the vectors miss it.

The last few tokens of a nearly full vector need the largest number of steps, or never become right;
listing them costs two or three bytes each. Decoding feeds the listed token back in the place of
the model's own, so that all that follows sees the true text; whatever is not listed must come from
the vectors with margin, as ever. At least one token always does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

# (position in the passage, its token id), positions rising
Corrections = tuple[tuple[int, int], ...]


def pick(
    margins: Float[Tensor, " n"], ids: Sequence[int], margin_asked: float, limit: int
) -> Corrections:
    """Up to `limit` corrections, at positions whose margin (in logits) is below the one asked.

    Wrong ones come first, front to back (where there are too many, that makes the longest horizon),
    then the weakest of the right ones; never all of them. `margins` are teacher-forced, of the last
    n of the passage's `ids`. A margin of 0 never suffices, even if 0 is required: the arg-max is
    then a tie.
    """
    given, values = len(ids) - len(margins), margins.tolist()
    missed = [i for i, m in enumerate(values) if not (m >= margin_asked and m > 0)]
    missed.sort(key=lambda i: (1, values[i], i) if values[i] > 0 else (0, 0.0, i))
    listed = sorted(missed[: min(limit, len(values) - 1)])
    return tuple((given + i, ids[given + i]) for i in listed)


def fixed_tokens(
    corrections: Sequence[Iterable[tuple[int, int]]], columns: int, *, skip: int = 0
) -> Int[Tensor, "B T"]:
    """Token to put at each of `columns` positions after the first `skip`, -1: the model's own."""
    tokens = torch.full((len(corrections), columns), -1, dtype=torch.long)
    for row, listed in zip(tokens, corrections, strict=True):
        for position, token in listed:
            if 0 <= position - skip < columns:
                row[position - skip] = token
    return tokens


def size(passages: Sequence[Iterable[tuple[int, int]]]) -> int:
    """Bytes of the corrections of a file's passages, as variable-length integers.

    Per passage: v(count) + sum over its corrections of v(positions skipped since the last one)
    + v(token id), where v(x) = ceil(bits of x / 7), at least 1 (LEB128). A file without a single
    correction needs no such list: 0.
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
