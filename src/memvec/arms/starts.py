"""Where the vectors of published programs begin; those of low-dim coordinates in `low_dim`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import passage_seed
from memvec.model.lm import FrozenLM


def uniform(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """Uniform in [0, 0.02), as progressive cramming was run (Tarasov et al. 2026, 'random0.02')."""
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    return 0.02 * torch.rand(K, lm.width, generator=generator)


def normal(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """Standard normal, as one-step decoding was run (Mezentsev & Oseledets 2025)."""
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    return torch.randn(K, lm.width, generator=generator)
