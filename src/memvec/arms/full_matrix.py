"""Full-matrix preconditioning: NAdam's step, with its direction changed by the last gradients.

Adam divides each number of the gradient by the root of its own mean square, so it ignores
correlations between numbers. This optimizer multiplies by the inverse root of the second-moment
matrix of the last gradients instead. A passage that nearly fills its vectors then takes two thirds
of the steps (docs/log.md). Full-matrix adaptive regularisation over a window of gradients is by
Agarwal et al. (2019, arXiv 1806.02958). The step keeps the length of Adam's step, so learning rates
have the same meaning as for Adam; this is grafting (Agarwal et al. 2020, arXiv 2002.11803).

The matrix (KD x KD) is never formed, and no eigenvalues are computed. The inverse root is a sum of
a few inverses (Hale, Higham & Trefethen 2008, doi 10.1137/070700607). Each inverse needs the
Cholesky factor of a matrix of the window's size. All are computed in one call without
synchronisation with the device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from scipy.special import ellipj, ellipkm1
from torch import Tensor

from memvec.cramming.optimizers import NAdam, OptimizerState

WINDOW = 60  # number of gradients kept of a passage (WINDOW x K x D numbers)
DECAY = 0.98  # factor of a gradient's weight in the matrix at each later move
FLOOR = 1e-4  # added to the eigenvalues of the matrix, in units of their sum
SPIKE = 100  # longer gradients than this, in units of the median norm, are scaled down to it
INVERSES = 4  # number of inverses in the sum: relative error of the root at most 0.6 %


@dataclass
class Window(OptimizerState):
    """Adam's state, the last W gradients of each slot, and their inner products.

    The gradient of move m of a passage is in row m modulo W. Unused rows are 0.
    """

    gradients: Float[Tensor, "B W P"]  # P = K D, or the numbers of other parameters
    products: Float[Tensor, "B W W"]


class FullMatrix(NAdam):
    """NAdam with the direction (M + floor)^(-1/2) m of the mean gradient m, and Adam's step length.

    M is the sum of g gᵀ over the last `WINDOW` gradients g of the passage. Their weights decay, and
    gradients longer than `SPIKE` times the median are scaled down.
    """

    def fresh(self, parameters: Tensor) -> Window:
        """Empty state for parameters (B, ...)."""
        adam, B = super().fresh(parameters), len(parameters)
        gradients = parameters.new_zeros(B, WINDOW, parameters[:1].numel())
        products = parameters.new_zeros(B, WINDOW, WINDOW)
        return Window(adam.mean, adam.square, adam.count, gradients, products)

    @torch.no_grad()
    def step(
        self,
        parameters: Tensor,
        gradient: Tensor,
        state: OptimizerState,
        moving: Bool[Tensor, " B"],
        lr_scale: Float[Tensor, " B"] | None = None,
    ) -> None:
        """As in Adam; the gradient first replaces the oldest one in its passage's window."""
        assert isinstance(state, Window)
        slots, row = torch.arange(len(moving), device=moving.device), state.count.long() % WINDOW
        oldest = state.gradients[slots, row]
        state.gradients[slots, row] = torch.where(moving[:, None], gradient.flatten(1), oldest)
        super().step(parameters, gradient, state, moving, lr_scale)

    def change(self, mean: Tensor, scale: Tensor, state: OptimizerState) -> Tensor:
        assert isinstance(state, Window)
        turned = turned_by(state.gradients, state.products, state.count, mean.flatten(1))
        length = (mean / scale).flatten(1).norm(dim=1) / turned.norm(dim=1).clamp_min(1e-30)
        change: Tensor = (turned * length[:, None]).reshape(mean.shape)
        return change


