"""Soft tokens: input vectors that a view of a model reads as additional tokens.

Their ids follow those of the embedding matrix, and no text is ever tokenized to them. A crammed
trigger consists of R soft tokens, which all passages share (memvec.companions.around).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


def first_soft_id(lm: FrozenLM) -> int:
    """The id of the first soft token; smaller ids are the model's own tokens."""
    return len(lm.embedding.weight)  # type: ignore[arg-type]


def embedded(lm: FrozenLM, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
    """Embeddings of token ids, soft tokens included; gradients flow to the soft tokens."""
    assert lm.soft is not None
    first = first_soft_id(lm)
    soft = ids >= first
    plain: Tensor = lm.embedding(ids.masked_fill(soft, 0))
    soft_rows = lm.soft.to(plain.dtype)[(ids - first).clamp_min(0)]
    return torch.where(soft[..., None], soft_rows, plain)
