"""Free-running greedy decoding from [mem] vectors, and what 'exact' means.

One code path for everybody: certification, `memvec decode` and `memvec verify` all call
`decode_ids`. It runs the model's own forward with its cache, one token at a time, for a batch of
passages; it takes the arg-max, knows each passage's length from its record (an EOS inside a passage
is a token like any other) and inherits no generation settings.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.corrections import table
from memvec.errors import MemvecError
from memvec.lm import FrozenLM, StartRule
from memvec.memory import in_batches

BATCH = 32  # passages decoded together; certification and users use the same number


@torch.no_grad()
def decode_ids(
    lm: FrozenLM,
    vectors: Float[Tensor, "P K D"],
    lengths: Sequence[int],
    *,
    start: StartRule = "vectors",
    first: Sequence[int] | None = None,
    corrections: Sequence[Iterable[tuple[int, int]]] | None = None,
    batch: int = BATCH,
    cached: bool = True,
) -> list[list[int]]:
    """Decode P passages greedily; returns their token ids, `lengths[p]` of them each.

    `first` holds the given first tokens for the start rule 'first-token' (they are returned as
    part of the passage). `corrections` lists (position, token id) for each passage: that token
    takes the place of the model's own and is what the model reads next. `cached=False` is the slow
    reference path: one whole forward per token; a model that keeps no cache (GPT-1, XLM) knows no
    other. Where memory runs out, the batch is halved and decoding goes on.
    """
    if lm.layout == "one-step":
        from memvec.onestep import decode_at_once

        at_once = decode_at_once(lm, vectors, lengths, start, batch)
        for ids, fixes in zip(at_once, corrections or [], strict=False):
            for position, token in fixes:
                ids[position] = token
        return at_once

    def work(rows: slice) -> list[list[int]]:
        given = torch.tensor([[t] for t in first[rows]] if first else [[0]] * len(lengths[rows]))
        prefix = lm.start_ids(given.to(lm.device), start)
        stepper = _cached_steps if cached and lm.has_cache else _uncached_steps
        wanted = max(lengths[rows]) - (start == "first-token")
        listed = corrections[rows] if corrections else [()] * len(lengths[rows])
        fixed = table(listed, wanted, skip=int(start == "first-token")).to(lm.device)
        tokens = list(stepper(lm, vectors[rows].to(lm.device), prefix, fixed))
        if start == "first-token":
            tokens.insert(0, prefix[:, 0])
        found = torch.stack(tokens, dim=1).tolist() if tokens else [[] for _ in lengths[rows]]
        return [row[:n] for row, n in zip(found, lengths[rows], strict=True)]

    return in_batches(work, len(lengths), batch)


def first_error(decoded: Sequence[int], truth: Sequence[int]) -> int | None:
    """Position of the first wrong token, None if there is none."""
    wrong = (i for i, pair in enumerate(zip(decoded, truth, strict=True)) if pair[0] != pair[1])
    return next(wrong, None)


def cached_logits(
    lm: FrozenLM, vectors: Float[Tensor, "B K D"], ids: Int[Tensor, "B T"]
) -> Float[Tensor, "B T V"]:
    """Teacher-forced logits through the cached one-token-at-a-time path (for checks)."""
    logits, cache = _forward(lm, inputs_embeds=vectors.to(lm.dtype))
    steps = [logits]
    for t in range(ids.shape[1] - 1):
        logits, cache = _forward(lm, cache, input_ids=ids[:, t : t + 1])
        steps.append(logits)
    return torch.stack(steps, dim=1)


def _cached_steps(lm: FrozenLM, vectors: Tensor, prefix: Tensor, fixed: Tensor) -> Iterator[Tensor]:
    n = fixed.shape[1]
    if n < 1:
        return
    inputs = torch.cat([vectors.to(lm.dtype), lm.embed(prefix)], dim=1)
    logits, cache = _forward(lm, inputs_embeds=inputs)
    for i in range(n):
        tokens = torch.where(fixed[:, i] < 0, logits.argmax(-1), fixed[:, i])
        yield tokens
        if i < n - 1:
            logits, cache = _forward(lm, cache, input_ids=tokens[:, None])


def _uncached_steps(
    lm: FrozenLM, vectors: Tensor, prefix: Tensor, fixed: Tensor
) -> Iterator[Tensor]:
    inputs = torch.cat([vectors.to(lm.dtype), lm.embed(prefix)], dim=1)
    for i in range(fixed.shape[1]):
        logits = lm.model(inputs_embeds=inputs, use_cache=False).logits[:, -1].float()
        tokens = torch.where(fixed[:, i] < 0, logits.argmax(-1), fixed[:, i])
        yield tokens
        inputs = torch.cat([inputs, lm.embed(tokens[:, None])], dim=1)


def _forward(lm: FrozenLM, cache: Any = None, **inputs: Tensor) -> tuple[Tensor, Any]:
    """Logits (B, V) of the last position and the cache, whatever the family calls its cache."""
    name, options = _cache_protocol(type(lm.model).forward)
    if name is None:
        raise MemvecError(f"{lm.name} keeps no cache.")
    if cache is not None:
        inputs[name] = cache
    out = lm.model(**inputs, **options)
    return out.logits[:, -1].float(), out[name]


def cache_name(model: nn.Module) -> str | None:
    """What a model's forward calls its cache; None for one that has none."""
    return _cache_protocol(type(model).forward)[0]


@functools.cache
def _cache_protocol(forward: Callable[..., Any]) -> tuple[str | None, dict[str, Any]]:
    """The name of a model family's cache argument, and the options of a one-step forward."""
    parameters = inspect.signature(forward).parameters
    names = ("past_key_values", "cache_params", "state")
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in parameters:
        options["logits_to_keep"] = 1
    return next((name for name in names if name in parameters), None), options
