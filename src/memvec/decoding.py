"""Free-running greedy decoding from [mem] vectors; it decides what is exact.

Certification, `memvec decode` and `memvec verify` all call `decode_ids`. It runs the model's own
forward pass with its cache, one token at a time, for a batch of passages. It takes the arg-max and
stops at the recorded length of each passage: an EOS inside a passage is a token like any other. The
model's generation settings are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.corrections import fixed_tokens
from memvec.machine import plain_torch
from memvec.model.caching import cache_arguments, forward_with_cache
from memvec.model.lm import FrozenLM
from memvec.model.memory import in_batches
from memvec.model.reading import StartRule

BATCH = 32  # passages decoded together; certification and users use the same number


@plain_torch()
@torch.no_grad()
def decode_ids(
    lm: FrozenLM,
    vectors: Float[Tensor, "P K D"],
    lengths: Sequence[int],
    *,
    start_rule: StartRule = "vectors",
    first: Sequence[int] | None = None,
    corrections: Sequence[Iterable[tuple[int, int]]] | None = None,
    batch: int = BATCH,
    cached: bool = True,
) -> list[list[int]]:
    """Decode P passages greedily; returns `lengths[p]` token ids of each passage p.

    `first` holds the given first tokens for the start rule 'first-token'; they are part of the
    result. `corrections` lists (position, token id) pairs for each passage: this token replaces the
    arg-max, and the model reads it next. `cached=False` is the slow reference path, one whole
    forward pass per token; a model without a usable cache always uses it. When memory runs out, the
    batch is halved and decoding continues. Raises MemvecError for the start rule 'bos' without a
    BOS or trigger, and for a start rule that the layout or space does not support.
    """
    if not lm.reading.feeds_back:
        decoded_at_once = _decode_in_one_pass(lm, vectors, lengths, start_rule, batch)
        for ids, listed in zip(decoded_at_once, corrections or [], strict=False):
            for position, token in listed:
                ids[position] = token
        return decoded_at_once

    def work(rows: slice) -> list[list[int]]:
        # Only 'first-token' uses the values of `given`; otherwise its shape is the number of rows.
        given = torch.tensor([[t] for t in first[rows]] if first else [[0]] * len(lengths[rows]))
        start_tokens = lm.start_ids(given.to(lm.device), start_rule)
        predicted = max(lengths[rows]) - (start_rule == "first-token")
        listed = corrections[rows] if corrections else [()] * len(lengths[rows])
        fixed = fixed_tokens(listed, predicted, skip=int(start_rule == "first-token")).to(lm.device)
        inputs, cache = lm.reading.opening(lm, vectors[rows].to(lm.device), start_tokens)

        def choose(logits: Tensor, i: int) -> Tensor:
            return torch.where(fixed[:, i] < 0, logits.argmax(-1), fixed[:, i])

        tokens = list(free_running(lm, inputs, fixed.shape[1], choose, cached=cached, cache=cache))
        if start_rule == "first-token":
            tokens.insert(0, start_tokens[:, 0])
        decoded = torch.stack(tokens, dim=1).tolist() if tokens else [[] for _ in lengths[rows]]
        return [row[:n] for row, n in zip(decoded, lengths[rows], strict=True)]

    return in_batches(work, len(lengths), batch)


def _decode_in_one_pass(
    lm: FrozenLM,
    vectors: Float[Tensor, "P K D"],
    lengths: Sequence[int],
    start_rule: StartRule,
    batch: int,
) -> list[list[int]]:
    """Token ids of P passages from one forward pass per batch; no token is fed back."""

    def work(rows: slice) -> list[list[int]]:
        part = vectors[rows].to(lm.device)
        blank = torch.zeros(len(part), max(lengths[rows]), dtype=torch.long, device=lm.device)
        states = lm.states(part, blank, start_rule)
        # One passage at a time, since the logits (B, T, V) of all may not fit in memory.
        own = (row[:n] for row, n in zip(states, lengths[rows], strict=True))
        return [lm.head(row).argmax(-1).tolist() for row in own]

    return in_batches(work, len(lengths), batch)


def first_error(decoded: Sequence[int], truth: Sequence[int]) -> int | None:
    """The position of the first wrong token; None if all are right."""
    wrong = (i for i, pair in enumerate(zip(decoded, truth, strict=True)) if pair[0] != pair[1])
    return next(wrong, None)


# (logits (B, V) of the next position, index of the position) -> token ids (B,)
Choose = Callable[[Tensor, int], Tensor]


def free_running(
    lm: FrozenLM,
    inputs: Float[Tensor, "B N D"],
    tokens: int,
    choose: Choose,
    *,
    cached: bool = True,
    cache: Callable[[], Any] = lambda: None,
) -> Iterator[Int[Tensor, " B"]]:
    """Yield the token ids (B,) that `choose` picks after `inputs`, for `tokens` positions in turn.

    The model reads each picked token next. It uses its cache if it has one, unless `cached` is
    False. Each call of `cache` returns a new cache of what precedes the inputs, or None if nothing
    does.
    """
    inputs, argument = inputs.to(lm.dtype), lm.caching.argument
    if cached and argument is not None:
        past, new = cache(), {"inputs_embeds": inputs}
        for i in range(tokens):
            logits, past = forward_with_cache(lm.model, argument, past, **new)
            ids = choose(logits, i)
            yield ids
            new = {"input_ids": ids[:, None]}
        return
    for i in range(tokens):
        out = lm.model(inputs_embeds=inputs, **cache_arguments(argument, cache()))
        ids = choose(out.logits[:, -1].float(), i)
        yield ids
        inputs = torch.cat([inputs, lm.embed(ids[:, None])], dim=1)
