"""The engine against the loop in arms/reference.py: the same steps, vectors and right tokens."""

from __future__ import annotations

import pytest
import torch

from conftest import passages, tiny
from memvec.arms.reference import cram_one
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_vectors
from memvec.decoding import decode_ids
from memvec.model.reading import START_RULES

SLOW, OTHERS = pytest.mark.slow, ("gpt2", "mamba")  # `make check` leaves them out


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("rule", START_RULES)
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=SLOW) for f in OTHERS)])
def test_the_engine_with_the_papers_recipe_equals_the_reference(family, rule, K):
    lm, asked = tiny(family), passages(3, 6, 4, seed=21)
    # Small steps: rounding differences between a batch and one passage must not grow.
    recipe = Recipe.of("paper", start_rule=rule, steps=25, lr=1e-3)
    outcomes = {o.passage.ids: o for o in Engine(lm, recipe, vectors=K, batch_size=3).run(asked)}
    for passage in asked:
        (first,) = start_vectors(lm, [passage.ids], K, recipe)
        vectors, right, losses = cram_one(
            lm, list(passage.ids), first, start_rule=rule, steps=25, lr=1e-3
        )
        outcome = outcomes[passage.ids]
        assert outcome.steps == len(losses) - 1
        assert round(outcome.metrics.accuracy * outcome.metrics.predicted) == right
        torch.testing.assert_close(outcome.vectors, vectors, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rule", START_RULES)
def test_the_reference_crams_a_passage_that_decodes(rule):
    """The loss falls, and the returned vectors decode freely."""
    lm, (passage,) = tiny(), passages(4, seed=22)
    (first,) = start_vectors(lm, [passage.ids], 2, Recipe.of("paper"))
    vectors, right, losses = cram_one(
        lm, list(passage.ids), first, start_rule=rule, lr=0.1, steps=400
    )
    given = int(rule == "first-token")
    assert right == len(passage) - given
    assert losses[-1] < losses[0]
    first_token = [passage.ids[0]] if given else None
    (decoded,) = decode_ids(lm, vectors[None], [4], start_rule=rule, first=first_token)
    assert decoded == list(passage.ids)


def test_the_reference_stops_after_its_patience_and_its_steps():
    lm, (passage,) = tiny(), passages(30, seed=23)
    (first,) = start_vectors(lm, [passage.ids], 1, Recipe.of("paper"))
    _, right, losses = cram_one(lm, list(passage.ids), first, steps=7)
    assert len(losses) == 8
    assert right < 30
    _, _, losses = cram_one(lm, list(passage.ids), first, patience=2, lr=1e-9)
    assert len(losses) in (2, 3)  # 2 if no token is right at first: then no accuracy is better


def test_the_first_step_of_the_reference_counts_as_progress_if_a_token_is_right():
    """As in the published loop, a first step without a right token uses up patience."""
    lm = tiny()
    first = torch.randn(1, lm.width, generator=torch.Generator().manual_seed(0))
    best = int(lm.logits(first[None], torch.zeros(1, 1, dtype=torch.long))[0, 0].argmax())
    wrong = (best + 1) % lm.vocab_size
    for ids, steps in (([best, wrong], 3), ([wrong, wrong], 2)):
        other = int(lm.logits(first[None], torch.tensor([ids]))[0, 1].argmax())
        ids[1] = (other + 1) % lm.vocab_size
        _, right, losses = cram_one(lm, ids, first, patience=2, lr=1e-9)
        assert (right, len(losses)) == (steps - 2, steps)
