"""The step of the term `use`: not every passage is asked for, and the front is read only once.

Most of what a step costs is to ask for the passage, and most of what it tells is that its tokens
are as right as before. Until a passage settles (`Recipe.settle`) it is asked for in one step of so
many (`Recipe.objective_every`); the steps between follow the term `use` alone (docs/usable.md).
Turns go by the passage's own steps, whoever is beside it. What stands in front of the vectors is
the same at every step, and is read once for all of them (memvec.usable.front).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.batch import BatchState
from memvec.cramming.objectives import Score
from memvec.cramming.step import Measurement, Step
from memvec.usable.front import with_front_read
from memvec.usable.teacher import Teacher

# A step without an exact passage takes back what so many steps with one have put on the weight, so
# that it settles where seven of eight steps have one. How far it goes from the recipe's weight.
FALLS, MIN_WEIGHT, MAX_WEIGHT = 7, 1 / 32, 128.0


class Turns(Step):
    """A step for a term with forward passes of its own.

    All rows are computed with `fixed_shapes` and `graphs`, where products keep their shape. Without
    them a GPU waits, in each step, until it is known which rows are asked.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.module = self.term.module = with_front_read(self.module)
        self.leaves_out = self.recipe.objective_every > 1 and not self.keeps_shape

    def asked(self, batch: BatchState) -> Bool[Tensor, " B"]:
        """Everybody but passages between two turns that have time left to settle."""
        turn = batch.steps % self.recipe.objective_every == 0
        return turn | (batch.steps >= self.recipe.settle)

    def _keep_best(
        self, batch: BatchState, measured: Measurement, padding_rows: int
    ) -> Bool[Tensor, " B"]:
        """For the schedule of who was not asked, this was no step."""
        if self.recipe.objective_every == 1:
            return super()._keep_best(batch, measured, padding_rows)
        before = batch.schedule.head(len(batch))
        newly_enlarged = super()._keep_best(batch, measured, padding_rows)
        for field in fields(before):
            was, now = (getattr(state, field.name) for state in (before, batch.schedule))
            asked = measured.asked.reshape(-1, *(1 for _ in now.shape[1:]))
            setattr(batch.schedule, field.name, torch.where(asked, now, was))
        return newly_enlarged & measured.asked

    def _better_by_term(
        self,
        batch: BatchState,
        loss: Float[Tensor, " B"],
        better: Bool[Tensor, " B"],
        whole: Bool[Tensor, " B"],
    ) -> Bool[Tensor, " B"]:
        """With `term_rise`, the weight also follows whether the passage, if it was asked for, came.

        Exactness is a condition and use a wish: the weight that asks for as much use as leaves the
        passage exact is another one for each passage, and at each stage of its cramming.
        """
        if rise := self.recipe.term_rise:
            assert isinstance(batch.term, Teacher)
            factor = torch.where(whole, 1 + rise, (1 + rise) ** -FALLS)
            factor = torch.where(self.asked(batch), factor, 1.0)
            batch.term.weight = (batch.term.weight * factor).clamp(MIN_WEIGHT, MAX_WEIGHT)
        return super()._better_by_term(batch, loss, better, whole)

    def score_of(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "N n"],
        temperature: Float[Tensor, " N"],
        asked: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "N T H"], Score]:
        """Of rows that are left out, losses and gradients are 0."""
        if not self.leaves_out:
            return super().score_of(vectors, ids, temperature, asked)
        rows = asked.nonzero()[:, 0]
        if not len(rows):  # states of nobody, attached to the vectors as all states are
            states = vectors[:, :1].expand(-1, ids.shape[1] - self.given, -1)
            none = torch.zeros_like(states)
            return states, Score(none[..., 0], none[..., 0], none)
        states, score = self.passed(vectors[rows], ids[rows], temperature[rows])
        parts = (states, score.loss, score.margin, score.gradient)
        states, *figures = (
            part.new_zeros(len(ids), *part.shape[1:]).index_copy(0, rows, part) for part in parts
        )
        return states, Score(*figures)
