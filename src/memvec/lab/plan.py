"""Estimate the vectors, bytes and time of cramming a document by cramming a sample of it.

The sample is stratified: the document is divided into equal parts, and in each part a passage
starts at a random offset. It is cut by the rule of `cram` and crammed by the same engine; a passage
that does not fit is halved as in `cram`. The mean of vectors / tokens over the sampled passages,
times the document's tokens, estimates the vectors of the document. Seconds are estimated in the
same way from four measured parts: each passage's forward-backward tokens at the rate of busy slots,
filling the slots, certifying, and cutting. Intervals are 95 % (Student's t) over the sampled
passages. The sample of a short document is the whole document, and the plan is then a measurement.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memvec.cram_job import CramJob, CramStatus
from memvec.cramming.recipe import Recipe
from memvec.errors import check_minimum
from memvec.lab.sources import seeded_random
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.documents import Document
from memvec.passages.passage import Passage
from memvec.statistics import Mean, mean_interval
from memvec.storage import storage_of

SAMPLE = 32  # passages
BUSY = 0.5  # steps count for the rate if this share of the largest number of slots is taken


@dataclass(frozen=True)
class Plan:
    """The estimate for a document, from `sampled` passages with `sampled_tokens` tokens.

    Means over passages: `tokens_per_vector`, `bits_per_vector` (bits of the passage under the model
    without vectors). Totals: `vectors`, `vector_bytes`, `seconds` (on a machine like this one,
    without loading the model). `inexact` counts the pieces of sampled passages that did not become
    exact: they are too short to be halved again.
    """

    tokens: int
    text_bytes: int
    sampled: int
    sampled_tokens: int
    sampled_seconds: float
    inexact: int
    tokens_per_vector: Mean
    bits_per_vector: Mean
    vectors: Mean
    vector_bytes: Mean
    seconds: Mean

    def record(self) -> dict[str, Any]:
        """The plan as a dictionary of plain values."""
        return asdict(self)


@plain_torch()
def plan(
    lm: FrozenLM,
    document: Document,
    *,
    vectors: int = 1,
    tokens: int | None = None,
    recipe: Recipe | None = None,
    batch_size: int | None = None,
    storage: str = "float32",
    sample: int = SAMPLE,
    seed: int = 0,
    on_status: Callable[[CramStatus], None] | None = None,
) -> Plan:
    """Cram `sample` passages spread over the document and estimate the cost of the whole.

    The other options are those of `memvec.cram`; `seed` decides where the passages start. Raises
    MemvecError for bad input, as `cram` does.
    """
    check_minimum(2, sample=sample)
    clock = _Clock(on_status)
    began = time.perf_counter()
    work = CramJob(
        lm,
        [document],
        vectors,
        tokens=tokens,
        recipe=recipe or Recipe(),
        batch_size=batch_size,
        storage=storage_of(storage),
        on_status=clock,
    )
    passages, cutting = _sample(work, document, sample, seed)
    times, vector_bytes = _cram(work, passages, clock, cutting)
    costs = [_cost(work, passage, vectors, times) for passage in passages]
    total = _Total(len(document.ids), passages)
    return Plan(
        tokens=len(document.ids),
        text_bytes=document.size,
        sampled=len(passages),
        sampled_tokens=sum(map(len, passages)),
        sampled_seconds=time.perf_counter() - began,
        inexact=sum(not outcome.exact for outcome in work.done.values()),
        tokens_per_vector=mean_interval(
            [len(p) / c.vectors for p, c in zip(passages, costs, strict=True)]
        ),
        bits_per_vector=mean_interval([c.bits / c.vectors for c in costs]),
        vectors=total([c.vectors for c in costs]),
        vector_bytes=total([c.vectors for c in costs], scale=vector_bytes),
        seconds=total([c.seconds for c in costs], per_token=times.per_token),
    )


# ---------------------------------------------------------------------- the sample


def _end(passage: Passage) -> int:
    return passage.offset + len(passage)


def _apart(passages: Sequence[Passage]) -> list[Passage]:
    """The passages without those that overlap an earlier one.

    An outcome belongs to the passage that it begins in, so sampled passages must not overlap.
    """
    kept: list[Passage] = []
    for passage in passages:
        if not kept or passage.offset >= _end(kept[-1]):
            kept.append(passage)
    return kept


def _sample(
    work: CramJob, document: Document, sample: int, seed: int
) -> tuple[list[Passage], float]:
    """The sampled passages, and the seconds that cutting takes per token of the document."""
    cutter = work.make_cutter()
    ids, began = document.ids, time.perf_counter()
    draw = seeded_random("plan", seed, document.sha256)
    passages = []
    for i in range(sample):
        low, high = len(ids) * i // sample, len(ids) * (i + 1) // sample
        offset = min(draw.randrange(low, max(low + 1, high)), max(0, len(ids) - cutter.min_tokens))
        passage = next(cutter.cut(ids[offset:]))
        passages.append(Passage(passage.ids, 0, offset))
    if sum(map(len, passages)) > len(ids) / 2:
        passages = list(cutter.cut(ids))
    return _apart(passages), (time.perf_counter() - began) / sum(map(len, passages))


@dataclass(frozen=True)
class _Times:
    """Measured seconds of the sample's parts."""

    per_computed_token: float  # of steps while slots were busy
    padding: float  # computed tokens per forward-backward token of a passage: 1 without padding
    per_piece: float  # filling a slot with a piece of a passage, and certifying the piece
    per_token: float  # cutting, and the certificate of the whole


