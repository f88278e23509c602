"""Geometric growth (Tarasov et al. 2026): the target length doubles, and is bisected on failure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.schedules import Schedule, ScheduleState

NO_FAILURE = 2**31  # value of `failed` while no target has failed


@dataclass
class GeometricState(ScheduleState):
    """Progress, the present target, and the upper bound of the bisection."""

    target: Int[Tensor, " B"]  # leading tokens that count now
    failed: Int[Tensor, " B"]  # the smallest target that failed


class Geometric(Schedule):
    """The number of leading tokens that count (the target) doubles when all of them are right.

    This is geometric growth with bisecting back-off (Tarasov et al. 2026), with fewer stages than
    one per token. The first target is `look_ahead` tokens per vector. A target fails after
    `narrow_after` steps without progress. From then on, the next target is half way between the
    reached length and the smallest failed target. If no length is between the two, the next target
    is one token longer than the reached length, so only the recipe's patience ends the search.
    """

    def fresh(self, size: Float[Tensor, " B"], enlarged: Bool[Tensor, " B"]) -> GeometricState:
        common = super().fresh(size, enlarged)
        first = torch.full_like(common.stale, self.recipe.look_ahead * self.K)
        failed = torch.full_like(first, NO_FAILURE)
        return GeometricState(**vars(common), target=first, failed=failed)

    def reached(self, leading: Int[Tensor, " B"], hits: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return leading

    def advance(self, state: ScheduleState, gained: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        assert isinstance(state, GeometricState)
        best = state.best.clamp_min(0)
        wait = self.recipe.narrow_after
        stuck = (state.stale > 0) & (state.stale % max(wait, 1) == 0) & bool(wait)
        state.failed = torch.where(stuck, torch.minimum(state.failed, state.target), state.failed)
        # A failed target is no longer a bound if it is reached or the next length.
        state.failed = torch.where(state.failed <= best + 1, NO_FAILURE, state.failed)
        known = state.failed < NO_FAILURE
        between = torch.maximum(best + 1, (best + state.failed) // 2)
        done = best >= state.target
        grown = torch.where(known, between, 2 * best.clamp_min(1))
        state.target = torch.where(done, grown, torch.where(stuck & known, between, state.target))
        state.target = torch.where(stuck & ~known, best + 1, state.target)
        return super().advance(state, gained)

    def counted(self, state: ScheduleState, length: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        assert isinstance(state, GeometricState)
        return torch.minimum(state.target, length)

    def may_count(self, steps: int) -> int:
        return steps * 8 * self.recipe.look_ahead * self.K
