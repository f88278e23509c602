"""The engine: passages do not affect each other, and it keeps the vectors that it measured."""

from __future__ import annotations

import functools
import math
from copy import copy
from dataclasses import replace

import pytest
import torch

from conftest import QUICK, V, passages, reader, tiny
from memvec import metrics
from memvec.companions.encoder import OnePassEncoder
from memvec.cramming import engine as engine_module
from memvec.cramming import outcomes as outcomes_module
from memvec.cramming import step as step_module
from memvec.cramming.batch import Job, Progress
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Finished, Outcome, outcomes_of
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import passage_seed, resolve_start_rule, start_vectors
from memvec.decoding import decode_ids, first_error
from memvec.errors import MemvecError
from memvec.model.reading import START_RULES
from memvec.passages.passage import Passage
from memvec.results import PositionScores
from memvec.storage import storage_of
from properties import moves, paths

FEW = ["llama", "gpt-neox", "opt", "gpt2", "mamba"]
ONE_IN_CHECK = [pytest.param(r, marks=[pytest.mark.slow] * (r != "vectors")) for r in START_RULES]
ENDLESS = Recipe(steps=12, margin=1000.0)  # no passage meets this margin: all make all steps


def crammed(lm, asked, recipe=ENDLESS, **options):
    """The outcomes of the passages, by token ids."""
    return {o.passage.ids: o for o in Engine(lm, recipe, **options).run(asked)}


# ---------------------------------------------------------------------- passages are independent


