"""Objectives that the default recipe was measured against."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec import metrics
from memvec.cramming.objectives import CrossEntropy
from memvec.cramming.recipe import Recipe


def margin(
    logits: Float[Tensor, "n V"],
    ids: Int[Tensor, " n"],
    temperature: Float[Tensor, " n"],
    recipe: Recipe,
) -> Float[Tensor, " n"]:
    """softplus((m - margin) / T) T with m = 2 x the recipe's margin + T: pays for the best wrong
    token only."""
    missing = 2 * recipe.margin + temperature - metrics.margins(logits[None], ids[None])[0]
    return torch.nn.functional.softplus(missing / temperature) * temperature


class Deficit(CrossEntropy):
    """Cross-entropy in which a position weighs what its margin lacks of the target margin.

    The margin-aware loss of Tarasov et al. (2026): a token that leads by enough costs nothing.
    """

    def weights(
        self,
        counted: Bool[Tensor, "B T"],
        margin: Float[Tensor, "B T"],
        target_margin: Float[Tensor, " B"],
    ) -> Float[Tensor, "B T"]:
        share = (target_margin[:, None] - margin).clamp_min(0).where(counted, 0)
        return share / share.sum(-1, keepdim=True).clamp_min(1e-6)
