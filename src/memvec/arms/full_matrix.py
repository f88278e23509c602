"""Adam's step, turned by the matrix of the passage's last gradients instead of their squares alone.

Adam divides each number of a vector by the root of its own mean square, and so knows nothing of how
the numbers vary together. With the inverse root of the whole second-moment matrix of the last
gradients, a passage that nearly fills its vectors takes two thirds of the steps (docs/log.md).
Full-matrix adaptive regularisation over a window of gradients is by Agarwal et al. (2019, arXiv
1806.02958); that the step keeps the length of Adam's is grafting (Agarwal et al. 2020, arXiv
2002.11803), so a recipe's rates mean what they mean for Adam.

No matrix of KD x KD is made, and no eigenvalues are computed: the inverse root is a sum of a few
inverses (Hale, Higham & Trefethen 2008, doi 10.1137/070700607), each by the Cholesky factor of a
matrix as large as the window, all in one call that a GPU need not wait for.
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

WINDOW = 60  # gradients of a passage that are kept: WINDOW x K x D numbers
DECAY = 0.98  # of what a gradient weighs in the matrix, at each move
FLOOR = 1e-4  # added to the matrix's eigenvalues, in units of their sum
SPIKE = 100  # times the median norm: no gradient of the window weighs more than such a one
INVERSES = 4  # in the sum: the root is right to 0.6 % for all eigenvalues


@dataclass
class Window(OptimizerState):
    """Adam's state, and the last gradients of each slot with their products with each other.

    Move m of a passage is in row m modulo W; rows of moves that have not been are 0.
    """

    gradients: Float[Tensor, "B W P"]  # P = K D, or the numbers of other parameters
    products: Float[Tensor, "B W W"]


class FullMatrix(NAdam):
    """NAdam whose mean gradient m is followed along (M + floor)^(-1/2) m, at Adam's length.

    M is the sum of g gᵀ over the last `WINDOW` gradients g of the passage, each with its decay,
    and none of them longer than `SPIKE` times their median.
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
        """As Adam's; the gradient takes the place of the oldest one of its passage's window."""
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
    """(M + floor)^(-1/2) v up to a factor, after `count` moves; writes the newest `products`.

    The first gradients of a plain model can be thousands of times as long as those after them. The
    floor would hide all others after one of these, so what one weighs is limited by the median.

    With the weighted gradients as rows of G, M = Gᵀ G, and each inverse in the sum is by Woodbury's
    identity (M + s)^(-1) v = (v - Gᵀ (G Gᵀ + s)^(-1) G v) / s.
    """
    B, W, _ = gradients.shape
    slots, newest = torch.arange(B, device=count.device), (count.long() - 1) % W
    pair = torch.stack([gradients[slots, newest], vector], dim=-1)
    product, along = product_of(gradients, pair).unbind(-1)
    products[slots, newest] = product
    products[slots, :, newest] = product
    age = (newest[:, None] - torch.arange(W, device=count.device)) % W
    norm = products.diagonal(dim1=1, dim2=2).sqrt()
    median = norm.where(norm > 0, torch.nan).nanmedian(1, keepdim=True).values
    limit = (SPIKE * median / norm).nan_to_num(1, posinf=1).clamp_max(1)
    weight = DECAY ** (age / 2) * limit
    size = (products.diagonal(dim1=1, dim2=2) * weight.square()).sum(1, keepdim=True)
    weight = weight / size.clamp_min(1e-30).sqrt()  # the eigenvalues' sum is 1 from here on
    matrix = products * weight[:, :, None] * weight[:, None, :]
    shift, share = inverses(FLOOR, INVERSES, count.device)
    shifted = matrix[:, None].repeat(1, len(shift), 1, 1)
    shifted.diagonal(dim1=2, dim2=3).add_(shift[:, None])
    factor, _ = torch.linalg.cholesky_ex(shifted)  # without a check, which a GPU would wait for
    right = (weight * along)[:, None, :, None].expand(-1, len(shift), -1, -1)
    solved = torch.cholesky_solve(right, factor)[..., 0]
    back = weight * (solved * (share / shift)[:, None]).sum(1)
    turned: Tensor = (share / shift).sum() * vector - product_of(back[:, None], gradients)[:, 0]
    return turned


def product_of(
    left: Float[Tensor, "B M P"], right: Float[Tensor, "B P N"]
) -> Float[Tensor, "B M N"]:
    """Products of B pairs; on a CPU one by one, so that one rounds alone as beside others.

    A single product of all rows rounds otherwise for three rows than for four on some processors.
    """
    if left.device.type != "cpu":
        return left @ right
    return torch.stack([a @ b for a, b in zip(left, right, strict=True)])


@functools.cache
def inverses(
    floor: float, N: int, device: torch.device
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Shifts s and shares c with (x + floor)^(-1/2) = sum of c / (x + s), for x from 0 to 1.

    The midpoint rule for (2 / pi) times the integral of dt / (x + floor + t²), in the variable in
    which it converges fastest: method 3 of the publication, by Jacobi's elliptic functions.
    """
    ratio = floor / (1 + floor)
    span = float(ellipkm1(ratio))
    _, cosine, delta, _ = ellipj((torch.arange(N) + 0.5).numpy() * span / N, 1 - ratio)
    shares = 2 * span * math.sqrt(floor) / (math.pi * N) * delta / cosine**2
    shifts = floor / cosine**2
    return torch.tensor(shifts).float().to(device), torch.tensor(shares).float().to(device)
