"""The vectors in the model's principal directions: coordinates in which Adam needs fewer steps.

Adam scales each coordinate by itself, so which coordinates it sees matters. Gradients at a model's
input are long in some directions of its D and short in most, at whatever vectors and for whatever
tokens; turned into these directions, every coordinate has a size of its own, and vectors are there
after about four fifths of the steps (docs/log.md). The directions are those of gradients at drawn
vectors for drawn tokens: they are the model's, not a passage's, and take `ROWS` times D forward and
backward passes of `TOKENS` tokens, once for a model.
"""

from __future__ import annotations

import functools
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.model.lm import FrozenLM
from memvec.model.memory import in_batches

TOKENS = 4  # drawn tokens behind each drawn vector
ROWS = 4  # gradients for each direction; with one, a sixth of the steps is saved
BATCH = 32
FOUND: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


class Principal:
    """The vectors, turned: parameters = vectors Q, whose columns are the principal directions."""

    of_inputs = True  # the directions that a model has are those of its inputs

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

    Eigenvectors of the mean of g gᵀ / |g|² over `ROWS` times D gradients g of the default recipe's
    loss, each at one vector of large normal numbers and `TOKENS` drawn tokens; float32, on the
    model's device.
    """
    if lm.model not in FOUND:
        covariance = torch.zeros(lm.width, lm.width, dtype=torch.float64)
        for at in range(0, ROWS * lm.width, lm.width):
            each = in_batches(functools.partial(_gradients, lm, at), lm.width, BATCH)
            unit = torch.nn.functional.normalize(torch.stack(each).double(), dim=-1)
            covariance += (unit.T @ unit).cpu()
        directions = torch.linalg.eigh(covariance).eigenvectors
        FOUND[lm.model] = directions.float().to(lm.device)
    return FOUND[lm.model]


def _gradients(lm: FrozenLM, at: int, rows: slice) -> list[Float[Tensor, " D"]]:
    """Gradients at drawn vectors; each row draws from its own seed, `at` + row."""
    recipe = Recipe().in_logits(lm.logit_spread)
    vectors, ids = [], []
    for row in range(rows.start, rows.stop):
        generator = torch.Generator().manual_seed(at + row)
        vectors.append(recipe.lr_large * torch.randn(1, lm.width, generator=generator))
        ids.append(torch.randint(lm.vocab_size, (TOKENS,), generator=generator))
    drawn = torch.stack(vectors).to(lm.device).requires_grad_()
    table = torch.stack(ids).to(lm.device)
    with torch.enable_grad():
        states = lm.states(drawn, table, "vectors")
    scores = score(lm.head, states, table, recipe, V=lm.vocab_size)
    (gradient,) = torch.autograd.grad(states, drawn, scores.gradient)
    return list(gradient[:, 0])
