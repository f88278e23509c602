"""The term `use`: the KL of predictions after the vectors from predictions after the text.

    KL(model after [text] || model after [vectors]), mean over the tokens of a query, nats

The vectors have two modes. In decoding mode, a trigger follows them: [vectors] BOS -> passage. In
context mode, a query follows them directly. This term is measured in context mode only. After keys
and values (memvec.spaces), the first token of a query is given. With neighbours, most queries are
read after a row of passages (memvec.usable.neighbours).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.cramming.batch import BatchState
from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows, with_padding
from memvec.cramming.terms import Term, TermLoss
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import Passage
from memvec.usable.certificate import certify_use
from memvec.usable.neighbours import Neighbours, neighbours_of
from memvec.usable.queries import queries_of, text_inputs
from memvec.usable.teacher import (
    NeighbourPlaces,
    Teacher,
    TopTokens,
    answer_positions,
    divergence_at,
    joined,
    no_neighbours,
    states_as_context,
    top_tokens_after,
)
from memvec.usable.turns import Turns
from memvec.vectors import MemVectors


class Use(Term):
    """The divergence from the model after the text; a step uses one query of each passage.

    Raises MemvecError for one-step vectors, for another start rule than 'bos', for query_tokens
    below 2 if the first token is given, and as `neighbours_of` does.
    """

    step_type = Turns

    def __init__(
        self, lm: FrozenLM, module: FrozenLM, recipe: Recipe, K: int, start_rule: StartRule
    ) -> None:
        if not lm.reading.feeds_back:
            raise MemvecError("vectors that are read in one step cannot stand in front of a query.")
        if start_rule != "bos":
            raise MemvecError(
                "vectors that are to be used as context need a trigger after which the passage "
                "comes: use the start rule 'bos', or a token as the trigger."
            )
        if recipe.query_tokens < 2 and not lm.reading.predicts:
            raise MemvecError(
                f"in the space '{lm.reading.space}' the first token of a query is given, so "
                "query_tokens must be at least 2."
            )
        super().__init__(lm, module, recipe, K, start_rule)
        self.given = int(not lm.reading.predicts)  # leading tokens of a query not predicted
        self.neighbours: Neighbours | None = None
        if recipe.neighbours != "none":
            self.neighbours = neighbours_of(lm, recipe)

    def fresh(self, passages: Sequence[Passage]) -> Rows:
        """The queries of each passage, with the teacher's predictions."""
        return joined([self._teacher(passage) for passage in passages])

    def measure(
        self,
        vectors: Float[Tensor, "N K D"],
        batch: BatchState,
        columns: int,
        padding_rows: int,
    ) -> TermLoss:
        teacher = batch.term
        assert isinstance(teacher, Teacher)
        B = len(batch)
        row = torch.arange(B, device=batch.steps.device)
        query = batch.steps % teacher.queries.shape[1]
        ids, length = teacher.queries[row, query], teacher.length[row, query]
        with torch.enable_grad():
            states = self._states(vectors, ids, teacher.beside, query, padding_rows)
        counted = answer_positions(length, ids.shape[1])[:, self.given :]
        share = counted / counted.sum(-1, keepdim=True)
        # Padding rows are computed as well, so that products keep their shape and rounding.
        parts = [
            part[row, query, self.given :]
            for part in (teacher.top, teacher.log_p, teacher.log_others)
        ]
        *expected, weight = (with_padding(t, padding_rows) for t in (*parts, share))
        head, V = self.module.head, self.lm.vocab_size
        loss, gradient = divergence_at(head, states.detach(), TopTokens(*expected), weight, V=V)
        return TermLoss(loss[:B], (states,), (gradient,))

    def weight(self, batch: BatchState) -> Float[Tensor, " B"]:
        """The weight as in `Term`, times the passage's factor by `term_rise`."""
        assert isinstance(batch.term, Teacher)
        return super().weight(batch) * batch.term.weight

    def inputs(self, counted: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Forward-backward tokens per step: the vectors, if they are inputs, and a query."""
        start_rule: StartRule = "first-token" if self.given else "vectors"
        before = self.module.inputs_before(self.K, start_rule) - self.given
        before += self.neighbours.max_inputs if self.neighbours else 0  # all rows have this length
        return torch.full_like(counted, before + self.recipe.query_tokens)

    def certificate(
        self, mem: MemVectors, passages: Sequence[Sequence[int]]
    ) -> dict[str, Any] | None:
        """The certificate of use; None for vectors that are not exact."""
        if not mem.exact:
            return None
        return certify_use(self.lm, mem, passages).record()

    def _states(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "B L"],
        beside: NeighbourPlaces,
        query: Int[Tensor, " B"],
        padding_rows: int,
    ) -> Float[Tensor, "N n H"]:
        """Hidden states that predict a query of each row, after its vectors and neighbours."""
        module, queries = self.module, with_padding(ids, padding_rows)
        if self.neighbours is None:
            return states_as_context(module, vectors, queries)
        row = torch.arange(len(ids), device=ids.device)
        parts = [part[row, query] for part in (beside.neighbours, beside.in_front, beside.count)]
        inputs, used = self.neighbours.row(
            module.context_scale * vectors,
            module.embed(queries[:, :-1]),
            *(with_padding(p, padding_rows) for p in parts),
        )
        keep = inputs.shape[1] - self.K + 1  # from the last vector of a row without neighbours on
        cache = module.reading.cache(module, vectors)
        states = module.states_of(module.after_front(inputs), keep, cache)
        at = used[:, None] + torch.arange(queries.shape[1], device=ids.device)
        return states.gather(1, at[..., None].expand(-1, -1, states.shape[2]))

    def _teacher(self, passage: Passage) -> Teacher:
        # One passage at a time, so that its numbers do not depend on the other slots.
        lm, ids = self.lm, passage.ids
        if self.neighbours is not None:
            beside = self.neighbours.drawn(ids, self.recipe)
            queries = self.neighbours.queries(lm, ids, self.recipe, beside)
        else:
            queries = queries_of(lm, ids, self.recipe)
            beside = no_neighbours(len(queries.ids), lm.device)
        top_tokens = queries.teacher or top_tokens_after(
            lm, text_inputs(lm, ids), queries.ids, self.recipe.teacher_top
        )
        top, log_p, log_others = (part[None] for part in top_tokens)
        weight = torch.ones(1, device=lm.device)
        return Teacher(
            queries.ids.to(lm.device)[None],
            queries.length.to(lm.device)[None],
            top=top,
            log_p=log_p,
            log_others=log_others,
            beside=beside,
            weight=weight,
        )
