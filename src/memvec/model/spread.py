"""Standard deviations of a model's embeddings and of its logits, measured once at load."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 20_000  # converted to wider numbers, of a matrix that is not in float32

MASKED = -1e4  # logits at or below this value: tokens that the model never writes


def embedding_std(weight: Float[Tensor, "V D"]) -> float:
    """Standard deviation of all entries of a matrix; one that is not float32 is read in parts."""
    if weight.dtype == torch.float32 or len(weight) <= ROWS_AT_ONCE:
        return float(weight.float().std())
    parts, n = torch.split(weight, ROWS_AT_ONCE), weight.numel()
    mean = sum(float(part.double().sum()) for part in parts) / n
    squares = sum(float((part.double() - mean).square().sum()) for part in parts)
    return float((squares / (n - 1)) ** 0.5)


def logit_spread(logits: Float[Tensor, "n V"]) -> float:
    """Mean over n positions of the standard deviation over the unmasked columns; 1 instead of 0."""
    rows = [row[row > MASKED] for row in logits]  # an unfit model may have no finite logits
    return sum(float(row.std()) for row in rows if len(row) > 1) / len(rows) or 1.0
