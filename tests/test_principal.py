"""Vectors moved in the model's principal directions, and in whitened coordinates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import QUICK, passages, tiny
from memvec.arms import principal
from memvec.companions.around import with_front
from memvec.cramming.coordinates import supported_coordinates
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from properties import alone_as_beside_others, exact_as_measured, moves, paths

TURNED = replace(QUICK, coordinates="principal", compute="model")
WHITENED = replace(TURNED, coordinates="whitened", optimizer="full-matrix")
both = pytest.mark.parametrize("recipe", [TURNED, WHITENED], ids=["principal", "whitened"])
FAMILIES = ["llama", "gpt2", "mamba", "gemma2", "opt-projected", "qwen3-moe"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.slow
@every_family
def test_directions_are_the_eigenvectors_of_gradients_computed_one_by_one(family):
    """The slow gradients are of the whole loss, by autograd; the sum of g gᵀ is diagonal."""
    lm = tiny(family)
    found = principal.gradient_spectrum(lm).directions
    D, recipe = lm.width, Recipe().in_logits(lm.logit_spread)
    torch.testing.assert_close(found.T @ found, torch.eye(D), atol=1e-5, rtol=0)
    covariance = torch.zeros(D, D, dtype=torch.float64)
    for row in range(principal.ROWS * D):
        generator = torch.Generator().manual_seed(row)
        vector = recipe.lr_large * torch.randn(1, 1, D, generator=generator)
        ids = torch.randint(lm.vocab_size, (1, principal.TOKENS), generator=generator)
        vector.requires_grad_()
        logits = lm.logits(vector, ids, "vectors")[0] / recipe.temperature
        loss = torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, vector)
        unit = torch.nn.functional.normalize(gradient[0, 0].double(), dim=0)
        covariance += unit[:, None] * unit
    turned = found.T.double() @ covariance @ found.double()
    shares = turned.diag()
    assert float((turned - shares.diag()).abs().max()) < 2e-3 * float(shares.max())
    assert bool((shares.diff() > -1e-3 * shares.max()).all())  # in ascending order
    assert float(shares.sum()) == pytest.approx(principal.ROWS * D, rel=1e-3)
    kept = principal.gradient_spectrum(lm).shares.double()
    torch.testing.assert_close(kept, shares, rtol=2e-3, atol=2e-3 * float(shares.max()))


@both
def test_earlier_crams_change_no_direction(recipe, monkeypatch):
    """Inputs in front of the vectors change none either, because directions are of the model."""
    lm, (passage,) = tiny(), passages(6, seed=3)
    recipe = replace(recipe, steps=6, margin=1e3)
    after = replace(recipe, front="bos")
    found = []
    for order in ([recipe, after], [after, recipe]):
        monkeypatch.setattr(principal, "SPECTRA", {})
        vectors = {}
        for one in order:
            vectors[one.front] = paths(Engine(lm, one), [passage])[passage]
            assert moves(vectors[one.front])
        found.append(vectors)
    for front in ("none", "bos"):
        assert torch.equal(found[0][front], found[1][front])


def test_directions_are_computed_once_and_do_not_depend_on_the_batch(monkeypatch):
    lm = tiny()
    found = principal.gradient_spectrum(lm)
    assert principal.gradient_spectrum(lm) is found
    assert principal.gradient_spectrum(with_front(lm, "bos")) is found
    monkeypatch.setattr(principal, "SPECTRA", {})
    monkeypatch.setattr(principal, "BATCH", 5)
    again = principal.gradient_spectrum(lm)
    # The directions of the largest shares, which are well apart, are equal up to sign.
    along = (found.directions * again.directions).sum(0).abs()
    assert float(along[-4:].min()) > 0.99
    torch.testing.assert_close(found.shares, again.shares, rtol=1e-3, atol=1e-3)


@every_family
def test_whitened_gradients_have_the_roots_of_the_eigenvalues(family):
    """The eigenvalues are those of the mean of g gᵀ; W keeps the mean length of a step."""
    lm = tiny(family)
    shares, directions = principal.gradient_spectrum(lm)
    white = principal.Whitened(Recipe(), 1, lm)
    scaled, D = white.to_vectors.double(), lm.width
    asked = torch.randn(3, 2, D)
    torch.testing.assert_close(white.vectors(white.parameters(asked)), asked, atol=1e-4, rtol=1e-4)
    assert float(scaled.square().sum()) == pytest.approx(D, rel=1e-4)
    covariance = directions.double() @ shares.double().diag() @ directions.double().T
    found = torch.linalg.eigvalsh(scaled @ covariance @ scaled)
    wanted = shares.double() / (shares.double() / shares.mean() + principal.MIN_SHARE).sqrt()
    wanted = wanted * float(found.sum() / wanted.sum())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))


def test_each_parameter_moves_the_vector_along_one_direction():
    """A vector along direction i has only parameter i, and that parameter gives this vector."""
    lm = tiny()
    directions = principal.gradient_spectrum(lm).directions.T
    rotated = principal.Principal(Recipe(), 1, lm)
    unit = torch.eye(lm.width)[:, None]
    torch.testing.assert_close(rotated.parameters(directions[:, None]), unit, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated.vectors(unit)[:, 0], directions, rtol=0, atol=1e-6)


@both
@every_family
def test_crammed_passages_decode_from_the_returned_vectors(family, recipe):
    exact_as_measured(tiny(family), recipe)


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize("coordinates", [principal.Principal, principal.Whitened])
def test_coordinates_of_a_passage_are_equal_bit_for_bit_in_any_batch(coordinates, K):
    lm = tiny()
    made, asked = coordinates(TURNED, K, lm), torch.randn(9, K, lm.width)
    for turn in (made.parameters, made.vectors):
        every = turn(asked)
        for n in (1, 2, 3, 4, 8):
            assert torch.equal(turn(asked[:n]), every[:n])
            assert torch.equal(turn(asked[-n:]), every[-n:])


@both
@pytest.mark.slow
def test_a_passage_does_not_depend_on_its_neighbours(recipe):
    alone_as_beside_others(recipe)


@both
def test_other_spaces_have_direct_coordinates_in_their_recipe(recipe):
    lm = tiny()
    record = Engine(lm, recipe).recipe.record()
    assert record["coordinates"] == recipe.coordinates
    for changes in (
        {"space": "prefix", "start_rule": "bos"},
        {"space": "shared-basis", "dimensions": 8},
    ):
        assert Engine(lm, replace(recipe, **changes)).recipe.coordinates == "direct"


def test_one_step_vectors_have_direct_coordinates():
    """The directions are of gradients at vectors in front of tokens, which e and m are not."""
    lm = tiny()
    for layout in ("one-step", "one-step-shared"):
        for name in ("principal", "whitened"):
            assert supported_coordinates(name, lm.read_as(layout)) == "direct"
    assert supported_coordinates("principal", lm) == "principal"


def test_gradients_that_are_not_finite_are_left_out(monkeypatch):
    lm, plain, D = tiny(), principal._gradients, 32
    monkeypatch.setattr(principal, "SPECTRA", {})
    whole = principal.gradient_spectrum(lm)

    def sometimes(lm, at, rows):
        found = plain(lm, at, rows)
        return [torch.full((D,), torch.nan) if i % 8 == 0 else g for i, g in enumerate(found)]

    monkeypatch.setattr(principal, "SPECTRA", {})
    monkeypatch.setattr(principal, "_gradients", sometimes)
    most = principal.gradient_spectrum(lm)
    left = principal.ROWS * D * 7 / 8
    assert float(whole.shares.sum()) == pytest.approx(principal.ROWS * D, rel=1e-4)
    assert float(most.shares.sum()) == pytest.approx(left, rel=1e-4)
    monkeypatch.setattr(principal, "SPECTRA", {})
    monkeypatch.setattr(
        principal, "_gradients", lambda lm, at, rows: [torch.full((D,), torch.inf)] * 32
    )
    with pytest.raises(MemvecError, match="are not finite, so its directions cannot be found"):
        Engine(lm, WHITENED)
