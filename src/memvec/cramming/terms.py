"""A second loss on the vectors, beside the objective.

The objective makes the vectors give the passage back. A term adds a second aim, with a weight
(`Recipe.term_weight`): the vectors stand for the text as context (`use`), or the hidden states
after them resemble those of the plain text (`alignment`). A term keeps state for each slot (what
was computed once for the passage), and returns, at each step, the loss of each slot and the
gradient that goes back to the vectors.

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

# Steps after `settle` after which the term has half its weight for a passage that is not exact.
YIELDS_AFTER = 40


@dataclass
class NoRows(Rows):
    """A term that keeps nothing for a slot."""


@dataclass(frozen=True)
class TermLoss:
    """The loss of each slot in one step, and the gradients for the backward pass.

    `outputs` are tensors that are attached to the parameters, with the slots (and padding rows) on
    their first axis; `gradients` are the gradients of each row's loss at them.
    """

    loss: Float[Tensor, " B"]
    outputs: tuple[Tensor, ...] = ()
    gradients: tuple[Tensor, ...] = ()


class Term:
    """The common skeleton of a second loss; made once for an engine.

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
        """Rows of passages that enter a slot. They depend on each passage alone."""
        return NoRows()

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Entered around the forward pass of the objective, for a term that reads along."""
        return contextlib.nullcontext()

    @property
    def watches(self) -> bool:
        """True for a term that reads along."""
        return type(self).watching is not Term.watching

    def measure(
        self, vectors: Float[Tensor, "N K D"], batch: BatchState, columns: int, padding_rows: int
    ) -> TermLoss:
        """The loss of each slot at these vectors, attached to the parameters (N: B and padding)."""
        raise MemvecError(f"the term '{self.recipe.term}' has no method measure.")

    def slopes(
        self, measured: TermLoss, counted: Int[Tensor, " B"], padding_rows: int
    ) -> tuple[Tensor, ...]:
        """The gradients at the outputs; `counted` are the tokens of each passage that count."""
        return measured.gradients

    def certificate(
        self, mem: MemVectors, passages: Sequence[Sequence[int]]
    ) -> dict[str, Any] | None:
        """The certificate of the finished vectors for this term, as a file keeps it; None: nothing.

        `passages` are the token ids that were crammed.
        """
        return None

    def inputs(self, counted: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Inputs of forward and backward passes that a step of the term costs each passage."""
        return torch.zeros_like(counted)

    def weight(self, batch: BatchState) -> Float[Tensor, " B"]:
        """The weight of the term beside the objective, for each slot.

        The recipe's weight, which falls with each step for a passage that is not exact after
        `Recipe.settle` steps: exactness is required, the term is not.
        """
        if not self.recipe.settle:
            return torch.full_like(batch.term_mean, self.recipe.term_weight)
        late = (batch.steps - self.recipe.settle).clamp_min(0) / YIELDS_AFTER
        late = torch.where(batch.schedule.best >= batch.length, 0.0, late)
        return self.recipe.term_weight * torch.exp2(-late.float())


class NoTerm(Term):
    """None: the objective alone."""

    def measure(
        self, vectors: Float[Tensor, "N K D"], batch: BatchState, columns: int, padding_rows: int
    ) -> TermLoss:
        return TermLoss(torch.zeros(len(batch), device=vectors.device))
