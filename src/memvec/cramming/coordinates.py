"""What is moved: the numbers the optimiser sees, and how [mem] vectors come from them.

Direct: the vectors themselves. Low-dim: few numbers through a matrix that moves too. The vectors
that the model reads are always the ones that will be stored: rounded to the storage dtype, with
gradients passed straight through the rounding, so that what is measured is what is kept.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.storage import Storage


class Coordinates(Protocol):
    """Parameters (B, ...) of B passages, and the vectors (B, K, D) they stand for.

    Made from a recipe, K and D. Coordinates need not reach every vector: what is measured and kept
    is always what `vectors` gives.
    """

    def __init__(self, recipe: Recipe, K: int, D: int) -> None: ...

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Tensor:
        """Parameters whose vectors are these, or the nearest that the coordinates reach."""

    def vectors(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The vectors of parameters, differentiable."""


class Direct:
    """The vectors themselves, as in the paper."""

    def __init__(self, recipe: Recipe, K: int, D: int) -> None:
        pass

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Tensor:
        """A copy of the vectors."""
        return vectors.clone()

    def vectors(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The parameters, unchanged."""
        return parameters


def basis(recipe: Recipe, K: int, D: int) -> tuple[Float[Tensor, "K d"], Float[Tensor, "d D"]]:
    """First coefficients and matrix of `LowDim`, the same for all passages: uniform in [0, 0.02)
    and in +-1/sqrt(d), which is how the published code and a fresh linear layer begin."""
    generator = torch.Generator().manual_seed(recipe.seed)
    d = recipe.dimensions
    z = 0.02 * torch.rand(K, d, generator=generator)
    return z, (2 * torch.rand(d, D, generator=generator) - 1) / d**0.5


class LowDim:
    """z W + b with d coefficients z per vector, where W and b of the passage move as well
    (Tarasov et al. 2026): d D + K (d + D) numbers, a preconditioner rather than a smaller code.

    b is per vector, so that any vectors can be taken up; for one vector that is the publication's.
    """

    def __init__(self, recipe: Recipe, K: int, D: int) -> None:
        self.z, self.W = basis(recipe, K, D)
        self.sizes = [self.z.numel(), self.W.numel(), K * D]

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Float[Tensor, "B n"]:
        """The common z and W, and the b that makes these vectors of them."""
        z, W = self.z.to(vectors.device), self.W.to(vectors.device)
        common = torch.cat([z.flatten(), W.flatten()]).expand(len(vectors), -1)
        return torch.cat([common, (vectors - z @ W).flatten(1)], dim=1)

    def vectors(self, parameters: Float[Tensor, "B n"]) -> Float[Tensor, "B K D"]:
        """z W + b."""
        z, W, b = torch.split(parameters, self.sizes, dim=1)
        lifted = z.reshape(-1, *self.z.shape) @ W.reshape(-1, *self.W.shape)
        vectors: Tensor = lifted + b.reshape_as(lifted)
        return vectors


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
