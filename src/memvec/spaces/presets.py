"""Recipes for keys and values: the default recipe with other rates and BOS (docs/spaces.md).

Keys and values are in units near their own size, so they take a larger learning rate than small
input vectors. They are never enlarged. The learning rate was chosen for the optimizer `nadam`. BOS
is between the prefix and the passage, because token 1 must be predicted from a token.
"""

from __future__ import annotations

from memvec.cramming.recipe import Recipe


def prefix() -> Recipe:
    """A key and a value in every layer, followed by BOS."""
    return Recipe(space="prefix", start_rule="bos", lr=0.3, lr_large=0.0, optimizer="nadam")


def prefix_layer() -> Recipe:
    """A key and a value in one layer, `Recipe.layer`, followed by BOS."""
    return Recipe(space="prefix-layer", start_rule="bos", lr=0.3, lr_large=0.0, optimizer="nadam")
