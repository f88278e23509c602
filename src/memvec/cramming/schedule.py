"""Which leading part of a passage counts now: a pure function of how far it is right already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
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
    """The leading right tokens plus the look-ahead.

    Errors then stay at the front of what counts instead of spreading over the whole passage, and
    the reached length is the horizon (progressive cramming, Tarasov et al. 2026, without stages).
    """
    return torch.minimum(best.clamp_min(0) + ahead, length)


SCHEDULES: dict[str, Schedule] = {"whole": whole, "growing": growing}


def look_ahead(
    ahead: Int[Tensor, " B"],
    better: Bool[Tensor, " B"],
    stale: Int[Tensor, " B"],
    K: int,
    recipe: Recipe,
) -> Int[Tensor, " B"]:
    """The next look-ahead: half of it after so many steps without progress, K more after progress.

    Far sight is what a passage needs as long as its vectors have room; when they are nearly full,
    tokens that they cannot hold yet lead them astray (docs/log.md).
    """
    if not recipe.narrow_after:
        return ahead
    stuck = (stale > 0) & (stale % recipe.narrow_after == 0)
    narrowed = torch.where(stuck, (ahead // 2).clamp_min(1), ahead)
    return torch.where(better, ahead + K, narrowed)
