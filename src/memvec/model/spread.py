"""Standard deviations of a model's embeddings and of its logits, measured once at load."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 20_000  # rows of a matrix that are converted to wider numbers at once
MASKED = -1e4  # logits at or below this value are masked: the model never writes these tokens


def embedding_std(weight: Float[Tensor, "V D"]) -> float:
    """The standard deviation of all entries of a matrix; other dtypes are converted in parts."""
    if weight.dtype == torch.float32 or len(weight) <= ROWS_AT_ONCE:
        return float(weight.float().std())
    parts, n = torch.split(weight, ROWS_AT_ONCE), weight.numel()
    mean = sum(float(part.double().sum()) for part in parts) / n
    squares = sum(float((part.double() - mean).square().sum()) for part in parts)
    return float((squares / (n - 1)) ** 0.5)


def logit_spread(logits: Float[Tensor, "n V"]) -> float:
    """The standard deviation over unmasked columns, averaged over n positions; 1 instead of 0."""
    rows = [row[row > MASKED] for row in logits]  # may be empty, if no logit is finite
    return sum(float(row.std()) for row in rows if len(row) > 1) / len(rows) or 1.0
