"""Terms: a second loss on the vectors, which is added to the objective.

The objective makes the vectors give the passage back. A term has another aim, with the weight
`Recipe.term_weight`: the vectors stand for the text as context (`use`), or the hidden states after
them are similar to those of the plain text (`alignment`). A term keeps state for each slot that it
computes once for the passage. At each step it returns the loss of each slot, and gradients for the
backward pass to the vectors.

    from memvec import register
    from memvec.cramming.terms import Term, TermLoss

    @register("term", "small")
    class Small(Term):
        def measure(self, vectors, batch, columns, padding_rows):
            loss = vectors.square().mean((1, 2))
            return TermLoss(loss[: len(batch)].detach(), (loss,), (torch.ones_like(loss),))
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import Passage

if TYPE_CHECKING:
    from memvec.cramming.batch import BatchState
    from memvec.cramming.step import Step
    from memvec.vectors import MemVectors

# Steps after `Recipe.settle` in which the weight of the term halves, for a passage not exact yet.
YIELDS_AFTER = 40


@dataclass
class NoRows(Rows):
    """The state of a term that keeps nothing for a slot."""


@dataclass(frozen=True)
class TermLoss:
    """The loss of each slot in one step, and the gradients for the backward pass.

    `outputs` are tensors attached to the parameters; their first axis is N (slots and padding
    rows). `gradients` are the gradients of each row's loss at the outputs.
    """

    loss: Float[Tensor, " B"]
    outputs: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()


class Term:
    """The base of second losses; an engine makes one instance.

    `module` computes the steps: `lm` itself, or a copy of its weights in a faster dtype.
    `step_type` is a subclass of Step, for a term that changes what a step does.
    """

    step_type: type[Step] | None = None

    def __init__(
        self, lm: FrozenLM, module: FrozenLM, recipe: Recipe, K: int, start_rule: StartRule
    ) -> None:
        self.lm, self.module, self.recipe, self.K = lm, module, recipe, K
        self.start_rule = start_rule

    def fresh(self, passages: Sequence[Passage]) -> Rows:
        """State of passages that enter a slot; a row may depend on its own passage only."""
        return NoRows()

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Context manager around the forward pass of the objective, for a term that observes it."""
        return contextlib.nullcontext()

    @property
    def watches(self) -> bool:
        """True for a term that observes the forward pass of the objective."""
        return type(self).watching is not Term.watching

    def measure(
        self, vectors: Float[Tensor, "N K D"], batch: BatchState, columns: int, padding_rows: int
    ) -> TermLoss:
        """The loss of each slot at `vectors`, which are attached to the parameters.

        N is B plus `padding_rows`; `columns` is the number of predicted columns of this step.
        """
        raise MemvecError(f"the term '{self.recipe.term}' has no method measure.")

    def slopes(
        self, measured: TermLoss, counted: Int[Tensor, " B"], padding_rows: int
    ) -> tuple[Tensor, ...]:
        """The gradients at the outputs of `measure`; `counted` tokens of each passage count."""
        return measured.gradients

    def certificate(
        self, mem: MemVectors, passages: Sequence[Sequence[int]]
    ) -> dict[str, Any] | None:
        """The certificate of this term for finished vectors, as stored in a file; None: none.

        `passages` are the token ids that were crammed.
        """
        return None

    def inputs(self, counted: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Forward-backward tokens that a step of the term costs each passage."""
        return torch.zeros_like(counted)

    def weight(self, batch: BatchState) -> Float[Tensor, " B"]:
        """The weight of the term for each slot; the objective has weight 1.

        It is the recipe's weight. After `Recipe.settle` steps it falls with each step of a passage
        that is not exact, because a passage must be exact, and need not have a small second loss.
        """
        if not self.recipe.settle:
            return torch.full_like(batch.term_mean, self.recipe.term_weight)
        late = (batch.steps - self.recipe.settle).clamp_min(0) / YIELDS_AFTER
        late = torch.where(batch.schedule.best >= batch.length, 0.0, late)
        return self.recipe.term_weight * torch.exp2(-late.float())


class NoTerm(Term):
    """No second loss."""

    def measure(
        self, vectors: Float[Tensor, "N K D"], batch: BatchState, columns: int, padding_rows: int
    ) -> TermLoss:
        return TermLoss(torch.zeros(len(batch), device=vectors.device))
