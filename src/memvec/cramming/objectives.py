"""What is minimised: a loss per position, from its logits and its true token.

An objective says what a position costs (`loss`) and what it weighs in its passage (`weights`);
chunking over memory is done once, in `score`. Each passage has its own weighted mean and passages
are summed, so that no passage changes another's gradient. A new objective is one function,

    @register("objective", "hinge")
    def hinge(logits, ids, temperature, recipe):        # (n, V), (n,), (n,) -> (n,)
        margin = metrics.margins(logits[None], ids[None])[0]
        return (recipe.margin - margin).clamp_min(0)

or a subclass of `Objective` if it weighs positions in its own way or has a fast path.
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

# Smaller probabilities do not change a gradient; below exp(-87) they are denormal float32 numbers,
# which make a CPU's products with the head so slow that a step takes twice as long (docs/log.md).
SMALLEST_LOG = -60.0


class Objective:
    """What is minimised; made from a loss function, or a subclass with a loss of its own."""

    fused: FusedLoss | None = None  # a fast path that gives the same figures as autograd

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
        """What each position weighs in its passage's loss; no gradient flows through it.

        Here: equal weights that add up to 1 over the positions that count.
        """
        return counted / counted.sum(-1, keepdim=True).clamp_min(1)


def cross_entropy(
    logits: Float[Tensor, "n V"],
    ids: Int[Tensor, " n"],
    temperature: Float[Tensor, " n"],
    recipe: Recipe,
) -> Float[Tensor, " n"]:
    """Cross-entropy of logits / T, times T so that gradients keep their size.

    T = 1 is the paper's loss (section 3). A smaller T stops paying for tokens that are already
    safely right and leaves the vector free for the others (docs/log.md).
    """
    divided = logits / temperature[:, None]
    return torch.nn.functional.cross_entropy(divided, ids, reduction="none") * temperature


def fused_cross_entropy(
    logits: Float[Tensor, "n V"], ids: Int[Tensor, " n"], temperature: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, "n V"]]:
    """Loss, margin, and the gradient of the loss at the logits, from one softmax.

    The same figures as `cross_entropy` and `metrics.margins` give through autograd, with half of
    the passes over a tensor of V columns; all work is in the place of one buffer.
    """
    here = ids[:, None]
    buffer = torch.log_softmax(logits / temperature[:, None], dim=-1)
    true = buffer.gather(-1, here)
    best_other = buffer.scatter_(-1, here, -torch.inf).amax(-1, keepdim=True)
    gradient = buffer.scatter_(-1, here, true).clamp_(min=SMALLEST_LOG).exp_()
    gradient.scatter_add_(-1, here, torch.full_like(true, -1.0))
    return -true[:, 0] * temperature, (true - best_other)[:, 0] * temperature, gradient


class CrossEntropy(Objective):
    """`cross_entropy` with its fast path."""

    fused = staticmethod(fused_cross_entropy)
    loss = staticmethod(cross_entropy)


def objective_named(name: str) -> Objective:
    """The objective of a name: from a registered class, or a registered loss function.

    Raises MemvecError for an unknown name.
    """
    choice = registry.get("objective", name)
    made: Objective = choice() if isinstance(choice, type) else Objective(choice)
    return made


def score(
    head: Callable[[Tensor], Tensor],
    states: Float[Tensor, "B T H"],
    ids: Int[Tensor, "B T"],
    recipe: Recipe,
    *,
    temperature: Float[Tensor, " B"] | None = None,
    V: int | None = None,
    reference: bool = False,
) -> Score:
    """Losses, margins and gradients at the states of a batch, a few rows of logits at a time.

    The head is frozen and the loss is a weighted sum over positions, so the gradient of each chunk
    is known, but for its weight, as soon as its logits are: no (B, T, V) tensor outlives its chunk,
    whatever V is, and the weights may depend on all margins. `temperature` (logits) is each
    passage's, or the recipe's if it is not given. `V` saves a call of the head. `reference`
    takes the slow path through autograd, to which the fused one must be equal.
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
    if V is None:
        with torch.no_grad():
            V = int(head(flat[:1]).shape[-1])
    rows = max(1, memory.LOGITS_AT_ONCE // V)

    def chunk(here: slice) -> None:
        # A function of its own, so that nothing of one chunk is alive during the next.
        with torch.enable_grad():
            part = flat[here].requires_grad_()
            logits = head(part).float()
            if fused is None:
                loss = objective.loss(logits, truth[here], temperatures[here], recipe)
                registry.checked("objective", recipe.objective, loss, truth[here].shape)
                (gradient[here],) = torch.autograd.grad(loss.sum(), part)
                margins = metrics.margins(logits.detach()[None], truth[here][None])[0]
            else:
                loss, margins, slope = fused(logits.detach(), truth[here], temperatures[here])
                (gradient[here],) = torch.autograd.grad(logits, part, slope)
        if not recipe.margin:  # else a tie is not enough, whichever token comes first
            margins = metrics.first_of_ties(margins, logits.detach(), truth[here])
        losses[here] = loss.detach()
        margin[here] = margins

    for at in range(0, B * T, rows):
        chunk(slice(at, at + rows))
    return Score(losses.reshape(B, T), margin.reshape(B, T), gradient.reshape(B, T, H))
