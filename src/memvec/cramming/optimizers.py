"""How it is moved: Adam for B passages at once, each with its own moments and its own step count.

`adamw` is the published recipes'; the default's (`memvec.arms.full_matrix`) turns `nadam`'s step.

One stacked parameter and the *sum* of per-passage losses make B separate runs out of one; what a
library optimiser lacks is a step count per passage (a newcomer's bias correction starts at 1 while
its neighbours are at 500) and moments that leave with the passage, so those are here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows


def learning_rate(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """The rate of a passage's next move after it has moved so often.

    A straight line from 0 over `warmup` moves, then half a cosine down to `lr_end` at move `decay`
    (0: it stays), as transformers' cosine schedule with a minimum rate has it.
    """
    rate = torch.full_like(moved, recipe.lr)
    if recipe.decay:
        gone = (moved - recipe.warmup) / max(1, recipe.decay - recipe.warmup)
        fall = 0.5 * (1 + torch.cos(torch.pi * gone.clamp(0, 1)))
        rate = recipe.lr_end + (recipe.lr - recipe.lr_end) * fall
    return rate * (moved / max(1, recipe.warmup)).clamp_max(1) if recipe.warmup else rate


RISE = 0.8  # how fast the mean gradient's memory grows with the number of moves


def first_decay(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """Decay of the mean gradient in a passage's next move after it has moved so often.

    A mean over about 1 + 0.8 t^beta1_rise gradients: short while the vector travels, long when it
    has to find its way between many tokens (docs/log.md). The first mean is the first gradient.
    """
    if not recipe.beta1_rise:
        return torch.full_like(moved, recipe.beta1)
    return (1 - 1 / (1 + RISE * moved**recipe.beta1_rise)).clamp_max(recipe.beta1)


@dataclass
class OptimizerState(Rows):
    """Moments and move counts of each slot; (B, ...) like the parameters."""

    mean: Tensor
    square: Tensor
    count: Float[Tensor, " B"]


class Adam:
    """Adam (Kingma & Ba 2015) for B passages that start and stop at different moves.

    It decays no weights (AdamW does); beta1 may rise from move to move.
    """

    decays = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def fresh(self, parameters: Tensor) -> OptimizerState:
        """Empty state for parameters (B, ...)."""
        mean, count = torch.zeros_like(parameters), parameters.new_zeros(len(parameters))
        return OptimizerState(mean, mean.clone(), count)

    def direction(self, mean: Tensor, gradient: Tensor, decay: Tensor) -> Tensor:
        """What the step follows, from the mean gradient, the newest one and the mean's decay."""
        return mean

    def change(self, mean: Tensor, scale: Tensor, state: OptimizerState) -> Tensor:
        """The step at rate 1, from what it follows and the root of the mean square."""
        return mean.div_(scale)

    @torch.no_grad()
    def step(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: OptimizerState,
        moving: Bool[Tensor, " B"],
        lr_scale: Float[Tensor, " B"] | None = None,
    ) -> None:
        """Move `parameters` (B, ...) in place where `moving` (B) is true; others stay.

        `lr_scale` multiplies the learning rate of each passage; 1 if it is not given.
        """
        beta1, beta2 = self.recipe.beta1, self.recipe.beta2
        shape = (-1,) + (1,) * (parameters.dim() - 1)
        on = moving.reshape(shape)
        decay = first_decay(state.count, self.recipe).reshape(shape)
        state.count.add_(moving)
        # lerp with weight 0 leaves a passage that has finished exactly as it was measured.
        state.mean.lerp_(gradient, (1 - decay) * on.to(gradient.dtype))
        state.square.lerp_(gradient.square(), (1 - beta2) * on.to(gradient.dtype))
        count = state.count.clamp_min(1).reshape(shape)
        # A decay that rises from 0 leaves no share of the mean to what was there before.
        mean = state.mean / (1.0 if self.recipe.beta1_rise else 1 - beta1**count)
        mean = self.direction(mean, gradient, decay)
        change = self.change(mean, (state.square / (1 - beta2**count)).sqrt_().add_(1e-8), state)
        if self.decays:
            change.add_(parameters, alpha=self.recipe.weight_decay)
        scale = 1.0 if lr_scale is None else lr_scale.reshape(shape)
        rate = learning_rate(count - 1, self.recipe) * scale
        parameters.sub_(change.mul_(rate).masked_fill_(~on, 0))


class NAdam(Adam):
    """Adam that follows the mean gradient one decay ahead (Nesterov's momentum; Dozat 2016).

    The newest gradient counts twice: in the mean, and once more beside it with the share that it
    would have in the next mean. Steps are as large as the vectors: what the last one overshot is
    corrected a move earlier (docs/log.md has what that gains). The mean is corrected for its first
    moves as Adam's is.
    """

    def direction(self, mean: Tensor, gradient: Tensor, decay: Tensor) -> Tensor:
        return gradient.lerp(mean, decay)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as the paper's code has it."""

    decays = True
