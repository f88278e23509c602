"""Published recipes, each under its preset's name.

They are to the letter, except that the vectors kept are the measured ones and nothing is called
exact before it decodes, and except for what `geometric` and `alignment` name here.
tests/test_published.py checks each against its definition.
"""

from __future__ import annotations

from dataclasses import replace

from memvec.cramming.recipe import Recipe


def paper() -> Recipe:
    """Kuratov et al. 2025, section 4 and the published train.py.

    4999 steps: the published loop measures 5000 losses, the first one before any move.
    """
    return Recipe(
        unit="logits",
        temperature=1.0,
        margin=0.0,
        schedule="whole",
        stuck_after=0,
        optimizer="adamw",
        lr=0.01,
        lr_large=0.0,
        beta1=0.9,
        beta1_rise=0.0,
        beta2=0.9,
        weight_decay=0.01,
        start="noise",
        start_rule="paper",
        compute="model",
        steps=4999,
        patience=2000,
        if_not_exact="stop",
    )


def one_step() -> Recipe:
    """Mezentsev & Oseledets 2025 (arXiv 2505.21189), section 4, for `--one-step`.

    At most 5000 losses, as in `paper`.
    """
    return Recipe(
        unit="logits",
        temperature=1.0,
        margin=0.0,
        schedule="whole",
        stuck_after=0,
        optimizer="adamw",
        lr=0.01,
        lr_large=0.0,
        beta1=0.9,
        beta1_rise=0.0,
        beta2=0.9,
        weight_decay=0.01,
        start="normal",
        compute="model",
        steps=4999,
        patience=5000,
    )


def progressive() -> Recipe:
    """Tarasov et al. 2026: the paper, and the launcher of its progressive runs
    (github.com/mrsndmn/compression_horizon).

    One more token a stage, at most 1000 steps for each and 10 000 in all; the first token is in the
    loss, which is a tokenizer's BOS (a source's `bos`). In its sweep a rate of 0.5 or 1 is best for
    three of four models.
    """
    return Recipe(
        unit="logits",
        temperature=1.0,
        margin=0.0,
        schedule="growing",
        look_ahead=1,
        narrow_after=0,
        stuck_after=0,
        optimizer="adamw",
        lr=0.0,
        lr_large=0.0,
        warmup=100,
        decay=10_000,
        lr_end=1e-3,
        beta1=0.9,
        beta1_rise=0.0,
        beta2=0.9,
        weight_decay=0.01,
        start="uniform",
        compute="model",
        steps=10_000,
        patience=1000,
    )


def temperature() -> Recipe:
    """`progressive` with a temperature T. Their loss is 1/T of ours: Adam's steps are the same."""
    return replace(progressive(), temperature=0.25)


def low_dim() -> Recipe:
    """`progressive` in low-dimensional coordinates."""
    return replace(progressive(), coordinates="low-dim", start="linear")


def margin_ce() -> Recipe:
    """`progressive`, where a token is right from a margin on (their "CE")."""
    return replace(progressive(), margin=0.5)


def margin() -> Recipe:
    """`margin-ce`, where a token weighs what it lacks of the margin (their "+LM")."""
    return replace(margin_ce(), objective="deficit")


def alignment() -> Recipe:
    """`progressive`, and hidden states of the first layers near those of the plain text.

    Their "hybrid" with L = 4, which counts the embeddings; these are the same in both, so three
    layers are left. (On their models but the 8B they report L = 8.) The text is read after the
    model's BOS, and the last counted token is not in the mean (memvec.arms.alignment).
    """
    return replace(progressive(), term="alignment", term_weight=1.0, align_layers=3)


def geometric() -> Recipe:
    """`progressive` with targets that double, and are bisected after the steps that a stage has.

    The published program gives a target up after 1000 steps in all, here after 1000 without
    progress; it ends when the bracket is closed, here one more token is tried until patience ends.
    Vectors and moments go on from where they are; nothing is restored.
    """
    return replace(progressive(), schedule="geometric", narrow_after=1000, patience=10_000)
