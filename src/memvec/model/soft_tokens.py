"""Soft tokens: input vectors that a view of a model reads as tokens of its own.

Their ids come behind the rows of its embedding, and no text is ever tokenized to them. A crammed
trigger is R of them, which all passages share (memvec.usable.around).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


def embedded(lm: FrozenLM, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
    """Embeddings of token ids, soft tokens among them; gradients flow to the soft tokens."""
    assert lm.soft is not None
    rows = len(lm.embedding.weight)  # type: ignore[arg-type]
    soft = ids >= rows
    plain: Tensor = lm.embedding(ids.masked_fill(soft, 0))
    own = lm.soft.to(plain.dtype)[(ids - rows).clamp_min(0)]
    return torch.where(soft[..., None], own, plain)
