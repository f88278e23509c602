"""Which leading part of a passage counts now: a pure function of how far it is right already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
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
    recipe: Recipe,
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """The next look-ahead, and the size of the next stage, after `gained` more leading tokens.

    What counts stays the same until all of it is right; then a stage more counts. Tokens that have
    to come right together do so sooner than one behind the other. After so many steps without
    progress both are halved: where vectors are nearly full, tokens that they cannot hold yet lead
    them astray (docs/log.md).
    """
    left = ahead - gained
    if recipe.narrow_after:
        stuck = (stale > 0) & (stale % recipe.narrow_after == 0)
        left = torch.where(stuck, (left // 2).clamp_min(1), left)
        stage = torch.where(stuck, (stage // 2).clamp_min(1), stage)
    return torch.where(left > 0, left, stage), stage
