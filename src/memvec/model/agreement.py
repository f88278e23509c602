"""When two computations of the same logits count as equal: one tolerance for every check."""

from __future__ import annotations

import torch
from torch import Tensor

from memvec.model.spread import MASKED

# Two orders of the same sums differ by about this share of the logits' spread, per dtype.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def agree(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether two tensors of logits are equal up to the rounding of `dtype`, and by how much.

    The largest difference is measured in standard deviations of `truth`; the second result is a
    clause for people that names it and the limit.
    """
    if not bool(torch.isfinite(truth).all()):
        return False, "its logits are not finite"
    # Columns that a model masks out (-1e9 and below) would make any difference look small.
    spread = truth[truth > MASKED].std().clamp_min(1e-6)
    difference = float((ours - truth).abs().max() / spread)
    limit = TOLERANCE[dtype]
    return difference <= limit, f"largest difference {difference:.1e} of a std (limit {limit:g})"
