"""Published recipes, each registered as a preset.

They differ from the publications in two ways: the vectors that are kept are the measured ones, and
a passage counts as exact only if it decodes. `geometric` and `alignment` list further differences.
tests/test_published.py compares each recipe with its definition.
"""

from __future__ import annotations

from dataclasses import replace

from memvec.cramming.recipe import Recipe


def paper() -> Recipe:
    """Kuratov et al. 2025, section 4 and the published train.py.

    The published loop measures 5000 losses, the first one before any move, so it has 4999 steps.
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

    It measures at most 5000 losses, as in `paper`.
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
    """Progressive cramming of Tarasov et al. 2026 (github.com/mrsndmn/compression_horizon).

    Settings are those of the paper and of the launcher of its progressive runs. Each stage adds one
    token, with at most 1000 steps per stage and 10 000 in all. The first token is in the loss; it
    is BOS if the tokenizer adds one (a source's `bos`). In the paper's sweep, a learning rate of
    0.5 or 1 is best for three of four models.
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
    """`progressive` with a temperature T. The published loss is 1/T of ours, with equal steps."""
    return replace(progressive(), temperature=0.25)


def low_dim() -> Recipe:
    """`progressive` in low-dimensional coordinates."""
    return replace(progressive(), coordinates="low-dim", start="linear")


def margin_ce() -> Recipe:
    """`progressive` with a margin from which a token is right (the paper's "CE")."""
    return replace(progressive(), margin=0.5)


def margin() -> Recipe:
    """`margin-ce` in which a token's weight is what its margin lacks (the paper's "+LM")."""
    return replace(margin_ce(), objective="deficit")


def alignment() -> Recipe:
    """`progressive` with activation alignment in the first layers.

    This is the paper's "hybrid" with L = 4. The paper counts the embeddings as a layer; they are
    equal with and without vectors, so three layers remain. (For its models other than the 8B, the
    paper reports L = 8.) Two details differ: see memvec.arms.alignment.
    """
    return replace(progressive(), term="alignment", term_weight=1.0, align_layers=3)


def geometric() -> Recipe:
    """`progressive` with targets that double, and are bisected when they fail.

    Three details differ from the published program. There a target fails after 1000 steps in all,
    here after 1000 steps without progress. There the search ends when no length is left to try,
    here one more token is tried until patience ends. Here vectors and moments continue after a
    failed target; they are not restored.
    """
    return replace(progressive(), schedule="geometric", narrow_after=1000, patience=10_000)
