"""The vectors in coordinates of the model's own, in which fewer steps are needed.

Gradients at a model's input are long in some directions of its D and short in most, at whatever
vectors and for whatever tokens. Adam scales each coordinate by itself: turned into these directions
(`principal`), every coordinate has a size of its own, and vectors are there after about four fifths
of the steps. An optimiser that follows a whole matrix does not feel a turn. Scaled as well
(`whitened`), it knows the model's directions before a passage has shown any (docs/log.md).

The directions are those of gradients at drawn vectors for drawn tokens: they are the model's, not a
passage's, and take `ROWS` times D forward and backward passes of `TOKENS` tokens, once for a model.
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

TOKENS = 4  # drawn tokens after each drawn vector
ROWS = 4  # gradients for each direction; with one, `principal` saves a sixth of the steps
BATCH = 32  # directions whose gradients are computed in one pass
MIN_SHARE = 1e-4  # added to every share, in units of their mean: none is scaled up without an end
SPECTRA: WeakKeyDictionary[Fingerprint, Spectrum] = WeakKeyDictionary()


class Spectrum(NamedTuple):
    """Shares (D) of a model's gradients in its principal directions, the columns of (D, D)."""

    shares: Float[Tensor, " D"]
    directions: Float[Tensor, "D D"]


class Principal:
    """The vectors, turned: parameters = vectors Q, whose columns are the principal directions.

    Raises MemvecError as `gradient_spectrum` does.
    """

    of_inputs = True  # the directions that a model has are those of its inputs

    def __init__(self, recipe: Recipe, K: int, lm: FrozenLM) -> None:
        self.to_parameters, self.to_vectors = self.maps(gradient_spectrum(lm))

    @staticmethod
    def maps(spectrum: Spectrum) -> tuple[Float[Tensor, "D D"], Float[Tensor, "D D"]]:
        """What vectors, and what parameters, are multiplied by from the right: Q and Qᵀ."""
        return spectrum.directions, spectrum.directions.T

    def parameters(self, vectors: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """The coordinates of vectors."""
        return product_of(vectors, self.to_parameters.expand(len(vectors), -1, -1))

    def vectors(self, parameters: Float[Tensor, "B K D"]) -> Float[Tensor, "B K D"]:
        """The vectors with these coordinates."""
        return product_of(parameters, self.to_vectors.expand(len(parameters), -1, -1))


class Whitened(Principal):
    """The vectors, turned, scaled and turned back: parameters = vectors W^(-1), W = C^(-1/4).

    C is the mean of g gᵀ / |g|² over the model's gradients g, in units of its mean eigenvalue.
    Gradients at the parameters have C^(1/2) in its place: half of what makes some directions long
    is gone, and the other half is for the passage's own gradients to tell. W is scaled so that a
    step in any direction is on average as long in the vectors as in the parameters.
    """

    @staticmethod
    def maps(spectrum: Spectrum) -> tuple[Float[Tensor, "D D"], Float[Tensor, "D D"]]:
        """W^(-1) and W, both symmetric."""
        shares, directions = spectrum
        scale = (shares / shares.mean() + MIN_SHARE) ** -0.25
        scale = scale / scale.square().mean().sqrt()
        return (directions / scale) @ directions.T, (directions * scale) @ directions.T


def gradient_spectrum(lm: FrozenLM) -> Spectrum:
    """What a model's gradients at its input are made of, computed once for a model.

    It is the model's own, whatever stands around vectors and however they are read: nothing that
    was crammed before changes it.

    The eigenvalues, rising, and eigenvectors of the sum of g gᵀ / |g|² over `ROWS` times D
    gradients g of the default recipe's loss, each at one vector of large normal numbers and
    `TOKENS` drawn tokens; float32, on the model's device. Gradients that are not finite are left
    out. Raises MemvecError if all are.
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
    """Gradients at drawn vectors; each row draws from its own seed, `seed` + row."""
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
