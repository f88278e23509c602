"""Vectors moved in the model's principal directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import QUICK, tiny
from memvec.arms import principal
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.model.lm import FrozenLM
from properties import alone_as_beside_others, exact_as_measured

TURNED = replace(QUICK, coordinates="principal", compute="model")
FAMILIES = ["llama", "gpt2", "mamba", "gemma2", "opt-projected", "qwen3-moe"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_directions_are_those_of_gradients_taken_one_by_one(family):
    """Through autograd and the whole loss, row by row; the mean of g gᵀ is diagonal in them."""
    lm = tiny(family)
    found = principal.principal_directions(lm)
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
    assert bool((shares.diff() > -1e-3 * shares.max()).all())  # from the least share on
    assert float(shares.sum()) == pytest.approx(principal.ROWS * D, rel=1e-3)


def test_directions_are_made_once_for_a_model_and_whatever_the_batch(monkeypatch):
    lm = tiny()
    found = principal.principal_directions(lm)
    assert principal.principal_directions(lm) is found
    other = FrozenLM(lm.model, lm.tokenizer, name="the same weights")
    assert principal.principal_directions(other) is found
    monkeypatch.setattr(principal, "FOUND", {})
    monkeypatch.setattr(principal, "BATCH", 5)
    again = principal.principal_directions(lm)
    # In the same order, up to sign, where shares are well apart: the largest ones.
    along = (found * again).sum(0).abs()
    assert float(along[-4:].min()) > 0.99


@every_family
def test_what_is_crammed_is_exact_and_kept_as_measured(family):
    exact_as_measured(tiny(family), TURNED)


def test_a_passage_does_not_feel_its_neighbours():
    alone_as_beside_others(TURNED)


def test_other_spaces_are_moved_directly_and_say_so():
    lm = tiny()
    record = Engine(lm, TURNED).recipe.record()
    assert record["coordinates"] == "principal"
    for changes in (
        {"space": "prefix", "start_rule": "bos"},
        {"space": "shared-basis", "dimensions": 8},
    ):
        assert Engine(lm, replace(TURNED, **changes)).recipe.coordinates == "direct"
