"""Coordinates along the principal directions of a model's gradients, which need fewer steps.

Gradients at a model's input are long in a few of D directions and short in most, for any vectors
and tokens. `principal` rotates the coordinates to these directions. Adam then scales each direction
separately, and needs about four fifths of the steps. A full-matrix optimizer does not depend on a
rotation. `whitened` also scales the directions, so that such an optimizer knows them before it has
seen gradients of the passage (docs/log.md).

The directions are computed from gradients at random vectors for random tokens, so they belong to
the model. This takes `ROWS` times D forward and backward passes of `TOKENS` tokens, once for a
model.
"""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.arms.full_matrix import product_of
from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM
from memvec.model.memory import in_batches

TOKENS = 4  # random tokens after each random vector
ROWS = 4  # gradients per direction; with one, `principal` saves a sixth of the steps
BATCH = 32  # gradients that are computed in one pass
MIN_SHARE = 1e-4  # added to every share, in units of their mean, to limit the scale
SPECTRA: WeakKeyDictionary[Fingerprint, Spectrum] = WeakKeyDictionary()


class Spectrum(NamedTuple):
    """The principal directions of a model's gradients (columns), and the share of each."""

    shares: Float[Tensor, " D"]
    directions: Float[Tensor, "D D"]


class Principal:
    """Rotated vectors: parameters = vectors Q, where the columns of Q are the directions.

    Raises MemvecError as `gradient_spectrum` does.
    """

    of_inputs = True  # the directions are those of inputs

    def __init__(self, recipe: Recipe, K: int, lm: FrozenLM) -> None:
        self.to_parameters, self.to_vectors = self.maps(gradient_spectrum(lm))

    @staticmethod
    def maps(spectrum: Spectrum) -> tuple[Float[Tensor, "D D"], Float[Tensor, "D D"]]:
        """The right factors Q (vectors to parameters) and Qᵀ (parameters to vectors)."""
        return spectrum.directions, spectrum.directions.T

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """The coordinates of vectors."""
        return product_of(vectors, self.to_parameters.expand(len(vectors), -1, -1))

    def vectors(self, parameters: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """The vectors with these coordinates."""
        return product_of(parameters, self.to_vectors.expand(len(parameters), -1, -1))


class Whitened(Principal):
    """Scaled vectors: parameters = vectors W^(-1), W = C^(-1/4).

    C is the mean of g gᵀ / |g|² over the model's gradients g, in units of its mean eigenvalue. At
    the parameters, this mean is C^(1/2): directions are made half as unequal (in logarithms), and
    the optimizer learns the rest from the passage's own gradients. W is scaled so that steps have
    on average the same length in the vectors as in the parameters.
    """

    @staticmethod
    def maps(spectrum: Spectrum) -> tuple[Float[Tensor, "D D"], Float[Tensor, "D D"]]:
        """W^(-1) and W, both symmetric."""
        shares, directions = spectrum
        scale = (shares / shares.mean() + MIN_SHARE) ** -0.25
        scale = scale / scale.square().mean().sqrt()
        return (directions / scale) @ directions.T, (directions * scale) @ directions.T


def gradient_spectrum(lm: FrozenLM) -> Spectrum:
    """The spectrum of a model's gradients at its input, computed once for a model.

    These are the eigenvalues, rising, and eigenvectors of the sum of g gᵀ / |g|² over `ROWS` times
    D gradients g of the default recipe's loss, float32 on the model's device. Each gradient is at
    one vector of large normal numbers, for `TOKENS` random tokens. The result does not depend on
    the front, trigger or layout of the view `lm`. Gradients that are not finite are left out.
    Raises MemvecError if none is finite.
    """
    if lm.fingerprint not in SPECTRA:
        lm = copy.copy(lm.read_as("prefix"))
        lm.front = ()
        covariance = torch.zeros(lm.width, lm.width, dtype=torch.float64)
        for seed in range(0, ROWS * lm.width, lm.width):
            gradients = in_batches(functools.partial(_gradients, lm, seed), lm.width, BATCH)
            unit = torch.nn.functional.normalize(torch.stack(gradients).double(), dim=-1)
            unit = unit[unit.isfinite().all(-1)]
            covariance += (unit.T @ unit).cpu()
        if not covariance.any():
            raise MemvecError(
                f"the gradients of {lm.name} at its input are not finite, so its directions cannot "
                "be found: use the dtype 'float32', or the coordinates 'direct'."
            )
        shares, directions = (part.float().to(lm.device) for part in torch.linalg.eigh(covariance))
        SPECTRA[lm.fingerprint] = Spectrum(shares.clamp_min(0), directions)
    return SPECTRA[lm.fingerprint]


def _gradients(lm: FrozenLM, seed: int, rows: slice) -> list[Float[Tensor, " D"]]:
    """Gradients at random vectors; each row has its own seed, `seed` + row."""
    recipe = Recipe().in_logits(lm.logit_spread)
    vectors, ids = [], []
    for row in range(rows.start, rows.stop):
        generator = torch.Generator().manual_seed(seed + row)
        vectors.append(recipe.lr_large * torch.randn(1, lm.width, generator=generator))
        ids.append(torch.randint(lm.vocab_size, (TOKENS,), generator=generator))
    drawn = torch.stack(vectors).to(lm.device).requires_grad_()
    table = torch.stack(ids).to(lm.device)
    with torch.enable_grad():
        states = lm.states(drawn, table, "vectors")
    scores = score(lm.head, states, table, recipe, V=lm.vocab_size)
    (gradient,) = torch.autograd.grad(states, drawn, scores.gradient)
    return list(gradient[:, 0])
