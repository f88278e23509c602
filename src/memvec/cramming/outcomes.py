"""Outcomes of passages: free decoding of the stored vectors decides which are exact.

All measures in the record of a passage are measured here, in one pass, from the vectors as they
will be stored. Only the costs come from the optimisation.
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
    """A passage that has left its slot, with its vectors and costs.

    `status` is 'done' (every margin is met), 'budget' or 'not-finite'. `min_mem_bits` is the
    smallest H_mem of all steps, bits; that of the kept vectors may be larger. It is infinite if the
    loss of a step is not the cross-entropy of the whole passage.
    """

    passage: Passage
    vectors: Tensor  # (K, D) float32, already rounded as they will be stored
    status: Status
    margin_asked: float  # margin that certification requires, logits
    _: KW_ONLY
    steps: int
    spent: int  # forward-backward tokens
    seconds: float  # the passage's share of the wall time of the batch
    min_mem_bits: float = math.inf


@dataclass(frozen=True)
class Outcome(Finished):
    """A finished passage with its measures; free-running decoding alone decides `exact`.

    `vectors` have the dtype in which a file stores them. `metrics` are the measures of the passage,
    computed from `scores`, the bits and margins of its positions (None if the outcome was read from
    a journal). `corrections` are listed tokens that decoding puts in their places; there are none
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
def outcomes_of(
    lm: FrozenLM,
    finished: Sequence[Finished],
    start_rule: StartRule,
    storage: Storage,
    corrections: int | Sequence[Corrections] = 0,
) -> Iterator[Outcome]:
    """Decode and measure finished passages as one batch; yields their outcomes in order.

    The vectors are rounded as `storage` stores them. `corrections` is the maximum number of tokens
    that may be listed for each passage (memvec.corrections chooses them), or the lists themselves.
    Passages with vectors that are not finite are not exact; their vectors are replaced by zeros.
    """
    if not finished:
        return
    vectors = storage.rounded(torch.stack([f.vectors.float() for f in finished]))
    passages = [f.passage for f in finished]
    finite = torch.isfinite(vectors).flatten(1).all(1)
    vectors = torch.where(finite[:, None, None], vectors, 0.0)
    given = int(start_rule == "first-token")
    batch = position_scores(lm, vectors, passages, start_rule)
    scores = [batch[i, : len(f.passage) - given] for i, f in enumerate(finished)]
    if isinstance(corrections, int):
        n, pairs = corrections, zip(finished, scores, strict=True)
        corrections = [pick(s.margin, f.passage.ids, f.margin_asked, n) for f, s in pairs]
    decoded = decode_ids(
        lm,
        vectors,
        [len(p) for p in passages],
        start_rule=start_rule,
        first=[p.ids[0] for p in passages] if start_rule == "first-token" else None,
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
def position_scores(
    lm: FrozenLM,
    vectors: Float[Tensor, "B K D"],
    passages: Sequence[Passage],
    start_rule: StartRule,
) -> PositionScores:
    """Teacher-forced scores (B, N) of every predicted position, with the vectors and without.

    N is T of the longest passage, or T - 1 if the first token is given. Without vectors, the model
    reads a passage after BOS. A passage that begins with BOS gets no second one; this BOS counts as
    given, at 0 bits, as in the published gains. For a model without a BOS, the first token costs
    log2 V bits without vectors. Rows of shorter passages are right-padded, and values in the
    padding have no meaning.
    """
    B, longest = len(passages), max(map(len, passages))
    given = int(start_rule == "first-token")
    ids = padded_ids(passages, longest).to(lm.device)
    states, measured = lm.states(vectors.to(lm.device), ids, start_rule), (surprisal, margins)
    bits, margin = at_states(lm, states, ids[:, given:], *measured)
    if given or lm.bos_id is not None:
        # `bos` is true for passages that begin with BOS, and false for all if the first token is
        # given (no id is -1). Rows with BOS are shifted left by one, so that the BOS in front is
        # their own. Then their scores are shifted right, after those of BOS: 0 bits, margin 1.
        bos = ids[:, :1].eq(-1 if given else lm.bos_id or 0)
        read = torch.where(bos, ids.roll(-1, 1), ids)
        base = lm.states(None, read, "first-token" if given else "bos")
        alone = at_states(lm, base, read[:, given:], *measured)
        base_bits, base_margin = (
            torch.where(bos.cpu(), torch.cat([torch.full_like(x[:, :1], first), x[:, :-1]], 1), x)
            for x, first in zip(alone, (0.0, 1.0), strict=True)
        )
    else:
        # This model has no token that starts a text: the first token costs log2 V bits.
        base_bits = base_margin = bits.new_empty(B, 0)
        if longest > 1:
            states = lm.states(None, ids, "first-token")
            base_bits, base_margin = at_states(lm, states, ids[:, 1:], *measured)
        # The margin -1 makes the first token a miss of the model alone.
        first = torch.full((B, 1), float(torch.tensor(float(lm.vocab_size)).log2()))
        base_bits = torch.cat([first, base_bits], dim=1)
        base_margin = torch.cat([torch.full_like(first, -1.0), base_margin], dim=1)
    return PositionScores(bits, margin, base_bits, base_margin)
