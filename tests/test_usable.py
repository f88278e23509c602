"""Usable vectors: the second loss, its turns, files and certificates of use, and generation."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import memvec
from conftest import QUICK, build, passages, reader, tiny
from memvec import codec
from memvec.cli.use_tables import show_use
from memvec.companions.around import as_context_at
from memvec.companions.triggers import token_named
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows
from memvec.cramming.starts import passage_seed
from memvec.cramming.starts import view_for as recipe_view
from memvec.decoding import BATCH, decode_ids
from memvec.errors import MemvecError, NotExactError
from memvec.journal import Journal
from memvec.lab import slow_use
from memvec.model.lm import FrozenLM
from memvec.passages.documents import Document
from memvec.passages.passage import ids_hash
from memvec.usable import certificate, contexts, generate, queries, teacher
from memvec.usable.certificate import _following, certify_use, exact_only_vectors, score_table
from memvec.usable.contexts import FULL, NONE, VECTORS, Figures
from memvec.usable.queries import continuations
from memvec.usable.turns import _undo_rows
from memvec.vectors import MemVectors
from properties import moves, paths

USABLE = Recipe.of(
    "usable", settle=30, decay=30, steps=400, query_count=3, query_tokens=5, compute="model"
)
FAMILIES = ["llama", "gpt2", "mamba", "opt-projected", "gemma2"]


@pytest.fixture
def short_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates of use have queries of 4 tokens instead of 48, in tests of other properties."""
    monkeypatch.setattr(certificate, "TOKENS", 4)


def triggered(family: str) -> tuple[FrozenLM, Recipe]:
    """A tiny model and the recipe; the trigger is BOS, or another token for a model without BOS."""
    lm = tiny(family)
    return lm, USABLE if lm.bos_id is not None else replace(USABLE, trigger="#3")


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("top", [1, 5, 10_000])
def test_the_divergence_merges_all_tokens_that_are_not_kept_into_one(top):
    generator = torch.Generator().manual_seed(top)
    p, q = (torch.randn(4, 3, 40, generator=generator).double() for _ in range(2))
    n = min(top, 39)
    values, ids = p.log_softmax(-1).topk(n, dim=-1)
    rest = 1 - values.exp().sum(-1)
    found = teacher.divergence(q, ids, values, rest.log())
    # The slow way: the other tokens are merged into one outcome, and KL is summed over outcomes.
    for at in range(4):
        for position in range(3):
            first, second = p[at, position].softmax(-1), q[at, position].softmax(-1)
            kept = ids[at, position].tolist()
            pairs = [(float(first[i]), float(second[i])) for i in kept]
            pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
            slow = sum(a * torch.tensor(a / b).log().item() for a, b in pairs)
            assert float(found[at, position]) == pytest.approx(slow, abs=1e-5)