def turned_by(
    gradients: Float[Tensor, "B W P"],
    products: Float[Tensor, "B W W"],
    count: Float[Tensor, " B"],
    vector: Float[Tensor, "B P"],
) -> Float[Tensor, "B P"]:
    """(M + floor)^(-1/2) v up to a factor, after `count` moves; updates `products` in place.

    The first gradients of some models are thousands of times as long as later ones. One of these
    would raise the floor (a share of the eigenvalues' sum) above all other eigenvalues, so long
    gradients are scaled down.

    With the weighted gradients as rows of G, M = Gᵀ G. Each inverse of the sum is computed by
    Woodbury's identity: (M + s)^(-1) v = (v - Gᵀ (G Gᵀ + s)^(-1) G v) / s.
    """
    B, W, _ = gradients.shape
    slots, newest = torch.arange(B, device=count.device), (count.long() - 1) % W
    pair = torch.stack([gradients[slots, newest], vector], dim=-1)
    product, along = product_of(gradients, pair).unbind(-1)
    products[slots, newest] = product
    products[slots, :, newest] = product
    age = (newest[:, None] - torch.arange(W, device=count.device)) % W
    norm = products.diagonal(dim1=1, dim2=2).sqrt()
    # The median by sorting: `nanmedian` raises on CUDA under deterministic algorithms.
    ranked, used = norm.where(norm > 0, torch.inf).sort(1).values, (norm > 0).sum(1, keepdim=True)
    median = ranked.gather(1, (used - 1).clamp_min(0) // 2)
    limit = (SPIKE * median / norm).nan_to_num(1, posinf=1).clamp_max(1)
    weight = DECAY ** (age / 2) * limit
    size = (products.diagonal(dim1=1, dim2=2) * weight.square()).sum(1, keepdim=True)
    weight = weight / size.clamp_min(1e-30).sqrt()  # now the sum of the eigenvalues is 1
    matrix = products * weight[:, :, None] * weight[:, None, :]
    shift, share = inverses(FLOOR, INVERSES, count.device)
    shifted = matrix[:, None].repeat(1, len(shift), 1, 1)
    shifted.diagonal(dim1=2, dim2=3).add_(shift[:, None])
    factor, _ = torch.linalg.cholesky_ex(shifted)  # unlike `cholesky`, does not synchronise
    right = (weight * along)[:, None, :, None].expand(-1, len(shift), -1, -1)
    # `cholesky_solve` gives the same numbers. On CUDA it makes a queue of MAGMA and page-locked
    # arrays in each call (BatchLinearAlgebra.cpp of PyTorch).
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]
    back = weight * (solved * (share / shift)[:, None]).sum(1)
    turned: Tensor = (share / shift).sum() * vector - product_of(back[:, None], gradients)[:, 0]
    return turned


def product_of(
    left: Float[Tensor, "B M P"], right: Float[Tensor, "B P N"]
) -> Float[Tensor, "B M N"]:
    """Products of B pairs of matrices; one by one on a CPU, so that rounding does not depend on B.

    On some processors, one batched product rounds differently for different B.
    """
    if left.device.type != "cpu":
        return left @ right
    return torch.stack([a @ b for a, b in zip(left, right, strict=True)])


@functools.cache
def inverses(
    floor: float, N: int, device: torch.device
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """N shifts s and shares c with (x + floor)^(-1/2) = sum of c / (x + s), for x from 0 to 1.

    This is the midpoint rule for (2 / pi) times the integral of dt / (x + floor + t²), after a
    substitution by Jacobi's elliptic functions that makes it converge fast (method 3 of Hale et
    al.).
    """
    ratio = floor / (1 + floor)
    span = float(ellipkm1(ratio))
    middles = (torch.arange(N).double() + 0.5).numpy()  # SciPy may compute float32 in float32
    _, cosine, delta, _ = ellipj(middles * span / N, 1 - ratio)
    shares = 2 * span * math.sqrt(floor) / (math.pi * N) * delta / cosine**2
    shifts = floor / cosine**2
    return torch.tensor(shifts).float().to(device), torch.tensor(shares).float().to(device)
