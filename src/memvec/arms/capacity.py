"""The recipe for the largest capacity, at a high cost (docs/capacity.md)."""

from __future__ import annotations

from memvec.cramming.recipe import Recipe


def capacity() -> Recipe:
    """The default with a smaller margin, in whitened coordinates, for up to 5000 steps.

    At this margin, vectors that are exact in float32 may not be exact where logits are rounded
    more coarsely.
    """
    return Recipe(margin=0.1, coordinates="whitened", start="noise", steps=5000, patience=5000)