def test_keeping_more_outcomes_never_lowers_the_divergence():
    p, q = torch.randn(6, 50, generator=torch.Generator().manual_seed(3)), torch.randn(6, 50)
    whole = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    last = torch.zeros(6)
    for n in (1, 4, 20, 49):
        values, ids = p.log_softmax(-1).topk(n, dim=-1)
        found = teacher.divergence(q, ids, values, (1 - values.exp().sum(-1)).log())
        assert bool((found >= last - 1e-5).all())
        last = found
    torch.testing.assert_close(last, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.slow
def test_a_step_has_the_gradient_of_both_losses(family, weight):
    lm, recipe = triggered(family)
    recipe = replace(recipe, optimizer="adam", term_weight=weight, look_ahead=100)
    asked = passages(5, 3, seed=4)
    engine = Engine(lm, recipe, vectors=2, batch_size=2)
    for passage in asked:
        engine.push(passage)
    engine.fill(2)
    batch, step = engine.batch, engine.stepper
    measured = step.measure(batch, engine.columns)
    # The slow way: autograd through both losses, one passage at a time.
    view = engine.lm
    for row, job in enumerate(engine.jobs):
        ids = torch.tensor([job.passage.ids])
        vectors = batch.parameters[row : row + 1].detach().clone().requires_grad_()
        logits = view.head(view.states(vectors, ids, "bos")).float() / recipe_in(engine)
        reconstruction = torch.nn.functional.cross_entropy(logits[0], ids[0]) * recipe_in(engine)
        kept = batch.term
        query, length = kept.queries[row, 0][None], int(kept.length[row, 0])
        text = queries.text_inputs(view, job.passage.ids)
        reference = view.head(teacher.states_after(view, text, query)).log_softmax(-1)
        front = view.after_front(vectors)
        mine = view.head(teacher.states_after(view, front, query)).log_softmax(-1)
        kl = (reference.exp() * (reference - mine)).sum(-1)[0, :length].mean()
        assert float(measured.term.loss[row]) == pytest.approx(kl.item(), abs=2e-3, rel=2e-2)
        (slow,) = torch.autograd.grad(reconstruction + weight * kl, vectors)
        share = torch.zeros_like(measured.margin)
        share[row, : len(job.passage)] = 1 / len(job.passage)
        slopes = [measured.gradient * share[..., None]]
        slopes += [g * weight for g in measured.term.gradients]
        mask = torch.zeros(len(engine.jobs))
        mask[row] = 1
        slopes[1:] = [s * mask[:, None, None] for s in slopes[1:]]
        (fast,) = torch.autograd.grad(
            [measured.states, *measured.term.outputs], batch.parameters, slopes, retain_graph=True
        )
        torch.testing.assert_close(fast[row], slow[0], atol=3e-4, rtol=3e-2)


@pytest.mark.parametrize("first", [0, 1])
def test_the_padding_of_a_query_does_not_count(first, monkeypatch):
    """A custom source may give queries of several lengths; their padding does not count."""
    rows = [([5, 6, 0, 0], 2), ([7, 8, 9, 4], 4)]
    table, lengths = zip(rows[first], rows[1 - first], strict=True)
    own = queries.Queries(torch.tensor(table), torch.tensor(lengths))
    monkeypatch.setattr("memvec.usable.term.queries_of", lambda *_: own)
    lm = tiny()
    engine = Engine(lm, USABLE, vectors=2, batch_size=1)
    engine.push(passages(5, 1, seed=4)[0])
    engine.fill(1)
    loss = engine.stepper.measure(engine.batch, engine.columns).term.loss
    words, view, ids = [table[0][: lengths[0]]], engine.lm, engine.jobs[0].passage.ids
    vectors = engine.batch.parameters[0].detach()
    text = slow_use.context_ids(lm, ids, 2)["text"]
    kl, _ = slow_use.divergence_and_nll(view, vectors, [], text, words)
    assert float(loss[0]) == pytest.approx(kl, rel=2e-2, abs=2e-3)


def recipe_in(engine: Engine) -> float:
    """The temperature in logits."""
    return engine.recipe.temperature


def test_queries_and_teacher_of_a_passage_do_not_depend_on_others():
    lm, asked = tiny(), passages(4, 6, 3, seed=8)
    engine = Engine(lm, USABLE, vectors=2, batch_size=3)
    together = engine.stepper.term.fresh(asked)
    for row, passage in enumerate(asked):
        alone = engine.stepper.term.fresh([passage])
        assert torch.equal(together.queries[row], alone.queries[0])
        assert torch.equal(together.log_p[row], alone.log_p[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top", [1, 7, 10_000])
def test_predictions_stored_while_sampling_are_those_of_one_forward_pass(family, top):
    lm, recipe = triggered(family)
    recipe = replace(recipe, teacher_top=top, query_count=BATCH + 1)  # two batches of samples
    ids = passages(4)[0].ids
    words, _, said = queries.continuations(lm, ids, recipe)
    again = teacher.top_tokens_after(lm, queries.text_inputs(lm, ids), words, top)
    assert said is not None
    assert said.top.shape == (len(words), 5, min(top, lm.vocab_size - 1))
    torch.testing.assert_close(said.log_p, again.log_p, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.log_others.exp(), again.log_others.exp(), atol=1e-4, rtol=1e-3)
    assert said.top.dtype == again.top.dtype
    assert float((said.top == again.top).float().mean()) > 0.99  # ties may differ


@pytest.mark.parametrize(("family", "once"), [("llama", True), ("gemma2", True), ("mamba", False)])
def test_a_text_is_read_once_for_all_queries_sampled_from_it(family, once):
    """This needs a cache of keys and values, which can be repeated; benchmarks count queries so."""
    lm, recipe = triggered(family)
    recipe, ids, read = replace(recipe, query_count=5), passages(4)[0].ids, []

    def count(module: nn.Module, args: Any, options: Any) -> None:
        given = options.get("input_ids")
        given = options["inputs_embeds"][..., 0] if given is None else given
        read.append(given.numel())

    hook = lm.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        queries.continuations(lm, ids, recipe)
    finally:
        hook.remove()
    text = len(ids) + (lm.bos_id is not None)
    # Each row reads the last input of the text, and all of its query but the last token. Without
    # such a cache each row reads the whole text; a first pass only finds the kind of cache.
    inputs = text - 1 + 5 * (1 if once else text)
    assert sum(read) == inputs + 5 * (recipe.query_tokens - 1)


@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.slow
def test_a_passage_with_the_second_loss_does_not_depend_on_its_neighbours(family, every):
    """Its parameters are equal bit for bit in the same slot, where products round alike."""
    lm, recipe = triggered(family)
    recipe = replace(recipe, objective_every=every)
    # The passages have one length and end together, so the shape and the slots stay the same.
    (a, b, c), (d, e, f) = passages(4, 4, 4, seed=5), passages(4, 4, 4, seed=6)
    recipe = replace(recipe, settle=12, decay=12, steps=12, if_not_exact="stop")
    options = {"vectors": 2, "batch_size": 3, "fixed_shapes": True}
    first, second, third, alone = (
        paths(Engine(lm, recipe, **options), in_slots)
        for in_slots in ((a, b, c), (a, e, f), (d, b, f), (a,))
    )
    assert all(len(path) == 13 and moves(path) for path in first.values())
    assert torch.equal(first[a], second[a])
    assert torch.equal(first[b], third[b])
    assert torch.equal(second[f], third[f])
    assert torch.equal(first[a], alone[a])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_the_second_loss_lowers_the_divergence_and_passages_stay_exact(family):
    lm, recipe = triggered(family)
    recipe = replace(recipe, settle=15, decay=15)
    asked = passages(3, 2, seed=4)
    kept = {}
    for weight in (0.0, 8.0):
        engine = Engine(lm, replace(recipe, term_weight=weight), vectors=2, batch_size=2)
        outcomes = list(engine.run(asked))
        assert all(o.exact for o in outcomes)
        assert all(o.steps >= recipe.settle for o in outcomes)
        term = engine.stepper.term
        inputs = {o.passage.ids: o.vectors[None].float() for o in outcomes}
        total = 0.0
        for ids, vectors in inputs.items():
            words, *_ = queries.continuations(engine.lm, ids, replace(recipe, seed=77))
            text = queries.text_inputs(engine.lm, ids).expand(len(words), -1, -1)
            after = engine.lm.after_front(vectors.expand(len(words), -1, -1))
            p = lm.head(teacher.states_after(lm, text, words)).log_softmax(-1)
            q = lm.head(teacher.states_after(lm, after, words)).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
        kept[weight] = total
        # A model with a cache of keys and values has read the front before (memvec.usable.front).
        before = 2 + (len(engine.lm.front) if family == "mamba" else 0)
        assert int(term.inputs(torch.tensor([3]))) == before + recipe.query_tokens - 1
    assert kept[8.0] < kept[0.0]


# ---------------------------------------------------------------------- turns


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("between", [[0, 1], [1]])
@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.slow
def test_between_its_turns_a_passage_has_the_gradient_of_the_second_loss_alone(
    family, between, fixed_shapes
):
    lm, recipe = triggered(family)
    recipe = replace(recipe, objective_every=2, optimizer="adam", look_ahead=100)
    engine = Engine(lm, recipe, vectors=2, batch_size=2, fixed_shapes=fixed_shapes)
    for passage in passages(5, 3, seed=4):
        engine.push(passage)
    engine.fill(2)
    batch, step, view = engine.batch, engine.stepper, engine.lm
    engine.step()
    batch.steps[[row for row in (0, 1) if row not in between]] = 2  # a turn of the first loss
    before, seen = batch.take(torch.arange(2)), []
    follow = step.gradient
    step.gradient = lambda *given: seen.append(follow(*given)) or seen[-1]
    at = batch.parameters.detach().clone().requires_grad_()
    total = 0.0
    for row in range(2):  # the slow way: autograd through the query, and in a turn the passage
        ids, vectors = torch.tensor([engine.jobs[row].passage.ids]), at[row : row + 1]
        which = int(batch.steps[row])
        query, length = batch.term.queries[row, which][None], int(batch.term.length[row, which])
        text = queries.text_inputs(view, engine.jobs[row].passage.ids)
        p = view.head(teacher.states_after(view, text, query)).log_softmax(-1)
        q = view.head(teacher.states_after(view, view.after_front(vectors), query))
        kl = (p.exp() * (p - q.log_softmax(-1))).sum(-1)[0, :length].mean()
        total = total + recipe.term_weight * kl
        if row not in between:
            logits = view.head(view.states(vectors, ids, "bos")).float() / recipe_in(engine)
            cross = torch.nn.functional.cross_entropy(logits[0], ids[0])
            total = total + cross * recipe_in(engine)
    (slow,) = torch.autograd.grad(total, at)
    engine.step()
    torch.testing.assert_close(seen[0], slow, atol=1e-3, rtol=3e-2)
    assert torch.equal(batch.vectors[between], before.vectors[between])
    assert torch.equal(batch.schedule.stale[between], before.schedule.stale[between])
    assert (batch.steps - before.steps).tolist() == [1, 1]
    # Cost of the second loss: the front unless it is in the cache, the vectors, and the query but
    # its last token. Cost of a turn: the front, the vectors, the trigger, and the passage likewise.
    around = 2 + (len(view.front) if family == "mamba" else 0)
    of_query = around + recipe.query_tokens - 1
    of_passage = [around + len(view.trigger) + n - 1 for n in (5, 3)]
    wanted = [of_query + (row not in between) * of_passage[row] for row in range(2)]
    assert (batch.spent - before.spent).tolist() == wanted


@pytest.mark.parametrize("poll", [1, 4])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.slow
def test_turns_cost_less_and_passages_stay_exact(slots, poll):
    lm, recipe = triggered("llama")
    recipe = replace(recipe, settle=45, decay=45)
    asked, spent = passages(4, 3, seed=9), {}
    for every in (1, 3):
        options = {"vectors": 2, "batch_size": slots, "poll": poll}
        engine = Engine(lm, replace(recipe, objective_every=every), **options)
        outcomes = {o.passage.ids: o for o in engine.run(asked)}
        assert all(o.exact and o.steps >= recipe.settle for o in outcomes.values())
        assert len(outcomes) == len(asked)
        spent[every] = sum(o.spent for o in outcomes.values())
    assert spent[3] < spent[1]


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("schedule", ["growing", "geometric"])
def test_a_stage_narrows_by_the_turns_that_a_passage_had(every, schedule):
    """After the same number of turns of a passage without progress, the same number of tokens
    counts, for every `objective_every`."""
    recipe = replace(USABLE, schedule=schedule, look_ahead=8, narrow_after=3, settle=1000, lr=1e-9)
    counted = {}
    for n in (1, every):
        engine = Engine(tiny(), replace(recipe, objective_every=n), vectors=1, batch_size=1)
        for passage in passages(20, seed=9):
            engine.push(passage)
        engine.fill(1)
        counted[n], stale = [], []
        for _ in range(10):
            for _ in range(n):
                engine.step()
            batch = engine.batch
            counted[n].append(int(engine.schedule.counted(batch.schedule, batch.length)))
            stale.append(int(batch.schedule.stale))
        assert stale == list(range(10))
    assert counted[every] == counted[1]
    assert counted[1][-1] < counted[1][0] < 20


@pytest.mark.parametrize("schedule", ["growing", "whole"])
@pytest.mark.parametrize("corrections", [0, 3])
@pytest.mark.slow
def test_a_passage_with_corrections_is_done_after_its_settle_steps(schedule, corrections):
    recipe = replace(USABLE, schedule=schedule, corrections=corrections, settle=40, decay=40)
    for outcome in Engine(tiny(), recipe, vectors=2, batch_size=3).run(passages(4, 3, 4, seed=9)):
        assert (outcome.status, outcome.exact) == ("done", True)
        assert 40 <= outcome.steps < recipe.steps


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("rise", [0.0, 0.1])
def test_the_weight_rises_in_turns_in_which_all_margins_are_met(every, rise):
    """In each turn `term_rise` raises it if the vectors meet every margin, and else lowers it."""
    lm, recipe = triggered("llama")
    recipe = replace(recipe, objective_every=every, term_rise=rise, settle=200, compute="model")
    engine = Engine(lm, recipe, vectors=2, batch_size=3)
    for passage in passages(2, 4, 3, seed=4):
        engine.push(passage)
    engine.fill(3)
    step, seen, margins = engine.stepper, [], []
    moved, kept = step.term.weight, step._update_progress
    step.term.weight = lambda batch: seen.append(moved(batch)) or seen[-1]
    step._update_progress = lambda batch, measured, padding: (
        margins.append((measured.margin.clone(), measured.decoding.clone()))
        or kept(batch, measured, padding)
    )
    expected, ups = torch.full((3,), recipe.term_weight), 0
    lengths = engine.batch.length.tolist()
    for number in range(90):
        asked = engine.batch.steps % every == 0
        engine.step()
        margin, measured = margins[-1]
        assert torch.equal(asked, measured)
        for row, length in enumerate(lengths):
            came = bool((margin[row, :length] >= engine.batch.target_margin[row]).all())
            if came := came and margin.shape[1] >= length:
                ups += int(asked[row])
            if asked[row] and rise:
                low, high = recipe.term_weight / 32, recipe.term_weight * 128
                factor = 1 + rise if came else (1 + rise) ** -7
                expected[row] = (expected[row] * factor).clamp(low, high)
        torch.testing.assert_close(seen[-1], expected, rtol=1e-4, atol=1e-6)
        assert len(seen) == number + 1
    assert 5 < ups < 90 * 3 - 20
    # After `settle` steps the weight decays, as it does without `term_rise`.
    step.recipe = step.term.recipe = replace(recipe, settle=10)
    engine.batch.steps += 80
    engine.batch.schedule.best *= 0
    late = torch.exp2(-(engine.batch.steps - 10) / 40.0)
    torch.testing.assert_close(moved(engine.batch), expected * late, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_rising_weight_keeps_passages_exact_and_independent():
    """A fixed weight is too large for some passages. With `term_rise` each passage gets its own
    weight, which does not depend on the other passages."""
    lm, recipe = triggered("llama")
    recipe = replace(recipe, settle=100, decay=100, steps=100, patience=100, term_weight=100.0)
    recipe = replace(recipe, if_not_exact="stop")
    asked = passages(4, 4, 4, seed=5)
    options = {"vectors": 2, "batch_size": 3, "fixed_shapes": True}
    fixed = list(Engine(lm, recipe, **options).run(asked))
    rising = replace(recipe, term_rise=0.05)
    found = {o.passage.ids: o for o in Engine(lm, rising, **options).run(asked)}
    assert sum(o.exact for o in fixed) < sum(o.exact for o in found.values()) == 3
    (alone,) = Engine(lm, rising, **options).run(asked[:1])
    assert torch.equal(alone.vectors, found[asked[0].ids].vectors)


def test_turns_and_rising_weights_are_refused_without_the_term_use():
    with pytest.raises(MemvecError, match="term_rise is for use only: take the preset 'usable'"):
        replace(QUICK, term="none", term_rise=0.03)
    with pytest.raises(MemvecError, match="term_rise must be at least 0"):
        replace(USABLE, term_rise=-0.1)
    assert "term_rise" not in USABLE.record()
    for term in ("none", "alignment"):
        with pytest.raises(MemvecError, match="the recipe's objective_every is for use only"):
            replace(QUICK, term=term, objective_every=2)
    with pytest.raises(MemvecError, match="objective_every must be at least 1"):
        replace(USABLE, objective_every=0)
    assert "objective_every" not in Recipe().record()
    assert replace(USABLE, objective_every=3).record()["objective_every"] == 3


# ---------------------------------------------------------------------- files and certificates


@pytest.mark.parametrize(
    ("trigger", "storage"), [("bos", "int8"), ("#0", "float32"), ("the", "int8")]
)
@pytest.mark.slow
def test_a_file_keeps_its_trigger_and_its_certificate_of_use(
    trigger, storage, tmp_path, short_queries
):
    lm = reader("words")
    (the,) = lm.tokenize("the")
    mem = codec.cram(
        lm,
        ["the cat sat on the mat and the dog"],
        vectors=2,
        tokens=3,
        recipe=replace(USABLE, trigger=trigger),
        storage=storage,
    )
    assert mem.exact
    assert mem.header.use is not None
    contexts = mem.header.use["held_out"]["contexts"]
    assert {"nothing", "vectors", "exact-only vectors"} <= set(contexts)
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert again.header.use == mem.header.use
    assert codec.decode(lm, again) == ["the cat sat on the mat and the dog"]
    assert again.header.use["trigger"] == {"bos": "bos", "#0": "0", "the": str(the)}[trigger]
    if trigger != "bos":
        assert again.header.trigger == token_named(lm, trigger)
        other = MemVectors(again.vectors, again.header.model_copy(update={"trigger": None}))
        certificate, _ = memvec.verify(lm, other)
        assert not certificate["exact"]  # after another token the passage does not decode
    worth = certify_use(lm, again)
    assert worth.held_out.contexts["nothing"].kept == 0
    measured = worth.model_dump(mode="json")["held_out"]["contexts"]["vectors"]
    assert measured["kl"] == pytest.approx(contexts["vectors"]["kl"], abs=1e-5)


@pytest.mark.slow
def test_the_true_continuation_is_measured_for_passages_that_have_one(short_queries):
    lm = reader("words")
    text = "the cat sat on the mat and the dog ran " * 2
    mem = codec.cram(lm, text, vectors=2, tokens=4, recipe=replace(USABLE, settle=2))
    worth = certify_use(lm, mem, exact_only=False)
    assert worth.continuation is not None
    after = sum(p.tokens for p in mem.passages)
    able = sum(
        after - sum(p.tokens for p in mem.passages[: i + 1]) >= worth.continuation.tokens
        for i in range(len(mem.passages))
    )
    assert worth.continuation.passages == able
    assert 1 < able < len(mem.passages)
    assert "exact-only vectors" not in worth.continuation.contexts


def test_a_context_that_a_passage_lacks_is_left_out_there_alone(capsys):
    full = {FULL: Figures(0.0, 1.0), NONE: Figures(1.0, 2.0)}
    full |= {"last 4 tokens": Figures(0.4, 1.4), VECTORS: Figures(0.1, 1.1)}
    short = {name: own for name, own in full.items() if name != "last 4 tokens"}
    tables = [score_table(own, 4, 48) for own in permutations([full, full, short])]
    assert list(tables[0].contexts) == [name for name in full if name != FULL]
    assert all(list(one.contexts) == list(tables[0].contexts) for one in tables)
    assert all(one.contexts["last 4 tokens"].kl == pytest.approx(0.4) for one in tables)
    assert {name for name, one in tables[0].contexts.items() if one.passages} == {"last 4 tokens"}
    assert tables[0].contexts["last 4 tokens"].passages == 2, "a number travels with its n"
    show_use({"vectors": 2, "held_out": tables[0].model_dump()})
    shown = capsys.readouterr().out
    assert "(n 3," in shown
    assert "last 4 tokens (n 2)" in shown


def test_a_context_is_compared_on_the_passages_that_have_it():
    """Computed by hand for one passage without the context and two with it, which differ."""
    last, whole = "last 4 tokens", []
    for kl, nll, nothing in ((None, None, 9.0), (0.4, 1.5, 2.0), (0.8, 3.0, 5.0)):
        own = {FULL: Figures(0.0, 1.0), NONE: Figures(1.0, nothing), VECTORS: Figures(0.2, 1.0)}
        whole.append(own if kl is None else own | {last: Figures(kl, nll)})
    whole[2][VECTORS] = Figures(0.4, 2.0)
    table = score_table(whole, 4, 48)
    found, vectors = table.contexts[last], table.contexts[VECTORS]
    assert (found.passages, vectors.passages, table.passages) == (2, None, 3)
    assert found.kl == pytest.approx((0.4 + 0.8) / 2)
    assert found.nll == pytest.approx((1.5 + 3.0) / 2)
    assert found.kept == pytest.approx((0.5 + 2.0) / (1.0 + 4.0))
    assert found.over_vectors == pytest.approx((0.4 + 0.8) / (0.2 + 0.4))
    assert vectors.nll == pytest.approx((1.0 + 2.0 + 1.0) / 3)
    assert vectors.kept == pytest.approx((1.0 + 3.0 + 8.0) / (1.0 + 4.0 + 8.0))
    assert table.gain == pytest.approx((1.0 + 4.0 + 8.0) / 3)


@pytest.mark.parametrize(("n", "limit"), [(1, 8), (8, 8), (9, 8), (100, 8), (1000, 32)])
def test_the_measured_passages_are_evenly_spaced_in_the_file(n, limit):
    found = certificate._evenly_spaced(n, limit)
    assert len(found) == min(n, limit)
    ends = [*found, n]
    assert found[0] == 0
    assert {b - a for a, b in pairwise(ends)} <= {n // len(found), -(-n // len(found))}


def test_the_context_of_the_last_passage_of_a_row_is_its_vectors_alone():
    lm, words = recipe_view(tiny(), USABLE), torch.tensor([[5, 6, 7]])
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(1))
    of_row = contexts.contexts_of_row(lm, vectors, [4, 5, 6])
    last = contexts.contexts_of(lm, vectors[2], [4, 5, 6], None)
    assert torch.equal(of_row[contexts.LAST_PASSAGE](words, 3), last[VECTORS](words, 3))
    assert contexts.LAST_PASSAGE not in contexts.contexts_of_row(lm, vectors[:1], [4, 5, 6])


def test_the_context_scale_does_not_apply_to_exact_only_vectors():
    lm, ids, words = recipe_view(tiny(), USABLE), passages(5, 1, seed=4)[0].ids, [[5, 6, 7]]
    vectors, control = torch.randn(2, 2, lm.width, generator=torch.Generator().manual_seed(1))
    of_scale = [
        contexts.contexts_of(as_context_at(lm, scale), vectors, ids, control)
        for scale in (1.0, 0.25)
    ]
    for name, same in (("exact-only vectors", True), ("vectors", False)):
        first, second = (contexts[name](torch.tensor(words), 3) for contexts in of_scale)
        assert torch.allclose(first, second, atol=1e-4) == same


def test_a_text_that_begins_with_bos_gets_no_second_bos():
    """The reference of the KL is then the model that has read the text, with one BOS in front."""
    lm, vectors = tiny(), torch.randn(1, tiny().width)
    words = torch.tensor([[4, 8, 2]])
    for rest in ((5, 6, 7, 9), (5,)):
        own = (lm.bos_id, *rest)
        read, plain = (
            contexts.after_each(lm, contexts.contexts_of(lm, vectors, ids, None), words)
            for ids in (own, rest)
        )
        assert (read[VECTORS], read[NONE]) == (plain[VECTORS], plain[NONE])
        assert slow_use.context_ids(lm, own, 1)["text"] == list(own)


@pytest.mark.parametrize(("tokens", "K"), [(3, 2), (2, 5), (1, 7)])
def test_a_row_has_as_many_passages_as_fit_the_context(tokens, K):
    lm = recipe_view(tiny(), USABLE)
    asked = [[5] * tokens] * 100
    n = certificate._passages_that_fit(lm, asked, K, 48)
    taken = [max(1 + m * tokens, len(lm.front) + m * K) + 48 for m in (n, n + 1)]
    assert taken[0] <= lm.context < taken[1]


@pytest.mark.parametrize(
    ("tokens", "context", "expected"),
    [(40, None, 4), (40, 10_000, 4), (40, 100, 1), (300, None, 2), (300, 400, 1), (7, None, 9)],
)
def test_a_row_of_more_than_two_passages_has_a_limit(tokens, context, expected, monkeypatch):
    """A model that reads 100,000 tokens, or any number, does not read a whole book."""
    monkeypatch.setattr(certificate, "ROW_INPUTS", 215)
    lm = copy(recipe_view(tiny(), USABLE))
    lm.context = context
    assert certificate._passages_that_fit(lm, [[5] * tokens] * 9, 2, 48) == expected


@pytest.mark.parametrize("limit", [0, 9, 13, 100])
def test_a_row_that_does_not_fit_in_memory_is_halved(limit, monkeypatch):
    """Of six passages of three tokens, the largest half that fits is measured."""
    lm = recipe_view(tiny(), USABLE)
    vectors = torch.randn(6, 2, lm.width, generator=torch.Generator().manual_seed(1))
    ids = [[i, 5, 6] for i in range(1, 7)]
    recipe = replace(USABLE, query_count=2, query_tokens=4)

    def read(view, *given):
        if len(given[0]) > limit:
            raise MemoryError
        return continuations(view, *given)

    monkeypatch.setattr(certificate, "continuations", read)
    found = certificate._figures_of_row(lm, vectors, ids, recipe)
    n = {0: 0, 9: 3, 13: 3, 100: 6}[limit]
    if n:
        text = [token for own in ids[:n] for token in own]
        row = contexts.contexts_of_row(lm, vectors[:n], text)
        words = continuations(lm, text, recipe).ids
        assert found == contexts.after_each(lm, row, words)
    else:
        assert found is None


@pytest.mark.parametrize("space", ["inputs", "prefix"])
def test_contexts_are_measured_in_parts_if_memory_runs_out(space):
    """The figures are those of all queries at once, and of logits at all of their positions."""
    lm = recipe_view(tiny(), replace(USABLE, space=space))
    given, words = int(space == "prefix"), torch.tensor([[4, 8, 2], [3, 9, 1], [6, 6, 5]])
    vectors = torch.randn(2, lm.numbers, generator=torch.Generator().manual_seed(1))
    plain = contexts.contexts_of(lm, vectors, [5, 6, 7, 9], None)

    def narrow(context, queries, last):
        if len(queries) > 1:
            raise MemoryError
        return context(queries, last)

    halved = {name: partial(narrow, context) for name, context in plain.items()}
    parts, whole = (contexts.after_each(lm, c, words) for c in (halved, plain))
    for name, figures in whole.items():
        assert parts[name] == pytest.approx(figures, abs=1e-5)
        everywhere = plain[name](words, 3 - given)
        assert everywhere.shape[1] == 3 - given
        assert torch.allclose(plain[name](words, 1), everywhere[:, -1:], atol=1e-5)


def test_exact_only_vectors_have_as_many_slots_as_memory_allows(untyped, monkeypatch):
    lm, seen = recipe_view(tiny(), USABLE), []
    monkeypatch.setattr(certificate, "default_batch_size", lambda lm, tokens, K: tokens + K)
    made = certificate.Engine
    monkeypatch.setattr(
        certificate,
        "Engine",
        lambda *a, **k: seen.append(k["batch_size"]) or made(*a, **k),
    )
    monkeypatch.setattr(made, "run", lambda *_: iter(()))
    header = SimpleNamespace(start_rule="bos")
    mem = SimpleNamespace(vectors=torch.zeros(9, 2, lm.width), header=header, storage="float32")
    assert exact_only_vectors(lm, mem, [[5, 6, 7]] * 9) == [None] * 9
    assert exact_only_vectors(lm, mem, [[5, 6, 7], [5]]) == [None] * 2
    assert seen == [5, 2]


def test_rows_out_of_turn_keep_the_state_of_a_schedule_within_a_schedule():
    """A state may consist of other states (memvec.cramming.rows)."""

    @dataclass
    class Inner(Rows):
        size: torch.Tensor

    @dataclass
    class Outer(Rows):
        count: torch.Tensor
        inner: Inner

    before = Outer(torch.tensor([1, 2, 3]), Inner(torch.tensor([[1.0], [2.0], [3.0]])))
    now = Outer(before.count + 10, Inner(before.inner.size + 10))
    _undo_rows(now, before, torch.tensor([False, True, False]))
    assert now.count.tolist() == [11, 2, 13]
    assert now.inner.size.tolist() == [[11.0], [2.0], [13.0]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 7919, -7919, 2**63 - 1])
def test_no_held_out_query_is_one_of_cramming(seed, monkeypatch):
    """This holds for every seed of the recipe, to which the certificate adds its own."""
    lm, text = reader("words"), "the cat sat"
    recipe = replace(USABLE, seed=seed, query_count=4, query_tokens=48, settle=1)
    mem = codec.cram(lm, [text], vectors=2, tokens=4, recipe=recipe)
    assert mem.exact
    seen = []
    monkeypatch.setattr(
        certificate,
        "continuations",
        lambda *given: seen.append(continuations(*given)) or seen[-1],
    )
    certify_use(lm, mem, exact_only=False)
    view = recipe_view(lm, recipe)
    trained = continuations(view, lm.tokenize(text), recipe).ids.tolist()
    assert seen[0].ids.shape == (4, 48)
    assert not [words for words in seen[0].ids.tolist() if words in trained]


@pytest.mark.slow
@pytest.mark.parametrize("room", [None, 110, 60])
def test_the_passages_of_a_text_are_measured_in_a_row(room):
    """As many of its passages as fit the context are read in a row; the slow way gives the same."""
    lm = reader("words")
    texts = ["the cat sat on the mat and the dog ran " * 3, "a dog and", "the fox ran on the mat"]
    mem = codec.cram(lm, texts, vectors=2, tokens=6, recipe=replace(USABLE, settle=2, steps=2))
    counts = [document.passages for document in mem.header.documents]
    assert counts[1] == 1 < min(counts[0], counts[2])
    passages = [mem.passages[i].tokens for i in range(sum(counts))]
    small = copy(lm)
    small.context = room
    ids = [list(range(2, 2 + tokens)) for tokens in passages]
    records = [
        record.model_copy(update={"sha256": ids_hash(own)})
        for record, own in zip(mem.passages, ids, strict=True)
    ]
    mem = MemVectors(mem.vectors, mem.header.model_copy(update={"passages": records}), mem.soft)
    worth = certify_use(small, mem, ids, exact_only=False).in_a_row
    found, view, recipe = [], mem.view(lm), Recipe(query_count=4, query_tokens=48, seed=7919)
    for first, n in ((0, counts[0]), (counts[0] + 1, counts[2])):
        while room and 1 + sum(passages[first : first + n]) + 48 > room:
            n -= 1
        if n > 1:
            text = [token for own in ids[first : first + n] for token in own]
            words = continuations(view, text, recipe).ids.tolist()
            vectors = mem.vectors[first : first + n].float().flatten(0, 1)
            before = slow_use.context_ids(lm, text, 2)["text"]
            found.append(slow_use.divergence_and_nll(view, vectors, [], before, words)[0])
    if not found:
        assert worth is None
        return
    assert worth.passages == len(found)
    assert worth.contexts["vectors"].kl == pytest.approx(sum(found) / len(found), rel=2e-3)
    assert "vectors of the last passage" in worth.contexts


@pytest.mark.slow
def test_a_resumed_run_gives_the_vectors_and_certificate_of_an_uninterrupted_one(
    tmp_path, short_queries
):
    lm, options = reader("words"), {"vectors": 2, "tokens": 3, "recipe": USABLE}
    text = "the cat sat on the mat and the dog"
    whole = codec.cram(lm, text, **options)
    journal = Journal(tmp_path / "j", {"a": 1})
    codec.cram(lm, text, journal=journal, **options)
    journal.close()
    again = Journal(tmp_path / "j", {"a": 1})
    resumed = codec.cram(lm, text, journal=again, **options)
    again.close()
    assert torch.equal(resumed.vectors, whole.vectors)
    without = {key: value for key, value in whole.header.use.items() if key != "environment"}
    assert without.items() <= resumed.header.use.items()


# ---------------------------------------------------------------------- in use


@pytest.fixture(scope="module", params=["bos", "none"])
def crammed(request):
    lm, recipe = reader("words"), replace(USABLE, front=request.param)
    texts = ["the cat sat on the mat", "a dog and the fox"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "TOKENS", 4)
        return lm, [codec.cram(lm, t, vectors=2, tokens=3, recipe=recipe) for t in texts]


@pytest.mark.parametrize("which", [[0], [0, 1]])
@pytest.mark.parametrize("context", ["vectors", "text", "nothing"])
@pytest.mark.slow
def test_use_writes_the_models_greedy_text(crammed, which, context):
    lm, mems = crammed
    chosen = [mems[i] for i in which]
    written = memvec.use(lm, chosen, "the lazy", context=context, max_new_tokens=5)
    asked = lm.embed(torch.tensor([lm.tokenize("the lazy")]))
    bos = lm.embed(torch.tensor([[lm.bos_id]]))
    if context == "vectors":
        front = [bos] if mems[0].header.front == "bos" else []
        inputs = [*front, *(v[None].float() for mem in chosen for v in mem.vectors)]
    elif context == "text":
        inputs = [bos, *(lm.embed(torch.tensor([i])) for mem in chosen for i in mem.tokens(lm))]
    else:
        inputs = [bos]
    assert written == greedy(lm, torch.cat([*inputs, asked], 1), 5)


def greedy(lm, inputs, tokens: int) -> str:
    """Greedy text after inputs (1, S, D), with one forward pass for each token."""
    ids = []
    for _ in range(tokens):
        token = int(lm.model(inputs_embeds=inputs, use_cache=False).logits[0, -1].argmax())
        if token == lm.model.generation_config.eos_token_id:
            break
        ids.append(token)
        inputs = torch.cat([inputs, lm.embed(torch.tensor([[token]]))], 1)
    return lm.text(ids)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [generate.context_inputs, partial(generate.use, prompt="fox")])
def test_passages_are_picked_from_one_file(crammed, asked):
    lm, mems = crammed
    with pytest.raises(MemvecError, match="passages are picked from one file"):
        asked(lm, mems, passages=[0])
    with pytest.raises(MemvecError, match="there is no passage to use"):
        asked(lm, mems[0], passages=[])


@pytest.mark.slow
@pytest.mark.usefixtures("untyped")
def test_settings_that_use_cannot_apply_are_refused(crammed):
    lm, (mem, *_) = crammed
    for chosen in (0, "0", [0.0]):
        with pytest.raises(MemvecError, match="passages is a list of numbers"):
            generate.use(lm, mem, "fox", passages=chosen)
    for setting in ("max_length", "num_return_sequences", "input_ids"):
        with pytest.raises(MemvecError, match=f"inputs of its own: leave out {setting}"):
            generate.use(lm, mem, "fox", **{setting: 1})
    with pytest.raises(MemvecError, match=r"^max_new_tokens must be a whole number, not 2\.5"):
        generate.use(lm, mem, "fox", max_new_tokens=2.5)
    with pytest.raises(MemvecError, match="an answer of 128 tokens"):  # the default
        generate.use(lm, mem, "fox", max_new_tokens=None)
    assert generate._options(lm, {"stop_strings": ["end"]})["tokenizer"] is lm.tokenizer
    written = generate.use(lm, mem, "fox", passages=iter([0]), max_new_tokens=3)
    assert written == generate.use(lm, mem, "fox", passages=[0], max_new_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("passage", [0, 1])
def test_a_single_passage_can_be_used(crammed, passage):
    lm, mems = crammed
    alone = generate.use(lm, mems[0], "fox", passages=[passage], max_new_tokens=4)
    asked = lm.embed(torch.tensor([lm.tokenize("fox")]))
    front = [lm.embed(torch.tensor([[lm.bos_id]]))] if mems[0].header.front == "bos" else []
    inputs = torch.cat([*front, mems[0].vectors[passage][None].float(), asked], 1)
    assert alone == greedy(lm, inputs, 4)
    with pytest.raises(MemvecError, match="no passage 7"):
        generate.use(lm, mems[0], "fox", passages=[7])


@pytest.mark.slow
@pytest.mark.parametrize("passage", [0, 1])
def test_passages_that_are_not_chosen_are_not_decoded(crammed, passage, monkeypatch):
    lm, (mem, *_) = crammed
    expected, decoded = mem.tokens(lm)[passage], []

    def counting(lm, vectors, lengths, **options):
        decoded.append(vectors)
        return decode_ids(lm, vectors, lengths, **options)

    monkeypatch.setattr("memvec.vectors.decode_ids", counting)
    assert generate.tokens_in_a_row(lm, [mem], [passage]) == expected
    (rows,) = decoded
    assert torch.equal(rows, mem.vectors[passage : passage + 1].float())


@pytest.mark.slow
def test_a_passage_that_is_exact_only_among_the_others_can_be_used(crammed, monkeypatch):
    """The number of passages in a batch changes the rounding."""
    lm, (mem, *_) = crammed
    expected = mem.tokens(lm)
    assert len(expected) > 1
    whole = MemVectors.decode_passages

    def other_rounding(self, lm, *, force=False):
        ids = whole(self, lm, force=force)
        return ids if len(ids) == len(expected) else [[token + 1 for token in i] for i in ids]

    monkeypatch.setattr(MemVectors, "decode_passages", other_rounding)
    assert generate.tokens_in_a_row(lm, [mem], [1]) == expected[1]


@pytest.mark.slow
def test_a_chosen_passage_that_is_not_exact_is_named_by_its_number_in_the_file(crammed):
    lm, (mem, *_) = crammed
    records = [p.model_copy(update={"sha256": "0" * 64}) for p in mem.passages]
    header = mem.header.model_copy(update={"passages": records})
    with pytest.raises(NotExactError, match=r"^passage 1 did not come back"):
        generate.tokens_in_a_row(lm, [MemVectors(mem.vectors, header, mem.soft)], [1])


# ---------------------------------------------------------------------- bad input


def test_bad_queries_are_refused(tmp_path):
    lm = reader("words")
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n \n")
    latin.write_bytes("é".encode("latin-1"))
    long = tmp_path / "long.txt"
    long.write_text("the cat " * 30)
    for name, sentence in (
        (str(empty), "holds no question"),
        (str(latin), "not UTF-8"),
        (str(long), "leaves no room for an answer"),
        ("continuation", "did you mean 'continuations'"),
        (str(tmp_path), "cannot be read"),
    ):
        with pytest.raises(MemvecError, match=sentence):
            codec.cram(lm, "the cat", tokens=2, recipe=replace(USABLE, queries=name))
    with pytest.raises(MemvecError, match="do not fit the context"):
        codec.cram(lm, "the cat", tokens=2, recipe=replace(USABLE, query_tokens=10_000))


def test_queries_from_a_file_are_questions_with_greedy_answers(tmp_path):
    lm, file = reader("words"), tmp_path / "questions.txt"
    file.write_text("the cat\nfox\n")
    rows, length, said = queries.queries_of(
        lm, lm.tokenize("a dog"), replace(USABLE, queries=str(file))
    )
    assert rows.shape == (2, USABLE.query_tokens)
    assert said is None  # a question is not sampled
    assert length.tolist() == [USABLE.query_tokens] * 2
    for row, question in zip(rows.tolist(), ("the cat", "fox"), strict=True):
        ids = [lm.bos_id, *lm.tokenize("a dog"), *lm.tokenize(question)]
        while len(ids) < 1 + len(lm.tokenize("a dog")) + USABLE.query_tokens:
            ids.append(int(lm.own_logits(torch.tensor([ids]))[0, -1].argmax()))
        assert row == ids[-USABLE.query_tokens :]  # the question and the model's greedy answer


@pytest.mark.parametrize("bos", [True, False])
def test_samples_are_drawn_without_the_passage(bos):
    """They follow BOS, or the first token if there is no BOS; the passage sets the seed."""
    lm, recipe = copy(tiny()), replace(USABLE, queries="samples", query_count=4)
    if not bos:
        lm.bos_id = None
    found = []
    for passage in passages(5, 5, seed=3):
        words, length, said = queries.queries_of(lm, passage.ids, recipe)
        assert (words.shape, said) == ((4, recipe.query_tokens), None)
        assert length.tolist() == [recipe.query_tokens] * 4
        draw = torch.Generator().manual_seed(passage_seed(passage.ids, recipe.seed))
        rows = torch.tensor([[lm.bos_id if bos else passage.ids[0]]] * 4)
        for _ in range(recipe.query_tokens):
            shares = lm.own_logits(rows)[:, -1].softmax(-1)
            drawn = torch.multinomial(shares, 1, generator=draw)
            rows = torch.cat([rows, drawn], 1)
        assert words.tolist() == rows[:, 1:].tolist()
        found.append(words)
    assert not torch.equal(*found)


def test_a_model_without_bos_needs_a_trigger(untyped):
    lm = copy(tiny())
    lm.bos_id = None
    with pytest.raises(MemvecError, match="no BOS token"):
        Engine(lm, USABLE)
    assert Engine(lm, replace(USABLE, trigger="#3")).start_rule == "bos"
    with pytest.raises(MemvecError, match="no token 99999"):
        Engine(lm, replace(USABLE, trigger="#99999"))
    for rule in ("vectors", "first-token"):
        with pytest.raises(MemvecError, match="need a trigger"):
            Engine(lm, replace(USABLE, trigger="#3", start_rule=rule))
    with pytest.raises(MemvecError, match="a trigger is one"):
        token_named(reader("words"), "the cat")


@pytest.mark.slow
def test_vectors_for_a_model_without_bos_are_certified_and_used(untyped):
    lm = copy(reader("words"))
    lm.bos_id = None
    recipe = replace(USABLE, trigger="#5")
    mem = codec.cram(lm, "the cat sat", vectors=2, tokens=3, recipe=recipe)
    assert mem.exact
    assert mem.header.use["held_out"]["contexts"]["nothing"]["kept"] == 0
    for context in ("vectors", "text"):
        answer = memvec.use(lm, mem, "fox", context=context, max_new_tokens=3)
        assert isinstance(answer, str)
    with pytest.raises(MemvecError, match="has no start token, so an answer needs a question"):
        memvec.use(lm, mem, "", context="nothing")


@pytest.mark.parametrize("start_rule", ["vectors", "first-token"])
def test_vectors_without_a_trigger_are_refused(start_rule):
    lm, recipe = reader("words"), replace(QUICK, start_rule=start_rule)
    mem = codec.cram(lm, "the cat sat", vectors=2, tokens=3, recipe=recipe)
    for refused in (lambda: memvec.use(lm, mem, "the"), lambda: certify_use(lm, mem)):
        with pytest.raises(MemvecError, match="no trigger"):
            refused()


def test_a_text_that_begins_with_bos_is_used_with_one_bos(crammed, monkeypatch):
    lm, (mem, *_) = crammed
    seen = []
    monkeypatch.setattr(generate, "write_after", lambda lm, inputs, *_: seen.append(inputs) or "")
    for ids in ([lm.bos_id, 5, 6], [5, 6]):
        monkeypatch.setattr(generate, "tokens_in_a_row", lambda *_, ids=ids, **__: ids)
        memvec.use(lm, mem, "the", context="text", max_new_tokens=4)
    assert torch.equal(*seen)


@pytest.mark.slow
def test_vectors_of_other_weights_are_used_with_force_only(crammed, short_queries):
    """A fine-tuned model may use the vectors of the model before the tuning."""
    lm, mems = crammed
    mem, ids = mems[0], mems[0].tokens(lm)
    tuned = deepcopy(lm.model)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.down_proj.weight.mul_(0.5)
    other = FrozenLM(tuned, lm.tokenizer, name="other")
    for after in (
        lambda **force: memvec.use(other, mem, "the", max_new_tokens=4, **force),
        lambda **force: memvec.use(other, mem, "the", context="vectors", max_new_tokens=4, **force),
        lambda **force: memvec.context_inputs(other, mem, **force),
        lambda **force: memvec.measure(other, mem, memvec.decode(lm, mem), **force),
        lambda **force: certify_use(other, mem, ids, exact_only=False, **force),
    ):
        with pytest.raises(MemvecError, match=r"were made for other weights .* force=True"):
            after()
        assert after(force=True) is not None
    own, others = (
        certify_use(model, mem, ids, exact_only=False, force=True).held_out.contexts["vectors"].kl
        for model in (lm, other)
    )
    assert own != others, "measured with the model that was given"


@pytest.mark.slow
def test_certify_use_refuses_vectors_of_another_width(crammed):
    _, mems = crammed
    other = FrozenLM(build("llama", 1, vocab_size=50, hidden_size=48), name="other")
    with pytest.raises(MemvecError, match="numbers each and other takes 48"):
        certify_use(other, mems[0], [[1] * p.tokens for p in mems[0].passages])


@pytest.mark.slow
def test_certify_use_refuses_the_token_ids_of_other_passages(crammed):
    lm, mems = crammed
    ids = mems[0].tokens(lm)
    assert certify_use(lm, mems[0], ids, exact_only=False) is not None
    others = [[1] * p.tokens for p in mems[0].passages]
    for wrong in (others, ids[1:], [*ids, [1]], ids[::-1], [[]] * len(ids)):
        with pytest.raises(MemvecError, match="are not those of these passages"):
            certify_use(lm, mems[0], wrong, exact_only=False)


# ---------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_command_crams_shows_and_uses(folder, tmp_path, command, short_queries):
    text, file = tmp_path / "a.txt", tmp_path / "a.mem"
    text.write_text("the cat sat")
    quick = ["--set", "settle=5", "--set", "decay=5", "--set", "query_tokens=4", "--tokens", 8]
    ran = command("cram", text, "-m", folder, "--usable", "--vectors", 4, "-o", file, *quick)
    assert ran.code == 0, ran.err
    shown = command("inspect", file).out.decode()
    assert "As context" in shown
    assert command("verify", file, "--use", "-m", folder).code == 0
    compared = command("use", file, "-m", folder, "-p", "the", "--compare", "--max-new-tokens", 3)
    assert compared.code == 0
    assert all(word in compared.out.decode() for word in ("vectors", "text", "nothing"))
    again = ["--seed", 5, "--max-new-tokens", 8]  # a seed means sampling
    first = command("use", file, "-m", folder, "-p", "the", *again).out
    assert first == command("use", file, "-m", folder, "-p", "the", "--sample", *again).out
    shown = command("use", file, "-m", folder, "-p", "the", "--json", *again).out
    assert json.loads(shown)["vectors"] == first.decode().removesuffix("\n")
    drawn = ["--temperature", 0.9, "--seed", 1, "--max-new-tokens", 3]
    assert command("use", file, "-m", folder, "-p", "the", *drawn).code == 0
    assert "do not fit" in command("use", file, "-m", folder, "-p", "the").sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--use-weight", "-1"], "--use-weight must be at least 0"),
        (["--usable", "--preset", "paper"], "leave out --preset paper"),
        (["--trigger", "#3"], "give --usable, too"),
        (["--usable", "--queries", "nowhere.txt"], "no source of queries, and no file"),
        (["--usable", "--one-step"], "cannot stand in front of a query"),
        (["--usable", "--set", "term=none"], "--set term=none leaves nothing of --usable"),
        (["--usable", "--start-rule", "first-token"], "use the start rule 'bos'"),
        (["--usable", "--trigger", "#²"], "a trigger is one"),
    ],
)
def test_bad_options_of_cram_are_refused_in_one_sentence(
    folder, tmp_path, command, words, sentence
):
    text = tmp_path / "a.txt"
    text.write_text("the cat sat")
    ran = command("cram", text, "-m", folder, "-o", tmp_path / "a.mem", *words)
    assert ran.code == 2
    assert sentence in ran.sentence


@pytest.mark.slow
def test_a_run_with_other_questions_does_not_continue_an_interrupted_one(
    folder, tmp_path, command, monkeypatch
):
    """The passages in the journal of a run are not taken if the file has other questions."""
    monkeypatch.setattr(certificate, "TOKENS", 4)
    text, file, questions = tmp_path / "a.txt", tmp_path / "a.mem", tmp_path / "q.txt"
    text.write_text("the cat sat")
    quick = ["--set", "settle=5", "--set", "decay=5", "--set", "query_tokens=6", "--vectors", 4]
    quick += ["--tokens", 8]
    words = ["cram", text, "-m", folder, "-o", file, "--usable", "--queries", questions, *quick]
    found = []

    def interrupt(mem, *_, **__):
        found.append(mem.vectors)
        raise KeyboardInterrupt

    monkeypatch.setattr(MemVectors, "save", interrupt)
    for question in ("the\n", "sat\n"):
        questions.write_text(question)
        ran = command(*words)
        assert ran.code == 130
        assert "1 finished passage is kept" in ran.err
    assert not torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_the_certificate_of_use_fits_the_context(family):
    """If the context is short, the queries have fewer tokens; the certificate records how many."""
    sizes = {"n_positions": 56} if family == "gpt2" else {}
    context = {} if family == "mamba" else {"max_position_embeddings": 56}
    lm = FrozenLM(build(family, **sizes, **context), None, name=family)
    ids = passages(12)[0].ids
    vectors = torch.randn(1, 8, lm.width)
    mem = codec.cram(
        lm,
        Document(ids, "d", ids_hash(ids), len(ids)),
        vectors=8,
        tokens=12,
        recipe=replace(USABLE, steps=0, trigger="bos" if lm.bos_id is not None else "#3"),
    )
    use = certify_use(lm, MemVectors(vectors, mem.header), [list(ids)], exact_only=False)
    expected = 48 if lm.context is None else 56 - 12  # BOS is read, the last token is not
    assert use.held_out.tokens == expected
    if lm.context is not None:
        lm.context = 13
        with pytest.raises(MemvecError, match="a passage of 12 tokens leaves no room for a query"):
            certify_use(lm, MemVectors(vectors, mem.header), [list(ids)], exact_only=False)


def test_figures_of_one_passage_have_no_interval():
    figures = {FULL: Figures(0.0, 1.0), NONE: Figures(0.5, 2.0), VECTORS: Figures(0.1, 1.2)}
    one, two = (score_table([figures] * n, 4, 48).contexts[VECTORS] for n in (1, 2))
    assert one.kl == two.kl == pytest.approx(0.1)
    assert all(math.isnan(end) for end in (*one.kl_interval, *one.kept_interval))
    assert two.kl_interval == (pytest.approx(0.1),) * 2


@pytest.mark.parametrize("fails", [{1}, {1, 2}, {2}])
def test_queries_are_the_same_after_out_of_memory(monkeypatch, fails):
    lm, ids = tiny(), passages(6)[0].ids
    recipe = Recipe(query_count=40, query_tokens=5)
    whole = queries.continuations(lm, ids, recipe).ids
    continued, calls = queries.continued, []

    def sometimes(*arguments, **options):
        calls.append(1)
        found = continued(*arguments, **options)
        if len(calls) in fails:
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(queries, "continued", sometimes)
    assert torch.equal(queries.continuations(lm, ids, recipe).ids, whole)
    assert len(calls) > 2


def test_draws_are_those_of_torch_multinomial():
    shares = torch.randn(5, 30).softmax(-1)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = queries.Draws(ours, 5, slice(0, 5))
    for _ in range(20):
        expected = torch.multinomial(shares, 1, generator=theirs)[:, 0]
        assert torch.equal(drawn.of(shares), expected)


@pytest.mark.slow
def test_draws_from_a_large_vocabulary_follow_the_probabilities():
    """A draw equals numpy's search in the cumulative sums. Each row gets the same random numbers if
    only a part of the rows is drawn."""
    V = queries.LARGE_VOCABULARY
    shares = torch.zeros(3, V)
    shares[:, [0, 5, V - 1]] = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    whole, part, numbers = (torch.Generator().manual_seed(3) for _ in range(3))
    draws, of_part = queries.Draws(whole, 3, slice(0, 3)), queries.Draws(part, 3, slice(1, 3))
    drawn = []
    for _ in range(500):
        drawn.append(draws.of(shares))
        assert torch.equal(of_part.of(shares[1:]), drawn[-1][1:])
        u = torch.rand(3, dtype=torch.float64, generator=numbers).numpy()
        sums = np.cumsum(shares.numpy().astype(np.float64), axis=1)
        slow = [np.searchsorted(sums[i], u[i] * sums[i, -1], side="right") for i in range(3)]
        assert drawn[-1].tolist() == slow
    tokens = torch.stack(drawn)
    found = torch.stack([(tokens == token).double().mean(0) for token in (0, 5, V - 1)], 1)
    assert (found - shares[:, [0, 5, V - 1]]).abs().max() < 0.08  # 3.5 standard errors


def test_the_models_own_generation_penalties_are_not_applied(monkeypatch):
    lm = reader()
    inputs = lm.embed(torch.tensor([lm.tokenize("the cat sat on the mat")]))
    plain = generate.write_after(lm, inputs, {"max_new_tokens": 12, "do_sample": False})
    own = copy(lm.model.generation_config)
    own.repetition_penalty, own.no_repeat_ngram_size = 3.0, 2
    monkeypatch.setattr(lm.model, "generation_config", own)
    again = generate.write_after(lm, inputs, {"max_new_tokens": 12, "do_sample": False})
    assert again == plain
    assert lm.model.generation_config is own


def test_threads_that_generate_with_one_model_leave_it_as_it_was(monkeypatch):
    """Two threads are in `generate` at the same time."""
    lm, both, seen = reader(), threading.Barrier(2, timeout=60), []
    inputs = lm.embed(torch.tensor([lm.tokenize("the cat sat on the mat")]))
    own, generates = lm.model.generation_config, type(lm.model).generate

    def meeting(model, **options):
        both.wait()
        seen.append((lm.model.generation_config is own, model.generation_config.eos_token_id))
        return generates(model, **options)

    monkeypatch.setattr(type(lm.model), "generate", meeting)
    options = {"max_new_tokens": 3, "do_sample": False}
    with ThreadPoolExecutor(2) as threads:
        written = list(
            threads.map(lambda _: generate.write_after(lm, inputs, dict(options)), range(2))
        )
    assert written[0] == written[1]
    assert seen == [(True, generate.end_ids(lm))] * 2
    assert lm.model.generation_config is own


@pytest.mark.parametrize("tokens", [2, 3, 6])
def test_the_true_continuation_of_a_passage_is_of_its_own_text(tokens):
    """It has exactly `tokens` tokens, from as many passages as needed; otherwise there is none."""
    lm, texts = reader("words"), ["the cat sat on the mat and the dog", "fox", "a dog ran over the"]
    recipe = Recipe(steps=1, if_not_exact="stop")
    mem = codec.cram(lm, texts, vectors=1, tokens=2, recipe=recipe)
    read = [lm.tokenize(text) for text in texts]
    wanted, cut = {}, []
    for document, ids in zip(mem.header.documents, read, strict=True):
        at = 0
        for _ in range(document.passages):
            n = mem.passages[len(cut)].tokens
            cut.append(ids[at : at + n])
            at += n
            if len(after := ids[at : at + tokens]) == tokens:
                wanted[len(cut) - 1] = after
    assert _following(mem, cut, tokens) == wanted
    assert wanted


@pytest.mark.slow
@pytest.mark.parametrize("trigger", ["bos", "#3"])
@pytest.mark.parametrize("vectors", [2, 3])
def test_the_exact_only_control_is_exact_after_the_same_trigger(vectors, trigger, short_queries):
    lm = reader("words")
    recipe = replace(USABLE, settle=2, trigger=trigger)
    options = {"vectors": vectors, "tokens": 3, "storage": "int8"}
    mem = codec.cram(lm, "the cat sat on the mat", recipe=recipe, **options)
    view, passages = mem.view(lm), mem.tokens(lm)
    found = exact_only_vectors(view, mem, passages)
    assert any(rows is not None for rows in found)
    for rows, ids in zip(found, passages, strict=True):
        if rows is not None:
            assert rows.shape == mem.vectors.shape[1:]
            assert torch.equal(mem.storage.rounded(rows), rows)  # in the file's storage format
            assert decode_ids(view, rows[None], [len(ids)], start_rule="bos") == [list(ids)]
