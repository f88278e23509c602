"""Training of a recurrent encoder on chains of segments, of which it must give back the newest.

Each step encodes chains of n segments and differentiates through all of them. The loss is the
cross-entropy of the segments 0 to R - 1 before the newest, each from the last memory and the
question of its lag. n is drawn from 1 to a maximum that rises linearly to the plan's number of
segments over the first half of the steps. Noise on the last memory makes decoding robust to small
errors of the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from memvec.encoders.adapted import own_summary
from memvec.encoders.recurrent import RecurrentEncoder, RecurrentNetwork, state_width
from memvec.encoders.training_run import NetworkPlan, TrainingRun, seeded
from memvec.errors import MemvecError
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM

BARE = 10.0  # factor of the learning rate of questions and first memory


@dataclass(frozen=True)
class RecurrentPlan(NetworkPlan):
    """Every choice of a run that trains a recurrent encoder.

    Raises MemvecError for a choice out of range.
    """

    slots: int = 4
    layers: int = 2
    segments: int = 8
    """Segments of the longest chain."""
    lags: int = 6
    """How many of the newest segments the memory is trained to give back."""
    segment_tokens: int = 8
    noise: float = 0.04
    """Gaussian noise on the last memory, as a share of its RMS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_1("segments", "lags", "segment_tokens")
        if self.lags > self.segments:
            raise MemvecError(
                f"lags must be at most {self.segments}, the segments of a chain, not {self.lags}."
            )


class RecurrentTraining(TrainingRun):
    """A training run of a recurrent encoder; it begins with the LM's summary encoder, if any.

    Raises MemvecError as `TrainingRun`, and for segments that do not fit the model's context or the
    held-out text.
    """

    reached = "segments"
    plan: RecurrentPlan

    @plain_torch()
    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: RecurrentPlan) -> None:
        super().__init__(lm, stream, plan)
        summary_encoder = own_summary(lm)
        self.identity["begun_at"] = summary_encoder.identity if summary_encoder else None
        shape = {k: getattr(plan, k) for k in ("hidden", "layers", "heads", "slots", "lags")}
        with seeded(plan.seed):
            network = RecurrentNetwork(
                lm.width, state_width(lm), segment=plan.segment_tokens, **shape
            )
            self.network = network.begun(self.mean.cpu(), self.std, plan.size, summary_encoder)
        self.network.to(lm.device)
        bare = [network.questions, network.first]
        bare_ids = {id(p) for p in bare}
        multiplied = [p for p in network.parameters() if id(p) not in bare_ids]
        self.optimizer = self.optimized([{"params": multiplied}, {"params": bare, "rate": BARE}])
        self.target = 1.0
        largest = plan.segment_tokens + 2 * plan.slots
        if lm.context is not None and largest > lm.context:
            raise MemvecError(
                f"a segment of {plan.segment_tokens} tokens between {plan.slots} vectors and "
                f"{plan.slots} slots does not fit the context of {lm.name} ({lm.context})."
            )
        if plan.segments * plan.segment_tokens > len(self.text):
            raise MemvecError(
                f"{len(stream)} tokens are too few to train an encoder on chains of "
                f"{plan.segments} segments: give more text."
            )

    def _train_step(self) -> tuple[float, float]:
        plan, T = self.plan, self.plan.segment_tokens
        self.target = float(self._longest_chain())
        draw = self._generator("step", self.step)
        n = int(torch.randint(1, int(self.target) + 1, (), generator=draw))
        lags = min(n, plan.lags)
        positions = n * (2 * plan.slots + T) + lags * (plan.slots + 1 + T)
        ids = self._windows(self.text, max(1, plan.positions // positions), n * T, draw)
        encoder = RecurrentEncoder(self.network.train())  # type: ignore[arg-type]
        memory = encoder.memories(self.fast, ids, T)[-1]
        size = memory.detach().pow(2).mean().sqrt()
        noise = torch.randn(memory.shape, generator=draw).to(memory.device)
        memory = memory + plan.noise * size * noise
        vectors = torch.cat([encoder.asked(memory, lag) for lag in range(lags)])
        parts = torch.split(ids, T, dim=1)
        return self._descend(vectors, torch.cat([parts[-1 - lag] for lag in range(lags)]))

    def _longest_chain(self) -> int:
        """Number of segments of the longest chain at this step."""
        risen = 2 * (self.step + 1) / self.plan.steps
        return max(1, min(self.plan.segments, math.ceil(self.plan.segments * risen)))

    def _finished(self) -> RecurrentEncoder:
        encoder = RecurrentEncoder(self.network.eval())  # type: ignore[arg-type]
        encoder.tokens = self.plan.segment_tokens
        return encoder
