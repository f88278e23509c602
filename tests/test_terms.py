"""A recipe's term, which is a second loss, with `alignment`; and the schedule `geometric`."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import QUICK, passages, tiny
from memvec.arms.alignment import PlainStates
from memvec.arms.geometric import NO_FAILURE, Geometric
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.passages.passage import Passage

ALIGNED = replace(QUICK, term="alignment", term_weight=0.5, align_layers=2, compute="model")


def slots(recipe, asked, family="llama", K=2):
    lm = tiny(family)
    engine = Engine(lm, recipe, vectors=K, batch_size=len(asked))
    for passage in asked:
        engine.push(passage)
    engine.fill(len(asked))
    return lm, engine


# ---------------------------------------------------------------------- activation alignment


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("rule", ["vectors", "bos", "first-token"])
@pytest.mark.parametrize("layers", [1, 2])
def test_alignment_is_the_distance_of_hidden_states(family, rule, layers):
    if family == "gpt2" and layers == 2:
        pytest.skip("transformers gives the last layer's states after a norm, which changes them")
    recipe = replace(ALIGNED, start_rule=rule, align_layers=layers)
    lm, engine = slots(recipe, passages(5, 3, seed=2), family)
    batch, step = engine.batch, engine.stepper
    measured = step.measure(batch, engine.columns)
    for row, job in enumerate(engine.jobs):
        ids = torch.tensor([job.passage.ids])
        vectors = batch.parameters[row : row + 1].detach().clone().requires_grad_()
        n = len(job.passage) - 1
        after = hidden(lm, lm.reading.inputs(lm, vectors, ids, rule))
        plain = hidden(lm, lm.reading.inputs(lm, None, ids, "bos"))
        slow = sum(
            (1 - torch.cosine_similarity(a[:, -n:], b[:, -n:], dim=-1)).mean()
            for a, b in zip(after[1 : layers + 1], plain[1 : layers + 1], strict=True)
        )
        assert float(measured.term.loss[row]) == pytest.approx(slow.item(), abs=1e-5)
        (wanted,) = torch.autograd.grad(slow, vectors)
        (output,) = measured.term.outputs
        (share,) = step.term.slopes(measured.term, batch.length, 0)
        (found,) = torch.autograd.grad(output[row], batch.parameters, share[row], retain_graph=True)
        torch.testing.assert_close(found[row], wanted[0], atol=1e-5, rtol=1e-3)


def test_the_alignment_of_a_passage_is_over_its_own_columns_only():
    (long, short), found = passages(100, 40, seed=2), []
    for asked in ([short], [short, long]):
        engine = Engine(tiny(), replace(ALIGNED, look_ahead=8), vectors=1, batch_size=2)
        for passage in asked:
            engine.push(passage)
        engine.fill(2)
        row = [job.passage for job in engine.jobs].index(short)
        engine.batch.schedule.best[1 - row if len(asked) == 2 else row + 1 :] = 80
        engine.batch.schedule.best[row] = 0
        engine.fill(2)
        assert engine.columns == (16 if len(asked) == 1 else 96)
        measured = engine.stepper.measure(engine.batch, engine.columns)
        found.append(float(measured.term.loss[row]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def hidden(lm, inputs):
    """Hidden states of every layer, from transformers itself."""
    return lm.model(inputs_embeds=inputs, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_aligned_passages_are_exact_and_nearer_to_the_text(family):
    asked = passages(4, 4, seed=3)
    reached = {}
    for weight in (0.0, 1.0):
        lm, engine = slots(replace(ALIGNED, term_weight=weight, settle=40), asked, family)
        outcomes = list(engine.run())
        assert all(o.exact for o in outcomes)
        _, again = slots(ALIGNED, [o.passage for o in outcomes], family)
        order = {o.passage.ids: o.vectors.float() for o in outcomes}
        again.batch.parameters = torch.stack([order[j.passage.ids] for j in again.jobs])
        reached[weight] = float(again.stepper.measure(again.batch, 4).term.loss.sum())
        assert lm is engine.lm
    assert reached[1.0] < reached[0.0]


def test_the_best_vectors_are_right_with_the_smallest_mean_of_the_term():
    """Vectors with more right tokens are better whatever the term; a loop computes it again."""
    _, engine = slots(ALIGNED, passages(5, 5, 5, seed=2))
    draw = torch.Generator().manual_seed(0)
    mean, best, by_loss = [math.nan] * 3, [math.inf] * 3, 0
    for _ in range(60):
        loss, *drawn = torch.rand(3, 3, generator=draw)
        more, all_right = drawn[0] > 0.9, drawn[1] > 0.5
        found = engine.stepper._better_by_term(engine.batch, loss, more, all_right)
        for i, value in enumerate(loss.tolist()):
            mean[i] = value if math.isnan(mean[i]) else 0.9 * mean[i] + 0.1 * value
            expected = bool(more[i]) or (bool(all_right[i]) and mean[i] < best[i])
            by_loss += expected and not more[i]
            best[i] = mean[i] if expected else best[i]
            assert bool(found[i]) == expected
    assert by_loss > 10


def test_a_passage_that_was_right_once_is_done_after_settle_steps():
    """It is done at step 5 and not at 4, although not all tokens are right in that step."""
    _, engine = slots(replace(ALIGNED, settle=5), passages(5, 5, 5, seed=2))
    batch = engine.batch
    batch.steps = torch.tensor([4, 5, 5])
    batch.schedule.best = batch.length - torch.tensor([0, 0, 1])
    before = batch.parameters.detach().clone()
    engine.step()
    assert batch.done.tolist() == [False, True, False]
    assert torch.equal(batch.parameters[1], before[1])
    assert engine.stepper.measure(batch, engine.columns).margin.amin(-1).max() < 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_fails_its_own_passage_only(number):
    """The passage fails before the step moves its vectors."""
    _, engine = slots(ALIGNED, passages(5, 5, seed=2))
    term = engine.stepper.term
    measure = term.measure

    def measured(*given):
        found = measure(*given)
        return replace(found, loss=found.loss.index_fill(0, torch.tensor([0]), number))

    term.measure = measured
    before = engine.batch.parameters.detach().clone()
    engine.step()
    assert engine.batch.failed.tolist() == [True, False]
    assert torch.equal(engine.batch.parameters[0], before[0])
    assert not torch.equal(engine.batch.parameters[1], before[1])


def test_a_passage_of_one_token_has_nothing_to_align():
    _, engine = slots(ALIGNED, passages(1, seed=1))
    (outcome,) = engine.run()
    assert outcome.exact


def test_layers_that_a_model_does_not_have_are_refused():
    with pytest.raises(MemvecError, match="align_layers cannot be 99"):
        Engine(tiny(), replace(ALIGNED, align_layers=99))


def test_the_term_of_the_documentation_makes_smaller_vectors():
    """The term is the example of docs/howto/add-term.md, compared with weight 0."""
    page = Path(__file__).parent.parent / "docs" / "howto" / "add-term.md"
    code = page.read_text("utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(code, str(page), "exec"), {"__name__": "a_page_of_the_docs"})
    sizes = {}
    for weight in (0.0, 30.0):
        recipe = replace(QUICK, term="small", term_weight=weight, settle=40, lr=0.05, lr_large=0.0)
        outcomes = list(Engine(tiny(), recipe, vectors=2).run(passages(3, 3, seed=6)))
        assert all(o.exact for o in outcomes)
        sizes[weight] = sum(float(o.vectors.float().square().mean()) for o in outcomes)
    assert sizes[30.0] < sizes[0.0]


# ---------------------------------------------------------------------- geometric growth

GEOMETRIC = Recipe(schedule="geometric", look_ahead=1, narrow_after=2, stuck_after=0, lr_large=0.0)


def targets(reach, steps=200):
    """The targets, the best length and the failed length if vectors can hold `reach` tokens."""
    schedule = Geometric(GEOMETRIC, K=1)
    state = schedule.fresh(torch.ones(1), torch.zeros(1, dtype=torch.bool))
    length, seen = torch.tensor([1000]), []
    for _ in range(steps):
        counted = int(schedule.counted(state, length))
        if not seen or seen[-1] != counted:
            seen.append(counted)
        now = min(counted, reach)
        _, gained = schedule.record(state, torch.tensor([now]))
        schedule.advance(state, gained)
    return seen, int(state.best), int(state.failed)


@pytest.mark.parametrize("reach", [1, 2, 5, 16, 23, 64])
def test_targets_double_and_then_approach_the_longest_length(reach):
    seen, best, failed = targets(reach)
    assert best == reach
    assert failed in (NO_FAILURE, reach + 1) or failed > reach
    doubled = [2**i for i in range(reach.bit_length())]
    assert seen[: len(doubled)] == doubled[: len(seen)]
    beyond = [target for target in seen[len(doubled) :] if target > reach]
    assert beyond  # longer targets are tried again
    assert max(seen) <= 2 * reach


def test_geometric_growth_takes_fewer_stages_than_tokens():
    seen, best, _ = targets(200, steps=60)
    assert best == 200
    assert len(seen) < 20


@pytest.mark.parametrize("wait", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_targets_are_those_of_the_rule_written_out_for_one_passage(seed, wait):
    """Progress is random: it exceeds the counted tokens at times, and continues after failures."""
    schedule = Geometric(replace(GEOMETRIC, look_ahead=2, narrow_after=wait), K=2)
    state = schedule.fresh(torch.ones(1), torch.zeros(1, dtype=torch.bool))
    draw = random.Random(seed)
    best, stale, target, failed = -1, 0, 4, math.inf
    for _ in range(80):
        assert int(schedule.counted(state, torch.tensor([10**6]))) == target
        choices = [0, max(best, 0), best + 1, target - 1, target, target + 2]
        reached = min(300, draw.choice(choices))
        schedule.advance(state, schedule.record(state, torch.tensor([reached]))[1])
        stale = 0 if reached > best else stale + 1
        best = max(best, reached)
        stuck = wait > 0 and stale > 0 and stale % wait == 0
        failed = min(failed, target) if stuck else failed
        if failed <= best + 1:
            failed = math.inf
        half_way = best + 1 if failed == math.inf else max(best + 1, int(best + failed) // 2)
        if stuck:
            target = half_way
        elif best >= target:
            target = 2 * best if failed == math.inf else half_way
    assert best > 4


@pytest.mark.parametrize("K", [2, 3])
def test_passages_are_exact_with_geometric_growth(K):
    recipe = replace(QUICK, schedule="geometric", look_ahead=1)
    outcomes = list(Engine(tiny(), recipe, vectors=K, batch_size=3).run(passages(5, 2, 4, seed=4)))
    assert all(o.exact for o in outcomes)


def test_the_cost_of_a_passage_is_of_its_own_tokens_only():
    """Beside a longer passage it costs the same as alone."""
    short, long = passages(3, 9, seed=7)
    recipe = replace(ALIGNED, schedule="whole", steps=4, stuck_after=0)
    spent = {}
    for asked in ([short], [short, long]):
        engine = Engine(tiny(), recipe, vectors=2, batch_size=2)
        for outcome in engine.run(asked):
            if outcome.passage.ids == short.ids:
                spent[len(asked)] = outcome.spent / max(1, outcome.steps)
    assert spent[1] == spent[2] == 3 + 1  # T + K - 1 inputs


def test_the_alignment_of_a_text_does_not_depend_on_its_neighbours():
    """One text begins with BOS and one does not; each is compared with a batch of its own."""
    lm, (with_bos, without) = tiny(), passages(5, 5, seed=2)
    with_bos = Passage((lm.bos_id, *with_bos.ids[1:]), 0)
    losses = []
    for batch in ([with_bos, without], [with_bos], [without]):
        engine = Engine(lm, ALIGNED, vectors=1, batch_size=2)
        for passage in batch:
            engine.push(passage)
        engine.fill(2)
        assert [job.passage for job in engine.jobs] == batch
        losses += engine.stepper.measure(engine.batch, engine.columns).term.loss.tolist()
    assert losses[:2] == pytest.approx(losses[2:], abs=1e-5)


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2), (3, 3)])
def test_joined_states_of_texts_of_different_lengths_are_padded_with_zeros(lengths):
    """A passage that enters a slot later may be longer than all earlier ones."""
    first, second = (torch.randn(2, tokens, 3, 4) for tokens in lengths)
    both = PlainStates(first).joined(PlainStates(second)).states
    assert both.shape == (4, max(lengths), 3, 4)
    for rows, states in ((both[:2], first), (both[2:], second)):
        assert torch.equal(rows[:, : states.shape[1]], states)
        assert not rows[:, states.shape[1] :].any()


def test_a_text_with_its_own_bos_is_aligned_without_another():
    """The model never reads a text after two BOS tokens."""
    lm, (passage,) = tiny(), passages(5, seed=2)
    passage = Passage((lm.bos_id, *passage.ids[1:]), 0)
    engine = Engine(lm, ALIGNED, vectors=1, batch_size=1)
    engine.push(passage)
    engine.fill(1)
    measured = engine.stepper.measure(engine.batch, engine.columns)
    ids, n = torch.tensor([passage.ids]), len(passage) - 1
    after = hidden(lm, lm.reading.inputs(lm, engine.batch.parameters.detach(), ids, "vectors"))
    plain = hidden(lm, lm.embed(ids[:, :-1]))
    slow = sum(
        (1 - torch.cosine_similarity(a[:, -n:], b[:, -n:], dim=-1)).mean()
        for a, b in zip(after[1:3], plain[1:3], strict=True)
    )
    assert float(measured.term.loss[0]) == pytest.approx(float(slow), abs=1e-5)
