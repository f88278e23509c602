"""Compare two computations of the same logits: on which tokens, and within which tolerance."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from memvec.model.spread import MASKED

# Largest difference that the order of sums makes, in standard deviations of the logits.
TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def agree(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[bool, str]:
    """Compare logits `ours` with `truth` (same shape) within the tolerance of `dtype`.

    The largest difference is measured in standard deviations of `truth`. Returns whether it is
    within the limit, and a clause for messages that names the difference and the limit (or that
    `truth` is not finite).
    """
    if not bool(torch.isfinite(truth).all()):
        return False, "its logits are not finite"
    # Masked columns (-1e9 and below) would inflate the standard deviation and hide differences.
    spread = truth[truth > MASKED].std().clamp_min(1e-6)
    gap = float((ours - truth).abs().max() / spread)
    limit = TOLERANCE[dtype]
    return gap <= limit, f"largest difference {gap:.1e} std of the logits (limit {limit:g})"


def spread_ids(embedding: nn.Module, n: int) -> Int[Tensor, "1 n"]:
    """n token ids spread over the rows of an embedding matrix, the same in every call."""
    rows: Tensor = embedding.weight  # type: ignore[assignment]
    return (torch.arange(n, device=rows.device) * 104729 % len(rows))[None]
