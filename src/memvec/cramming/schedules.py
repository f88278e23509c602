"""Schedules choose the tokens that count in the loss, and its temperature, from the progress.

A schedule keeps a row of state for each slot. Every step tells it how many tokens of each passage
are right. From this it derives the tokens that count, the temperature, whether a passage is out of
patience, and whether its vectors are enlarged. `Schedule` is the base class; a subclass only has to
say which tokens count:

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
LOWEST_TEMPERATURE = 1 / 3  # lowest temperature, in multiples of the recipe's
# Lowest temperature, in multiples of the target margin. Below it, the loss is almost flat before
# the margin is reached.
LOWEST_PER_MARGIN = 1 / 5


@dataclass
class ScheduleState(Rows):
    """Progress of the passage in each slot."""

    best: Int[Tensor, " B"]  # largest progress so far, tokens; -1 before the first measurement
    stale: Int[Tensor, " B"]  # steps since `best` rose
    enlarged: Bool[Tensor, " B"]  # the vectors are large (`Recipe.lr_large`)
    lr_scale: Float[Tensor, " B"]  # learning rate, in multiples of `Recipe.lr`


class Schedule:
    """The base of schedules: progress, patience, temperature and enlargement."""

    def __init__(self, recipe: Recipe, K: int) -> None:
        self.recipe, self.K = recipe, K
        self.large_scale = recipe.lr_large / recipe.lr if recipe.lr_large else 1.0

    def fresh(self, size: Float[Tensor, " B"], enlarged: Bool[Tensor, " B"]) -> ScheduleState:
        """State of passages that enter a slot.

        `size` is the RMS of their vectors; `enlarged` is true for vectors that are large already.
        """
        count = torch.zeros(len(size), dtype=torch.long, device=size.device)
        lr_scale = torch.where(enlarged, self.large_scale, size.clamp_min(1))
        return ScheduleState(count - 1, count, enlarged, lr_scale)

    def reached(self, leading: Int[Tensor, " B"], hits: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The progress of each passage, tokens: by default the number of right tokens (`hits`).

        `leading` is the number of tokens before the first wrong one.
        """
        return hits

    def record(
        self, state: ScheduleState, reached: Int[Tensor, " B"]
    ) -> tuple[Bool[Tensor, " B"], Int[Tensor, " B"]]:
        """Record the progress of a step; returns the rows whose `best` rose, and by how much."""
        better = reached > state.best
        gained = (reached - state.best.clamp_min(0)).clamp_min(0)
        state.best = torch.where(better, reached, state.best)
        state.stale = torch.where(better, 0, state.stale + 1)
        return better, gained

    def advance(self, state: ScheduleState, gained: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Update the state after `record`; returns the rows to enlarge now."""
        newly = ~state.enlarged & (state.stale >= self.recipe.stuck_after)
        newly = newly & bool(self.recipe.stuck_after)
        state.enlarged = state.enlarged | newly
        state.lr_scale = torch.where(newly, self.large_scale, state.lr_scale)
        return newly

    def counted(self, state: ScheduleState, length: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The number of leading tokens of each passage that count in the loss."""
        raise MemvecError(f"the schedule '{self.recipe.schedule}' has no method counted.")

    def may_count(self, steps: int) -> int:
        """The largest number of tokens by which `counted` may rise within `steps` steps.

        The engine makes room for them, since it checks the batch only every few steps on a GPU.
        """
        return 0

    def temperature(
        self, state: ScheduleState, target_margin: Float[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """Temperature of each passage's loss, logits."""
        return annealed_temperature(state.stale, target_margin, self.recipe)

    def out_of_patience(self, state: ScheduleState) -> Bool[Tensor, " B"]:
        """Rows without progress for `Recipe.patience` steps."""
        return state.stale >= self.recipe.patience


class Whole(Schedule):
    """All tokens count from the first step, as in the paper (Kuratov et al., section 3)."""

    def record(
        self, state: ScheduleState, reached: Int[Tensor, " B"]
    ) -> tuple[Bool[Tensor, " B"], Int[Tensor, " B"]]:
        better, gained = super().record(state, reached)
        # As in the published loop, a first step without a right token is not progress.
        state.stale = torch.where(reached > 0, state.stale, state.stale.clamp_min(1))
        return better, gained

    def counted(self, state: ScheduleState, length: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return length


@dataclass
class GrowingState(ScheduleState):
    """Progress, and the stage of each passage."""

    look_ahead: Int[Tensor, " B"]  # tokens that count beyond the leading right ones
    stage: Int[Tensor, " B"]  # tokens that are added when all tokens that count are right


class Growing(Schedule):
    """The leading right tokens count, and a look-ahead of tokens after them.

    So wrong tokens are only in the look-ahead and not all over the passage, and the progress is the
    number of leading right tokens (progressive cramming, Tarasov et al. 2026).
    """

    def fresh(self, size: Float[Tensor, " B"], enlarged: Bool[Tensor, " B"]) -> GrowingState:
        common = super().fresh(size, enlarged)
        first = torch.full_like(common.stale, self.recipe.look_ahead * self.K)
        return GrowingState(**vars(common), look_ahead=first, stage=first.clone())

    def reached(self, leading: Int[Tensor, " B"], hits: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return leading

    def advance(self, state: ScheduleState, gained: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
        assert isinstance(state, GrowingState)
        # Small vectors are enlarged before their look-ahead is halved.
        stale = torch.where(state.enlarged, state.stale, 0) if self.recipe.lr_large else state.stale
        self.update_look_ahead(state, gained=gained, stale=stale)
        return super().advance(state, gained)

    def update_look_ahead(
        self, state: GrowingState, *, gained: Int[Tensor, " B"], stale: Int[Tensor, " B"]
    ) -> None:
        """Update the look-ahead and the next stage, after `gained` more leading tokens.

        The number of tokens that count stays the same until all of them are right; then a stage of
        new tokens is added. (Tokens that are added together become right in fewer steps than one by
        one.) After every `narrow_after` steps without progress, look-ahead and stage are halved:
        tokens that nearly full vectors cannot hold yet hinder the others (docs/log.md). Each
        finished stage makes the next one K tokens longer, up to the size of the first.
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
    """The temperature of each passage (logits): the recipe's, or lower while the passage is stuck.

    At a high temperature, tokens that are nearly right have large gradients, too, and vectors move
    far. Only the worst tokens should move a nearly full vector (docs/log.md).
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
