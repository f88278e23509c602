"""The vectors in the model's principal directions: coordinates in which Adam needs fewer steps.

Adam scales each coordinate by itself, so which coordinates it sees matters. Gradients at a model's
input are long in some directions of its D and short in most, at whatever vectors and for whatever
tokens; turned into these directions, every coordinate has a size of its own, and vectors are there
after about three quarters of the steps (docs/log.md). The directions are those of gradients at
drawn vectors for drawn tokens: they are the model's, not a passage's, and take D forward-backward
passes of `TOKENS` tokens, once for a model.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.model.lm import FrozenLM
from memvec.model.memory import in_batches

TOKENS = 4  # drawn tokens behind each drawn vector
BATCH = 32
FOUND: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


class Principal:
    """The vectors, turned: parameters = vectors Q, whose columns are the principal directions."""

    def __init__(self, recipe: Recipe, K: int, lm: FrozenLM) -> None:
        self.directions = principal_directions(lm)

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """The vectors' coordinates in the principal directions."""
        turned: Tensor = vectors @ self.directions
        return turned

    def vectors(self, parameters: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """The vectors with these coordinates."""
        vectors: Tensor = parameters @ self.directions.T
        return vectors


def principal_directions(lm: FrozenLM) -> Float[Tensor, "D D"]:
    """Orthonormal columns: the principal directions of a model's gradients, made once for a model.

    Eigenvectors of the mean of g gᵀ / |g|² over D gradients g of the default recipe's loss, each at
    one vector of large normal numbers and `TOKENS` drawn tokens; float32, on the model's device.
    """
    if lm.model not in FOUND:
        rows = torch.stack(in_batches(lambda rows: list(_gradients(lm, rows)), lm.width, BATCH))
        rows = torch.nn.functional.normalize(rows.double(), dim=-1)
        FOUND[lm.model] = torch.linalg.eigh(rows.T @ rows).eigenvectors.float()
    return FOUND[lm.model]


def _gradients(lm: FrozenLM, rows: slice) -> Float[Tensor, "n D"]:
    """Gradients at drawn vectors; each row's numbers are its own, whoever is beside it."""
    recipe = Recipe().in_logits(lm.logit_spread)
    vectors, ids = [], []
    for row in range(rows.start, rows.stop):
        generator = torch.Generator().manual_seed(row)
        vectors.append(recipe.lr_large * torch.randn(1, lm.width, generator=generator))
        ids.append(torch.randint(lm.vocab_size, (TOKENS,), generator=generator))
    at = torch.stack(vectors).to(lm.device).requires_grad_()
    table = torch.stack(ids).to(lm.device)
    with torch.enable_grad():
        states = lm.states(at, table, "vectors")
    scores = score(lm.head, states, table, recipe, V=lm.vocab_size)
    (gradient,) = torch.autograd.grad(states, at, scores.gradient)
    return gradient[:, 0]
