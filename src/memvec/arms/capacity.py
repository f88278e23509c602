"""The recipe for the most that vectors hold, whatever it takes (docs/capacity.md)."""

from __future__ import annotations

from memvec.cramming.recipe import Recipe


def capacity() -> Recipe:
    """The default with a smaller margin, in whitened coordinates, for as long as there is progress.

    At this margin what is exact in float32 need not be so where logits are rounded more coarsely.
    """
    return Recipe(margin=0.1, coordinates="whitened", start="noise", steps=5000, patience=5000)
