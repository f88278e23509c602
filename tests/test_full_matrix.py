"""The default optimizer, `full-matrix`: it divides by the root of the last gradients' matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import QUICK, tiny
from memvec.arms import full_matrix
from memvec.arms.full_matrix import (
    DECAY,
    FLOOR,
    INVERSES,
    SPIKE,
    WINDOW,
    FullMatrix,
    inverses,
    turned_by,
)
from memvec.cramming.optimizers import NAdam
from memvec.cramming.recipe import Recipe
from memvec.model.estimate import STATE_COPIES
from properties import alone_as_beside_others, exact_as_measured

RECIPE = Recipe(optimizer="full-matrix", lr=0.03, lr_large=0.0, beta1=0.8, beta1_rise=0.0)
WHOLE = replace(QUICK, optimizer="full-matrix", compute="model")


def slow_direction(gradients, vector):
    """(M + floor)^(-1/2) v by the eigenvectors of the whole matrix; the newest gradient is last."""
    kept = [g.double() for g in gradients][-WINDOW:][::-1]
    limit = SPIKE * sorted(float(g.norm()) for g in kept)[(len(kept) - 1) // 2]
    kept = [g * min(1.0, limit / float(g.norm())) for g in kept]
    weighted = [DECAY ** (i / 2) * g for i, g in enumerate(kept)]
    matrix = sum(torch.outer(g, g) for g in weighted)
    values, vectors = torch.linalg.eigh(matrix)
    root = (values.clamp_min(0) + FLOOR * values.sum()).sqrt()
    return vectors @ ((vectors.T @ vector.double()) / root)


@pytest.mark.slow
@pytest.mark.parametrize("moves", [1, 2, 7, WINDOW, 2 * WINDOW + 9])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("first", [1, 2500])
def test_the_direction_is_that_of_the_eigenvectors_of_the_matrix(moves, scale, first, monkeypatch):
    """The window is filled in part, or has dropped gradients; their unit does not matter.

    The sum has enough inverses for float32. The next test bounds the error of fewer.
    """
    monkeypatch.setattr(full_matrix, "INVERSES", 10)
    random = torch.Generator().manual_seed(moves)
    gradients = scale * torch.randn(moves, 24, generator=random) * torch.logspace(0, -2, 24)
    gradients[moves // 3] *= first
    vector = torch.randn(24, generator=random)
    ours, place = FullMatrix(RECIPE), torch.zeros(1, 24)
    state = ours.fresh(place)
    for gradient in gradients:
        ours.step(place, gradient[None], state, torch.tensor([True]))
    found = turned_by(state.gradients, state.products, state.count, vector[None])[0].double()
    slow = slow_direction(gradients / scale, vector)
    torch.testing.assert_close(found / found.norm(), slow / slow.norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("N", "error"), [(INVERSES, 6e-3), (6, 3e-4), (8, 1e-5), (10, 3.2e-7)])
def test_a_sum_of_inverses_is_the_inverse_root(N, error):
    shift, share = inverses(FLOOR, N, torch.device("cpu"))
    x = torch.cat([torch.zeros(1), torch.logspace(-8, 0, 200)])[:, None].double()
    root = (x[:, 0] + FLOOR).rsqrt()
    assert ((share / (x + shift)).sum(1) / root - 1).abs().max() < error


def test_the_estimate_of_memory_counts_the_window():
    assert STATE_COPIES >= WINDOW + 8


@pytest.mark.parametrize("shape", [(3, 2, 5), (4, 7)])
def test_steps_have_the_length_of_nadams_and_are_those_of_a_passage_alone(shape):
    random = torch.Generator().manual_seed(0)
    together = torch.randn(shape, generator=random)
    alone = [row[None].clone() for row in together]
    ours, plain = FullMatrix(RECIPE), NAdam(RECIPE)
    state, states = ours.fresh(together), [ours.fresh(row) for row in alone]
    moments = plain.fresh(together)
    for _ in range(WINDOW // 2):
        gradient = torch.randn(shape, generator=random)
        moving = torch.rand(len(together), generator=random) > 0.3
        before, beside = together.clone(), together.clone()
        ours.step(together, gradient, state, moving)
        plain.step(beside, gradient, moments, moving)
        lengths = [(after - before).flatten(1).norm(dim=1) for after in (together, beside)]
        torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-3, atol=1e-5)
        for b, row in enumerate(alone):
            ours.step(row, gradient[b : b + 1], states[b], moving[b : b + 1])
            assert torch.equal(row[0], together[b])


def test_a_passage_that_does_not_move_keeps_its_state_and_a_zero_gradient_moves_none():
    ours, stacked = FullMatrix(RECIPE), torch.ones(2, 3, 4)
    state = ours.fresh(stacked)
    ours.step(stacked, torch.randn(2, 3, 4), state, torch.tensor([True, True]))
    kept, before = state.take(torch.arange(2)), stacked.clone()
    ours.step(stacked, torch.full((2, 3, 4), 3.0), state, torch.tensor([False, False]))
    assert torch.equal(stacked, before)
    for now, then in zip(vars(state).values(), vars(kept).values(), strict=True):
        assert torch.equal(now, then)
    fresh = ours.fresh(stacked)
    ours.step(stacked, torch.zeros(2, 3, 4), fresh, torch.tensor([True, True]))
    assert torch.equal(stacked, before)


def test_a_gradient_that_is_not_finite_changes_its_own_passage_only():
    ours, stacked = FullMatrix(RECIPE), torch.zeros(2, 6)
    state, gradient = ours.fresh(stacked), torch.ones(2, 6)
    gradient[0, 3] = torch.nan
    for _ in range(3):
        ours.step(stacked, gradient, state, torch.tensor([True, True]))
    assert not bool(torch.isfinite(stacked[0]).all())
    assert bool(torch.isfinite(stacked[1]).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "gemma2", "opt-projected"])
def test_crammed_passages_decode_from_the_returned_vectors(family):
    exact_as_measured(tiny(family), WHOLE)


def test_a_passage_does_not_depend_on_its_neighbours(monkeypatch):
    """Also after more steps than the window has gradients."""
    monkeypatch.setattr(full_matrix, "WINDOW", 5)
    alone_as_beside_others(WHOLE)
