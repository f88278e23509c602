"""Recipes for keys and values: the default one with their own rate and start rule (docs/spaces.md).

Numbers that are counted in units near their own size move faster than small input vectors; none is
made large, and `nadam` moves them, for which their rate was chosen. BOS stands between the prefix
and the passage, for something has to predict token 1.
"""

from __future__ import annotations

from memvec.cramming.recipe import Recipe


def prefix() -> Recipe:
    """A key and a value in every layer, behind which BOS stands."""
    return Recipe(space="prefix", start_rule="bos", lr=0.3, lr_large=0.0, optimizer="nadam")


def prefix_layer() -> Recipe:
    """A key and a value in one layer; `layer` says in which."""
    return Recipe(space="prefix-layer", start_rule="bos", lr=0.3, lr_large=0.0, optimizer="nadam")
