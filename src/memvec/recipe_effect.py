"""Refuse fields of a recipe that were set and have no effect in this recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError

# field -> the values of other fields with which it has no effect (all of these fields must match).
_FOR_USE = {"term": ("none", "alignment")}
IDLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "term_weight": {"term": ("none",)},
    "align_layers": {"term": ("none", "use")},
    "queries": _FOR_USE,
    "query_count": _FOR_USE,
    "query_tokens": _FOR_USE,
    "teacher_top": _FOR_USE,
    "layer": {"space": ("inputs", "prefix", "shared-basis")},
    "dimensions": {
        "space": ("inputs", "prefix", "prefix-layer"),
        "coordinates": ("direct", "whitened", "principal"),
    },
    "weight_decay": {"optimizer": ("adam", "nadam", "full-matrix")},
    "lr_end": {"decay": (0,)},
    "trigger": {"start_rule": ("vectors", "first-token")},
    "look_ahead": {"schedule": ("whole",)},
    "narrow_after": {"schedule": ("whole",)},
}


def check_effect(recipe: Recipe, changed: Iterable[str]) -> None:
    """Raise MemvecError if one of the fields `changed` has no effect in this recipe."""
    for name in changed:
        others = IDLE.get(name, {})
        if others and all(getattr(recipe, owner) in idle for owner, idle in others.items()):
            where = " and ".join(f"{owner} is '{getattr(recipe, owner)}'" for owner in others)
            raise MemvecError(
                f"the recipe's {name} does nothing where {where}: leave it out, or change both."
            )