@pytest.mark.slow
@pytest.mark.parametrize(("vectors", "schedule"), [(1, "growing"), (3, "whole")])
@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("family", FEW)
def test_a_passages_vectors_do_not_depend_on_its_neighbours(family, fixed, vectors, schedule):
    """In the same slot of a batch of the same shape the parameters are equal bit for bit.

    In another slot they are equal up to rounding, which may differ between rows of a product.
    """
    lm, recipe = tiny(family), replace(ENDLESS, schedule=schedule, steps=6, lr=0.01, lr_large=0.0)
    a, b, c, d = passages(6, 6, 6, 6, seed=4)
    options = {"vectors": vectors, "batch_size": 3, "fixed_shapes": fixed}
    found, others, moved = (
        paths(Engine(lm, recipe, **options), in_slots)
        for in_slots in ((a, b, c), (a, c, d), (d, b, a))
    )
    assert all(moves(path) for path in found.values())
    assert torch.equal(found[a], others[a])
    assert torch.equal(found[b], moved[b])
    for here, elsewhere in ((found[a], moved[a]), (found[c], others[c]), (others[d], moved[d])):
        torch.testing.assert_close(elsewhere, here, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", ONE_IN_CHECK)
def test_neighbours_of_other_lengths_do_not_matter_at_a_fixed_shape(rule):
    lm, recipe = tiny(), replace(ENDLESS, start_rule=rule)
    long, me, a, b = passages(9, 5, 3, 4, seed=5)
    found = [  # the longest passage has the first slot
        paths(Engine(lm, recipe, batch_size=3, fixed_shapes=True), in_slots)[me]
        for in_slots in ([long, me, a], [me, b, long], [long, me])
    ]
    assert moves(found[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.slow
@pytest.mark.parametrize("family", FEW)
def test_passages_in_refilled_slots_are_crammed_as_alone(family):
    lm, recipe = tiny(family), replace(ENDLESS, lr=0.01, lr_large=0.0)
    asked = passages(7, 3, 5, 2, 4, seed=6)
    of_two, of_four = (paths(Engine(lm, recipe, batch_size=size), asked) for size in (2, 4))
    assert len(of_two) == len(of_four) == len(asked)
    for passage in asked:
        alone = paths(Engine(lm, recipe), [passage])[passage]
        assert moves(alone)
        assert len(alone) == recipe.steps + 1  # the last call of `step` only measures
        for together in (of_two, of_four):
            torch.testing.assert_close(together[passage], alone, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_refilled_slots_end_exact_whatever_the_lengths():
    """Short passages take slots that long ones leave, and the other way round."""
    lm, asked = tiny(), passages(2, 5, 3, 2, 4, 2, 3, 5, seed=7)
    for batch_size in (2, 3):
        outcomes = crammed(lm, asked, QUICK, vectors=2, batch_size=batch_size)
        assert {o.exact for o in outcomes.values()} == {True}
        assert {o.passage for o in outcomes.values()} == set(asked)


def test_equal_passages_are_crammed_alike_and_seeds_differ():
    """Up to rounding, which may differ between slots."""
    lm, (passage,) = tiny(), passages(4)
    twins = [passage, Passage(passage.ids, document=1)]
    recipe = replace(ENDLESS, lr=0.01, lr_large=0.0)
    a, b = paths(Engine(lm, recipe, batch_size=2), twins).values()
    assert moves(a)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    other = paths(Engine(lm, replace(recipe, seed=1)), [passage])[passage]
    assert not torch.equal(a[0], other[0])
    assert passage_seed(passage.ids, 0) != passage_seed(passage.ids, 1)
    assert passage_seed(passage.ids, 0) != passage_seed(passage.ids[:-1], 0)


def test_passages_pushed_between_outcomes_are_crammed_too():
    lm, (long, *halves) = tiny(), passages(6, 3, 3)
    engine, seen = Engine(lm, QUICK, vectors=2, batch_size=1), []
    for outcome in engine.run([long]):
        if not seen:
            for half in halves:
                engine.push(half)
        seen.append(outcome.passage)
    assert set(seen) == {long, *halves}


@functools.cache
def given_back() -> tuple[torch.Tensor, list[int]]:
    """Vectors for the tiny Llama, and the 90 tokens that decode from them."""
    first = torch.full((1, 1, tiny().width), 0.5)
    (own,) = decode_ids(tiny(), first, [90])
    return first, own


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [{}, {"fixed_shapes": True}, {"poll": 8}])
@pytest.mark.parametrize("schedule", ["growing", "whole", "geometric"])
def test_the_columns_of_a_passage_do_not_depend_on_its_neighbour(schedule, shapes):
    """The first vectors give back all 40 tokens, and a step finds those in the passage's columns.
    These are the same alone and beside a passage that has 70 right tokens, also in fixed shapes and
    between rare polls."""
    lm, (first, own) = tiny(), given_back()
    passage = Passage(tuple(own[:40]), 0)
    other = Passage(tuple(own[:80]) + tuple((t + 5) % lm.vocab_size for t in own[80:]), 1)
    recipe = replace(QUICK, margin=0.0, schedule=schedule, look_ahead=8, lr_large=0.0)
    alone, beside = [], []
    for seen, neighbours in ((alone, []), (beside, [other])):
        options = shapes if neighbours else {}
        engine = Engine(lm, recipe, vectors=1, batch_size=2, **options)
        engine._first_vectors = lambda jobs: first.expand(len(jobs), -1, -1).clone()
        for one in neighbours:
            engine.push(one)
        engine.fill(2)
        if neighbours:
            engine.batch.schedule.best[:] = 70  # right tokens of the neighbour
        engine.push(passage)
        engine.fill(2)
        row = [job.passage for job in engine.jobs].index(passage)
        for _ in range(2):
            engine.step()
            if engine.poll == 1:
                engine.fill(2)
            batch = engine.batch
            found = batch.schedule.best[row], batch.done[row], batch.spent[row]
            seen.append(tuple(int(value) for value in found))
    assert alone == beside
    assert alone[0][:2] == ((40, 1) if schedule == "whole" else (16, 0))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["growing", "whole"])
def test_padding_that_a_model_masks_fails_no_passage(schedule):
    """The model gives token 0 the logit -inf, so the loss at padding (token 0) is infinite."""
    lm, recipe = copy(tiny()), replace(QUICK, schedule=schedule, steps=60)
    head = lm._head
    lm._head = lambda states: head(states).index_fill(-1, torch.tensor([0]), -torch.inf)
    long, short = passages(12, 3, seed=4)
    both = {o.passage: o for o in Engine(lm, recipe).run([long, short])}
    (alone,) = Engine(lm, recipe).run([short])
    assert alone.status == both[short].status != "not-finite"
    assert (alone.steps, alone.spent) == (both[short].steps, both[short].spent)


def test_masked_padding_does_not_change_the_smallest_h_mem_of_a_passage():
    """The infinite loss at the padding, times a weight of 0, must not make the sum NaN."""
    lm = copy(tiny())
    head = lm._head
    lm._head = lambda states: head(states).index_fill(-1, torch.tensor([0]), -torch.inf)
    long, short = passages(9, 3, seed=4)
    recipe = Recipe.of("paper", steps=5, start_rule="vectors")
    both = {o.passage: o.min_mem_bits for o in Engine(lm, recipe).run([long, short])}
    (alone,) = Engine(lm, recipe).run([short])
    assert both[short] == pytest.approx(alone.min_mem_bits, rel=1e-4)
    assert all(map(math.isfinite, both.values()))


@pytest.mark.parametrize(
    "objective",
    [*(pytest.param(o, marks=pytest.mark.slow) for o in ("cross-entropy", "deficit")), "margin"],
)
def test_a_token_of_logit_minus_infinity_fails_only_passages_that_contain_it(objective):
    """A passage that is only padded with the token is crammed as alone, although the weights by
    margin at its padding are infinite or NaN."""
    lm = copy(tiny())
    head = lm._head
    lm._head = lambda states: head(states).index_fill(-1, torch.tensor([0]), -torch.inf)
    short, long = passages(3, 9, seed=4)
    recipe = Recipe(objective=objective, schedule="whole", steps=20, start="noise", compute="model")
    both = {o.passage: o for o in Engine(lm, recipe).run([long, short])}
    assert torch.isfinite(both[short].vectors).all()
    (alone,) = Engine(lm, recipe).run([short])
    assert (both[short].status, both[short].steps) == (alone.status, alone.steps)
    assert alone.status == "done"
    (never,) = Engine(lm, recipe).run([Passage((5, 0, 7))])
    assert (never.status, never.steps) == ("not-finite", 0)


@pytest.mark.parametrize("poll", [1, 3, 8])
def test_rare_polls_change_no_vectors_and_no_costs(poll):
    lm, (passage,) = tiny(), passages(4, seed=8)
    often = crammed(lm, [passage], QUICK, vectors=2, poll=1)[passage.ids]
    seldom = crammed(lm, [passage], QUICK, vectors=2, poll=poll)[passage.ids]
    assert often.status == seldom.status == "done"
    assert (often.steps, often.spent) == (seldom.steps, seldom.spent)
    assert torch.equal(often.vectors, seldom.vectors)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [{}, {"fixed_shapes": True}])
@pytest.mark.parametrize("poll", [1, 3, 8])
@pytest.mark.parametrize("look_ahead", [1, 8])
def test_between_polls_a_passage_has_the_columns_that_it_has_alone(look_ahead, poll, shapes):
    """The first vectors give back all 90 tokens. Each step finds as many of them as it finds alone,
    although the neighbour, which has 80 right tokens, has more columns."""
    lm, (first, own) = tiny(), given_back()
    passage, other = Passage(tuple(own), 0), Passage((*own[:-1], (own[-1] + 5) % V), 1)
    recipe = replace(QUICK, margin=0.0, look_ahead=look_ahead, lr=1e-6, lr_large=0.0)
    alone, beside = [], []
    for seen, neighbours in ((alone, []), (beside, [other])):
        engine = Engine(lm, recipe, vectors=1, batch_size=2, poll=poll, **shapes)
        engine._first_vectors = lambda jobs: first.expand(len(jobs), -1, -1).clone()
        for one in neighbours:
            engine.push(one)
            engine.fill(2)
            engine.batch.schedule.best[:] = 80
        engine.push(passage)
        engine.fill(2)
        row = [job.passage for job in engine.jobs].index(passage)
        for step in range(9):
            if step % poll == 0:
                engine.fill(2)
            engine.step()
            # A step costs the tokens that counted in it; a new stage counts from the next step.
            seen.append((int(engine.batch.schedule.best[row]), int(engine.batch.spent[row])))
    assert alone == beside
    assert alone[0][0] == 16
    assert alone[-1][0] >= 32


def test_a_fixed_shape_stays_fixed(monkeypatch):
    """All steps have the same (B, T), although passages leave one by one and none waits."""
    lm, shapes = copy(tiny()), set()
    states = lm.states

    def watched(vectors, ids, start_rule):
        if torch.is_grad_enabled():  # a step; certification asks for no gradients
            shapes.add(tuple(ids.shape))
        return states(vectors, ids, start_rule)

    monkeypatch.setattr(lm, "states", watched)
    engine = Engine(lm, QUICK, vectors=2, batch_size=3, fixed_shapes=True)
    assert len(list(engine.run(passages(4, 2, 3, 2, seed=9)))) == 4
    assert len(shapes) == 1


# ---------------------------------------------------------------------- measures, costs and starts


@pytest.mark.parametrize("schedule", ["growing", "whole"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "steps"), [(3, 600), pytest.param(12, 40, marks=pytest.mark.slow)]
)
def test_the_kept_vectors_are_the_measured_ones(monkeypatch, length, steps, storage, schedule):
    """They are bit for bit those of the first best measurement, not those of one step later."""
    lm, (passage,) = tiny(), passages(length, seed=10)
    recipe = Recipe(steps=steps, patience=600, schedule=schedule)
    measured, reached = [], []
    as_stored, score = step_module.as_stored, step_module.score

    def watch_vectors(vectors, dtype):
        stored = as_stored(vectors, dtype)
        measured.append(stored.detach().clone())
        return stored

    def watch_score(*arguments, **options):
        found = score(*arguments, **options)
        right = found.margin >= recipe.in_logits(lm.logit_spread).margin
        reached.append(int(right.sum() if schedule == "whole" else metrics.horizon(right)))
        return found

    monkeypatch.setattr(step_module, "as_stored", watch_vectors)
    monkeypatch.setattr(step_module, "score", watch_score)
    (outcome,) = Engine(lm, recipe, vectors=2, storage=storage).run([passage])
    best = reached.index(max(reached))
    assert torch.equal(outcome.vectors.float(), measured[best][0])
    assert outcome.status == ("done" if length == 3 else "budget")


@pytest.mark.slow
@pytest.mark.parametrize("rule", START_RULES)
@pytest.mark.parametrize("vectors", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_measures_of_an_outcome_are_those_of_its_vectors(rule, vectors):
    """The test measures the stored vectors again, with the model's logits only."""
    lm, recipe = tiny(), Recipe(steps=40, start_rule=rule)
    given = int(rule == "first-token")
    for outcome in Engine(lm, recipe, vectors=vectors, batch_size=4).run(
        passages(2, 8, 4, seed=11)
    ):
        ids = torch.tensor([outcome.passage.ids])
        logits = lm.logits(outcome.vectors[None], ids, rule)[0]
        truth, m = ids[0, given:], outcome.metrics
        n = len(truth)
        true = logits[torch.arange(n), truth]
        logits[torch.arange(n), truth] = -torch.inf
        margin = true - logits.amax(-1)
        assert m.margin == pytest.approx(float(margin.min()), abs=1e-4)
        assert m.accuracy == pytest.approx(float((margin > 0).double().mean()))
        first = [outcome.passage.ids[0]] if given else None
        (decoded,) = decode_ids(
            lm, outcome.vectors[None], [n + given], start_rule=rule, first=first
        )
        error = first_error(decoded, outcome.passage.ids)
        assert m.horizon == (n if error is None else error - given)
        assert outcome.exact == (error is None)
        if outcome.status == "done":
            assert m.margin >= outcome.margin_asked - 1e-4


def test_a_passage_that_runs_out_of_steps_has_the_horizon_of_its_vectors():
    lm, (passage,) = tiny(), passages(20, seed=12)
    (outcome,) = Engine(lm, Recipe(steps=30)).run([passage])
    assert (outcome.status, outcome.exact, outcome.steps) == ("budget", False, 30)
    (decoded,) = decode_ids(lm, outcome.vectors[None], [20])
    assert outcome.metrics.horizon == first_error(decoded, passage.ids) < 20


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "given"), [("vectors", 0), ("bos", 1), ("first-token", 1)])
def test_the_cost_of_a_passage_does_not_depend_on_its_neighbours(rule, given):
    """A step costs the inputs of its predictions, in forward-backward tokens: the vectors, a given
    token, and all tokens that count but the last."""
    lm, (short, long) = tiny(), passages(6, 20, seed=12)
    recipe = Recipe(steps=7, schedule="whole", margin=1e3, start_rule=rule)
    for outcome in Engine(lm, recipe, vectors=2, batch_size=2).run([short, long]):
        predicted = len(outcome.passage) - (rule == "first-token")
        assert outcome.spent == 7 * (predicted + 1 + given)
    growing = replace(recipe, schedule="growing", lr=1e-9, narrow_after=0)
    (outcome,) = Engine(lm, growing, vectors=2, batch_size=2).run([long])
    assert outcome.spent == 7 * (2 * growing.look_ahead + 1 + given)


