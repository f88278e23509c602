"""Refuse a seed on which no vector depends."""

from __future__ import annotations

from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_of
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM


def refuse_idle_seed(lm: FrozenLM, recipe: Recipe, advice: str) -> None:
    """Raise MemvecError, which ends with `advice`, for a seed other than 0 that changes nothing.

    Nothing is drawn if the vectors start from the model's encoder and no part draws numbers.
    """
    parts = (recipe.space, recipe.term, recipe.coordinates)
    nothing_drawn = parts in {("inputs", "none", c) for c in ("direct", "whitened", "principal")}
    if recipe.seed and nothing_drawn and start_of(lm, recipe) == "encoder":
        raise MemvecError(
            f"seed {recipe.seed} changes nothing: passages start from the encoder of {lm.name}, "
            f"{advice}"
        )
