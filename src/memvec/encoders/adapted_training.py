"""Training of an adapted encoder with the cross-entropy of the passage that it encodes.

For a LM with its own summary encoder, training begins with that encoder's values and draws passages
of all lengths from the first step. For others it begins with short passages, whose length grows
with the accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from memvec.encoders.adapted import AdaptedEncoder, AdaptedNetwork, fresh, own_summary
from memvec.encoders.adapter_training import AdapterPlan, AdapterTraining
from memvec.encoders.resumable import check_size
from memvec.encoders.training_run import seeded
from memvec.errors import MemvecError
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM

FIRST_TARGET = 2.0  # tokens per vector, for a LM without a summary encoder


@dataclass(frozen=True)
class AdaptedPlan(AdapterPlan):
    """Every choice of a run that trains an adapted encoder. Lengths in tokens per vector.

    Raises MemvecError for a choice out of range.
    """

    longest: int = 28
    several: float = 0.4
    """Share of steps with more than one vector for a passage."""
    size: float = 12.8
    """RMS of the vectors before training, beside a LM without a summary encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)


class AdaptedTraining(AdapterTraining):
    """A training run of an adapted encoder.

    Raises MemvecError as `AdapterTraining`, and for passages that do not fit the model's context or
    the held-out text.
    """

    makes = AdaptedEncoder
    plan: AdaptedPlan
    network: AdaptedNetwork

    @plain_torch()
    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: AdaptedPlan) -> None:
        super().__init__(lm, stream, plan)
        summary_encoder = own_summary(lm)
        self.identity["begun_at"] = summary_encoder.identity if summary_encoder else None
        with seeded(plan.seed):
            self.network = fresh(lm, rank=plan.rank).begun(lm, self.mean, plan.size)
        self.begin()
        self.grows = summary_encoder is None and not plan.begin
        self.target = FIRST_TARGET if self.grows else float(plan.longest)
        largest = plan.slots * (plan.longest + 1)
        if lm.context is not None and largest > lm.context:
            raise MemvecError(
                f"{plan.slots} vectors and passages of {plan.slots * plan.longest} tokens do not "
                f"fit the context of {lm.name} ({lm.context}): use fewer slots, or shorter "
                "passages."
            )
        if largest > len(self.text):
            raise MemvecError(
                f"{len(stream)} tokens are too few to train an encoder on passages of "
                f"{plan.slots * plan.longest}: give more text."
            )

    def _train_step(self) -> tuple[float, float]:
        plan = self.plan
        draw = self._generator("step", self.step)
        K = 1
        if plan.slots > 1 and float(torch.rand((), generator=draw)) < plan.several:
            K = int(torch.randint(2, plan.slots + 1, (), generator=draw))
        longest = plan.longest
        if self.grows:
            longest = min(longest, max(plan.shortest, math.ceil(2 * self.target)))
        per_vector = int(torch.randint(plan.shortest, longest + 1, (), generator=draw))
        count = max(1, plan.positions // (2 * K * (per_vector + 1)))
        ids = self._windows(self.text, count, K * per_vector, draw)
        vectors = AdaptedEncoder(self.network, plan.slots).read(self.fast, ids, K)
        loss, accuracy = self._descend(vectors, ids)
        if self.grows:
            self._follow(per_vector / self.target, accuracy, float(plan.longest))
        return loss, accuracy

    def _finished(self) -> AdaptedEncoder:
        """The encoder with its best length, rounded to bfloat16 as in its file."""
        encoder = AdaptedEncoder(self.network.to(torch.bfloat16), self.plan.slots)
        encoder.tokens = self.best_length(encoder, self.plan.longest)
        return encoder
