"""What is moved: the numbers the optimiser sees, and how [mem] vectors come from them.

Direct: the vectors themselves. The vectors that the model reads are always the ones that will be
stored: rounded to the storage dtype, with gradients passed straight through the rounding, so that
what is measured is what is kept.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Coordinates(Protocol):
    """Parameters (B, ...) of B passages, and the vectors (B, K, D) they stand for."""

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Tensor:
        """Parameters whose vectors are these."""

    def vectors(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The vectors of parameters, differentiable."""


class Direct:
    """The vectors themselves, as in the paper."""

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Tensor:
        """A copy of the vectors."""
        return vectors.clone()

    def vectors(self, parameters: Tensor) -> Float[Tensor, "B K D"]:
        """The parameters, unchanged."""
        return parameters


COORDINATES: dict[str, type[Coordinates]] = {"direct": Direct}


class _Round(torch.autograd.Function):
    """To a dtype and back, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        return vectors.to(dtype).to(vectors.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def as_stored(vectors: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """What a reader of the file will see: rounded to the storage dtype, in float32."""
    if dtype == vectors.dtype:
        return vectors
    rounded: Tensor = _Round.apply(vectors, dtype)  # type: ignore[no-untyped-call]
    return rounded
