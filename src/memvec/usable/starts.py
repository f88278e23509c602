"""The start of usable vectors: the embeddings of the last tokens of their passage.

As context they are as good as the end of the text, whereas noise is worse than nothing
(docs/usable.md). A usable encoder also begins from them, and adds to them (memvec.encoders.usable).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.model.lm import FrozenLM


@torch.no_grad()
def last_tokens(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """Embeddings of the last K tokens of the passage, each scaled to RMS 1.

    A passage with fewer tokens repeats its first one.
    """
    return last_embeddings(lm, torch.tensor([list(ids)], device=lm.device), K)[0].cpu()


def last_embeddings(lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
    """`last_tokens` for passages of one length, in float32 on the model's device."""
    T = ids.shape[1]
    last = torch.arange(T - K, T, device=ids.device).clamp_min(0)
    rows = lm.embed(ids[:, last]).float()
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)
