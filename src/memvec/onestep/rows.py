"""What of one-step vectors goes into a file: an m that all passages share is there once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.model.lm import Layout


def to_rows(vectors: Float[Tensor, "P K D"], layout: Layout) -> Float[Tensor, "R k D"]:
    """The rows to store: the vectors as they are; for a shared m [m, e_1 ... e_P] (P + 1, 1, D)."""
    if layout != "one-step-shared":
        return vectors
    return torch.cat([vectors[:1, 1:], vectors[:, :1]]).contiguous()


def from_rows(rows: Float[Tensor, "R k D"], layout: Layout) -> Float[Tensor, "P K D"]:
    """The vectors (P, K, D) that stored rows stand for."""
    if layout != "one-step-shared":
        return rows
    return torch.cat([rows[1:], rows[:1].expand(len(rows) - 1, -1, -1)], dim=1).contiguous()


def row_count(passages: int, layout: Layout) -> int:
    """Stored rows of so many passages."""
    return passages + (layout == "one-step-shared")
