"""Which leading part of a passage counts now, and how sharply: pure functions of its progress."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.cramming.recipe import Recipe

# (best horizon so far, look-ahead, passage lengths) -> tokens that count
Schedule = Callable[[Int[Tensor, " B"], Int[Tensor, " B"], Int[Tensor, " B"]], Int[Tensor, " B"]]


def whole(
    best: Int[Tensor, " B"], ahead: Int[Tensor, " B"], length: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """All of it from the first step, as in the paper."""
    return length


def growing(
    best: Int[Tensor, " B"], ahead: Int[Tensor, " B"], length: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """The leading right tokens plus what is left of a stage, the look-ahead.

    Errors then stay at the front of what counts instead of spreading over the whole passage, and
    the reached length is the horizon (progressive cramming, Tarasov et al. 2026).
    """
    return torch.minimum(best.clamp_min(0) + ahead, length)


SCHEDULES: dict[str, Schedule] = {"whole": whole, "growing": growing}


def look_ahead(
    ahead: Int[Tensor, " B"],
    stage: Int[Tensor, " B"],
    gained: Int[Tensor, " B"],
    stale: Int[Tensor, " B"],
    K: int,
    recipe: Recipe,
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """The next look-ahead, and the size of the next stage, after `gained` more leading tokens.

    What counts stays the same until all of it is right; then a stage more counts. Tokens that have
    to come right together do so sooner than one behind the other. After so many steps without
    progress both are halved: where vectors are nearly full, tokens that they cannot hold yet lead
    them astray (docs/log.md). A stage that is done makes the next one longer by a token for each of
    the K vectors, up to the first one's size.
    """
    left, first = ahead - gained, recipe.look_ahead * K
    if recipe.narrow_after:
        stuck = (stale > 0) & (stale % recipe.narrow_after == 0)
        left = torch.where(stuck, (left // 2).clamp_min(1), left)
        narrower = torch.where(stuck, (stage // 2).clamp_min(1), stage)
        stage = torch.where(left > 0, narrower, (narrower + K).clamp_max(first))
    return torch.where(left > 0, left, stage), stage


COOL_OVER = 60  # stuck steps over which the temperature falls to a half
COLDEST = 1 / 3  # of the recipe's temperature
FELT = 1 / 5  # of the margin asked; at a lower temperature nothing pulls towards such a margin


def cooled(
    stale: Int[Tensor, " B"], margin: Float[Tensor, " B"], recipe: Recipe
) -> Float[Tensor, " B"]:
    """Each passage's temperature: the recipe's, and less while it is stuck (docs/log.md).

    A high one spreads the loss over what is nearly right and moves vectors far; where a vector is
    nearly full, only the worst tokens should move it. `margin` is what is asked of each passage.
    """
    temperature = torch.full(stale.shape, recipe.temperature, device=stale.device)
    if not recipe.stuck_after:
        return temperature
    stuck = (stale - recipe.stuck_after).clamp_min(0)
    least = torch.maximum(COLDEST * temperature, FELT * margin.to(temperature))
    return torch.minimum(temperature, torch.maximum(temperature / (1 + stuck / COOL_OVER), least))
