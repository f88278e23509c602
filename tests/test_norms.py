"""RMS norms in fewer operations, in the copy of the model that computes the steps."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import FAMILIES, build, tiny
from memvec.loading import load_lm
from memvec.model import precision
from memvec.model.norms import join_norms, rms_norm

SERVED = [family for family in FAMILIES if family != "rwkv"]


def norms_of(model):
    return {n: m for n, m in model.named_modules() if "RMSNorm" in type(m).__name__}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 64), (2, 4, 3, 16)])
def test_a_norm_and_its_gradient_are_those_of_the_formula(shape, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    x = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    slope = torch.randn(shape, generator=generator).to(dtype)
    kept = x.detach().clone()
    found = rms_norm(x, weight, 1e-5)
    (gradient,) = torch.autograd.grad(found, x, slope)
    wide = x.detach().double().requires_grad_()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    (slow,) = torch.autograd.grad(truth, wide, slope.double())
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    assert found.dtype == gradient.dtype == dtype
    torch.testing.assert_close(found.double(), truth.detach(), **near)
    torch.testing.assert_close(gradient.double(), slow, **near)
    assert torch.equal(x.detach(), kept)  # the input is not overwritten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SERVED)
def test_joined_norms_are_those_of_the_family(family, dtype):
    """Every RMS norm with one input is joined; one with a gate is not."""
    model = build(family).to(dtype)
    with torch.no_grad():  # new weights are all 1 or all 0; those of a trained model vary
        for module in norms_of(model).values():
            module.weight.add_(0.3 * torch.randn_like(module.weight))
    before = copy.deepcopy(model)
    own, originals = norms_of(model), norms_of(before)
    gated = [name for name, module in own.items() if "Gated" in type(module).__name__]
    assert join_norms(model) == len(own) - len(gated)
    near = 8 * torch.finfo(dtype).eps
    for name, module in own.items():
        assert ("forward" in vars(module)) == (name not in gated)
        if name in gated:
            continue
        x = torch.randn(2, 3, len(module.weight)).to(dtype).requires_grad_()
        ours, theirs = module(x), originals[name](x)
        slope = torch.randn_like(theirs)
        pair = [torch.autograd.grad(y, x, slope)[0].float() for y in (ours, theirs)]
        for a, b in ((ours.detach().float(), theirs.detach().float()), pair):
            assert float((a - b).abs().max()) <= near * max(1.0, float(b.abs().max()))


def test_a_norm_with_another_formula_is_not_joined():
    model = build("llama")
    first = next(iter(norms_of(model).values()))
    forward = type(first).forward

    class ShiftedRMSNorm(type(first)):
        def forward(self, hidden_states):
            return forward(self, hidden_states) + 0.1

    first.__class__ = ShiftedRMSNorm
    assert join_norms(model) == len(norms_of(model)) - 1
    assert "forward" not in vars(first)


def test_only_the_copy_that_computes_steps_has_joined_norms():
    lm = load_lm()
    fast = precision.for_steps(lm, "bfloat16")
    assert all("forward" in vars(module) for module in norms_of(fast.model).values())
    assert not any("forward" in vars(module) for module in norms_of(lm.model).values())
    assert len(norms_of(fast.model)) == 25
    assert precision.for_steps(tiny(), "model") is tiny()