class Guess(OnePassEncoder):
    """An encoder that gives every passage vectors of one size; each encodes `tokens` tokens."""

    def __init__(self, size, tokens):
        self.size, self.tokens = size, tokens

    def to(self, device, dtype):
        return self

    def read(self, lm, ids, K):
        return self.size * torch.ones(len(ids), K, lm.width)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("size", [0.5, 3.0])
def test_vectors_of_an_encoder_are_enlarged_only_if_stuck(after, size):
    recipe = Recipe(  # no token meets the margin, so there is no progress
        look_ahead=2, narrow_after=after, stuck_after=after, margin=1e3, temperature=1.0
    )
    lm = copy(tiny())
    lm.encoder = Guess(size, 6)
    engine = Engine(lm, recipe, batch_size=2)
    for passage in passages(12, 13, seed=15):
        engine.push(passage)
    engine.fill(2)
    assert [len(job.passage) for job in engine.jobs] == [13, 12]
    seen = []
    found = engine.batch.parameters.square().mean(-1).sqrt()[:, 0]
    assert found.tolist() == pytest.approx([recipe.lr_large, size])
    assert engine.batch.schedule.lr_scale[1] == max(1, size)
    for _ in range(5):
        engine.step()
        seen.append((engine.batch.schedule.enlarged.tolist(), engine.batch.schedule.stage.tolist()))
    # The first step counts as progress, although it finds no right token: nothing was measured yet.
    assert [large[1] for large, _ in seen] == [bool(after) and i >= 3 for i in range(5)]
    assert all(large[0] for large, _ in seen)
    small = engine.batch.parameters.square().mean(-1).sqrt()[1, 0] < recipe.lr_large / 2
    assert bool(small) == (not after)
    # Being stuck halves the stage of a passage only if its vectors are large already.
    assert seen[-1][1] == ([1, 2] if after else [2, 2])


