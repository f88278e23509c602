"""Do vectors keep their text in some directions and its meaning in others?

Every token of the passage has a direction of its own in the space of the vectors (K·D numbers):
the gradient of its margin (the logit of the true token minus the best other one) after the
trigger. So has every word that the model reads after the vectors as context: the gradient of its
log-probability. Each set of n directions spans a subspace, and two figures say how far the
subspaces coincide:

    overlap   mean over the directions of one set of the share of their squared length that lies in
              the span of the other; n / (K·D) by chance, 1 if one span holds the other
    without   what is lost of each mode when the vectors lose what they have in a span

Vectors lose a little in any span, so the same number of random directions is the control
(`random_directions`). Directions are taken at the vectors, one gradient each; nothing is assumed
of curvature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec import metrics
from memvec.model.lm import FrozenLM
from memvec.usable.teacher import states_after

Directions = Float[Tensor, "n KD"]


def directions_of_text(
    lm: FrozenLM, vectors: Float[Tensor, "K D"], ids: Sequence[int]
) -> Directions:
    """The gradient of each token's margin after the trigger at the vectors, a row for each."""
    T = len(ids)
    table = torch.tensor([list(ids)], device=lm.device).expand(T, -1)
    with torch.enable_grad():
        rows = vectors.to(lm.device).expand(T, -1, -1).detach().clone().requires_grad_()
        states = lm.states(rows, table, "bos")
        margin = metrics.margins(lm.head(_one_each(states)), table[0, :, None])[:, 0]
        (gradient,) = torch.autograd.grad(margin.sum(), rows)
    return gradient.flatten(1).float().cpu()


def directions_of_use(
    lm: FrozenLM,
    vectors: Float[Tensor, "K D"],
    words: Int[Tensor, "M L"],
    places: Sequence[tuple[int, int]],
) -> Directions:
    """The gradient of the log-probability of words after the vectors, for (row, position) each."""
    row, position = (torch.tensor(axis, device=lm.device) for axis in zip(*places, strict=True))
    table = words.to(lm.device)[row]
    with torch.enable_grad():
        rows = vectors.to(lm.device).expand(len(places), -1, -1).detach().clone().requires_grad_()
        states = states_after(lm, lm.after_front(lm.context_scale * rows), table)
        predicting = states[torch.arange(len(places)), position]
        log_p = lm.head(predicting).log_softmax(-1)
        (gradient,) = torch.autograd.grad(
            log_p.gather(-1, table.gather(1, position[:, None])).sum(), rows
        )
    return gradient.flatten(1).float().cpu()


def random_directions(n: int, numbers: int, seed: int) -> Directions:
    """n independent directions without preference among so many numbers (K·D)."""
    return torch.randn(n, numbers, generator=torch.Generator().manual_seed(seed))


def places_of(M: int, L: int, n: int) -> list[tuple[int, int]]:
    """n (row, position) pairs, spread evenly over M texts of L words."""
    return [divmod(M * L * i // n, L) for i in range(n)]


def overlap(directions: Directions, others: Float[Tensor, "m KD"]) -> float:
    """Mean share of the squared length of `directions` that lies in the span of `others`."""
    inside = directions.double() @ _basis(others)
    return float((inside.square().sum(1) / directions.double().square().sum(1)).mean())


def without(vectors: Float[Tensor, "K D"], directions: Directions) -> Float[Tensor, "K D"]:
    """The vectors less what they have in the span of the directions."""
    basis, flat = _basis(directions), vectors.flatten().double().cpu()
    return (flat - basis @ (basis.T @ flat)).float().reshape(vectors.shape)


def _basis(directions: Directions) -> Float[Tensor, "KD r"]:
    """An orthonormal basis of the span, each direction at length 1 first.

    Of directions that depend on each other the span has fewer columns than there are directions.
    """
    unit = directions.double() / directions.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    basis, sizes, _ = torch.linalg.svd(unit.T, full_matrices=False)
    independent: Tensor = basis[:, sizes > 1e-9 * sizes.max()]
    return independent


def _one_each(states: Float[Tensor, "T T H"]) -> Float[Tensor, "T 1 H"]:
    """Row i's state at position i."""
    at = torch.arange(len(states), device=states.device)
    return states[at, at][:, None]
