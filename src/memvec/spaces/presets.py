"""Recipes for keys and values: the default recipe with other rates and BOS (docs/spaces.md).

These numbers are in units near their own size, so they take a larger learning rate than small input
vectors. They are never made large. The optimiser is `nadam`, for which the rate was chosen. BOS
stands between the prefix and the passage, because a token has to predict token 1.
"""

from __future__ import annotations

from memvec.cramming.recipe import Recipe


def prefix() -> Recipe:
    """A key and a value in every layer, after which BOS stands."""
    return Recipe(space="prefix", start_rule="bos", lr=0.3, lr_large=0.0, optimizer="nadam")


def prefix_layer() -> Recipe:
    """A key and a value in one layer; `layer` says in which."""
    return Recipe(space="prefix-layer", start_rule="bos", lr=0.3, lr_large=0.0, optimizer="nadam")
