"""The step of the term `use`: decoding mode is computed in some steps, and the front is read once.

The forward pass in decoding mode is the largest cost of a step, and usually the same tokens are
right as in the step before. Until step `Recipe.settle`, a passage is measured in decoding mode in
one of `Recipe.objective_every` steps; the other steps minimise the term `use` alone
(docs/usable.md). Which steps these are depends on the passage's own step count, not on the other
slots. The inputs in front of the vectors are the same at every step, so they are read once
(memvec.usable.front).
"""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.batch import BatchState
from memvec.cramming.rows import Rows
from memvec.cramming.step import Measurement, Step
from memvec.results import Score
from memvec.usable.front import with_front_read
from memvec.usable.teacher import Teacher

# A step without all tokens right lowers the weight by as much as FALLS steps with all tokens right
# raise it. So the weight converges to where seven of eight steps have all tokens right. The bounds
# are multiples of the recipe's weight.
FALLS, MIN_WEIGHT, MAX_WEIGHT = 7, 1 / 32, 128.0


class Turns(Step):
    """A step that leaves out decoding mode for some rows in some steps.

    With `fixed_shapes` or `graphs`, all rows are computed, so that shapes stay the same. Without
    them, each step synchronises with the device to learn which rows are in decoding mode.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.module = self.term.module = with_front_read(self.module)
        self.leaves_out = self.recipe.objective_every > 1 and not self.keeps_shape

    def in_decoding_mode(self, batch: BatchState) -> Bool[Tensor, " B"]:
        """Rows at a step that computes the objective, and rows from step `settle` on."""
        turn = batch.steps % self.recipe.objective_every == 0
        return turn | (batch.steps >= self.recipe.settle)

    def _update_progress(
        self, batch: BatchState, measured: Measurement, padding_rows: int
    ) -> Bool[Tensor, " B"]:
        """As in `Step`, but rows that are not in decoding mode keep their schedule's state."""
        if self.recipe.objective_every == 1:
            return super()._update_progress(batch, measured, padding_rows)
        before = copy.deepcopy(batch.schedule)
        newly_enlarged = super()._update_progress(batch, measured, padding_rows)
        _undo_rows(batch.schedule, before, ~measured.decoding)
        return newly_enlarged & measured.decoding

    def _better_by_term(
        self,
        batch: BatchState,
        loss: Float[Tensor, " B"],
        better: Bool[Tensor, " B"],
        all_right: Bool[Tensor, " B"],
    ) -> Bool[Tensor, " B"]:
        """As in `Step`; with `term_rise`, this also updates the weight of the term.

        All tokens must be right, and the KL should be small. The largest weight at which all tokens
        stay right differs between passages, and changes while they are crammed.
        """
        if rise := self.recipe.term_rise:
            assert isinstance(batch.term, Teacher)
            factor = torch.where(all_right, 1 + rise, (1 + rise) ** -FALLS)
            factor = torch.where(self.in_decoding_mode(batch), factor, 1.0)
            batch.term.weight = (batch.term.weight * factor).clamp(MIN_WEIGHT, MAX_WEIGHT)
        return super()._better_by_term(batch, loss, better, all_right)

    def score_of(
        self,
        vectors: Float[Tensor, "N K D"],
        ids: Int[Tensor, "N n"],
        temperature: Float[Tensor, " N"],
        decoding: Bool[Tensor, " B"],
    ) -> tuple[Float[Tensor, "N T H"], Score]:
        """The forward pass of the rows in decoding mode; other losses and gradients are 0."""
        if not self.leaves_out:
            return super().score_of(vectors, ids, temperature, decoding)
        rows = decoding.nonzero()[:, 0]
        if not len(rows):  # even without a row, autograd needs states attached to the vectors
            states = vectors[:, :1].expand(-1, ids.shape[1] - self.given, -1)
            none = torch.zeros_like(states)
            return states, Score(none[..., 0], none[..., 0], none)
        states, score = self.run_pass(vectors[rows], ids[rows], temperature[rows])
        parts = (states, score.loss, score.margin, score.gradient)
        states, *figures = (
            part.new_zeros(len(ids), *part.shape[1:]).index_copy(0, rows, part) for part in parts
        )
        return states, Score(*figures)


def _undo_rows(state: Rows, before: Rows, undone: Bool[Tensor, " B"]) -> None:
    """Give the rows where `undone` is True the values that they had `before`, in place."""
    for field in fields(state):
        now, was = (getattr(rows, field.name) for rows in (state, before))
        if isinstance(now, Rows):
            _undo_rows(now, was, undone)
        else:
            rows = undone.reshape(-1, *(1 for _ in now.shape[1:]))
            setattr(state, field.name, torch.where(rows, was, now))
