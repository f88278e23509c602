"""The step of the term `use`: decoding mode in some steps only, and the front is read once.

The forward pass in decoding mode is most of a step's cost, and mostly shows that the tokens are as
right as before. Until a passage settles (`Recipe.settle`) it is measured in decoding mode in one of
`Recipe.objective_every` steps; the other steps follow the term `use` alone (docs/usable.md). The
turn depends on the passage's own number of steps, not on its neighbours. The inputs in front of the
vectors are the same at every step and are read once for all steps (memvec.usable.front).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.batch import BatchState
from memvec.cramming.step import Measurement, Step
from memvec.results import Score
from memvec.usable.front import with_front_read
from memvec.usable.teacher import Teacher

# A step whose passage is not exact lowers the weight by as much as FALLS exact steps raise it, so
# that it settles where seven of eight steps are exact. The bounds are multiples of the recipe's.
FALLS, MIN_WEIGHT, MAX_WEIGHT = 7, 1 / 32, 128.0


class Turns(Step):
    """A step for a term with forward passes of its own.

    All rows are computed with `fixed_shapes` and `graphs`, where products keep their shape. Without
    them a GPU waits, in each step, until it is known which rows are in decoding mode.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.module = self.term.module = with_front_read(self.module)
        self.leaves_out = self.recipe.objective_every > 1 and not self.keeps_shape

    def in_decoding_mode(self, batch: BatchState) -> Bool[Tensor, " B"]:
        """All rows but those between two turns that have not settled yet."""
        turn = batch.steps % self.recipe.objective_every == 0
        return turn | (batch.steps >= self.recipe.settle)

    def _update_progress(
        self, batch: BatchState, measured: Measurement, padding_rows: int
    ) -> Bool[Tensor, " B"]:
        """As in any step, but rows that are not in decoding mode keep their schedule's state."""
        if self.recipe.objective_every == 1:
            return super()._update_progress(batch, measured, padding_rows)
        before = batch.schedule.head(len(batch))
        newly_enlarged = super()._update_progress(batch, measured, padding_rows)
        for field in fields(before):
            was, now = (getattr(state, field.name) for state in (before, batch.schedule))
            decoding = measured.decoding.reshape(-1, *(1 for _ in now.shape[1:]))
            setattr(batch.schedule, field.name, torch.where(decoding, now, was))
        return newly_enlarged & measured.decoding

    def _better_by_term(
        self,
        batch: BatchState,
        loss: Float[Tensor, " B"],
        better: Bool[Tensor, " B"],
        whole: Bool[Tensor, " B"],
    ) -> Bool[Tensor, " B"]:
        """With `term_rise`, each exact step raises the weight too, and each other step lowers it.

        Exactness is a condition and use a wish: the largest weight that leaves a passage exact
        differs between passages, and between stages of their cramming.
        """
        if rise := self.recipe.term_rise:
            assert isinstance(batch.term, Teacher)
            factor = torch.where(whole, 1 + rise, (1 + rise) ** -FALLS)
            factor = torch.where(self.in_decoding_mode(batch), factor, 1.0)
            batch.term.weight = (batch.term.weight * factor).clamp(MIN_WEIGHT, MAX_WEIGHT)
        return super()._better_by_term(batch, loss, better, whole)

    def score_of(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "N n"],
        temperature: Float[Tensor, " N"],
        decoding: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "N T H"], Score]:
        """Rows that are not in decoding mode may be left out: their losses and gradients are 0."""
        if not self.leaves_out:
            return super().score_of(vectors, ids, temperature, decoding)
        rows = decoding.nonzero()[:, 0]
        if not len(rows):  # no row; states have to be attached to the vectors all the same
            states = vectors[:, :1].expand(-1, ids.shape[1] - self.given, -1)
            none = torch.zeros_like(states)
            return states, Score(none[..., 0], none[..., 0], none)
        states, score = self.passed(vectors[rows], ids[rows], temperature[rows])
        parts = (states, score.loss, score.margin, score.gradient)
        states, *figures = (
            part.new_zeros(len(ids), *part.shape[1:]).index_copy(0, rows, part) for part in parts
        )
        return states, Score(*figures)
