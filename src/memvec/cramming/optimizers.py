"""Optimisers: Adam for B passages at once, each with its own moments and step count.

The published recipes use `adamw`. The default recipe's optimiser (`memvec.arms.full_matrix`)
rotates the step of `nadam`.

With one stacked parameter and the *sum* of per-passage losses, one optimiser runs B separate ones.
torch's optimisers lack a step count per passage (the bias correction of a new passage starts at 1
while others are at 500) and moments that are removed with their passage; both are added here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows


def learning_rate(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """The learning rate of each passage's next step, after `moved` steps.

    It rises linearly from 0 over `warmup` steps, then falls along half a cosine to `lr_end` at step
    `decay` (0: it stays constant), like transformers' cosine schedule with a minimum rate.
    """
    rate = torch.full_like(moved, recipe.lr)
    if recipe.decay:
        gone = (moved - recipe.warmup) / max(1, recipe.decay - recipe.warmup)
        fall = 0.5 * (1 + torch.cos(torch.pi * gone.clamp(0, 1)))
        rate = recipe.lr_end + (recipe.lr - recipe.lr_end) * fall
    return rate * (moved / max(1, recipe.warmup)).clamp_max(1) if recipe.warmup else rate


RISE = 0.8  # factor of the growth of the mean gradient's window, see `first_decay`


def first_decay(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """beta1 of each passage's next step, after `moved` steps (t).

    The mean gradient covers about 1 + 0.8 t^beta1_rise gradients: few while the vector moves far,
    many later, when it balances many tokens (docs/log.md). The first mean is the first gradient.
    """
    if not recipe.beta1_rise:
        return torch.full_like(moved, recipe.beta1)
    return (1 - 1 / (1 + RISE * moved**recipe.beta1_rise)).clamp_max(recipe.beta1)


@dataclass
class OptimizerState(Rows):
    """Mean and mean square of gradients, (B, ...) like the parameters, and step counts (B)."""

    mean: Tensor
    square: Tensor
    count: Float[Tensor, " B"]


class Adam:
    """Adam (Kingma & Ba 2015) for B passages that start and stop at different steps.

    It has no weight decay (AdamW has); beta1 may rise from step to step. Gradients, means and
    directions have the parameters' shape (B, ...), counts are (B).
    """

    decays = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def fresh(self, parameters: Tensor) -> OptimizerState:
        """Zero moments and step counts for parameters (B, ...)."""
        mean, count = torch.zeros_like(parameters), parameters.new_zeros(len(parameters))
        return OptimizerState(mean, mean.clone(), count)

    def direction(self, mean: Tensor, gradient: Tensor, decay: Tensor) -> Tensor:
        """The direction of a step, from the mean gradient, the newest gradient and beta1."""
        return mean

    def change(self, mean: Tensor, scale: Tensor, state: OptimizerState) -> Tensor:
        """The step at learning rate 1, from the direction and the root of the mean square."""
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
        """Update `parameters` (B, ...) and `state` in place, only where `moving` (B) is true.

        `lr_scale` multiplies the learning rate of each passage (None: 1).
        """
        beta1, beta2 = self.recipe.beta1, self.recipe.beta2
        shape = (-1,) + (1,) * (parameters.dim() - 1)
        on = moving.reshape(shape)
        decay = first_decay(state.count, self.recipe).reshape(shape)
        state.count.add_(moving)
        # lerp with weight 0 leaves the state of a passage that is not moving bit-identical.
        state.mean.lerp_(gradient, (1 - decay) * on.to(gradient.dtype))
        state.square.lerp_(gradient.square(), (1 - beta2) * on.to(gradient.dtype))
        count = state.count.clamp_min(1).reshape(shape)
        # With a beta1 that rises from 0, the zero start has no weight in the mean.
        mean = state.mean / (1.0 if self.recipe.beta1_rise else 1 - beta1**count)
        mean = self.direction(mean, gradient, decay)
        change = self.change(mean, (state.square / (1 - beta2**count)).sqrt_().add_(1e-8), state)
        if self.decays:
            change.add_(parameters, alpha=self.recipe.weight_decay)
        scale = 1.0 if lr_scale is None else lr_scale.reshape(shape)
        rate = learning_rate(count - 1, self.recipe) * scale
        parameters.sub_(change.mul_(rate).masked_fill_(~on, 0))


class NAdam(Adam):
    """Adam with Nesterov's momentum, which looks one step ahead (Dozat 2016).

    The newest gradient counts twice: in the mean, and once more with the weight that it has there,
    1 - beta1, beside beta1 times the mean. Steps are as large as the vectors, and this corrects an
    overshoot one step earlier (gains: docs/log.md). The bias correction of the mean is Adam's.
    """

    def direction(self, mean: Tensor, gradient: Tensor, decay: Tensor) -> Tensor:
        return gradient.lerp(mean, decay)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as the paper's code has it."""

    decays = True
