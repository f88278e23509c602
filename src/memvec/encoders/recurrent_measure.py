"""Measures which segments a recurrent encoder's memory gives back, compared with cramming.

For each number of segments and lag: the leading tokens of each segment in free-running decoding,
and its teacher-forced accuracy. Two controls with the same K: each segment crammed alone (exact at
any lag, but with K vectors per segment), and the whole chain crammed into K vectors, the upper
bound for a memory of K vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.encoders.measure import crammed_in_order
from memvec.encoders.recurrent import RecurrentEncoder, recurrent_of
from memvec.errors import MemvecError, check_minimum
from memvec.machine import plain_torch
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM


@dataclass(frozen=True)
class AtLag:
    """Result for the segment `lag` before the newest of `segments`; one entry per document (n)."""

    segments: int
    lag: int
    leading: tuple[int, ...]  # leading tokens that free-running decoding gives back
    right: tuple[int, ...]  # positions that are right in teacher forcing


@dataclass(frozen=True)
class AfterSegments:
    """Tokens that each document's memory (n) gives back after `segments` segments."""

    segments: int
    exact_tokens: tuple[int, ...]  # tokens of all exact segments over the measured lags
    whole: tuple[int, ...]  # leading tokens of the chain crammed into K; () if not crammed


@dataclass(frozen=True)
class SegmentComparison:
    """The results of all lags and chains, with the controls."""

    vectors: int  # K
    segment: int  # tokens of a segment (T)
    documents: int  # n
    lags: tuple[AtLag, ...]
    chains: tuple[AfterSegments, ...]
    alone: tuple[int, ...]  # leading tokens of every segment crammed alone; () if not crammed

    def record(self) -> dict[str, Any]:
        """The comparison as a dict."""
        return asdict(self)


@plain_torch()
def compare_segments(
    lm: FrozenLM,
    documents: Int[Tensor, "n N"],
    segments: int,
    *,
    lags: int | None = None,
    recipe: Recipe | None = None,
    batch_size: int = 32,
) -> SegmentComparison:
    """Measure lm.encoder, a recurrent one, on the first `segments` segments of documents.

    `lags` is how many of the newest segments to decode; by default all that it was trained for.
    `recipe` is that of the controls; without one, nothing is crammed. Raises MemvecError if the
    model has no recurrent encoder, a document has fewer segments, a lag is out of range, or a
    chain that is to be crammed does not fit the context.
    """
    encoder = recurrent_of(lm)
    check_minimum(1, segments=segments, lags=lags)
    T, K = encoder.segment, encoder.slots
    lags = encoder.lags if lags is None else lags
    check_chain(lm, encoder, documents.shape[1], segments, lags, crammed=recipe is not None)
    ids = documents[:, : segments * T].to(lm.device)
    with torch.no_grad():
        memories = encoder.memories(lm, ids, T)
    at_lags, chains = [], []
    for i, memory in enumerate(memories, start=1):
        part = ids[:, : i * T]
        recalled = [recall(lm, memory, part, lag) for lag in range(min(i, lags))]
        exact = torch.tensor([at.leading for at in recalled]).eq(T).sum(0) * T
        at_lags += recalled
        whole = crammed_leading(lm, part.tolist(), K, recipe, batch_size) if recipe else ()
        chains.append(AfterSegments(i, tuple(exact.tolist()), tuple(whole)))
    segments_alone = ids.reshape(-1, T).tolist()
    alone = crammed_leading(lm, segments_alone, K, recipe, batch_size) if recipe else ()
    return SegmentComparison(
        vectors=K,
        segment=T,
        documents=len(ids),
        lags=tuple(at_lags),
        chains=tuple(chains),
        alone=tuple(alone),
    )


def check_chain(
    lm: FrozenLM,
    encoder: RecurrentEncoder,
    tokens: int,
    segments: int,
    lags: int,
    *,
    crammed: bool,
) -> None:
    """Raise MemvecError if a document is too short for the segments, or a number is too large.

    `tokens` is the length of each document. Refused are more `lags` than the encoder was trained
    for, and, if it is to be crammed as a whole, a chain that does not fit the context together with
    its vectors. The encoder itself reads one segment at a time.
    """
    T = encoder.segment
    if tokens < segments * T:
        raise MemvecError(
            f"a document of {tokens} tokens has {tokens // T} segments of {T}, not {segments}: "
            "ask for fewer."
        )
    if lags > encoder.lags:
        raise MemvecError(
            f"lags must be at most {encoder.lags}, the newest segments that this encoder was "
            f"trained to give back, not {lags}."
        )
    if crammed and lm.context is not None and segments * T > lm.context - encoder.slots:
        raise MemvecError(
            f"{segments} segments of {T} tokens and {encoder.slots} vectors do not fit the context "
            f"of {lm.name} ({lm.context} tokens), so they cannot be crammed together: use fewer."
        )


@torch.no_grad()
def recall(
    lm: FrozenLM, memory: Float[Tensor, "B K D"], ids: Int[Tensor, "B N"], lag: int
) -> AtLag:
    """Decode the segment `lag` before the newest of chains `ids` from their memories."""
    encoder = recurrent_of(lm)
    T = encoder.segment
    segments = ids.shape[1] // T
    truth = ids[:, (segments - 1 - lag) * T : (segments - lag) * T]
    vectors = encoder.asked(memory, lag)
    decoded = torch.tensor(decode_ids(lm, vectors, [T] * len(ids)))
    leading = horizon(decoded == truth.cpu())
    right = (lm.logits(vectors, truth).argmax(-1) == truth).sum(1)
    return AtLag(segments, lag, tuple(leading.tolist()), tuple(right.tolist()))


def crammed_leading(  # noqa: PLR0917 (what is crammed, and how)
    lm: FrozenLM,
    passages: Sequence[Sequence[int]],
    K: int,
    recipe: Recipe,
    batch_size: int,
    storage: torch.dtype = torch.float32,
) -> list[int]:
    """The horizon (tokens) of each passage after cramming it into K vectors.

    The start is the recipe's, but noise for 'auto', since a recurrent encoder is no start.
    """
    if recipe.start == "auto":
        recipe = replace(recipe, start="noise")
    engine = Engine(lm, recipe, vectors=K, batch_size=batch_size, storage=storage)
    return [outcome.metrics.horizon for outcome in crammed_in_order(engine, passages)]
