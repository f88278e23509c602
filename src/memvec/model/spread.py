"""Two spreads of a model, measured once at load: of its embeddings and of its logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_ONCE = 20_000  # of an embedding matrix that is not in float32

MASKED = -1e4  # of a logit, or below: a token that the model never writes


def embedding_std(weight: Float[Tensor, "V D"]) -> float:
    """Standard deviation of all entries of an embedding matrix; one in few bits is not copied."""
    if weight.dtype == torch.float32 or len(weight) <= ROWS_AT_ONCE:
        return float(weight.float().std())
    parts, n = torch.split(weight, ROWS_AT_ONCE), weight.numel()
    mean = sum(float(part.double().sum()) for part in parts) / n
    squares = sum(float((part.double() - mean).square().sum()) for part in parts)
    return float((squares / (n - 1)) ** 0.5)


def logit_spread(logits: Float[Tensor, "n V"]) -> float:
    """Mean over positions of the standard deviation over the columns that are not masked."""
    rows = [row[row > MASKED] for row in logits]  # a model that is refused may have none
    return sum(float(row.std()) for row in rows if len(row) > 1) / len(rows) or 1.0
