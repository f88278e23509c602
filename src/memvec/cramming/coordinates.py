"""Coordinates: the parameters that the optimiser moves, and how [mem] vectors come from them.

`Direct` moves the vectors themselves. `memvec.arms.principal` rotates them, and
`memvec.arms.low_dim` moves a few coefficients and a matrix. The model always reads the vectors as
they will be stored: rounded to the storage dtype. Gradients pass straight through the rounding
(straight-through estimator), so the stored vectors are the measured ones.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from memvec import registry
from memvec.cramming.recipe import Recipe
from memvec.model.lm import FrozenLM
from memvec.storage import Storage


class Coordinates(Protocol):
    """A map between parameters (B, ...) of B passages and their vectors (B, K, D).

    It is made from a recipe, K and a model. The map need not reach every vector: the result of
    `vectors` is what is measured and stored. Coordinates with `of_inputs` true are for inputs of
    the model only; in other spaces the vectors are moved directly.
    """

    def __init__(self, recipe: Recipe, K: int, lm: FrozenLM) -> None: ...

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Tensor:
        """Parameters of these vectors, or of the nearest vectors that the coordinates reach."""

    def vectors(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The vectors of parameters; differentiable."""


def supported_coordinates(name: str, lm: FrozenLM) -> str:
    """`name`, or 'direct' if these coordinates are for inputs and the vectors are no inputs.

    Raises MemvecError for an unknown name.
    """
    of_inputs = getattr(registry.get("coordinates", name), "of_inputs", False)
    are_inputs = lm.reading.enlarges and lm.numbers == lm.width
    return name if are_inputs or not of_inputs else "direct"


class Direct:
    """The vectors themselves, as in the paper."""

    def __init__(self, recipe: Recipe, K: int, lm: FrozenLM) -> None:
        pass

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Tensor:
        """A copy of the vectors."""
        return vectors.clone()

    def vectors(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The parameters, unchanged."""
        return parameters


class _Round(torch.autograd.Function):
    """Rounding to the storage's numbers, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, storage: Storage) -> Tensor:
        return storage.rounded(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def as_stored(vectors: Float[Tensor, "*shape"], storage: Storage) -> Float[Tensor, "*shape"]:
    """The vectors as a reader of the file gets them: rounded by `storage`, in float32."""
    if storage.name == "float32":
        return vectors
    rounded: Tensor = _Round.apply(vectors, storage)  # type: ignore[no-untyped-call]
    return rounded
