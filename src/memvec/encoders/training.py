"""Training of a slot encoder with the cross-entropy of the passage that it encodes.

The length of passages grows with the accuracy, so that it stays near what the encoder can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from memvec.encoders.slots import SlotEncoder, SlotNetwork
from memvec.encoders.training_run import GRID, NetworkPlan, TrainingRun, seeded
from memvec.errors import MemvecError
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM


@dataclass(frozen=True)
class SlotsPlan(NetworkPlan):
    """Every choice of a training run. Lengths in tokens per vector."""

    first_target: float = 2.0
    """Target length at the start; it rises by 2 % at steps with an accuracy above RISE_ABOVE."""
    largest_share: float = 2.0
    """Largest length of a passage, as a multiple of the target length."""


class Training(TrainingRun):
    """A training run of a slot encoder.

    Raises MemvecError as `TrainingRun`, and for slots that leave no room for a passage in the
    model's context or the held-out text.
    """

    plan: SlotsPlan

    @plain_torch()
    def __init__(self, lm: FrozenLM, stream: Int[Tensor, " N"], plan: SlotsPlan) -> None:
        super().__init__(lm, stream, plan)
        shape = {k: getattr(plan, k) for k in ("hidden", "layers", "heads", "slots")}
        with seeded(plan.seed):
            self.network = SlotNetwork(lm.width, **shape).to(lm.device)
        self.network.scaled(self.mean, self.std, plan.size)
        self.optimizer = self.optimized(self.network.parameters())
        self.target = plan.first_target
        room = (lm.context or GRID[-1] + plan.slots) - plan.slots
        self.longest = min(GRID[-1], room // plan.slots, len(self.held_out) // (2 * plan.slots))
        if self.longest < 1:
            raise MemvecError(
                f"{plan.slots} slot(s) leave no room for text in {lm.name}'s context, or the text "
                "is too short for them: use fewer."
            )

    def _train_step(self) -> tuple[float, float]:
        plan = self.plan
        draw = self._generator("step", self.step)
        K = int(torch.randint(1, plan.slots + 1, (), generator=draw))
        share = 0.5 + (plan.largest_share - 0.5) * float(torch.rand((), generator=draw))
        T = K * min(max(1, round(share * self.target)), self.longest)
        ids = self._windows(self.text, max(1, plan.positions // (T + K)), T, draw)
        loss, accuracy = self._descend(self.network(self.fast.embed(ids), K), ids)
        self._follow(share, accuracy, float(self.longest))
        return loss, accuracy

    def _finished(self) -> SlotEncoder:
        """The encoder, with its best length."""
        encoder = SlotEncoder(self.network.eval())  # type: ignore[arg-type]
        encoder.tokens = self.best_length(encoder, self.longest)
        return encoder