@pytest.mark.parametrize("start", ["auto", "noise"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_which_passages_begin_with_large_vectors(start, tokens):
    lm, texts = copy(tiny()), passages(3, 8, 9, seed=16)
    for encoder in (None, Guess(0.5, tokens)):
        lm.encoder = encoder
        engine = Engine(lm, Recipe(start=start), batch_size=3)
        for passage in texts:
            engine.push(passage)
        engine.fill(3)
        near = encoder is not None and start == "auto"
        for job, large in zip(engine.jobs, engine.batch.schedule.enlarged.tolist(), strict=True):
            assert large == (not near or (bool(tokens) and len(job.passage) > 2 * tokens))
    published = Engine(lm, Recipe.of("progressive"), batch_size=3)
    published.push(texts[0])
    published.fill(1)
    assert float(published.batch.parameters.abs().max()) < 0.02


def test_large_vectors_count_as_large_when_their_passage_gets_a_slot_again():
    lm, (passage,) = copy(tiny()), passages(5, seed=17)
    lm.encoder = Guess(0.5, 6)
    recipe = Recipe(margin=1e3, steps=30, stuck_after=5)
    engine = Engine(lm, recipe)
    (outcome,) = engine.run([passage])
    for vectors, large in ((outcome.vectors, False), (outcome.vectors * 100, True)):
        engine.push_again(replace(outcome, vectors=vectors, exact=False))
        engine.fill(1)
        assert engine.batch.schedule.enlarged.tolist() == [large]
        engine.jobs, engine.batch = [], None


def test_patience_stops_a_passage_without_progress():
    lm, (passage,) = tiny(), passages(30, seed=12)
    (outcome,) = Engine(lm, Recipe(steps=5000, patience=3)).run([passage])
    assert outcome.status == "budget"
    assert outcome.steps < 200


@pytest.mark.parametrize("large", [0.0, 12.8])
def test_a_recipe_without_steps_returns_the_start(large):
    lm, (passage,) = tiny(), passages(5, seed=13)
    recipe = Recipe(steps=0, lr_large=large)
    (outcome,) = Engine(lm, recipe, vectors=2).run([passage])
    assert outcome.steps == outcome.spent == 0
    start = start_vectors(lm, [passage.ids], 2, recipe)[0]
    if large:
        start *= large / start.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(outcome.vectors, start, rtol=1e-6 * bool(large), atol=0)


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", FEW)
def test_numbers_that_are_not_finite_do_not_affect_other_slots(monkeypatch, family):
    lm, asked, start = tiny(family), passages(5, 5, 5, seed=14), start_vectors
    recipe = replace(ENDLESS, lr=0.01, lr_large=0.0)
    sound, poisons = paths(Engine(lm, recipe, batch_size=3), asked), {}

    def poisoned(lm, everyone, K, recipe, **options):
        vectors = start(lm, everyone, K, recipe, **options)
        return [v * poisons.get(ids, 1.0) for ids, v in zip(everyone, vectors, strict=True)]

    monkeypatch.setattr(engine_module.starts, "start_vectors", poisoned)
    for slot, poison in ((0, float("nan")), (2, float("inf"))):
        poisons.clear()
        poisons[asked[slot].ids] = poison
        engine, found = Engine(lm, recipe, batch_size=3), {}
        run = engine.run
        engine.run = lambda asked, run=run, found=found: (
            found.setdefault(outcome.passage, outcome) for outcome in run(asked)
        )
        beside = paths(engine, asked)
        failed = found.pop(asked[slot])
        assert (failed.status, failed.exact, failed.steps) == ("not-finite", False, 0)
        assert {(o.status, o.steps) for o in found.values()} == {("budget", recipe.steps)}
        assert len(found) == 2
        for passage in found:
            assert moves(beside[passage])
            torch.testing.assert_close(beside[passage], sound[passage], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["spread", pytest.param("logits", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("margin", "raised"), [(0.5, 1.0), (0.0, 0.05), (0.02, 0.05), (1.0, 2.0)])
def test_a_passage_that_does_not_decode_is_crammed_on_with_a_larger_margin(
    monkeypatch, margin, raised, unit
):
    """The new margin is twice the old one, and at least 0.05 of the spread of the logits."""
    lm, (passage,), decoded_wrong = tiny(), passages(3, seed=15), []

    def wrong_at_first(*arguments, **options):
        decoded = decode_ids(*arguments, **options)
        if not decoded_wrong:
            decoded_wrong.append([(token + 1) % V for token in decoded[0]])
            return decoded_wrong
        return decoded

    monkeypatch.setattr(outcomes_module, "decode_ids", wrong_at_first)
    recipe = replace(QUICK, margin=margin, unit=unit)
    (outcome,) = Engine(lm, recipe, vectors=2).run([passage])
    assert decoded_wrong
    raised *= lm.logit_spread if unit == "spread" or raised == 0.05 else 1
    assert outcome.exact
    assert outcome.margin_asked == pytest.approx(raised)
    assert outcome.metrics.margin >= raised - 1e-4


def test_a_passage_that_never_decodes_comes_to_an_end(monkeypatch):
    lm, (passage,) = tiny(), passages(2, seed=15)
    monkeypatch.setattr(outcomes_module, "decode_ids", lambda *_, **__: [[0, 0]])
    (outcome,) = Engine(lm, Recipe(steps=60), vectors=2).run([passage])
    assert not outcome.exact
    assert outcome.metrics.horizon == 0
    assert outcome.margin_asked > Recipe().margin * lm.logit_spread


@pytest.mark.parametrize("more", [0, 1])
def test_a_passage_that_has_spent_its_budget_is_not_crammed_on(monkeypatch, more):
    """Decoding fails at the step that spends the whole budget, or all of it but one token."""
    lm, (passage,) = tiny(), passages(2, seed=15)
    monkeypatch.setattr(outcomes_module, "decode_ids", lambda *_, **__: [[0, 0]])
    (once,) = Engine(lm, replace(QUICK, if_not_exact="stop"), vectors=2).run([passage])
    assert (once.status, once.exact) == ("done", False)
    recipe = replace(QUICK, steps=60, budget=once.spent + more)
    (outcome,) = Engine(lm, recipe, vectors=2).run([passage])
    assert (outcome.steps > once.steps) == bool(more)
    assert (outcome.spent > once.spent) == bool(more)


@pytest.mark.parametrize("batch_size", [3, 4])
def test_passages_that_wait_for_certification_count_as_slots(batch_size):
    """So at most `batch_size` passages are begun and not certified. While passages wait, at least
    half of the slots are taken."""
    asked, certified, begun = passages(*[2, 3] * 4, seed=7), [], []
    engine = Engine(tiny(), QUICK, vectors=2, batch_size=batch_size)
    step = engine.step

    def watched():
        if engine.waiting:
            assert 2 * len(engine.jobs) >= batch_size
        begun.append(len(asked) - len(engine.waiting) - len(certified))
        assert len(engine.jobs) <= begun[-1] <= batch_size
        step()

    engine.step = watched
    for outcome in engine.run(asked):
        certified.append(outcome)
    assert {o.passage for o in certified} == set(asked)
    assert max(begun) == batch_size


@pytest.mark.parametrize("optimizer", ["adam", "full-matrix"])
def test_halving_the_batch_does_not_affect_passages_that_keep_their_slots(optimizer):
    """The batch is halved if memory runs out. The first half continues with all of its state."""
    recipe = replace(ENDLESS, optimizer=optimizer, lr=0.01, lr_large=0.0)
    found = []
    for halved in (False, True):
        engine = Engine(tiny(), recipe, batch_size=4)
        for passage in passages(5, 5, 5, 5, seed=6):
            engine.push(passage)
        engine.fill(4)
        for step in range(8):
            if halved and step == 4:
                engine._halve_batch()
            engine.step()
        found.append(engine.batch.parameters[:2].detach())
    assert [job.passage for job in engine.jobs] == passages(5, 5, 5, 5, seed=6)[:2]
    assert [job.passage for job in engine.waiting.jobs()] == passages(5, 5, 5, 5, seed=6)[2:]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def test_the_tokens_of_an_engine_are_those_of_its_passages():
    """The engine counts all steps, also the last one, which only measures; every token counts."""
    seen = []
    recipe = replace(ENDLESS, schedule="whole", start_rule="bos")
    engine = Engine(tiny(), recipe, vectors=2, batch_size=5, on_progress=seen.append)
    spent = [o.spent for o in engine.run(passages(4, 4, seed=3))]
    each = 4 + 2 + 1 - 1  # tokens, vectors and BOS, but for the last input
    assert spent == [recipe.steps * each] * 2
    assert engine.tokens == seen[-1].tokens == sum(spent) + 2 * each


@pytest.mark.slow
def test_waiting_passages_hold_no_tensors():
    lm, engine = tiny(), None
    rows = []

    def look(progress: Progress):
        waiting = engine.waiting.jobs()
        assert all(job.vectors is None for job in waiting)
        assert (0 if engine.batch is None else len(engine.batch)) == progress.in_slots
        rows.append((progress.in_slots, progress.waiting))

    engine = Engine(lm, ENDLESS, batch_size=2, on_progress=look)
    asked = passages(*[4] * 9, seed=16)
    assert len(list(engine.run(asked))) == 9
    assert max(in_slots for in_slots, _ in rows) == 2
    assert rows[0] == (2, 7)
    assert rows[-1] == (0, 0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_longest_passages_are_crammed_first(batch_size):
    asked = passages(2, 6, 4, 3, 5, seed=17)
    order = [len(o.passage) for o in Engine(tiny(), ENDLESS, batch_size=batch_size).run(asked)]
    assert order == [6, 5, 4, 3, 2]


@pytest.mark.parametrize(
    ("options", "recipe", "word"),
    [
        ({"vectors": 0}, {}, "^vectors must"),
        ({"vectors": -1}, {}, "^vectors must"),
        ({"batch_size": 0}, {}, "^batch_size must"),
    ],
)
def test_fewer_than_one_vector_or_slot_is_refused(options, recipe, word):
    with pytest.raises(MemvecError, match=word):
        Engine(tiny(), Recipe(**recipe), **options)


@pytest.mark.parametrize("rule", START_RULES)
@pytest.mark.parametrize("vectors", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_passage_may_fill_the_context_and_no_more(rule, vectors):
    lm, recipe = tiny("gpt2"), Recipe(steps=1, start_rule=rule)
    engine = Engine(lm, recipe, vectors=vectors)
    most = engine.max_tokens()
    (outcome,) = engine.run(passages(most))
    assert outcome.metrics.tokens == most
    with pytest.raises(MemvecError, match=f"context of tiny-gpt2 .128.: at most {most} tokens"):
        engine.push(passages(most + 1)[0])


def test_a_model_without_a_limit_takes_any_length():
    engine = Engine(tiny("mamba"), Recipe(steps=0))
    assert engine.max_tokens() is None
    (outcome,) = engine.run(passages(200))
    assert outcome.metrics.tokens == 200


def test_starts_that_a_model_or_a_passage_cannot_have_are_refused(monkeypatch):
    lm = tiny()
    with pytest.raises(MemvecError, match="two tokens"):
        list(Engine(lm, Recipe(start_rule="first-token")).run(passages(1)))
    with pytest.raises(MemvecError, match="no one-pass encoder"):
        list(Engine(lm, Recipe(start="encoder")).run(passages(3)))
    monkeypatch.setattr(lm, "bos_id", None)
    with pytest.raises(MemvecError, match="no BOS token"):
        Engine(lm, Recipe(start_rule="bos"))
    with pytest.raises(MemvecError, match="no BOS token"):
        lm.logits(torch.zeros(1, 1, lm.width), torch.tensor([[1]]), "bos")
    with pytest.raises(MemvecError, match="no BOS token"):
        lm.start_ids(torch.tensor([[1]]), "bos")


def test_the_papers_start_rule_depends_on_the_tokenizer(monkeypatch):
    lm, recipe = reader(), Recipe.of("paper")
    assert resolve_start_rule(lm, recipe) == "first-token"
    monkeypatch.setattr(type(lm), "adds_bos", property(lambda _: True))
    assert resolve_start_rule(lm, recipe) == "bos"


@pytest.mark.parametrize("start", ["noise", "embeddings", "auto"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_starts_depend_on_the_passage_only(start, vectors):
    lm, recipe = tiny(), Recipe(start=start)
    a, b = passages(5, 5, seed=18)
    first, again, other = start_vectors(lm, [a.ids, a.ids, b.ids], vectors, recipe)
    (alone,) = start_vectors(lm, [b.ids], vectors, recipe)
    assert torch.equal(alone, other)
    assert first.shape == (vectors, lm.width)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    (outcome,) = Engine(lm, replace(QUICK, start=start), vectors=3).run(passages(3, seed=18))
    assert outcome.exact


@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_the_embedding_start_is_the_mean_of_each_part(vectors):
    lm, ids = tiny(), passages(8, seed=19)[0].ids
    recipe = Recipe(start="embeddings")
    (noise,) = start_vectors(lm, [ids], vectors, Recipe(start="noise"))
    found = start_vectors(lm, [ids], vectors, recipe)[0] - 0.1 * noise
    part = 8 // vectors
    for k in range(vectors):
        rows = [lm.embedding.weight[token] for token in ids[k * part : (k + 1) * part]]
        torch.testing.assert_close(found[k], torch.stack(rows).mean(0))


@pytest.mark.parametrize(("tokens", "vectors"), [(2, 5), (7, 3), (5, 4), (1, 3)])
def test_parts_of_the_embedding_start_cover_the_passage_whatever_its_length(tokens, vectors):
    """Each token is in one part; with fewer tokens than vectors, a part has one token."""
    lm, ids = tiny(), passages(tokens, seed=19)[0].ids
    (noise,) = start_vectors(lm, [ids], vectors, Recipe(start="noise"))
    found = start_vectors(lm, [ids], vectors, Recipe(start="embeddings"))[0] - 0.1 * noise
    first = [tokens * k // vectors for k in range(vectors)]
    end = [max(a + 1, b) for a, b in zip(first, [*first[1:], tokens], strict=True)]
    for k in range(vectors):
        rows = lm.embedding.weight[list(ids[first[k] : end[k]])]
        torch.testing.assert_close(found[k], rows.mean(0))
    assert end[-1] == tokens


def test_a_passage_that_continues_keeps_its_costs():
    """A finished passage has its job's costs; a job that continues has its outcome's costs."""
    costs = {"steps": 3, "spent": 5, "min_mem_bits": 7.0, "seconds": 11.0}
    finished = Job(passages(2)[0], 0.5, torch.zeros(1, 4), **costs).finished("budget")
    assert {name: getattr(finished, name) for name in costs} == costs
    measured = PositionScores(*torch.ones(4, 2)).measures(2, 2)
    job = Job.with_raised_margin(Outcome(**vars(finished), exact=False, metrics=measured), 20.0)
    assert {name: getattr(job, name) for name in costs} == costs
    assert (job.margin, job.vectors.tolist()) == (1.0, [[0.0] * 4])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["vectors", "bos"])
def test_vectors_that_are_not_finite_are_never_exact(rule, number):
    """Zeros are decoded in the place of such vectors. Here the zeros give the passage back, and the
    passage must not count as exact."""
    lm, zeros = tiny(), torch.zeros(1, 2, tiny().width)
    passage = Passage(tuple(decode_ids(lm, zeros, [5], start_rule=rule)[0]))
    failed = zeros[0].clone()
    failed[1, 3] = number
    finished = [
        Finished(passage, v, "budget", 0.0, steps=1, spent=1, seconds=0.0)
        for v in (zeros[0], failed)
    ]
    sound, spoilt = outcomes_of(lm, finished, rule, storage_of("float32"))
    assert (sound.exact, spoilt.exact) == (True, False)
    assert bool(torch.isfinite(spoilt.vectors).all())


@pytest.mark.parametrize("tokens", [0, 2, 4])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_vectors_of_an_encoder_are_enlarged_for_more_than_twice_its_tokens(K, tokens):
    lm = copy(tiny())
    lm.encoder = Guess(0.5, tokens)
    engine = Engine(lm, Recipe(), vectors=K, batch_size=3)
    for passage in passages(2 * K * (tokens or 2) + 1, 2 * K * (tokens or 2), 3, seed=16):
        engine.push(passage)
    engine.fill(3)
    found = zip(engine.jobs, engine.batch.schedule.enlarged.tolist(), strict=True)
    for job, large in found:
        assert large == (bool(tokens) and len(job.passage) > 2 * tokens * K)


@pytest.mark.parametrize("budget", ["below", "just", "above"])
def test_a_passage_stops_at_the_step_that_spends_its_budget(budget):
    recipe = replace(QUICK, schedule="whole", margin=1e3)
    each = 6 + 2 - 1  # inputs of a step: two vectors, and all tokens but the last
    tokens = 5 * each + {"below": -1, "just": 0, "above": 1}[budget]
    (outcome,) = Engine(tiny(), replace(recipe, budget=tokens), vectors=2).run(passages(6, seed=4))
    steps = 6 if budget == "above" else 5
    assert (outcome.status, outcome.steps, outcome.spent) == ("budget", steps, steps * each)


@pytest.mark.parametrize("how", ["halved", "retried"])
@pytest.mark.parametrize("K", [1, 2])
def test_a_passage_that_gets_a_slot_again_keeps_its_costs(K, how):
    """Its steps, forward-backward tokens, and the smallest H_mem of all its steps."""
    lm, asked = tiny(), passages(6, 6, seed=5)
    recipe = replace(
        QUICK,
        schedule="whole",
        objective="cross-entropy",
        temperature=1.0,
        stuck_after=0,
        margin=1e3,
        lr=1e-6,
        lr_large=0.0,
        steps=9,
    )
    engine = Engine(lm, recipe, vectors=K, batch_size=2)
    for passage in asked:
        engine.push(passage)
    engine.fill(2)
    for _ in range(4):
        engine.step()
    engine.batch.min_mem_bits[:] = 1.0  # less than in any step
    if how == "halved":
        engine._halve_batch()
        found, extra = list(engine.run()), 0
    else:
        engine.batch.stopped[:] = True
        for outcome in engine._certified(engine.retire_stopped()):
            engine.push_again(outcome)
        found, extra = list(engine.run()), 1  # a retry costs a step
    each = 6 + K - 1
    for o in found:
        assert (o.steps, o.spent, o.min_mem_bits) == (9, (9 - extra) * each, 1.0)
    assert len(found) == 2


def test_the_time_of_waiting_for_a_device_counts(monkeypatch):
    """A GPU computes after the call, so its time passes where a result is read from it."""
    now, tolist = [0.0], torch.Tensor.tolist

    def waiting(tensor):
        now[0] += tensor.dtype == torch.bool  # reading the stopped slots takes a second
        return tolist(tensor)

    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    engine = Engine(tiny(), replace(QUICK, steps=3, margin=1e3), batch_size=2)
    found = list(engine.run(passages(3, 3)))
    assert engine.seconds == sum(o.seconds for o in found) > 0


def test_a_batch_is_polled_after_each_step_by_default():
    """Rare polls cost columns that no token needs, and steps after the last one of a passage."""
    recipe, asked = Recipe(steps=10, margin=1e3), passages(40, 40)
    rare, often = (Engine(tiny(), recipe, vectors=1, poll=poll) for poll in (8, None))
    for engine in (rare, often):
        list(engine.run(asked))
    assert (often.poll, often.steps, rare.steps) == (1, 11, 16)
    assert often.tokens < 0.6 * rare.tokens


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(("size", "large"), [(0.4, False), (0.6, True), (1.0, True), (7.0, True)])
def test_vectors_that_get_a_slot_again_never_shrink(size, large, K):
    """Vectors of at least half of the large size are enlarged to that size; larger ones stay."""
    lm = copy(tiny())
    lm.encoder = Guess(0.5, 6)
    engine = Engine(lm, Recipe(stuck_after=5), vectors=K, batch_size=1)
    unit = torch.randn(K, lm.width, generator=torch.Generator().manual_seed(1))
    unit = unit / unit.square().mean(-1, keepdim=True).sqrt()
    vectors = size * engine.recipe.lr_large * unit
    engine.waiting.push(Job(passages(5)[0], 0.5, vectors))
    engine.fill(1)
    assert engine.batch.schedule.enlarged.tolist() == [large]
    found = engine.stepper.coordinates.vectors(engine.batch.parameters)[0]
    wanted = vectors * max(1.0, 1 / size) if large else vectors
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
