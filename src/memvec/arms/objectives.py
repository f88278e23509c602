"""Objectives other than cross-entropy."""

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
    """softplus((m - margin) / T) T with m = 2 x the recipe's margin + T, logits.

    Only the true token and the best other one have a gradient.
    """
    missing = 2 * recipe.margin + temperature - metrics.margins(logits[None], ids[None])[0]
    return torch.nn.functional.softplus(missing / temperature) * temperature


class Deficit(CrossEntropy):
    """Cross-entropy in which the weight of a position is what its margin lacks of the target.

    This is the margin-aware loss of Tarasov et al. (2026). A token that reaches the target margin
    has weight 0.
    """

    def weights(
        self,
        counted: Bool[Tensor, "B T"],
        margin: Float[Tensor, "B T"],
        target_margin: Float[Tensor, " B"],
    ) -> Float[Tensor, "B T"]:
        share = (target_margin[:, None] - margin).clamp_min(0).where(counted, 0)
        return share / share.sum(-1, keepdim=True).clamp_min(1e-6)
