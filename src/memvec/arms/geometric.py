"""Geometric growth (Tarasov et al. 2026): targets that double, and are bisected where they fail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.schedules import Schedule, ScheduleState

NO_FAILURE = 2**31  # no target has failed yet, tokens


@dataclass
class GeometricState(ScheduleState):
    """Progress, and the lengths between which the search is."""

    target: Int[Tensor, " B"]  # leading tokens that count now
    failed: Int[Tensor, " B"]  # the smallest target that was given up


class Geometric(Schedule):
    """The target doubles when it is reached; one that is not reached is halved back (bisected).

    Geometric growth with bisecting back-off (Tarasov et al. 2026): fewer stages than a token each.
    The first target is `look_ahead` tokens for each vector. A target is given up after
    `narrow_after` steps without progress; the next one is half way between what is reached and it,
    and above what is reached targets then grow half way towards the one that failed. Once nothing
    lies between the two, a token more is tried, so that nothing is given up for good but by
    patience.
    """

    def fresh(self, size: Float[Tensor, " B"], enlarged: Bool[Tensor, " B"]) -> GeometricState:
        common = self._common(size, enlarged)
        first = torch.zeros_like(common["stale"]) + self.recipe.look_ahead * self.K
        return GeometricState(**common, target=first, failed=torch.full_like(first, NO_FAILURE))

    def reached(self, leading: Int[Tensor, " B"], hits: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return leading

    def advance(self, state: ScheduleState, gained: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        assert isinstance(state, GeometricState)
        best = state.best.clamp_min(0)
        wait = self.recipe.narrow_after
        stuck = (state.stale > 0) & (state.stale % max(wait, 1) == 0) & bool(wait)
        state.failed = torch.where(stuck, torch.minimum(state.failed, state.target), state.failed)
        # What was thought out of reach and is reached, or lies next to it, is no bound any more.
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
