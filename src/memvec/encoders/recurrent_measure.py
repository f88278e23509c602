"""How far back a recurrent encoder's memory gives a document back, beside cramming.

Per number of segments and lag: which segments come back whole by free-running decoding, and the
teacher-forced accuracy beside it. Two controls with the same K: each segment crammed alone (exact
at any lag, but K vectors a segment), and the whole chain crammed into one memory's K vectors, the
upper bound of what K vectors hold.
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
from memvec.encoders.recurrent import RecurrentEncoder, recurrent_of
from memvec.errors import MemvecError, check_minimum
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage


@dataclass(frozen=True)
class AtLag:
    """The segment `lag` before the newest, of each document (n), after so many segments."""

    segments: int
    lag: int
    leading: tuple[int, ...]  # leading tokens that decode freely
    right: tuple[int, ...]  # positions right when the true earlier tokens are given


@dataclass(frozen=True)
class AfterSegments:
    """What the memory of each document (n) holds after so many segments, tokens."""

    segments: int
    exact_tokens: tuple[int, ...]  # of the segments that come back whole, over all lags asked
    whole: tuple[int, ...]  # leading tokens of the chain crammed into the same K; () if it is not


@dataclass(frozen=True)
class SegmentComparison:
    """All lags and chains, with the controls."""

    vectors: int  # K
    segment: int  # tokens of a segment (T)
    documents: int  # n
    lags: tuple[AtLag, ...]
    chains: tuple[AfterSegments, ...]
    alone: tuple[int, ...]  # leading tokens of every segment, crammed alone; () if they are not

    def record(self) -> dict[str, Any]:
        """As plain numbers."""
        return asdict(self)


def compare_segments(
    lm: FrozenLM,
    documents: Int[Tensor, "n N"],
    segments: int,
    lags: int | None = None,
    recipe: Recipe | None = None,
    batch_size: int = 32,
) -> SegmentComparison:
    """Measure lm.encoder, a recurrent one, on the first `segments` segments of documents.

    `lags`: how many of the newest segments to ask for; default: those it was trained for.
    `recipe` is that of the controls; without one, nothing is crammed. Raises MemvecError if the
    model has no recurrent encoder, a document has fewer segments, a lag is out of range, or the
    chain does not fit the context.
    """
    encoder = recurrent_of(lm)
    check_minimum(1, segments=segments, lags=lags)
    T, K = encoder.segment, encoder.slots
    lags = encoder.lags if lags is None else lags
    check_chain(lm, encoder, documents.shape[1], segments, lags)
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
    return SegmentComparison(K, T, len(ids), tuple(at_lags), tuple(chains), tuple(alone))


def check_chain(
    lm: FrozenLM, encoder: RecurrentEncoder, tokens: int, segments: int, lags: int
) -> None:
    """Raise MemvecError if documents of so many tokens are no chain of so many segments, a lag is
    out of range, or the whole chain does not fit the context beside its vectors."""
    T = encoder.segment
    if tokens < segments * T:
        raise MemvecError(
            f"a document of {tokens} tokens has {tokens // T} segments of {T}, not {segments}: "
            "ask for fewer."
        )
    if lags > encoder.lags:
        raise MemvecError(
            f"--lags {lags} is out of range: this encoder was trained to give back the newest "
            f"{encoder.lags} segments."
        )
    if lm.context is not None and segments * T > lm.context - encoder.slots:
        raise MemvecError(
            f"{segments} segments of {T} tokens and {encoder.slots} vectors do not fit the context "
            f"of {lm.name} ({lm.context} tokens), so they cannot be crammed together: use fewer."
        )


@torch.no_grad()
def recall(
    lm: FrozenLM, memory: Float[Tensor, "B K D"], ids: Int[Tensor, "B N"], lag: int
) -> AtLag:
    """What a memory of chains gives back of the segment `lag` before the newest."""
    encoder = recurrent_of(lm)
    T = encoder.segment
    segments = ids.shape[1] // T
    truth = ids[:, (segments - 1 - lag) * T : (segments - lag) * T]
    vectors = encoder.asked(memory, lag)
    decoded = torch.tensor(decode_ids(lm, vectors, [T] * len(ids)))
    leading = horizon(decoded == truth.cpu())
    right = (lm.logits(vectors, truth).argmax(-1) == truth).sum(1)
    return AtLag(segments, lag, tuple(leading.tolist()), tuple(right.tolist()))


def crammed_leading(
    lm: FrozenLM,
    passages: Sequence[Sequence[int]],
    K: int,
    recipe: Recipe,
    batch_size: int,
    storage: torch.dtype = torch.float32,
) -> list[int]:
    """Leading tokens of each passage that decode freely after cramming it into K vectors.

    Under the recipe's own start: where it is 'auto', noise, as a recurrent encoder starts nothing.
    """
    if recipe.start == "auto":
        recipe = replace(recipe, start="noise")
    engine = Engine(lm, recipe, vectors=K, batch_size=batch_size, storage=storage)
    jobs = [Passage(tuple(ids), i) for i, ids in enumerate(passages)]
    horizon_of = {outcome.passage.document: outcome.metrics.horizon for outcome in engine.run(jobs)}
    return [horizon_of[i] for i in range(len(jobs))]
