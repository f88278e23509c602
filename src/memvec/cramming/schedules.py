"""Schedules: which tokens count now, and how soft the loss is, from each passage's progress.

A schedule keeps a row of state for each slot and learns, at every step, how many tokens of each
passage are right. From that follow the tokens that count in the loss, the temperature, whether a
passage is out of patience, and whether its vectors are enlarged. `Schedule` holds what schedules
have in common; a new one says which tokens count, in a dozen lines:

    import torch
    from memvec import register
    from memvec.cramming.schedules import Schedule

    @register("schedule", "halves")
    class Halves(Schedule):
        def counted(self, state, length):
            half = (length + 1) // 2
            return torch.where(state.best >= half, length, half)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows
from memvec.errors import MemvecError

HALVED_AFTER = 60  # stuck steps after which the temperature is half of the recipe's
LOWEST_TEMPERATURE = 1 / 3  # of the recipe's temperature
# Of the target margin: at a lower temperature the loss hardly falls towards such a margin.
LOWEST_PER_MARGIN = 1 / 5


@dataclass
class ScheduleState(Rows):
    """Progress of the passage in each slot."""

    best: Int[Tensor, " B"]  # tokens reached so far; -1 before the first measurement
    stale: Int[Tensor, " B"]  # steps since `best` rose
    enlarged: Bool[Tensor, " B"]  # the vectors have been made large
    lr_scale: Float[Tensor, " B"]  # learning rate, in multiples of the recipe's


class Schedule:
    """The common skeleton: progress, patience, temperature and enlargement."""

    def __init__(self, recipe: Recipe, K: int) -> None:
        self.recipe, self.K = recipe, K
        self.large_scale = recipe.lr_large / recipe.lr if recipe.lr_large else 1.0

    def fresh(self, size: Float[Tensor, " B"], enlarged: Bool[Tensor, " B"]) -> ScheduleState:
        """State of passages that enter a slot.

        `size` is the RMS of their vectors; `enlarged` is true where they are large already.
        """
        return ScheduleState(**self._common(size, enlarged))

    def reached(self, leading: Int[Tensor, " B"], hits: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The progress of each passage, tokens: here all that are right (`hits`).

        `leading` are those before the first wrong one.
        """
        return hits

    def record(
        self, state: ScheduleState, reached: Int[Tensor, " B"]
    ) -> tuple[Bool[Tensor, " B"], Int[Tensor, " B"]]:
        """Record a measurement; returns which passages did better than ever, and by how much."""
        better = reached > state.best
        gained = (reached - state.best.clamp_min(0)).clamp_min(0)
        state.best = torch.where(better, reached, state.best)
        state.stale = torch.where(better, 0, state.stale + 1)
        return better, gained

    def advance(self, state: ScheduleState, gained: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Update the state after the last measurement; returns the rows to enlarge now."""
        newly = ~state.enlarged & (state.stale >= self.recipe.stuck_after)
        newly = newly & bool(self.recipe.stuck_after)
        state.enlarged = state.enlarged | newly
        state.lr_scale = torch.where(newly, self.large_scale, state.lr_scale)
        return newly

    def counted(self, state: ScheduleState, length: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Leading tokens of each passage that count in the loss."""
        raise MemvecError(f"the schedule '{self.recipe.schedule}' has no method counted.")

    def may_count(self, steps: int) -> int:
        """The largest number of tokens by which `counted` may rise within so many steps.

        The engine makes room for them, since on a GPU it checks the batch only every few steps.
        """
        return 0

    def temperature(
        self, state: ScheduleState, target_margin: Float[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """Temperature of each passage's loss, logits."""
        return annealed_temperature(state.stale, target_margin, self.recipe)

    def out_of_patience(self, state: ScheduleState) -> Bool[Tensor, " B"]:
        """Passages without progress for as many steps as the recipe's patience."""
        return state.stale >= self.recipe.patience

    def _common(self, size: Float[Tensor, " B"], enlarged: Bool[Tensor, " B"]) -> dict[str, Tensor]:
        count = torch.zeros(len(size), dtype=torch.long, device=size.device)
        return {
            "best": count - 1,
            "stale": count.clone(),
            "enlarged": enlarged,
            "lr_scale": torch.where(enlarged, self.large_scale, size.clamp_min(1)),
        }


class Whole(Schedule):
    """All tokens count from the first step, as in the paper (Kuratov et al., section 3)."""

    def record(
        self, state: ScheduleState, reached: Int[Tensor, " B"]
    ) -> tuple[Bool[Tensor, " B"], Int[Tensor, " B"]]:
        better, gained = super().record(state, reached)
        # No right token is no progress, not even in the first step: the published loop counts so.
        state.stale = torch.where(reached > 0, state.stale, state.stale.clamp_min(1))
        return better, gained

    def counted(self, state: ScheduleState, length: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return length


@dataclass
class GrowingState(ScheduleState):
    """Progress, and the stage of each passage."""

    look_ahead: Int[Tensor, " B"]  # tokens after the horizon that count now
    stage: Int[Tensor, " B"]  # tokens that are added once all that count are right


class Growing(Schedule):
    """The leading right tokens count, and what is left of a stage: the look-ahead.

    Errors then stay at the front of what counts instead of spreading over the whole passage, and
    the reached length is the horizon (progressive cramming, Tarasov et al. 2026).
    """

    def fresh(self, size: Float[Tensor, " B"], enlarged: Bool[Tensor, " B"]) -> GrowingState:
        common = self._common(size, enlarged)
        first = torch.zeros_like(common["stale"]) + self.recipe.look_ahead * self.K
        return GrowingState(**common, look_ahead=first, stage=first.clone())

    def reached(self, leading: Int[Tensor, " B"], hits: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return leading

    def advance(self, state: ScheduleState, gained: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        assert isinstance(state, GrowingState)
        # Small vectors are made large before their stages narrow.
        stale = torch.where(state.enlarged, state.stale, 0) if self.recipe.lr_large else state.stale
        self.look_further(state, gained=gained, stale=stale)
        return super().advance(state, gained)

    def look_further(
        self, state: GrowingState, *, gained: Int[Tensor, " B"], stale: Int[Tensor, " B"]
    ) -> None:
        """Change the look-ahead and the size of the next stage, after `gained` more leading tokens.

        What counts stays the same until all of it is right; then a stage more counts. Tokens that
        have to come right together do so sooner than one after the other. After so many steps
        without progress both are halved: where vectors are nearly full, tokens that they cannot
        hold yet lead them astray (docs/log.md). A stage that is done makes the next one longer by a
        token for each of the K vectors, up to the first one's size.
        """
        left, stage = state.look_ahead - gained, state.stage
        if self.recipe.narrow_after:
            stuck = (stale > 0) & (stale % self.recipe.narrow_after == 0)
            left = torch.where(stuck, (left // 2).clamp_min(1), left)
            narrower = torch.where(stuck, (stage // 2).clamp_min(1), stage)
            longer = (narrower + self.K).clamp_max(self.recipe.look_ahead * self.K)
            stage = torch.where(left > 0, narrower, longer)
        state.look_ahead, state.stage = torch.where(left > 0, left, stage), stage

    def counted(self, state: ScheduleState, length: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        assert isinstance(state, GrowingState)
        return torch.minimum(state.best.clamp_min(0) + state.look_ahead, length)

    def may_count(self, steps: int) -> int:
        return steps * self.recipe.look_ahead * self.K


def annealed_temperature(
    stale: Int[Tensor, " B"], target_margin: Float[Tensor, " B"], recipe: Recipe
) -> Float[Tensor, " B"]:
    """Each passage's temperature: the recipe's, and lower while it is stuck (docs/log.md).

    A high temperature spreads the loss over what is nearly right and moves vectors far; where a
    vector is nearly full, only the worst tokens should move it.
    """
    temperature = torch.full(stale.shape, recipe.temperature, device=stale.device)
    if not recipe.stuck_after:
        return temperature
    stuck = (stale - recipe.stuck_after).clamp_min(0)
    lowest = torch.maximum(
        LOWEST_TEMPERATURE * temperature, LOWEST_PER_MARGIN * target_margin.to(temperature)
    )
    annealed = torch.maximum(temperature / (1 + stuck / HALVED_AFTER), lowest)
    return torch.minimum(temperature, annealed)
