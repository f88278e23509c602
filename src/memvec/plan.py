"""What a cram of a document will take, from cramming a sample of it: vectors, bytes and time.

The sample is stratified: the document is cut into equal parts and a passage is taken at a random
place of each, cut by the same rule as `cram` cuts and crammed by the same engine, halves of what
does not fit included. A place costs 1 / tokens vectors per token there, so the mean of vectors /
tokens over places, times the document's tokens, is what the whole will need; seconds likewise, from
each passage's forward-backward tokens, the rate of full slots, what filling slots, certifying and
cutting took. Intervals are 95 % (Student's t)
over the places. The sample of a short document is all of it: then the plan is a measurement.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from memvec.cram_job import CramJob, Status
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.passages.documents import Document
from memvec.passages.passage import Passage
from memvec.passages.sources import seeded_random as rng
from memvec.statistics import Mean, mean_interval
from memvec.storage import storage_of

SAMPLE = 32  # passages
FULL = 0.5  # a step counts for the rate while at least this share of the most slots is taken


@dataclass(frozen=True)
class Plan:
    """What the whole document will take; `sampled` passages with `sampled_tokens` were crammed.

    Means of places: `tokens_per_vector`, `bits_per_vector` (what the vectors had to remove).
    Totals: `vectors`, `vector_bytes`, `seconds` (of one machine like this one, after the model is
    loaded). `inexact` sampled passages did not become exact even in the shortest pieces.
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
        """As a plain dictionary."""
        return asdict(self)


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
    on_status: Callable[[Status], None] | None = None,
) -> Plan:
    """Cram `sample` passages spread over the document and say what all of it would take.

    Options are those of `memvec.cram`. Raises MemvecError for bad input, as `cram` does.
    """
    if sample < 2:
        raise MemvecError(f"--sample must be at least 2, not {sample}.")
    clock = _Clock(on_status)
    began = time.perf_counter()
    work = CramJob(
        lm,
        [document],
        vectors,
        tokens,
        recipe or Recipe(),
        batch_size,
        storage_of(storage),
        None,
        clock,
    )
    places, cutting = _places(work, document, sample, seed)
    work.sit(places)  # with the trial step that is timed for the sentence before the start
    beside = time.perf_counter()
    work.cram(places)
    certifying = time.perf_counter()
    # Filling slots and certifying of a piece, whether it stayed or was halved.
    beside = max(0.0, certifying - beside - work.engine.seconds) / max(1, len(work.spent))
    mem, _ = work.certified(keep_text=False)
    certifying = (time.perf_counter() - certifying) / sum(map(len, places))

    rate = clock.seconds_per_token()
    padded = work.engine.tokens / max(1, sum(work.spent.values()))
    pieces, lasted, bits = [], [], []
    for place in places:
        here = range(place.offset, _end(place))
        mine = [outcome for (_, at), outcome in work.done.items() if at in here]
        pieces.append(float(vectors * len(mine)))
        tried = [n for (_, at, _), n in work.spent.items() if at in here]
        lasted.append(sum(tried) * padded * rate + len(tried) * beside)
        bits.append(sum(outcome.metrics.lm_bits for outcome in mine))
    total, lengths = len(document.ids), [len(place) for place in places]
    complete = sum(lengths) == total

    def whole(costs: list[float], each: float = 1.0, per_token: float = 0.0) -> Mean:
        """The document's total of what places cost, `each` of it, and so much for every token."""
        if complete:
            sum_ = math.fsum(costs) * each + total * per_token
            return Mean(sum_, sum_, sum_, 0.0, len(costs))
        shares = zip(costs, lengths, strict=True)
        return mean_interval([total * (cost / n * each + per_token) for cost, n in shares])

    return Plan(
        tokens=total,
        text_bytes=document.size,
        sampled=len(places),
        sampled_tokens=sum(lengths),
        sampled_seconds=time.perf_counter() - began,
        inexact=sum(not outcome.exact for outcome in work.done.values()),
        tokens_per_vector=mean_interval([n / k for n, k in zip(lengths, pieces, strict=True)]),
        bits_per_vector=mean_interval([b / k for b, k in zip(bits, pieces, strict=True)]),
        vectors=whole(pieces),
        vector_bytes=whole(pieces, each=mem.storage.size(vectors, lm.width) / vectors),
        seconds=whole(lasted, per_token=cutting + certifying),
    )


def _end(passage: Passage) -> int:
    return passage.offset + len(passage)


def _places(
    work: CramJob, document: Document, sample: int, seed: int
) -> tuple[list[Passage], float]:
    """The sample, and the seconds that cutting takes for each token of the document."""
    cutter, least = work.cutter()
    ids, began = document.ids, time.perf_counter()
    draw = rng("plan", seed, document.sha256)
    found = []
    for i in range(sample):
        low, high = len(ids) * i // sample, len(ids) * (i + 1) // sample
        at = min(draw.randrange(low, max(low + 1, high)), max(0, len(ids) - least))
        passage = next(cutter.cut(ids[at:], 0, least))
        found.append(Passage(passage.ids, 0, at))
    if sum(map(len, found)) > len(ids) / 2:
        found = list(cutter.cut(ids, 0, least))
    # Outcomes find their place by where they begin: of two that overlap the later one stays.
    found = [p for p, q in zip(found, [*found[1:], None], strict=True) if q is None or _apart(p, q)]
    return found, (time.perf_counter() - began) / sum(map(len, found))


def _apart(passage: Passage, following: Passage) -> bool:
    return _end(passage) <= following.offset


class _Clock:
    """Hears how the cram goes, and keeps what steps with many slots taken cost."""

    def __init__(self, on_status: Callable[[Status], None] | None) -> None:
        self.on_status = on_status
        self.last = (0.0, 0)  # seconds in steps, tokens
        self.laps: list[tuple[int, float, int]] = []  # slots, seconds, tokens

    def __call__(self, status: Status) -> None:
        if self.on_status is not None:
            self.on_status(status)
        if status.engine is None or status.stage != "cramming":
            return
        e = status.engine
        then, tokens = self.last
        self.laps.append((e.in_slots, e.seconds - then, e.tokens - tokens))
        self.last = (e.seconds, e.tokens)

    def seconds_per_token(self) -> float:
        """Seconds of a computed token while slots were taken; 0 if nothing was crammed."""
        most = max((batch_size for batch_size, _, _ in self.laps), default=0)
        busy = [(s, n) for batch_size, s, n in self.laps if batch_size >= FULL * most]
        return sum(s for s, _ in busy) / max(1, sum(n for _, n in busy))
