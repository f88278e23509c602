"""Objectives: the loss of each position, from its logits and its true token.

An objective defines the loss of a position (`loss`) and its weight in the loss of its passage
(`weights`). `score` computes both in chunks that fit in memory. The loss of a passage is a weighted
mean over its positions, and the losses of passages are summed, so a passage does not change the
gradient of another one. A new objective is a function,

    @register("objective", "hinge")
    def hinge(logits, ids, temperature, recipe):        # (n, V), (n,), (n,) -> (n,)
        margin = metrics.margins(logits[None], ids[None])[0]
        return (recipe.margin - margin).clamp_min(0)

or a subclass of `Objective`, if it has its own weights or a fast path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memvec import metrics, registry
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.model import memory
from memvec.results import Score

# (logits, true token ids, temperature, recipe) -> loss of each position
LossFunction = Callable[
    [Float[Tensor, "n V"], Int[Tensor, " n"], Float[Tensor, " n"], Recipe], Float[Tensor, " n"]
]
# (logits, true token ids, temperature) -> loss, margin, gradient of the loss at the logits
FusedLoss = Callable[
    [Float[Tensor, "n V"], Int[Tensor, " n"], Float[Tensor, " n"]],
    tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n V"]],
]

# Log-probabilities are clamped to this minimum. Smaller probabilities do not change a gradient, and
# below exp(-87) they are denormal float32 numbers: CPU matrix products with these are so slow that
# a step takes twice as long (docs/log.md).
SMALLEST_LOG = -60.0


class Objective:
    """An objective: made from a loss function, or a subclass that defines `loss`."""

    fused: FusedLoss | None = None  # a fast path with the same results as autograd

    def __init__(self, loss: LossFunction | None = None) -> None:
        if loss is not None:
            self.loss = loss  # type: ignore[method-assign, assignment]

    def loss(
        self,
        logits: Float[Tensor, "n V"],
        ids: Int[Tensor, " n"],
        temperature: Float[Tensor, " n"],
        recipe: Recipe,
    ) -> Float[Tensor, " n"]:
        """The loss of each position, logits."""
        raise MemvecError(f"the objective '{recipe.objective}' has no method loss.")

    def weights(
        self,
        counted: Bool[Tensor, "B T"],
        margin: Float[Tensor, "B T"],
        target_margin: Float[Tensor, " B"],
    ) -> Float[Tensor, "B T"]:
        """The weight of each position in the loss of its passage; no gradient flows through it.

        By default, the positions that count have equal weights with the sum 1.
        """
        return counted / counted.sum(-1, keepdim=True).clamp_min(1)


def cross_entropy(
    logits: Float[Tensor, "n V"],
    ids: Int[Tensor, " n"],
    temperature: Float[Tensor, " n"],
    recipe: Recipe,
) -> Float[Tensor, " n"]:
    """Cross-entropy of logits / T, multiplied by T so that gradients keep their size.

    T is `temperature`, logits. T = 1 is the paper's loss (section 3). At a smaller T, tokens with a
    large margin have almost no gradient, so the vector moves for the others (docs/log.md).
    """
    scaled = logits / temperature[:, None]
    return torch.nn.functional.cross_entropy(scaled, ids, reduction="none") * temperature


def fused_cross_entropy(
    logits: Float[Tensor, "n V"], ids: Int[Tensor, " n"], temperature: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """Loss, margin, and the gradient of the loss at the logits, from one softmax.

    The results are those of `cross_entropy` and `metrics.margins` through autograd. This takes half
    as many passes over a tensor of V columns, and works in place in a single buffer.
    """
    column = ids[:, None]
    buffer = torch.log_softmax(logits / temperature[:, None], dim=-1)
    true = buffer.gather(-1, column)
    best_other = buffer.scatter_(-1, column, -torch.inf).amax(-1, keepdim=True)
    gradient = buffer.scatter_(-1, column, true).clamp_(min=SMALLEST_LOG).exp_()
    gradient.scatter_add_(-1, column, torch.full_like(true, -1.0))
    return -true[:, 0] * temperature, (true - best_other)[:, 0] * temperature, gradient


class CrossEntropy(Objective):
    """The objective `cross_entropy`, with its fast path."""

    fused = staticmethod(fused_cross_entropy)
    loss = staticmethod(cross_entropy)


def objective_named(name: str) -> Objective:
    """The objective that is registered under a name, as a class or as a loss function.

    Raises MemvecError for an unknown name.
    """
    choice = registry.get("objective", name)
    made = choice() if isinstance(choice, type) else Objective(choice)
    objective: Objective = registry.guarded("objective", name, made)
    return objective


def score(
    head: Callable[[Tensor], Tensor],
    states: Float[Tensor, "B T H"],
    ids: Int[Tensor, "B T"],
    recipe: Recipe,
    *,
    V: int,
    temperature: Float[Tensor, " B"] | None = None,
    reference: bool = False,
) -> Score:
    """Losses, margins and gradients at the states of a batch, a few rows of logits at a time.

    `ids` are the true tokens. The gradients are those of each position's own loss, without weights:
    the loss of a passage is a weighted sum over positions, so the caller can multiply the gradients
    by weights that depend on all margins. So a (B, T, V) tensor of logits never exists.
    `temperature` (logits) is that of each passage (None: the recipe's). `reference` uses autograd
    instead of the objective's fast path.
    """
    B, T, H = states.shape
    flat, truth = states.detach().reshape(B * T, H), ids.reshape(-1)
    objective = objective_named(recipe.objective)
    fused = None if reference else objective.fused
    if temperature is None:
        temperature = torch.full((B,), recipe.temperature, device=states.device)
    temperatures = temperature.repeat_interleave(T)
    losses = torch.empty(B * T, device=states.device)
    margin = torch.empty(B * T, device=states.device)
    gradient = torch.empty_like(flat)
    rows = max(1, memory.LOGITS_AT_ONCE // V)

    def score_rows(span: slice) -> None:
        # This is a function so that the tensors of one chunk are freed before the next one.
        with torch.enable_grad():
            part = flat[span].requires_grad_()
            logits = head(part).float()
            if fused is None:
                loss = objective.loss(logits, truth[span], temperatures[span], recipe)
                (gradient[span],) = torch.autograd.grad(loss.sum(), part)
                margins = metrics.margins(logits.detach()[None], truth[span][None])[0]
            else:
                loss, margins, slope = fused(logits.detach(), truth[span], temperatures[span])
                (gradient[span],) = torch.autograd.grad(logits, part, slope)
        if not recipe.margin:  # with a required margin, a tie never suffices
            margins = metrics.first_of_ties(margins, logits.detach(), truth[span])
        losses[span] = loss.detach()
        margin[span] = margins

    for at in range(0, B * T, rows):
        score_rows(slice(at, at + rows))
    return Score(losses.reshape(B, T), margin.reshape(B, T), gradient.reshape(B, T, H))
