"""RMS norms as one autograd function each, for the model that computes the steps.

transformers computes a norm with eight operators, and autograd needs as many in the backward pass.
In bfloat16 on a CPU they take a tenth to a fifth of a step, since products are fast and every
operator reads and writes memory (docs/log.md). The function here has four operators forward and
four backward. Sums and factors are in float32, as in the originals; results are rounded once.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

ROUNDINGS = 4  # tolerance, in units of rounding: originals may round several times


class _RMSNorm(torch.autograd.Function):
    """x -> x / rms(x) * weight over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        # A copy made by `float` may be overwritten; a float32 input belongs to the caller.
        normed = wide * scale if wide is x else wide.mul_(scale)
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        normed, scale, weight = ctx.saved_tensors
        (gradient,) = gradients
        weighted = gradient * weight
        along = torch.einsum("...d,...d->...", weighted, normed)[..., None]
        along.div_(-normed.shape[-1])
        back = weighted.addcmul_(normed, along).mul_(scale).to(gradient.dtype)
        return back, None, None


def rms_norm(
    x: Float[Tensor, "*shape D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*shape D"]:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in the dtype of x.

    `weight` is float32 and gets no gradient.
    """
    normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


@torch.no_grad()
def join_norms(model: nn.Module) -> int:
    """Replace the forward of every RMS norm of a frozen model by `rms_norm`; returns how many.

    A module is replaced if its class name contains "RMSNorm", its forward takes one tensor, and
    `rms_norm` gives the same result on a random tensor, with its weight or with 1 + weight (Gemma).
    """
    joined = 0
    for module in model.modules():
        weight = _weight_of(module)
        if weight is not None:
            module.forward = functools.partial(rms_norm, weight=weight, eps=_eps_of(module))
            joined += 1
    return joined


def _weight_of(module: nn.Module) -> Tensor | None:
    """The float32 weight with which `rms_norm` equals this module; None if there is none."""
    own, eps = getattr(module, "weight", None), _eps_of(module)
    takes = inspect.signature(type(module).forward).parameters
    if "RMSNorm" not in type(module).__name__ or len(takes) != 2 or eps is None:
        return None
    if not isinstance(own, Tensor) or own.dim() != 1 or not own.dtype.is_floating_point:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, len(own), generator=generator).to(own.device, own.dtype)
    try:
        truth = module(x)
    except Exception:  # foreign code may raise any error
        return None
    for weight in (own.float(), 1 + own.float()):
        ours = rms_norm(x, weight, eps)
        near = ROUNDINGS * torch.finfo(own.dtype).eps * float(truth.float().abs().max())
        if ours.dtype == truth.dtype and float((ours - truth).abs().max()) <= near:
            return weight
    return None


def _eps_of(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
