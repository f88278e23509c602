"""Directions of decoding mode and of context mode in the space of the vectors (K·D numbers).

The question is whether vectors store their text in other directions than its meaning. Each token of
the passage has a direction for decoding mode: the gradient of its margin after the trigger. Each
token of a query has a direction for context mode: the gradient of its log-probability after the
vectors. n directions of one mode span a subspace. Two figures compare the subspaces of both modes:

    overlap   the share of a direction's squared length in the subspace of the other mode, mean over
              directions; n / (K·D) by chance, 1 if the other subspace contains this one
    without   the loss in each mode when the component of the vectors in a subspace is removed

Removing any component changes vectors a little, so n random directions are the control
(`random_directions`). Each direction is one gradient at the vectors, so this is a first-order view.
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
    """The gradient of each token's margin (logits) in decoding mode at the vectors, one per row."""
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
    queries: Int[Tensor, "M L"],
    places: Sequence[tuple[int, int]],
) -> Directions:
    """The gradient of a token's log-probability in context mode, one row for each of `places`.

    A place is the (row, position) of a token in `queries`.
    """
    row, position = (torch.tensor(axis, device=lm.device) for axis in zip(*places, strict=True))
    table = queries.to(lm.device)[row]
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
    """n random normal directions in the space of `numbers` (K·D) numbers."""
    return torch.randn(n, numbers, generator=torch.Generator().manual_seed(seed))


def places_of(M: int, L: int, n: int) -> list[tuple[int, int]]:
    """n (row, position) pairs, evenly spaced over M queries of L tokens."""
    return [divmod(M * L * i // n, L) for i in range(n)]


def overlap(directions: Directions, others: Float[Tensor, "m KD"]) -> float:
    """The mean share of the squared length of `directions` that is in the span of `others`."""
    inside = directions.double() @ _basis(others)
    return float((inside.square().sum(1) / directions.double().square().sum(1)).mean())


def without(vectors: Float[Tensor, "K D"], directions: Directions) -> Float[Tensor, "K D"]:
    """The vectors without their component in the span of the directions."""
    basis, flat = _basis(directions), vectors.flatten().double().cpu()
    return (flat - basis @ (basis.T @ flat)).float().reshape(vectors.shape)


def _basis(directions: Directions) -> Float[Tensor, "KD r"]:
    """An orthonormal basis of the span of the directions, which are first scaled to length 1.

    r is below n if the directions are linearly dependent.
    """
    unit = directions.double() / directions.double().norm(dim=1, keepdim=True).clamp_min(1e-30)
    basis, sizes, _ = torch.linalg.svd(unit.T, full_matrices=False)
    independent: Tensor = basis[:, sizes > 1e-9 * sizes.max()]
    return independent


def _one_each(states: Float[Tensor, "T T H"]) -> Float[Tensor, "T 1 H"]:
    """Row i's state at position i."""
    at = torch.arange(len(states), device=states.device)
    return states[at, at][:, None]
