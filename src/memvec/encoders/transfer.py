"""A linear map from the vectors of one model (the origin) to those of another (the target).

The map is fitted on passages that were crammed into K vectors of each model. It is a ridge
regression of the target's numbers (K · D) on the origin's (K · D'), both centred. The penalty is
the one of a grid with the smallest leave-one-out error, so no pair is evaluated with a map that was
fitted on it.

A `Transfer` is an encoder of the target, so the same measurements apply and the engine can start
from it. It does not take one pass, since it crams passages into the origin first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memvec.companions.encoder import OnePassEncoder
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.encoders.measure import crammed_in_order
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM

Floats = NDArray[np.float64]
PENALTIES = np.logspace(-6, 3, 19)  # as multiples of the mean squared singular value
MIN_PAIRS = 8


class LinearMap(NamedTuple):
    """The map y = (x - mean_in) @ weight + mean_out.

    `explained` measures it on pairs that it was not fitted on: 1 minus its leave-one-out squared
    error over that of the mean (0 or less: the map is no better than the mean).
    """

    weight: Floats  # (inputs, outputs)
    mean_in: Floats  # (inputs,)
    mean_out: Floats  # (outputs,)
    penalty: float  # of the ridge regression, added to the squared singular values
    explained: float
    pairs: int

    def __call__(self, x: Floats) -> Floats:
        """Map rows (n, inputs) to rows (n, outputs)."""
        mapped: Floats = (x - self.mean_in) @ self.weight + self.mean_out
        return mapped


def fit_linear(x: Floats, y: Floats) -> LinearMap:
    """Ridge regression of y (n, outputs) on x (n, inputs); the penalty is chosen by leave-one-out.

    The leave-one-out residual of row i is its residual over 1 - h_ii, where h is the hat matrix of
    the fit including the mean. Raises MemvecError for fewer than MIN_PAIRS rows.
    """
    n = len(x)
    if n < MIN_PAIRS:
        raise MemvecError(f"a linear map needs at least {MIN_PAIRS} pairs, not {n}.")
    mean_in, mean_out = x.mean(0), y.mean(0)
    u, s, vt = np.linalg.svd(x - mean_in, full_matrices=False)
    turned = u.T @ (y - mean_out)
    best: tuple[float, float] | None = None
    for share in PENALTIES:
        penalty = float(share * (s**2).mean())
        keep = s**2 / (s**2 + penalty)
        residual = (y - mean_out) - u @ (keep[:, None] * turned)
        leverage = (u**2 * keep).sum(1) + 1 / n
        error = float(np.square(residual / (1 - leverage).clip(1e-9)[:, None]).sum())
        if best is None or error < best[0]:
            best = (error, penalty)
    assert best is not None
    error, penalty = best
    weight = vt.T @ ((s / (s**2 + penalty))[:, None] * turned)
    # The leave-one-out error of the mean: each residual over 1 - 1 / n.
    about = float(np.square((y - mean_out) * n / (n - 1)).sum())
    explained = 1 - error / about if about else 0.0
    return LinearMap(weight, mean_in, mean_out, penalty=penalty, explained=explained, pairs=n)


class Transfer(OnePassEncoder):
    """An encoder of the target model that maps the crammed vectors of `origin`.

    `recipe` crams into the origin; `K` is the number of vectors for which the map was fitted.
    """

    identity = "linear-transfer"

    def __init__(self, origin: FrozenLM, recipe: Recipe, K: int, mapping: LinearMap) -> None:
        self.origin, self.recipe, self.mapping = origin, recipe, mapping
        self.max_vectors = K

    def to(self, device: torch.device, dtype: torch.dtype) -> Transfer:
        """The same object: the origin stays on its device."""
        return self

    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        """Cram the passages into the origin and map their vectors.

        Raises MemvecError for another K than the map's.
        """
        if self.max_vectors != K:
            raise MemvecError(
                f"the linear map is for K = {self.max_vectors}, and {K} vectors are asked for."
            )
        origin_vectors, _ = crammed(self.origin, ids.tolist(), K, self.recipe)
        mapped = torch.from_numpy(self.mapping(origin_vectors)).to(lm.device, torch.float32)
        return mapped.reshape(len(ids), K, lm.width)


def crammed(
    lm: FrozenLM, passages: Sequence[Sequence[int]], K: int, recipe: Recipe
) -> tuple[Floats, NDArray[np.bool_]]:
    """Crammed vectors (n, K · D) of n passages of token ids, and which (n) decode exactly."""
    outcomes = crammed_in_order(Engine(lm, recipe, vectors=K), passages)
    rows: Floats = np.stack([o.vectors.flatten().double().numpy() for o in outcomes])
    return rows, np.array([o.exact for o in outcomes])


def fit_transfer(  # noqa: PLR0917 (two models, the passages, and how both are crammed)
    origin: FrozenLM,
    target: FrozenLM,
    passages: Sequence[Sequence[int]],
    K: int,
    recipe: Recipe,
    origin_recipe: Recipe | None = None,
) -> Transfer:
    """Fit the map on those passages of token ids that are exact in K vectors of both models.

    `recipe` crams into the target, and into the origin unless `origin_recipe` is given. Raises
    MemvecError if the two models do not have the same tokens, or if too few passages are exact.
    """
    check_same_tokens(origin, target)
    from_recipe = origin_recipe or recipe
    x, exact_in_origin = crammed(origin, passages, K, from_recipe)
    y, exact_in_target = crammed(target, passages, K, recipe)
    usable = exact_in_origin & exact_in_target
    return Transfer(origin, from_recipe, K, fit_linear(x[usable], y[usable]))


def check_same_tokens(first: FrozenLM, second: FrozenLM) -> None:
    """Raise MemvecError unless two models have the same vocabulary."""
    vocab, other_vocab = (lm.tokenizer and lm.tokenizer.get_vocab() for lm in (first, second))
    if first.vocab_size != second.vocab_size or vocab != other_vocab:
        raise MemvecError(
            f"{first.name} and {second.name} do not have the same tokens, so no passage is the "
            "same for both: take models with one tokenizer."
        )
