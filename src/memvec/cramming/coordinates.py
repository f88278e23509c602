"""What is moved: the numbers the optimiser sees, and how [mem] vectors come from them.

Here the vectors themselves; `memvec.arms.principal` turns them, and `memvec.arms.low_dim` moves
a few numbers and the matrix that makes vectors of them. The vectors that the model reads are always
the ones that will be stored: rounded to the storage dtype, with gradients passed straight through
the rounding, so that what is measured is what is kept.
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
    """Parameters (B, ...) of B passages, and the vectors (B, K, D) they stand for.

    Made from a recipe, K and a model. Coordinates need not reach every vector: what is measured and
    kept is always what `vectors` gives. Those with `of_inputs` true are for vectors in the model's
    input; in other spaces vectors are moved directly.
    """

    def __init__(self, recipe: Recipe, K: int, lm: FrozenLM) -> None: ...

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Tensor:
        """Parameters whose vectors are these, or the nearest that the coordinates reach."""

    def vectors(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The vectors of parameters, differentiable."""


def fitting(name: str, lm: FrozenLM) -> str:
    """The name of the coordinates to use: `name`, or 'direct' where that is only for inputs.

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
    """To what is stored and back, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, storage: Storage) -> Tensor:
        return storage.rounded(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def as_stored(vectors: Float[Tensor, "*shape"], storage: Storage) -> Float[Tensor, "*shape"]:
    """What a reader of the file will see: rounded as it is stored, in float32."""
    if storage.name == "float32":
        return vectors
    rounded: Tensor = _Round.apply(vectors, storage)  # type: ignore[no-untyped-call]
    return rounded
