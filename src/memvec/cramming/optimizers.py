"""Optimisers: Adam for B passages at once, each with its own moments and step count.

The published recipes use `adamw`. The optimiser of the default recipe is in
`memvec.arms.full_matrix`; it changes the direction of the step of `nadam`.

One optimiser of a stacked parameter (B, ...), with the *sum* of the passages' losses, equals B
separate optimisers. torch's optimisers cannot do this: they have one step count for all passages
(a new passage needs its own for the bias correction), and cannot remove the moments of one passage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows

RISE = 0.8  # growth factor of the window of the mean gradient (see `first_decay`)


def learning_rate(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """The learning rate of each passage's next step, after `moved` steps.

    It rises linearly from 0 over `warmup` steps. Then it falls along half a cosine to `lr_end` at
    step `decay` (0: it stays constant), like transformers' cosine schedule with a minimum rate.
    """
    rate = torch.full_like(moved, recipe.lr)
    if recipe.decay:
        progress = (moved - recipe.warmup) / max(1, recipe.decay - recipe.warmup)
        cosine = 0.5 * (1 + torch.cos(torch.pi * progress.clamp(0, 1)))
        rate = recipe.lr_end + (recipe.lr - recipe.lr_end) * cosine
    return rate * (moved / max(1, recipe.warmup)).clamp_max(1) if recipe.warmup else rate


def first_decay(moved: Float[Tensor, "*B"], recipe: Recipe) -> Float[Tensor, "*B"]:
    """beta1 of each passage's next step, after `moved` steps (t).

    With `beta1_rise`, the mean covers about 1 + 0.8 t^beta1_rise gradients: few at first, while the
    vector moves far, and many later, when it balances many tokens (docs/log.md).
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

    It has no weight decay (see AdamW). beta1 may rise from step to step (`first_decay`). Gradients,
    means and directions have the shape (B, ...) of the parameters; step counts have shape (B,).
    """

    decays = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def fresh(self, parameters: Tensor) -> OptimizerState:
        """Zero moments and step counts for parameters (B, ...)."""
        mean, count = torch.zeros_like(parameters), parameters.new_zeros(len(parameters))
        return OptimizerState(mean, mean.clone(), count)

    def direction(self, mean: Tensor, gradient: Tensor, decay: Tensor) -> Tensor:
        """The direction of a step, from the mean gradient, the latest gradient and beta1."""
        return mean

    def change(self, mean: Tensor, scale: Tensor, state: OptimizerState) -> Tensor:
        """The step at learning rate 1, from the direction and the root mean square (`scale`)."""
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
        # lerp with weight 0 keeps the state of a passage that does not move, bit for bit.
        state.mean.lerp_(gradient, (1 - decay) * on.to(gradient.dtype))
        state.square.lerp_(gradient.square(), (1 - beta2) * on.to(gradient.dtype))
        count = state.count.clamp_min(1).reshape(shape)
        # A beta1 that rises from 0 needs no bias correction: the first mean is the first gradient.
        mean = state.mean / (1.0 if self.recipe.beta1_rise else 1 - beta1**count)
        mean = self.direction(mean, gradient, decay)
        change = self.change(mean, (state.square / (1 - beta2**count)).sqrt_().add_(1e-8), state)
        if self.decays:
            change.add_(parameters, alpha=self.recipe.weight_decay)
        scale = 1.0 if lr_scale is None else lr_scale.reshape(shape)
        rate = learning_rate(count - 1, self.recipe) * scale
        parameters.sub_(change.mul_(rate).masked_fill_(~on, 0))


class NAdam(Adam):
    """Adam with Nesterov's momentum (Dozat 2016); the bias correction of the mean is Adam's.

    The direction is beta1 times the mean plus 1 - beta1 times the latest gradient, which the mean
    already contains. Steps are as large as the vectors, and Nesterov's momentum corrects an
    overshoot one step earlier (docs/log.md has the gains).
    """

    def direction(self, mean: Tensor, gradient: Tensor, decay: Tensor) -> Tensor:
        return gradient.lerp(mean, decay)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as in the paper's code."""

    decays = True
