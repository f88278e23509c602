"""Which leading part of a passage counts now: a pure function of how far it is right already."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from memvec.cramming.recipe import Recipe

# (best horizon so far, passage lengths, number of vectors, recipe) -> tokens that count
Schedule = Callable[[Int[Tensor, " B"], Int[Tensor, " B"], int, Recipe], Int[Tensor, " B"]]


def whole(
    best: Int[Tensor, " B"], length: Int[Tensor, " B"], K: int, recipe: Recipe
) -> Int[Tensor, " B"]:
    """All of it from the first step, as in the paper."""
    return length


def growing(
    best: Int[Tensor, " B"], length: Int[Tensor, " B"], K: int, recipe: Recipe
) -> Int[Tensor, " B"]:
    """The leading right tokens plus a look-ahead.

    Errors then stay at the front of what counts instead of spreading over the whole passage, and
    the reached length is the horizon (progressive cramming, Tarasov et al. 2026, without stages).
    """
    return torch.minimum(best.clamp_min(0) + recipe.look_ahead * K, length)


SCHEDULES: dict[str, Schedule] = {"whole": whole, "growing": growing}
