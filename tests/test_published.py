"""Published recipes against slow implementations for one passage, from their definitions.

Kuratov et al. 2025, section 3 and 4; Tarasov et al. 2026, the method and the launcher of its
progressive runs. Both use AdamW with betas 0.9 and weight decay 0.01; nothing here is shared with
the package but the first vectors, and the matrix and coefficients that low-dim begins with.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from conftest import one_step, passages, tiny
from memvec import registry
from memvec.arms.low_dim import basis
from memvec.cramming.engine import Engine
from memvec.cramming.optimizers import learning_rate
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_vectors

MOVES = 20
D = 32


def ours(recipe, passage, family):
    """Vectors of the engine after each of the first moves."""
    engine = Engine(tiny(family), recipe, batch_size=1)
    engine.push(passage)
    found = []
    engine.fill(1)
    for _ in range(MOVES):
        engine.step()
        found.append(engine.stepper.coordinates.vectors(engine.batch.parameters)[0].clone())
    return found


def kuratov(lm, ids, vector):
    """The model reads [vector, tokens]; the loss leaves out the first token of the passage."""
    memory = torch.nn.Parameter(vector.clone())
    optimizer = torch.optim.AdamW([memory], lr=0.01, betas=(0.9, 0.9), weight_decay=0.01)
    tokens = torch.tensor([ids])
    found = []
    for _ in range(MOVES):
        inputs = torch.cat([memory[None], lm.embedding(tokens)], dim=1)
        logits = lm.model(inputs_embeds=inputs).logits[:, 1:]
        loss = cross_entropy(logits[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(memory.detach().clone())
    return found


def mezentsev(lm, ids, vectors):
    """The model reads [e, m, m ... m]; the loss is a mean over outputs, one for each token."""
    pair = torch.nn.Parameter(vectors.clone())
    optimizer = torch.optim.AdamW([pair], lr=0.01, betas=(0.9, 0.9), weight_decay=0.01)
    found = []
    for _ in range(MOVES):
        inputs = torch.cat([pair[:1], pair[1:].repeat(len(ids) - 1, 1)])[None]
        loss = cross_entropy(lm.model(inputs_embeds=inputs).logits[0], torch.tensor(ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(pair.detach().clone())
    return found


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_the_first_moves_of_one_step_are_those_of_its_publication(family):
    passage, recipe = passages(12)[0], Recipe.of("one-step")
    lm = one_step(tiny(family))
    engine = Engine(lm, recipe, vectors=2, batch_size=1)
    engine.push(passage)
    engine.fill(1)
    (first,) = start_vectors(lm, [passage.ids], 2, recipe)
    for theirs in mezentsev(tiny(family), passage.ids, first):
        engine.step()
        assert torch.allclose(engine.batch.parameters[0], theirs, atol=2e-4)


def tarasov(
    lm,
    ids,
    vector,
    *,
    temperature=1.0,
    epsilon=0.0,
    reweigh=False,
    low_dim=None,
    doubling=False,
    align=0,
):
    """Each stage has one more token; it ends, without a step, when all its tokens are right."""
    if low_dim is None:
        memory = torch.nn.Parameter(vector.clone())
        parameters, embedding = [memory], lambda: memory
    else:
        z, W = basis(low_dim, 1, D)
        coefficients, layer = torch.nn.Parameter(z.clone()), torch.nn.Linear(len(z[0]), D)
        with torch.no_grad():
            layer.weight.copy_(W.T)
            layer.bias.copy_((vector - z @ W)[0])
        parameters = [coefficients, *layer.parameters()]

        def embedding():
            return layer(coefficients)

    family_rate = 0.5 if lm.config.model_type == "gpt_neox" else 0.1  # the first is that of Pythia
    optimizer = torch.optim.AdamW(parameters, lr=family_rate, betas=(0.9, 0.9), weight_decay=0.01)
    rate = get_scheduler(
        "cosine_with_min_lr", optimizer, 100, 10_000, scheduler_specific_kwargs={"min_lr": 1e-3}
    )
    tokens, stage, best, found, stages = torch.tensor(ids), 1, 0, [], []
    while len(found) < MOVES:
        if doubling:  # right tokens after the stage count as progress, too
            whole = torch.cat([embedding(), lm.embedding(tokens)])[None]
            right = lm.model(inputs_embeds=whole).logits[0, :-1].argmax(-1) == tokens
            best = max(best, int(right.int().cumprod(0).sum()))
        here = tokens[:stage]
        inputs = torch.cat([embedding(), lm.embedding(here)])[None]
        logits = lm.model(inputs_embeds=inputs).logits[0, :-1]
        true = logits.gather(1, here[:, None])[:, 0]
        others = logits.scatter(1, here[:, None], -torch.inf)
        lead = (true - others.amax(1)).detach()
        if bool((lead >= epsilon).all()):
            stage = 2 * best if doubling else stage + 1
            continue
        losses = cross_entropy(logits / temperature, here, reduction="none")
        if reweigh:
            deficit = (epsilon - lead).clamp_min(0)
            loss = (losses * deficit).sum() / deficit.sum().clamp_min(1e-6)
        else:
            loss = losses.mean()
        if align and stage > 1:
            loss = loss + distance(lm, embedding(), here[:-1], align)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        found.append(embedding().detach().clone())
        stages.append(stage)
    assert max(stages) > stages[0]  # at least one stage ended
    return found


def distance(lm, memory, read, layers):
    """1 - cosine of the hidden states of the tokens that are read, with the vector and without.

    It is a sum over the first `layers` hidden states of transformers, which begin with embeddings.
    """
    bos = lm.embedding(torch.tensor([lm.bos_id]))
    after, plain = (
        lm.model(
            inputs_embeds=torch.cat([first, lm.embedding(read)])[None], output_hidden_states=True
        ).hidden_states
        for first in (memory, bos)
    )
    return sum(
        (1 - torch.cosine_similarity(a[0, 1:], b[0, 1:], dim=-1)).mean()
        for a, b in zip(after[:layers], plain[:layers], strict=True)
    )


CHANGED = {"alignment": {"align_layers": 1}}  # a tiny model has fewer layers than three
PUBLISHED = {
    "paper": kuratov,
    "progressive": tarasov,
    "temperature": lambda *a: tarasov(*a, temperature=0.25),
    "margin-ce": lambda *a: tarasov(*a, epsilon=0.5),
    "margin": lambda *a: tarasov(*a, epsilon=0.5, reweigh=True),
    "low-dim": lambda *a: tarasov(*a, low_dim=Recipe.of("low-dim")),
    "geometric": lambda *a: tarasov(*a, doubling=True),
    "alignment": lambda *a: tarasov(*a, align=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_the_first_moves_of_a_preset_are_those_of_its_publication(preset, family):
    lm, (passage,) = tiny(family), passages(12, seed=30)
    recipe = replace(Recipe.of(preset), **CHANGED.get(preset, {}))
    (start,) = start_vectors(lm, [passage.ids], 1, recipe)
    theirs = PUBLISHED[preset](lm, passage.ids, start)
    found = ours(recipe, passage, family)
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert float((found[-1] - start).abs().max()) > 0.015


def test_a_preset_takes_the_rate_of_the_family_unless_it_has_one():
    for family, rate in (("gpt-neox", 0.5), ("llama", 0.1)):
        assert Engine(tiny(family), Recipe.of("progressive")).recipe.lr == rate
        assert Engine(tiny(family), Recipe.of("low-dim", lr=0.3)).recipe.lr == 0.3
        assert Engine(tiny(family), Recipe.of("paper")).recipe.lr == 0.01


def test_every_published_preset_is_checked():
    ours = {
        "default",
        "capacity",
        "one-step",
        "usable",
        "usable-quick",
        "usable-long",
        "prefix",
        "prefix-layer",
    }
    assert set(PUBLISHED) | ours == set(registry.names("preset"))


def test_the_learning_rate_is_the_published_schedule():
    recipe = Recipe(lr=0.5, warmup=10, decay=60, lr_end=1e-3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    theirs = get_scheduler(
        "cosine_with_min_lr", optimizer, 10, 60, scheduler_specific_kwargs={"min_lr": 1e-3}
    )
    for move in range(60):
        (rate,) = theirs.get_last_lr()
        assert float(learning_rate(torch.tensor([float(move)]), recipe)) == pytest.approx(
            rate, abs=1e-7
        )
        optimizer.step()
        theirs.step()
    assert float(learning_rate(torch.tensor([1e6]), recipe)) == pytest.approx(1e-3)
    assert learning_rate(torch.tensor([0.0, 7.0]), Recipe(lr=0.5)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", registry.names("coordinates"))
@pytest.mark.parametrize("K", [1, 3])
def test_coordinates_represent_any_vectors(name, K):
    lm = tiny()
    vectors = torch.randn(2, K, lm.width, generator=torch.Generator().manual_seed(6))
    coordinates = registry.get("coordinates", name)(Recipe(dimensions=8), K, lm)
    found = coordinates.vectors(coordinates.parameters(vectors))
    torch.testing.assert_close(found, vectors, rtol=0, atol=2e-5)


def test_published_recipes_start_from_their_distributions():
    """One start is uniform in [0, 0.02); the other is a linear layer's bias, in +-1/sqrt(d)."""
    lm, passage = tiny(), passages(5, seed=31)[0]
    (uniform,) = start_vectors(lm, [passage.ids], 64, Recipe.of("progressive"))
    assert 0 <= float(uniform.min()) < 0.001 < 0.019 < float(uniform.max()) < 0.02
    (linear,) = start_vectors(lm, [passage.ids], 64, Recipe.of("low-dim"))
    assert float(linear.std()) == pytest.approx((1 / 256 / 3 + 1e-4 / 9) ** 0.5, rel=0.2)
    assert float(linear.mean()) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("start", ["uniform", "normal", "linear"])
def test_their_starts_depend_on_the_passage_and_the_seed_only(start):
    lm, recipe = tiny(), Recipe(start=start, dimensions=8)
    a, b = passages(5, 5, seed=31)
    first, again, other = start_vectors(lm, [a.ids, a.ids, b.ids], 2, recipe)
    (seeded,) = start_vectors(lm, [a.ids], 2, replace(recipe, seed=recipe.seed + 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    assert not torch.allclose(first, seeded, atol=1e-3)


def test_low_dim_begins_as_a_new_linear_layer_over_small_coefficients():
    """Coefficients are uniform in [0, 0.02), and weights in +-1/sqrt(d) as in torch.nn.Linear."""
    z, W = basis(Recipe(dimensions=16), 64, 64)
    assert (z.shape, W.shape) == ((64, 16), (16, 64))
    assert 0 <= float(z.min()) < 0.001 < 0.019 < float(z.max()) < 0.02
    assert -0.25 <= float(W.min()) < -0.24 < 0.24 < float(W.max()) <= 0.25
    assert float(W.mean()) == pytest.approx(0, abs=0.02)
