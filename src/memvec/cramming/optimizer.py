"""How it is moved: Adam for B passages at once, each with its own moments and its own step count.

One stacked parameter and the *sum* of per-passage losses make B separate runs out of one; what a
library optimiser lacks is a step count per passage (a newcomer's bias correction starts at 1 while
its neighbours are at 500) and moments that leave with the passage, so those are here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cramming.recipe import Recipe


def learning_rate(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """The rate of a passage's next move after it has moved so often.

    A straight line from 0 over `warmup` moves, then half a cosine down to `lr_end` at move `decay`
    (0: it stays), as transformers' cosine schedule with a least rate has it.
    """
    rate = torch.full_like(moved, recipe.lr)
    if recipe.decay:
        gone = (moved - recipe.warmup) / max(1, recipe.decay - recipe.warmup)
        fall = 0.5 * (1 + torch.cos(torch.pi * gone.clamp(0, 1)))
        rate = recipe.lr_end + (recipe.lr - recipe.lr_end) * fall
    return rate * (moved / max(1, recipe.warmup)).clamp_max(1) if recipe.warmup else rate


RISE = 0.8


def first_decay(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """Decay of the mean gradient in a passage's next move after it has moved so often.

    A mean over about 1 + 0.8 t^beta1_rise gradients: short while the vector travels, long when it
    has to find its way between many tokens (docs/log.md). The first mean is the first gradient.
    """
    if not recipe.beta1_rise:
        return torch.full_like(moved, recipe.beta1)
    return (1 - 1 / (1 + RISE * moved**recipe.beta1_rise)).clamp_max(recipe.beta1)


class Adam:
    """Adam (Kingma & Ba 2015) over the first axis of a stacked parameter; AdamW with decay.

    `state` tensors have the passages as their first axis, so the engine can slot, compact and
    retire passages without knowing what they mean.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.weight_decay = recipe.weight_decay if recipe.optimizer == "adamw" else 0.0

    def fresh(self, parameters: Tensor) -> dict[str, Tensor]:
        """Empty state for parameters (B, ...)."""
        return {
            "mean": torch.zeros_like(parameters),
            "square": torch.zeros_like(parameters),
            "count": torch.zeros(len(parameters), device=parameters.device),
        }

    @torch.no_grad()
    def step(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        moving: Tensor,
        faster: Tensor | None = None,
    ) -> None:
        """Move `parameters` (B, ...) in place where `moving` (B) is true; others stay.

        `faster` (B): how many times the learning rate each passage moves at; once, if not given.
        """
        beta1, beta2 = self.recipe.beta1, self.recipe.beta2
        shape = (-1,) + (1,) * (parameters.dim() - 1)
        on = moving.reshape(shape)
        decay = first_decay(state["count"], self.recipe).reshape(shape)
        state["count"].add_(moving)
        # lerp with weight 0 leaves a passage that has finished exactly as it was measured.
        state["mean"].lerp_(gradient, (1 - decay) * on.to(gradient.dtype))
        state["square"].lerp_(gradient.square(), (1 - beta2) * on.to(gradient.dtype))
        count = state["count"].clamp_min(1).reshape(shape)
        # A decay that rises from 0 leaves no share of the mean to what was there before.
        mean = state["mean"] / (1.0 if self.recipe.beta1_rise else 1 - beta1**count)
        scale = (state["square"] / (1 - beta2**count)).sqrt_().add_(1e-8)
        change = mean.div_(scale)
        if self.weight_decay:
            change.add_(parameters, alpha=self.weight_decay)
        rate = learning_rate(count - 1, self.recipe)
        if faster is not None:
            rate = rate * faster.reshape(shape)
        parameters.sub_(change.mul_(rate).masked_fill_(~on, 0))


OPTIMIZERS = {"adam": Adam, "adamw": Adam}
