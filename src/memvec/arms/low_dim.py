"""Low-dimensional coordinates (Tarasov et al. 2026): coefficients, and a matrix that is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import passage_seed
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM

MAX_DIMENSIONS = 512  # maximum d, or D if that is larger


def basis(recipe: Recipe, K: int, D: int) -> tuple[Float[Tensor, "K d"], Float[Tensor, "d D"]]:
    """The first coefficients and matrix of `LowDim`, the same for all passages.

    Coefficients are uniform in [0, 0.02) as in the published code. The matrix is uniform in
    +-1/sqrt(d), as a new linear layer.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    d = recipe.dimensions
    z = 0.02 * torch.rand(K, d, generator=generator)
    return z, (2 * torch.rand(d, D, generator=generator) - 1) / d**0.5


class LowDim:
    """Vectors z W + b with d coefficients z per vector (Tarasov et al. 2026).

    z, W and b of each passage are trained: d D + K (d + D) numbers. So this is a preconditioner,
    not a smaller code. Each vector has its own b, so that any vectors have parameters; for one
    vector, this is the published form. Raises MemvecError for a d above both D and MAX_DIMENSIONS.
    """

    def __init__(self, recipe: Recipe, K: int, lm: FrozenLM) -> None:
        limit = max(lm.numbers, MAX_DIMENSIONS)
        if recipe.dimensions > limit:
            raise MemvecError(
                f"low-dim coordinates of {lm.name} have 1 to {limit} dimensions, not "
                f"{recipe.dimensions}: change the recipe's dimensions."
            )
        self.z, self.W = (t.to(lm.device) for t in basis(recipe, K, lm.numbers))
        self.sizes = [self.z.numel(), self.W.numel(), K * lm.numbers]

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Float[Tensor, "B n"]:
        """z and W as in `basis`, and the b with which z W + b are these vectors."""
        z, W = self.z.to(vectors.device), self.W.to(vectors.device)
        common = torch.cat([z.flatten(), W.flatten()]).expand(len(vectors), -1)
        return torch.cat([common, (vectors - z @ W).flatten(1)], dim=1)

    def vectors(self, parameters: Float[Tensor, "B n"]) -> Float[Tensor, "B K D"]:
        """z W + b."""
        z, W, b = torch.split(parameters, self.sizes, dim=1)
        lifted = z.reshape(-1, *self.z.shape) @ W.reshape(-1, *self.W.shape)
        vectors: Tensor = lifted + b.reshape_as(lifted)
        return vectors


def linear(lm: FrozenLM, ids: Sequence[int], K: int, recipe: Recipe) -> Float[Tensor, "K D"]:
    """The start that a new linear layer computes from the first coefficients of `LowDim`."""
    generator = torch.Generator().manual_seed(passage_seed(ids, recipe.seed))
    z, W = basis(recipe, K, lm.width)
    bias = 2 * torch.rand(K, lm.width, generator=generator) - 1
    vectors: Tensor = z @ W + bias / recipe.dimensions**0.5
    return vectors