def _cram(
    work: CramJob, passages: Sequence[Passage], clock: _Clock, cutting: float
) -> tuple[_Times, float]:
    """Cram the sample as `cram` does: (seconds of its parts, bytes of a stored vector)."""
    # Includes the trial step that is timed for the sentence before the start.
    work.choose_batch_size(passages)
    began = time.perf_counter()
    work.cram(passages)
    crammed = time.perf_counter()
    outside_steps = max(0.0, crammed - began - work.engine.seconds)
    mem = work.certified()
    certifying = (time.perf_counter() - crammed) / sum(map(len, passages))
    times = _Times(
        per_computed_token=clock.seconds_per_token(),
        padding=work.engine.tokens / max(1, sum(work.spent.values())),
        per_piece=outside_steps / max(1, len(work.spent)),
        per_token=cutting + certifying,
    )
    return times, mem.storage.size(work.K, mem.vectors.shape[2]) / work.K


@dataclass(frozen=True)
class _Cost:
    """Vectors, seconds and bits of one sampled passage, with its halves."""

    vectors: float
    seconds: float
    bits: float  # of the passage under the model without vectors


def _cost(work: CramJob, passage: Passage, vectors: int, times: _Times) -> _Cost:
    inside = range(passage.offset, _end(passage))
    kept = [outcome for (_, offset), outcome in work.done.items() if offset in inside]
    tried = [spent for (_, offset, _), spent in work.spent.items() if offset in inside]
    in_steps = sum(tried) * times.padding * times.per_computed_token
    return _Cost(
        vectors=float(vectors * len(kept)),
        seconds=in_steps + len(tried) * times.per_piece,
        bits=math.fsum(outcome.metrics.lm_bits for outcome in kept),
    )


class _Total:
    """Scales the costs of sampled passages up to the document, with an interval."""

    def __init__(self, tokens: int, passages: Sequence[Passage]) -> None:
        self.tokens, self.lengths = tokens, [len(p) for p in passages]

    def __call__(
        self, costs: Sequence[float], *, scale: float = 1.0, per_token: float = 0.0
    ) -> Mean:
        """The document's cost: `scale` times the passages' costs, and `per_token` per token."""
        if sum(self.lengths) == self.tokens:  # the sample is everything: no uncertainty is left
            value = math.fsum(costs) * scale + self.tokens * per_token
            return Mean(value, value, value, 0.0, len(costs))
        shares = zip(costs, self.lengths, strict=True)
        return mean_interval([self.tokens * (c / n * scale + per_token) for c, n in shares])


class _Clock:
    """Records the seconds and computed tokens of the steps of a cram, and the slots in use."""

    def __init__(self, on_status: Callable[[CramStatus], None] | None) -> None:
        self.on_status = on_status
        self.last = (0.0, 0)  # seconds in steps, computed tokens
        self.laps: list[tuple[int, float, int]] = []  # slots taken, seconds, computed tokens

    def __call__(self, status: CramStatus) -> None:
        if self.on_status is not None:
            self.on_status(status)
        if status.engine is None or status.stage != "cramming":
            return
        e = status.engine
        seconds, tokens = self.last
        self.laps.append((e.in_slots, e.seconds - seconds, e.tokens - tokens))
        self.last = (e.seconds, e.tokens)

    def seconds_per_token(self) -> float:
        """Seconds of a computed token while slots were busy; 0 if nothing was crammed."""
        max_slots = max((slots for slots, _, _ in self.laps), default=0)
        busy = [(s, n) for slots, s, n in self.laps if slots >= BUSY * max_slots]
        return sum(s for s, _ in busy) / max(1, sum(n for _, n in busy))
