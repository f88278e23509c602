"""Certification: stored vectors are reloaded, decoded and measured; this decides what is exact.

Everything in an outcome's record is measured here, in one pass, on the vectors as they will be
stored. Only the costs come from the optimisation, and the positions are not measured again later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.corrections import Corrections, pick
from memvec.decoding import decode_ids, first_error
from memvec.metrics import margins, surprisal
from memvec.model.heads import at_states
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import Passage, padded_ids
from memvec.results import Measures, PassageResult, PositionScores, Status
from memvec.storage import Storage


@dataclass(frozen=True)
class Finished:
    """A passage that left its slot: 'done' (every margin met), 'budget' or 'not-finite'.

    `min_mem_bits` is the smallest H_mem of all its steps, bits, which need not be that of the
    kept vectors; infinite where the loss of a step is not the cross-entropy of the whole passage.
    """

    passage: Passage
    vectors: Tensor  # (K, D) float32, already rounded as they will be stored
    status: Status
    margin_asked: float  # that certification requires, logits
    _: KW_ONLY
    steps: int
    spent: int  # forward-backward tokens
    seconds: float  # its share of the wall time of the batch
    min_mem_bits: float = math.inf


@dataclass(frozen=True)
class Outcome(Finished):
    """A finished passage with its measures; `exact` is decided by free-running decoding alone.

    `vectors` are in the dtype in which a file holds them. `metrics` are its measures, `scores` the
    bits and margins of each position that they were computed from (None for an outcome that was
    read from a journal). Decoding puts the listed `corrections` in their places; there are none
    unless the recipe allows them.
    """

    exact: bool
    metrics: Measures
    corrections: Corrections = ()
    scores: PositionScores | None = None

    @property
    def result(self) -> PassageResult:
        """The record of this passage: its measures, how it was crammed, and the costs."""
        return PassageResult(
            **self.metrics.model_dump(),
            status=self.status,
            exact=self.exact,
            margin_asked=self.margin_asked,
            steps=self.steps,
            spent=self.spent,
            seconds=self.seconds,
        )


@torch.no_grad()
def certify(
    lm: FrozenLM,
    finished: Sequence[Finished],
    start: StartRule,
    storage: Storage,
    corrections: int | Sequence[Corrections] = 0,
) -> Iterator[Outcome]:
    """Decode and measure finished passages in a batch, from the vectors as stored, in their order.

    `corrections`: how many tokens of each passage may be listed (memvec.corrections chooses them),
    or the lists themselves. Vectors that are not finite are not exact; zeros replace them.
    """
    if not finished:
        return
    # The same rounding as in a file: whoever reads the file gets these numbers.
    vectors = storage.rounded(torch.stack([f.vectors.float() for f in finished]))
    passages = [f.passage for f in finished]
    usable = torch.isfinite(vectors).flatten(1).all(1)
    vectors = torch.where(usable[:, None, None], vectors, 0.0)
    given = int(start == "first-token")
    batch = positions(lm, vectors, passages, start)
    scores = [batch[i, : len(f.passage) - given] for i, f in enumerate(finished)]
    if isinstance(corrections, int):
        n, pairs = corrections, zip(finished, scores, strict=True)
        corrections = [pick(s.margin, f.passage.ids, f.margin_asked, n) for f, s in pairs]
    decoded = decode_ids(
        lm,
        vectors,
        [len(p) for p in passages],
        start=start,
        first=[p.ids[0] for p in passages] if start == "first-token" else None,
        corrections=corrections,
    )
    for f, stored, ids, score, fixed in zip(
        finished, vectors, decoded, scores, corrections, strict=True
    ):
        error = first_error(ids, f.passage.ids)
        horizon = len(f.passage) - given if error is None else error - given
        corrected = [position - given for position, _ in fixed]
        yield Outcome(
            **{**vars(f), "vectors": stored.to(storage.dtype)},  # a file holds finite numbers only
            exact=error is None and bool(torch.isfinite(f.vectors).all()),
            metrics=score.measures(len(f.passage), horizon, corrected),
            corrections=fixed,
            scores=score,
        )


@torch.no_grad()
def positions(
    lm: FrozenLM, vectors: Float[Tensor, "B K D"], passages: Sequence[Passage], start: StartRule
) -> PositionScores:
    """The scores (B, N) of every predicted position, teacher-forced, with the vectors and without.

    N is T of the longest passage, or T - 1 where the first token is given. Without vectors, a
    passage whose first token is BOS is read as it is, not after a second BOS, and its first token
    costs no bits: it is given, as in the published gains. For a model without a BOS, the first
    token costs log2 V bits without vectors. Rows of shorter passages are right-padded; values in
    the padding have no meaning.
    """
    B, longest, given = len(passages), max(len(p) for p in passages), int(start == "first-token")
    ids = padded_ids(passages, longest).to(lm.device)
    states, measured = lm.states(vectors.to(lm.device), ids, start), (surprisal, margins)
    bits, margin = at_states(lm, states, ids[:, given:], *measured)
    if given or lm.bos_id is not None:
        # Passages that begin with BOS; none where the first token is given: no id is -1. Their rows
        # are shifted left by one, so that the model reads their own BOS, and their scores are
        # shifted back, after those of the BOS itself: 0 bits, and a hit (a margin above 0).
        bos = ids[:, :1].eq(-1 if given else lm.bos_id or 0)
        read = torch.where(bos, ids.roll(-1, 1), ids)
        base = lm.states(None, read, "first-token" if given else "bos")
        alone = at_states(lm, base, read[:, given:], *measured)
        base_bits, base_margin = (
            torch.where(bos.cpu(), torch.cat([torch.full_like(x[:, :1], first), x[:, :-1]], 1), x)
            for x, first in zip(alone, (0.0, 1.0), strict=True)
        )
    else:
        # No token starts a text for this model: the first token costs log2 V without vectors.
        base_bits = base_margin = bits.new_empty(B, 0)
        if longest > 1:
            states = lm.states(None, ids, "first-token")
            base_bits, base_margin = at_states(lm, states, ids[:, 1:], *measured)
        # A margin below 0 counts as a miss of the model alone.
        first = torch.full((B, 1), float(torch.tensor(float(lm.vocab_size)).log2()))
        base_bits = torch.cat([first, base_bits], dim=1)
        base_margin = torch.cat([torch.full_like(first, -1.0), base_margin], dim=1)
    return PositionScores(bits, margin, base_bits, base_margin)
