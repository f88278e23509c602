"""Training of a usable encoder, whose vectors serve both decoding mode and context mode.

The losses are those of cramming usable vectors (memvec.usable.term), with the model's own trigger:

    cross-entropy of the passage after [vectors] trigger (decoding mode)
    + weight x mean over a query's tokens of KL(model after [BOS text] || model after [vectors])

Passages are drawn from the text; a passage's query is the text that follows it. Every fourth step
draws the number of vectors from 1 to the number of slots, so that the encoder works for any of
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.companions.around import MADE_BY
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import view_for
from memvec.encoders.adapted import own_summary
from memvec.encoders.adapter_training import AdapterPlan, AdapterTraining
from memvec.encoders.training_run import seeded
from memvec.encoders.usable import UsableEncoder, UsableNetwork, fresh, own_trigger_of
from memvec.errors import MemvecError
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.usable.queries import after_bos
from memvec.usable.teacher import divergence_at, likeliest, states_after

SHARE_OF_MEAN = 0.05  # weight of the newest step in the displayed running mean of the KL


@dataclass(frozen=True)
class UsablePlan(AdapterPlan):
    """Every choice of a run that trains a usable encoder.

    Raises MemvecError for a choice out of range.
    """

    lr: float = 2e-3
    query_tokens: int = 32
    """Tokens after each passage, on which the vectors stand for it."""
    weight: float = 8.0
    """Weight of the divergence (KL, nats per token) beside the passage's cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_1("query_tokens")
        if not 0 <= self.weight < float("inf"):
            raise MemvecError(f"weight must be a number from 0, not {self.weight}.")


class UsableTraining(AdapterTraining):
    """A training run of a usable encoder, with the trigger of the model's folder, or BOS.

    Raises MemvecError as `AdapterTraining`, and for a model that has neither of the two.
    """

    makes = UsableEncoder
    reached = "nats a token to the text"
    plan: UsablePlan
    network: UsableNetwork

    @plain_torch()
    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: UsablePlan) -> None:
        super().__init__(lm, stream, plan)
        recipe = Recipe.of("usable")
        self.fast = view_for(self.fast, recipe)
        if not self.fast.trigger:
            raise MemvecError(
                f"{lm.name} has no BOS token and no trigger in its folder to ask for a passage "
                f"with: make one with {MADE_BY}."
            )
        self.identity["trigger"] = own_trigger_of(lm)
        summary_encoder = own_summary(lm)
        self.identity["begun_at"] = summary_encoder.identity if summary_encoder else None
        self.top = min(recipe.teacher_top, lm.vocab_size - 1)
        with seeded(plan.seed):
            self.network = fresh(lm, slots=plan.slots, rank=plan.rank).begun(lm, self.mean)
        self.begin()
        self.target = 0.0
        before = self.fast.inputs_before(plan.slots, "bos")
        longest = plan.slots * plan.longest
        largest = longest + max(before, plan.query_tokens + 1)
        if lm.context is not None and largest > lm.context:
            raise MemvecError(
                f"{plan.slots} vectors, passages of {longest} tokens and queries of "
                f"{plan.query_tokens} do not fit the context of {lm.name} ({lm.context}): use "
                "fewer slots, or shorter passages or queries."
            )
        if longest + plan.query_tokens > len(self.text):
            raise MemvecError(
                f"{len(stream)} tokens are too few to train an encoder on passages of {longest} "
                f"and {plan.query_tokens} after them: give more text."
            )

    def _train_step(self) -> tuple[float, float]:
        plan = self.plan
        draw = self._generator("step", self.step)
        K = plan.slots
        if self.step % 4 == 3:
            K = int(torch.randint(1, plan.slots + 1, (), generator=draw))
        T = K * int(torch.randint(plan.shortest, plan.longest + 1, (), generator=draw))
        count = max(1, plan.positions // (3 * T + 2 * plan.query_tokens + 4 * K))
        windows = self._windows(self.text, count, T + plan.query_tokens, draw)
        ids, query = windows[:, :T], windows[:, T:]
        vectors = UsableEncoder(self.network).read(self.fast, ids, K)
        decoding = self.fast.states(vectors, ids, "bos")
        loss, accuracy, gradient = self._scored(decoding, ids)
        context = self.fast.states(vectors, query, "vectors")
        nats, slope = self._divergence(context, ids, query)
        self._move([decoding, context], [gradient, plan.weight * slope])
        share = max(SHARE_OF_MEAN, 1 / self.step)
        self.target += share * (nats - self.target)
        return loss, accuracy

    def _divergence(
        self, states: Float[Tensor, "B L H"], ids: Int[Tensor, "B T"], query: Int[Tensor, "B L"]
    ) -> tuple[float, Float[Tensor, "B L H"]]:
        """Mean KL in nats per token to the model after the text, and its gradient at the states."""
        lm = self.fast
        with torch.no_grad():
            teacher = likeliest(lm.head(states_after(lm, after_bos(lm, ids), query)), self.top)
        share = torch.full(query.shape, 1 / query.numel(), device=query.device)
        losses, gradient = divergence_at(
            lm.head, states.detach(), teacher, share, V=self.lm.vocab_size
        )
        return float(losses.sum()), gradient

    def _finished(self) -> UsableEncoder:
        """The encoder, rounded to bfloat16 as in its file."""
        return UsableEncoder(self.network.to(torch.bfloat16), own_trigger_of(self.lm))
