"""A step in which not every passage is asked for (`Recipe.objective_every`).

Most of what a step costs is to ask for the passage, and most of what it tells is that its tokens
are as right as before. Until a passage settles (`Recipe.settle`) it is asked for in one step of so
many; the steps between follow the term `use` alone (docs/usable.md). Turns go by the passage's own
steps, whoever is beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.batch import BatchState
from memvec.cramming.objectives import Score
from memvec.cramming.step import Step


class Turns(Step):
    """A step for a term with forward passes of its own.

    All rows are computed with `fixed_shapes` and `graphs`, where products keep their shape. Without
    them a GPU waits, in each step, until it is known which rows are asked.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.leaves_out = self.recipe.objective_every > 1 and not self.keeps_shape

    def asked(self, batch: BatchState) -> Bool[Tensor, " B"]:
        """Everybody but passages between two turns that have time left to settle."""
        turn = batch.steps % self.recipe.objective_every == 0
        return turn | (batch.steps >= self.recipe.settle)

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
