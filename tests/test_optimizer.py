"""Optimisers, schedules and objectives against plain references; recipes and their values."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import get_constant_schedule_with_warmup
from transformers import get_cosine_with_min_lr_schedule_with_warmup as cosine

from conftest import tiny
from memvec import metrics, registry
from memvec.cramming.coordinates import Direct, as_stored
from memvec.cramming.objectives import (
    cross_entropy,
    fused_cross_entropy,
    objective_named,
    score,
)
from memvec.cramming.optimizers import Adam, AdamW, NAdam, first_decay
from memvec.cramming.recipe import Recipe
from memvec.cramming.schedules import Growing, annealed_temperature
from memvec.errors import MemvecError
from memvec.model import memory
from memvec.storage import storage_of

B, K, D = 4, 2, 5


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.8), (0.0, 0.9)])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_of_many_passages_is_torchs_adam_for_each(name, betas, decay):
    """Passages skip different steps, so their step counts differ."""
    random = torch.Generator().manual_seed(0)
    rates = {"lr": 0.03, "beta1": betas[0], "beta1_rise": 0.0, "beta2": betas[1]}
    recipe = Recipe(optimizer=name, weight_decay=decay, **rates)
    stacked = torch.randn(B, K, D, generator=random)
    separate = [torch.nn.Parameter(row.clone()) for row in stacked]
    options = {"lr": 0.03, "betas": betas}
    if name == "adamw":
        theirs = [torch.optim.AdamW([p], weight_decay=decay, **options) for p in separate]
    else:
        theirs = [torch.optim.Adam([p], **options) for p in separate]
    ours = registry.get("optimizer", name)(recipe)
    state = ours.fresh(stacked)
    for _ in range(30):
        gradient = torch.randn(B, K, D, generator=random)
        moving = torch.rand(B, generator=random) > 0.4
        ours.step(stacked, gradient, state, moving)
        for b in range(B):
            if moving[b]:
                separate[b].grad = gradient[b].clone()
                theirs[b].step()
    for b in range(B):
        torch.testing.assert_close(stacked[b], separate[b].detach(), rtol=1e-4, atol=1e-5)
    assert len(set(state.count.tolist())) > 1


def test_a_passage_that_does_not_move_keeps_its_parameters_and_state():
    stacked = torch.randn(B, K, D, generator=torch.Generator().manual_seed(1))
    adam = AdamW(Recipe(optimizer="adamw", weight_decay=0.1))
    state = adam.fresh(stacked)
    adam.step(stacked, torch.ones(B, K, D), state, torch.ones(B, dtype=torch.bool))
    before = stacked.clone(), state.take(torch.arange(B))
    moving = torch.tensor([True, False, True, False])
    adam.step(stacked, torch.full((B, K, D), 3.0), state, moving)
    for now, then in [
        (stacked, before[0]),
        *zip(vars(state).values(), vars(before[1]).values(), strict=True),
    ]:
        assert torch.equal(now[~moving], then[~moving])
        assert not torch.equal(now[moving], then[moving])


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_schedules_count_the_columns_of_their_rule(name):
    best = torch.tensor([-1, 0, 3, 9, 10])
    ahead = torch.tensor([1, 4, 4, 4, 2])
    length = torch.tensor([10, 2, 10, 10, 10])
    schedule = registry.get("schedule", name)(Recipe(), K)
    state = schedule.fresh(torch.ones(5), torch.zeros(5, dtype=torch.bool))
    assert state.best.tolist() == [-1] * 5
    state.best = best
    if name == "geometric":  # tests/test_terms.py checks its targets
        state.target = ahead
    if name == "growing":
        assert state.look_ahead.tolist() == [Recipe().look_ahead * K] * 5
        state.look_ahead = ahead
    found = schedule.counted(state, length).tolist()
    for b, a, n, counted in zip(*(t.tolist() for t in (best, ahead, length)), found, strict=True):
        reach = {"whole": n, "geometric": a, "growing": max(b, 0) + a}[name]
        assert counted == min(n, reach)


def test_the_rate_of_stuck_vectors_is_raised_once_and_that_of_large_ones_never():
    recipe = Recipe(schedule="growing", stuck_after=3, lr_large=2.0)
    schedule = registry.get("schedule", "growing")(recipe, 1)
    state = schedule.fresh(torch.ones(2), torch.tensor([False, True]))
    newly = []
    for _ in range(12):
        _, gained = schedule.record(state, torch.zeros(2, dtype=torch.long))
        newly.append(schedule.advance(state, gained).tolist())
    assert [row for row, _ in newly] == [step == 3 for step in range(12)]
    assert not any(row for _, row in newly)
    assert state.enlarged.all()


def test_rates_are_multiples_of_the_first_size_above_1_until_vectors_are_large():
    """The rate of large vectors is `lr_large`, independent of their first size."""
    recipe = Recipe(schedule="growing", stuck_after=2, lr=0.1, lr_large=2.0)
    schedule = registry.get("schedule", "growing")(recipe, 1)
    large = torch.tensor([False, False, False, True])
    state = schedule.fresh(torch.tensor([0.1, 1.0, 4.0, 4.0]), large)
    assert state.lr_scale.tolist() == pytest.approx([1.0, 1.0, 4.0, 20.0])
    for _ in range(3):
        _, gained = schedule.record(state, torch.zeros(4, dtype=torch.long))
        schedule.advance(state, gained)
    assert state.lr_scale.tolist() == pytest.approx([20.0] * 4)


def test_a_schedule_records_progress_and_runs_out_of_patience():
    schedule = registry.get("schedule", "whole")(Recipe(patience=3), 1)
    state = schedule.fresh(torch.ones(2), torch.zeros(2, dtype=torch.bool))
    for step, reached in enumerate(([0, 4], [0, 3], [2, 3], [2, 4], [2, 4])):
        better, gained = schedule.record(state, torch.tensor(reached))
        assert better.tolist() == [step in (0, 2), step == 0]
        assert gained.tolist() == [2 * (step == 2), 4 * (step == 0)]
    assert state.best.tolist() == [2, 4]
    assert state.stale.tolist() == [2, 4]
    assert schedule.out_of_patience(state).tolist() == [False, True]


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("K", [1, 3])
def test_the_counted_columns_stay_until_all_of_them_are_right(after, K):
    """The reference is a loop over passages and steps."""
    schedule = Growing(Recipe(look_ahead=4, narrow_after=after), K)
    state = schedule.fresh(torch.ones(5), torch.zeros(5, dtype=torch.bool))
    draw = torch.Generator().manual_seed(K)
    gains = torch.randint(1, 7, (60, 5), generator=draw) * (torch.rand(60, 5, generator=draw) < 0.2)
    stale, best, narrowest = (
        torch.zeros(5, dtype=torch.long),
        torch.zeros(5, dtype=torch.long),
        4 * K,
    )
    slow_best, target, size, idle = [0] * 5, [4 * K] * 5, [4 * K] * 5, [0] * 5
    for gained in gains:
        stale = torch.where(gained > 0, 0, stale + 1)
        schedule.update_look_ahead(state, gained=gained, stale=stale)
        narrowest = min(narrowest, int(state.stage.min()))
        best += gained
        for i in range(5):
            slow_best[i] += int(gained[i])
            idle[i] = 0 if gained[i] else idle[i] + 1
            if after and idle[i] and idle[i] % after == 0:
                size[i] = max(1, size[i] // 2)
                target[i] = slow_best[i] + max(1, (target[i] - slow_best[i]) // 2)
            if target[i] <= slow_best[i]:
                size[i] = min(4 * K, size[i] + K) if after else size[i]
                target[i] = slow_best[i] + size[i]
        assert (best + state.look_ahead).tolist() == target
        assert state.stage.tolist() == size
    assert (narrowest == 4 * K) == (after == 0)


@pytest.mark.parametrize("after", [0, 5])
def test_the_temperature_of_a_stuck_passage_falls_to_a_third(after):
    recipe = Recipe(temperature=0.6, stuck_after=after)
    stale = torch.tensor([0, 4, 5, 6, 65, 1000])
    slow = [0.6, 0.6, 0.6, 0.6 * 60 / 61, 0.3, 0.2] if after else [0.6] * 6
    assert annealed_temperature(stale, torch.full((6,), 0.5), recipe).tolist() == pytest.approx(
        slow
    )
    # The temperature stays above a fifth of a large margin, but not above the recipe's.
    for margin in (1.5, 9.0):
        least = max(0.2, min(0.6, margin / 5))
        found = annealed_temperature(stale, torch.full((6,), margin), recipe).tolist()
        assert found == pytest.approx([max(least, value) for value in slow])


@pytest.mark.parametrize("name", ["adam", "nadam"])
@pytest.mark.parametrize("rise", [0.0, 0.25, 0.4])
def test_the_mean_gradient_is_the_weighted_mean_of_its_definition(rise, name):
    """The weights of all gradients so far add up to one.

    `nadam` takes the mean after one more occurrence of the newest gradient.
    """
    recipe = Recipe(lr=1.0, beta1=0.9, beta1_rise=rise, beta2=0.0)
    adam, parameters = registry.get("optimizer", name)(recipe), torch.zeros(1, 1, 2)
    state = adam.fresh(parameters)
    gradients = torch.randn(40, 1, 1, 2, generator=torch.Generator().manual_seed(7))
    weights = []
    for t, gradient in enumerate(gradients):
        decay = min(0.9, 1 - 1 / (1 + 0.8 * t**rise)) if rise and t else 0.0 if rise else 0.9
        weights = [w * decay for w in weights] + [1 - decay]
        share = torch.tensor(weights) / sum(weights)
        mean = (share[:, None, None, None] * gradients[: t + 1]).sum(0)
        if name == "nadam":
            mean = decay * mean + (1 - decay) * gradient
        before = parameters.clone()
        adam.step(parameters, gradient, state, torch.tensor([True]))
        torch.testing.assert_close(before - parameters, mean / gradient.abs(), rtol=1e-4, atol=1e-4)
    assert sum(weights) == pytest.approx(1.0 if rise else 1 - 0.9**40)


def test_the_decay_of_the_mean_gradient_rises_to_beta1():
    moved, recipe = torch.arange(40.0), Recipe(beta1=0.6, beta1_rise=0.5)
    expected = [min(0.6, 1 - 1 / (1 + 0.8 * t**0.5)) for t in range(40)]
    assert first_decay(moved, recipe).tolist() == pytest.approx(expected)
    assert expected.count(0.6) > 30


def test_published_presets_have_adamw_and_the_default_full_matrix():
    assert Recipe().optimizer == "full-matrix"
    for name, where in registry.BUILT_IN["preset"].items():
        published = where.startswith("memvec.arms.presets:")
        ours = "nadam" if name in ("usable", "prefix", "prefix-layer") else "full-matrix"
        assert Recipe.of(name).optimizer == ("adamw" if published else ours), name
    assert issubclass(registry.get("optimizer", "full-matrix"), NAdam)


def test_each_passage_has_its_own_rate():
    adam = Adam(Recipe(lr=0.5, beta1=0.0, beta1_rise=0.0, beta2=0.0))
    parameters, moving = torch.zeros(3, 1, 4), torch.ones(3, dtype=torch.bool)
    state, faster = adam.fresh(parameters), torch.tensor([1.0, 17.0, 1.0])
    for move in range(12):
        faster[2] = 17.0 if move >= 10 else 1.0
        before = parameters.clone()
        adam.step(parameters, torch.ones(3, 1, 4), state, moving, faster)
        rates = (before - parameters)[:, 0, 0]
        torch.testing.assert_close(rates, 0.5 * faster, rtol=1e-4, atol=0)
    before = parameters.clone()
    adam.step(parameters, torch.ones(3, 1, 4), adam.fresh(parameters), moving)
    torch.testing.assert_close(before - parameters, torch.full((3, 1, 4), 0.5))


def slow_loss(name: str, row: list[float], true: int, recipe: Recipe) -> float:
    """The loss of one position in plain Python."""
    T = recipe.temperature
    if name != "margin":
        return T * (math.log(math.fsum(math.exp(x / T) for x in row)) - row[true] / T)
    best_other = max(x for i, x in enumerate(row) if i != true)
    missing = 2 * recipe.margin + T - (row[true] - best_other)
    return T * math.log1p(math.exp(missing / T))


@pytest.mark.parametrize("temperature", [0.25, 1.0])
@pytest.mark.parametrize("name", registry.names("objective"))
def test_objectives_are_their_formulas_at_every_position(name, temperature):
    recipe = Recipe(objective=name, temperature=temperature, margin=0.7)
    logits = 2 * torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([0, 8, 3, 3, 1, 5])
    warm = torch.full((6,), temperature)
    found = objective_named(name).loss(logits, ids, warm, recipe)
    for i in range(6):
        slow = slow_loss(name, logits[i].tolist(), int(ids[i]), recipe)
        assert float(found[i]) == pytest.approx(slow, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0])
def test_gradients_of_the_loss_have_no_denormal_numbers(spread):
    """They halve the speed of a CPU; their replacement differs by less than 1e-6."""
    recipe, warm = Recipe(), torch.full((50,), 0.25)
    logits = spread * torch.randn(50, 300, generator=torch.Generator().manual_seed(4))
    ids = torch.arange(50)
    _, _, gradient = fused_cross_entropy(logits, ids, warm)
    size = gradient.abs()
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()
    whole = logits.clone().requires_grad_()
    (slow,) = torch.autograd.grad(cross_entropy(whole, ids, warm, recipe).sum(), whole)
    assert torch.allclose(gradient, slow, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("name", registry.names("objective"))
def test_scores_in_chunks_are_those_of_one_plain_backward_pass(monkeypatch, name, rows):
    """These are losses, margins and the gradient at the states."""
    H, V, T = 6, 11, 7
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(V, H, generator=random)
    states = torch.randn(3, T, H, generator=random)
    ids = torch.randint(0, V, (3, T), generator=random)
    counted = torch.arange(T) < torch.tensor([[7], [3], [0]])
    recipe = Recipe(objective=name)
    monkeypatch.setattr(memory, "LOGITS_AT_ONCE", rows * V)
    widest = []

    def head(part):
        widest.append(len(part))
        return part @ weight.T

    warm = torch.tensor([0.3, 0.1, 2.0])  # one temperature for each passage
    found = score(head, states, ids, recipe, V=V, temperature=warm)
    asked = torch.full((3,), recipe.margin)
    share = objective_named(name).weights(counted, found.margin, asked)
    assert max(widest) <= rows

    whole = states.clone().requires_grad_()
    logits = whole @ weight.T
    total = torch.zeros(())
    for b in range(3):
        n = int(counted[b].sum())
        if n:
            losses = objective_named(name).loss(
                logits[b, :n], ids[b, :n], warm[b].expand(n), recipe
            )
            if name == "deficit":
                lead = metrics.margins(logits[b : b + 1, :n].detach(), ids[b : b + 1, :n])[0]
                lack = (recipe.margin - lead).clamp_min(0)
                loss = (losses * lack).sum() / lack.sum()
            else:
                loss = losses.mean()
            ours = float((found.loss[b] * share[b]).sum())
            assert ours == pytest.approx(float(loss.detach()), rel=1e-5)
            total = total + loss
    total.backward()
    torch.testing.assert_close(found.gradient * share[..., None], whole.grad)
    for b in range(3):
        for t in range(T):
            row = logits[b, t].detach().tolist()
            true = row.pop(int(ids[b, t]))
            assert float(found.margin[b, t]) == pytest.approx(true - max(row), abs=1e-5)
    assert share[2].tolist() == [0.0] * T


def test_positions_that_count_have_equal_weights_with_the_sum_1():
    counts = torch.tensor([0, 1, 2, 5])
    counted = torch.arange(5) < counts[:, None]
    weights = objective_named("cross-entropy").weights(counted, torch.zeros(4, 5), torch.zeros(4))
    for row, count in zip(weights.tolist(), counts.tolist(), strict=True):
        assert row == pytest.approx([1 / max(1, count)] * count + [0.0] * (5 - count))


@pytest.mark.parametrize("reference", [False, True])
def test_passages_without_a_temperature_have_that_of_the_recipe(reference):
    states, ids = torch.randn(2, 3, 8), torch.randint(0, 8, (2, 3))
    recipe, options = Recipe(temperature=0.25), {"V": 8, "reference": reference}
    default = score(torch.nn.Identity(), states, ids, recipe, **options)
    given = score(
        torch.nn.Identity(), states, ids, recipe, temperature=torch.full((2,), 0.25), **options
    )
    for name, value in vars(default).items():
        assert torch.equal(value, getattr(given, name))
    loss = cross_entropy(states.flatten(0, 1), ids.flatten(), torch.full((6,), 0.25), recipe)
    torch.testing.assert_close(default.loss.flatten(), loss)


@pytest.mark.parametrize("reference", [False, True])
def test_a_tie_is_right_if_greedy_decoding_takes_it_and_no_margin_is_required(reference):
    """Greedy decoding takes the first of equal tokens. No tie reaches a required margin."""
    logits = torch.tensor([[[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 1.5, 1.0]]])
    options = {"temperature": torch.ones(1), "V": 3, "reference": reference}
    for asked in (0.0, 0.5):
        recipe, ids = Recipe(margin=asked), torch.tensor([[0, 1, 1]])
        first, second, third = (
            score(torch.nn.Identity(), logits, ids, recipe, **options).margin[0].tolist()
        )
        assert first > 0 or asked
        assert second == 0
        assert first < 1e-5
        assert third == pytest.approx(0.5)


@pytest.mark.parametrize("name", registry.names("objective"))
def test_a_row_that_is_not_finite_changes_no_other(name):
    weight = torch.eye(4)
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[0, 1, 2], [3, 2, 1]])
    sound = score(lambda part: part @ weight, states, ids, Recipe(objective=name), V=4)
    spoilt = states.clone()
    spoilt[0, 1] = torch.nan
    found = score(lambda part: part @ weight, spoilt, ids, Recipe(objective=name), V=4)
    assert not torch.isfinite(found.loss[0].sum())
    assert torch.equal(found.loss[1], sound.loss[1])
    assert torch.equal(found.gradient[1], sound.gradient[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_to_the_stored_dtype_lets_gradients_through(dtype):
    vectors = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    direct = Direct(Recipe(), 1, tiny())
    stored = as_stored(direct.vectors(direct.parameters(vectors)), storage_of(dtype))
    assert stored.dtype == torch.float32
    assert torch.equal(stored, vectors.to(dtype).float())
    (gradient,) = torch.autograd.grad((stored * torch.arange(8.0)).sum(), vectors)
    assert torch.equal(gradient, torch.arange(8.0).expand(2, 1, 8))


def test_direct_coordinates_are_a_copy_of_the_vectors():
    """An optimiser changes parameters in place, and the vectors must not change with them."""
    vectors, direct = torch.randn(B, K, D), Direct(Recipe(), K, tiny())
    parameters = direct.parameters(vectors)
    assert torch.equal(direct.vectors(parameters), vectors)
    before = vectors.clone()
    parameters.add_(1)
    assert torch.equal(vectors, before)


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "cross entropy"}, "one of cross-entropy, margin, deficit"),
        ({"schedule": "zzz"}, "one of growing, geometric, whole"),
        ({"lr": -0.1}, "recipe's lr must be at least"),
        ({"lr": "fast"}, "recipe's lr must be a number, not 'fast'"),
        ({"lr": float("nan")}, "recipe's lr must be at least"),
        ({"temperature": float("inf")}, "recipe's temperature"),
        ({"beta1": 1.0}, r"recipe's beta1 must be in \[0, 1\)"),
        ({"beta2": float("nan")}, r"recipe's beta2 must be in \[0, 1\)"),
        ({"steps": -1}, "recipe's steps must be at least 0"),
        ({"steps": "1.5"}, "recipe's steps must be a whole number"),
        ({"patience": 0}, "recipe's patience"),
        ({"margin": -0.1}, "recipe's margin"),
        ({"look-ahead": 0}, "recipe's look_ahead"),
        ({"start_rule": "eos"}, "recipe's start_rule"),
        ({"learning_rate": 1}, "a recipe has no 'learning_rate'"),
    ],
)
def test_wrong_values_of_a_recipe_are_refused(untyped, changes, sentence):
    with pytest.raises(MemvecError, match=sentence):
        Recipe.of("default", **changes)


@pytest.mark.parametrize("made", [Recipe, Recipe.of, partial(replace, Recipe())])
def test_values_have_the_types_of_their_fields(untyped, made):
    """So equal recipes have equal records and keys, no matter how they are made."""
    recipe = made(lr=1, steps=np.int64(40), margin=np.float32(0.5), temperature="2")
    assert all(type(getattr(recipe, f.name)) is type(f.default) for f in fields(Recipe))
    assert json.dumps(recipe.record()) == json.dumps(
        Recipe.of(lr=1.0, steps=40, margin=0.5, temperature=2.0).record()
    )
    for wrong in ({"steps": 1.5}, {"steps": True}, {"lr": None}, {"seed": "x"}, {"beta1": "x"}):
        with pytest.raises(MemvecError, match=r"must be a (whole )?number, not"):
            made(**wrong)


def test_a_preset_has_its_values_and_takes_changes(untyped):
    with pytest.raises(MemvecError, match="did you mean 'paper'"):
        Recipe.of("papre")
    paper = Recipe.of("paper", steps="7")
    assert paper.steps == 7
    assert paper.record() == Recipe.of("paper").record() | {"steps": 7}
    assert (paper.lr, paper.beta1, paper.beta2, paper.weight_decay) == (0.01, 0.9, 0.9, 0.01)
    assert (paper.patience, Recipe.of("paper").steps, paper.margin) == (2000, 4999, 0.0)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0, 9), (4, 0), (4, 20), (5, 6)])
def test_the_rate_of_each_step_is_that_of_the_schedules_of_transformers(warmup, decay):
    """Two passages begin at different steps; the first step of each is compared too."""
    recipe = Recipe(optimizer="adamw", lr=0.1, lr_end=0.02, warmup=warmup, decay=decay, beta2=0.9)
    rows = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))
    separate = [torch.nn.Parameter(row.clone()) for row in rows]
    options = {"lr": 0.1, "betas": (0.9, 0.9), "weight_decay": recipe.weight_decay}
    theirs = [torch.optim.AdamW([p], **options) for p in separate]
    kind = (
        (lambda o: cosine(o, warmup, decay, min_lr=0.02))
        if decay
        else (lambda o: get_constant_schedule_with_warmup(o, warmup))
    )
    schedules = [kind(optimizer) for optimizer in theirs]
    ours = AdamW(recipe.__class__(**(vars(recipe) | {"beta1": 0.9, "beta1_rise": 0.0})))
    state = ours.fresh(rows)
    for step in range(decay or 30):  # the cosine of transformers rises after its last step
        moving, gradient = torch.tensor([True, step >= 7]), torch.randn(2, 1, 4)
        ours.step(rows, gradient, state, moving)
        for b in range(2):
            if moving[b]:
                separate[b].grad = gradient[b].clone()
                theirs[b].step()
                schedules[b].step()
            torch.testing.assert_close(rows[b], separate[b].detach(), rtol=1e-4, atol=1e-5)
