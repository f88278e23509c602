"""Presets of usable vectors, which also stand for their text as context (docs/usable.md)."""

from __future__ import annotations

from dataclasses import replace

from memvec.cramming.recipe import Recipe


def usable() -> Recipe:
    """Vectors that give their text back after a trigger, and stand for it as context."""
    return Recipe(
        term="use",
        term_weight=12.0,
        margin=0.05,
        query_count=64,
        settle=300,
        decay=300,
        optimizer="nadam",
        lr=0.3,
        lr_large=0.0,
        lr_end=0.05,
        beta1=0.9,
        beta1_rise=0.0,
        beta2=0.8,
        start_rule="bos",
        front="auto",
        trigger="auto",
        steps=900,
        patience=900,
    )


def usable_quick() -> Recipe:
    """`usable` in a sixth of the steps, for a model with a usable encoder (docs/usable.md).

    From an encoder's vectors, the objective need only be computed in every fifth step. So few steps
    need few queries, and sampling them costs less than cramming exact-only vectors.
    """
    return replace(
        usable(),
        start="encoder",
        optimizer="full-matrix",
        term_weight=36.0,
        margin=0.01,
        settle=50,
        decay=50,
        objective_every=5,
        query_count=12,
        query_tokens=20,
        lr=0.15,
        lr_end=0.1,
    )


def usable_long() -> Recipe:
    """`usable` for many tokens per vector (such as 24), in seven times the steps (docs/usable.md).

    Context mode multiplies the vectors by 1/8, so that their size distinguishes the modes. The
    learning rates are those of the stored vectors, and are 8 times as large.
    """
    return replace(
        usable(),
        optimizer="full-matrix",
        term_weight=64.0,
        query_count=512,
        context_scale=0.125,
        lr=2.4,
        lr_end=0.4,
        settle=2000,
        decay=2000,
        steps=4000,
        patience=4000,
    )
