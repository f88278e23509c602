"""Further starts: those of published programs, and the embeddings of the passage's tokens.

The start of low-dim coordinates is in `memvec.arms.low_dim`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import noise, passage_seed
from memvec.model.lm import FrozenLM


def uniform(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """Uniform in [0, 0.02), as in progressive cramming (Tarasov et al. 2026, 'random0.02')."""
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    return 0.02 * torch.rand(K, lm.width, generator=generator)


def normal(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """Standard normal, as in one-step decoding (Mezentsev & Oseledets 2025)."""
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    return torch.randn(K, lm.width, generator=generator)


@torch.no_grad()
def embeddings(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """The mean embedding of each of K equal spans of the passage, plus a tenth of `noise`.

    The noise makes the vectors of spans with equal tokens different.
    """
    rows = lm.embed(torch.tensor([list(ids)], device=lm.device))[0].float().cpu()
    bounds = [len(ids) * k // K for k in range(K + 1)]
    spans = (slice(a, max(b, a + 1)) for a, b in itertools.pairwise(bounds))
    return torch.stack([rows[span].mean(0) for span in spans]) + 0.1 * noise(lm, ids, K, recipe)
