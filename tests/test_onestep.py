"""One-step decoding: one forward pass on two vectors, e and m, gives a passage."""

from __future__ import annotations

import functools
import json
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from conftest import QUICK, FrozenLM, build, one_step, passages, reader, tiny
from memvec import codec
from memvec.arms import shared_m
from memvec.arms.shared_job import SharedCramJob
from memvec.arms.shared_m import Shared
from memvec.cramming.batch import Job
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.errors import MemvecError
from memvec.export import export, names
from memvec.export import target as target_of
from memvec.header import Header
from memvec.lab.protocols.one_step import one_step_result
from memvec.passages.documents import Document
from memvec.passages.passage import Passage
from memvec.results import PositionScores
from memvec.storage import storage_of
from memvec.vectors import MemVectors
from properties import moves, paths
from test_engine import Guess
from test_families import as_mem

FAMILIES = ["llama", "gpt-neox", "opt-projected", "gpt2", "mamba", "bloom", "gemma2", "falcon-h1"]
ASKED = passages(3, 2, 3, 1)


@functools.cache
def crammed(family: str) -> list[Outcome]:
    """One-step outcomes of `ASKED`, crammed once for all tests."""
    engine = Engine(one_step(tiny(family)), QUICK, vectors=2, batch_size=4)
    return sorted(engine.run(ASKED), key=lambda o: o.passage.document)


def as_one_step(family: str) -> MemVectors:
    mem = as_mem(tiny(family), crammed(family), "vectors")
    return MemVectors(mem.vectors, mem.header.model_copy(update={"layout": "one-step"}))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_passages_from_the_file_decode_in_a_batch_and_alone(family, tmp_path):
    mem, lm = as_one_step(family), tiny(family)
    assert mem.exact
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert again.header.layout == "one-step"
    truth = [list(p.ids) for p in ASKED]
    assert again.tokens(lm) == truth
    one = one_step(lm)
    alone = [decode_ids(one, v[None], [len(t)])[0] for v, t in zip(mem.vectors, truth, strict=True)]
    assert alone == truth


@pytest.mark.parametrize("family", ["llama", "mamba", "gemma2"])
def test_ids_bits_and_margins_are_those_of_the_models_own_forward(family):
    """The model reads e and copies of m, one passage in one call."""
    model = tiny(family).model
    for o in crammed(family):
        e, m = o.vectors[:1], o.vectors[1:]
        inputs = torch.cat([e, m.repeat(len(o.passage) - 1, 1)])[None]
        with torch.no_grad():
            logits = model(inputs_embeds=inputs, use_cache=False).logits[0].double()
        ids = torch.tensor(o.passage.ids)
        assert torch.equal(logits.argmax(-1), ids)
        bits = -logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum() / torch.tensor(2.0).log()
        assert o.metrics.mem_bits == pytest.approx(float(bits), abs=1e-3)
        others = logits.scatter(-1, ids[:, None], -torch.inf).amax(-1)
        margin = (logits[torch.arange(len(ids)), ids] - others).min()
        assert o.metrics.margin == pytest.approx(float(margin), abs=1e-3)
        assert o.metrics.margin >= QUICK.margin - 1e-3


def test_one_forward_pass_decodes_a_batch():
    lm, calls = one_step(FrozenLM(build("llama"), name="counted")), []
    hook = lm.model.model.register_forward_hook(lambda *_: calls.append(1))
    vectors = torch.stack([o.vectors for o in crammed("llama")])
    decode_ids(lm, vectors, [len(p) for p in ASKED])
    hook.remove()
    assert len(calls) == 1


def test_states_do_not_depend_on_tokens_and_t_tokens_take_t_inputs():
    lm, vectors = one_step(tiny()), torch.stack([o.vectors for o in crammed("llama")])[:1]
    a, b = (torch.full((1, 5), t) for t in (3, 9))
    assert torch.equal(lm.states(vectors, a), lm.states(vectors, b))
    assert lm.reading.inputs(lm, vectors, a).shape == (1, 5, lm.width)
    single = next(o for o in crammed("llama") if len(o.passage) == 1)
    assert single.spent == single.steps  # a passage of one token has one input


def test_passages_do_not_depend_on_each_other():
    lm, recipe = (
        one_step(tiny()),
        replace(QUICK, steps=10, margin=1e3),
    )  # no passage reaches the margin
    recipe = replace(recipe, lr=0.01, lr_large=0.0)
    together = paths(Engine(lm, recipe, vectors=2, batch_size=4), ASKED)
    for passage in ASKED[:2]:
        alone = paths(Engine(lm, recipe, vectors=2, batch_size=1), [passage])[passage]
        assert moves(alone)
        torch.testing.assert_close(alone, together[passage], rtol=0, atol=1e-4)


def test_bits_without_vectors_do_not_depend_on_the_layout():
    ordinary = next(Engine(tiny(), QUICK, vectors=2, batch_size=1).run(ASKED[:1]))
    one = crammed("llama")[0]
    assert one.metrics.lm_bits == pytest.approx(ordinary.metrics.lm_bits, abs=1e-4)


def test_a_one_step_view_does_not_change_its_model():
    lm = reader()
    view = lm.read_as("one-step")
    assert (lm.reading.layout, view.reading.layout) == ("prefix", "one-step")
    assert view.model is lm.model
    assert view.read_as("one-step") is view
    assert lm.read_as("prefix") is lm
    vectors, ids = torch.zeros(1, 2, lm.width), torch.zeros(1, 3, dtype=torch.long)
    assert lm.reading.inputs(lm, vectors, ids).shape[1] == 4


@pytest.mark.parametrize("window", [4, 8])
def test_no_passage_is_longer_than_the_reach_of_e_through_sliding_windows(window):
    """If all layers have a sliding window, later predictions do not depend on e."""
    lm = FrozenLM(build("mistral", sliding_window=window), name="short-sighted")
    one, reach = one_step(lm), 2 * (window - 1) + 1
    assert Engine(one, vectors=2).max_tokens() == reach
    vectors = (torch.randn(1, 2, lm.width, generator=torch.manual_seed(0))).requires_grad_()
    states = one.states(vectors, torch.zeros(1, reach + 1, dtype=torch.long))
    for position, reached in ((reach - 1, True), (reach, False)):
        (slope,) = torch.autograd.grad(states[0, position].sum(), vectors, retain_graph=True)
        assert bool(slope[0, 0].any()) is reached
    with pytest.raises(MemvecError, match=f"at most {reach} tokens"):
        next(Engine(one, vectors=2).run(passages(reach + 1)))
    assert one_step(tiny("gemma2")).context == 128  # some of its layers have full attention


@pytest.mark.parametrize(("used", "context"), [(False, 128), (True, 2 * 3 + 1 + 2)])
def test_an_unused_sliding_window_limits_no_passage(used, context):
    """Some configurations name a window, do not use it, and do not list the types of layers."""
    lm = copy(one_step(tiny()))
    config = SimpleNamespace(sliding_window=4, use_sliding_window=used, num_hidden_layers=2)
    lm.config = SimpleNamespace(get_text_config=lambda: config)
    assert lm.reading.context(lm) == context


@pytest.mark.parametrize("rule", ["bos", "first-token"])
def test_start_rules_with_given_tokens_are_refused(rule):
    lm = one_step(tiny())
    vectors = torch.stack([o.vectors for o in crammed("llama")])[:1]
    with pytest.raises(MemvecError, match="continues no given tokens"):
        decode_ids(lm, vectors, [3], start_rule=rule, first=[5])
    with pytest.raises(MemvecError, match="continues no given tokens"):
        next(Engine(lm, Recipe(start_rule=rule), vectors=2).run(ASKED[:3]))


@pytest.mark.parametrize("target", names())
def test_exports_to_token_by_token_decoders_are_refused(target, tmp_path):
    with pytest.raises(MemvecError, match="one-step vectors are read in one forward pass"):
        export(tiny(), as_one_step("llama"), target_of(target), tmp_path / "out")


def test_wrong_layouts_and_numbers_of_vectors_are_refused():
    with pytest.raises(MemvecError, match="did you mean 'one-step'"):
        tiny().read_as("onestep")
    with pytest.raises(MemvecError, match="two vectors, e and m, not 1"):
        next(Engine(one_step(tiny()), vectors=1).run(ASKED))
    header = as_one_step("llama").header
    with pytest.raises(MemvecError, match="are two, e and m, not 3"):
        MemVectors(torch.zeros(len(ASKED), 3, 32), header)
    plain = header.model_dump_json()
    with pytest.raises(ValueError, match="not followed by tokens"):
        Header.model_validate_json(plain.replace('"start_rule":"vectors"', '"start_rule":"bos"'))
    older = json.loads(plain)
    del older["layout"]  # files of earlier versions have no such field
    assert Header.model_validate(older).layout == "prefix"


def test_the_command_crams_and_decodes_in_one_step(command, folder, tmp_path):
    (tmp_path / "a.txt").write_text("the fox and the dog")
    words = ["cram", tmp_path / "a.txt", "-m", folder, "--one-step", "-o", tmp_path / "a.mem"]
    assert command(*words, "--vectors", "3").code == 2
    options = ["--steps", 600, "--set", "patience=600", "--tokens", 2, "--json"]
    ran = command(*words, *options)
    assert ran.code == 0, ran.err
    shown = json.loads(ran.out)
    assert (shown["layout"], shown["vectors_per_passage"]) == ("one-step", 2)
    assert command("decode", tmp_path / "a.mem").out == b"the fox and the dog"
    ran = command("verify", tmp_path / "a.mem")
    assert ran.code == 0
    assert b"without a cache (one forward pass" in b" ".join(ran.out.split())
    shown = " ".join(command("inspect", tmp_path / "a.mem").out.decode().split())
    assert "one-step" in shown
    assert "without a cache: one forward pass gives all tokens" in shown


@pytest.mark.slow
def test_lengths_do_not_come_from_the_bits_of_vectors_in_front(monkeypatch):
    """With such bits the text would be one passage."""
    lm = reader()
    monkeypatch.setattr(lm, "facts", {"bits_per_vector": {"1": 1e9}})
    recipe = Recipe(steps=100, patience=40)
    mem = codec.cram(lm, ["the cat sat on the mat"], layout="one-step", recipe=recipe)
    assert mem.header.certificate is not None
    assert codec.decode(lm, mem) == ["the cat sat on the mat"]
    assert len(mem.passages) > 2


# ---------------------------------------------------------------------- one m for all


def test_a_shared_m_is_stored_once_and_gives_every_passage_back(tmp_path):
    lm, texts = reader(), ["the fox and", "the dog"]
    mem = codec.cram(lm, texts, layout="one-step-shared", tokens=2, recipe=QUICK)
    P, D = len(mem.passages), lm.width
    assert mem.exact
    assert P > 2
    assert mem.size == (P + 1) * D * 4
    assert mem.summary()["vectors"] == P + 1
    assert mem.summary()["bits_per_number"] == 32
    assert torch.equal(mem.vectors[:, 1], mem.vectors[:1, 1].expand(P, -1))
    file = mem.save(tmp_path / "a.mem")
    assert load_file(file)["vectors"].shape == (P + 1, 1, D)
    again = MemVectors.load(file)
    assert torch.equal(again.vectors, mem.vectors)
    assert again.header.layout == "one-step-shared"
    assert again.header.certificate["cache"] == "none: one forward pass gives all tokens"
    assert codec.decode(lm, again) == texts
    did = again.header.recipe  # options that a shared m does not use are off
    assert (did["compute"], did["lr_large"], did["stuck_after"]) == ("model", 0.0, 0)


@pytest.mark.slow
def test_a_shared_m_depends_on_all_passages_and_not_on_the_slots():
    """Fewer passages give other vectors; fewer slots give the same."""
    lm = one_step(tiny())
    options = {"storage": torch.float32}
    jobs = [Job(p, QUICK.margin) for p in ASKED]
    together = Shared(lm, QUICK, batch_size=4, **options).run(jobs)
    fewer = Shared(lm, QUICK, batch_size=4, **options).run(
        [Job(p, QUICK.margin) for p in ASKED[:2]]
    )
    assert all(o.exact and o.status == "done" for o in (*together, *fewer))
    assert [o.passage for o in together] == ASKED
    assert len({o.steps for o in together}) == 1  # all finish at the same step
    assert not torch.allclose(together[0].vectors, fewer[0].vectors, atol=1e-2)
    short = Recipe(steps=10)  # differences by rounding grow with the steps
    moved = [
        Shared(lm, short, batch_size=batch_size, **options).run([Job(p, 0.5) for p in ASKED])
        for batch_size in (1, 4)
    ]
    for a, b in zip(*moved, strict=True):
        assert torch.allclose(a.vectors, b.vectors, atol=1e-3)


@pytest.mark.slow
def test_passages_that_share_m_and_are_not_exact_are_halved():
    lm, text = reader(), "Dog, 42 zebras"
    hasty, shown = Recipe(steps=60, patience=20), []
    options = {"layout": "one-step-shared", "tokens": 64, "recipe": hasty}
    mem = codec.cram(lm, [text, "cat sat"], on_status=shown.append, **options)
    assert len(mem.passages) > 2
    assert max(status.done for status in shown) == shown[-1].tokens  # each round counts anew
    assert sum(p.tokens for p in mem.passages) == shown[-1].tokens
    assert mem.exact == all(p.exact for p in mem.passages)
    if mem.exact:
        assert codec.decode(lm, mem) == [text, "cat sat"]


def test_passages_beside_a_halved_one_keep_their_place_and_margin(monkeypatch):
    """The same holds beside a passage whose margin is raised because it does not decode."""
    lm, given, run = reader("words").read_as("one-step-shared"), [], Shared.run
    document = Document.of(lm, "the cat sat on the lazy dog and")
    options = {"recipe": Recipe(steps=0), "batch_size": 8, "storage": storage_of("float32")}
    work = SharedCramJob(lm, [document], 2, tokens=4, **options)

    def scripted(shared, jobs):
        given.append([(job.passage, job.margin) for job in jobs])
        outcomes = run(shared, jobs)
        return [replace(o, exact=len(given) > 1 or o.passage.offset > 0) for o in outcomes]

    monkeypatch.setattr(Shared, "run", scripted)
    first, other = (Passage(tuple(document.ids[at : at + 4]), 0, at) for at in (0, 4))
    work._cram_together([Job(first, 1.0), Job(other, 1.0)])
    assert [[passage for passage, _ in call] for call in given] == [
        [first, other],
        [*first.halves(), other],
    ]
    assert sorted(work.done) == [(0, 0), (0, 2), (0, 4)]
    before = dict(given[-1])
    work.cram_further([work.done[0, 2]])
    for passage, margin in given[-1]:
        assert (margin > before[passage]) == (passage.offset == 2)


def test_a_header_cannot_claim_a_shared_m():
    mem = as_one_step("llama")
    header = mem.header.model_copy(update={"layout": "one-step-shared"})
    with pytest.raises(MemvecError, match="do not share one m"):
        MemVectors(mem.vectors, header)


def test_a_header_cannot_claim_one_step_in_another_space():
    claimed = as_one_step("llama").header.model_dump()
    claimed["space"] = {"name": "shared-basis", "numbers": 4, "options": {}}
    with pytest.raises(ValidationError, match="one-step vectors are inputs"):
        Header.model_validate(claimed)


def test_the_command_shares_m(command, folder, tmp_path):
    (tmp_path / "a.txt").write_text("the fox")
    words = ["cram", tmp_path / "a.txt", "-m", folder, "--tokens", 2, "--shared-m"]
    options = ["--steps", 600, "--set", "patience=600", "-o", tmp_path / "a.mem"]
    assert "--one-step" in command(*words, *options).sentence
    ran = command(*words, *options, "--one-step")
    assert ran.code == 0, ran.err
    assert command("decode", tmp_path / "a.mem").out == b"the fox"


# ---------------------------------------------------------------------- the protocol


def test_the_published_capacity_needs_one_exact_passage_and_ours_needs_all():
    rows = pd.DataFrame(
        [
            {"length": n, "tokens": n, "accuracy": a, "exact": a == 1.0, "lm_bits": 10.0 * n + a}
            for n, each in ((4, (1.0, 1.0)), (8, (1.0, 0.995)), (16, (0.5, 1.0)), (32, (0.9, 0.2)))
            for a in each
        ]
    )
    result = one_step_result(rows)
    assert (result.longest, result.always) == (16, 4)
    assert result.longest_bits == 161.0
    assert [n.length for n in result.lengths] == [4, 8, 16, 32]
    assert [n.exact[0] for n in result.lengths] == [1.0, 0.5, 0.5, 0.0]
    assert result.lengths[3].accuracy.mean == pytest.approx(0.55)
    nothing = one_step_result(rows[rows["length"] == 32])
    assert (nothing.longest, nothing.always) == (None, None)


def test_a_shared_m_is_certified_once_if_the_recipe_says_stop(monkeypatch):
    honest, seen = shared_m.outcomes_of, []

    def disagreeing(*args):
        for outcome in honest(*args):
            seen.append(outcome)
            yield replace(outcome, exact=False)

    monkeypatch.setattr(shared_m, "outcomes_of", disagreeing)
    recipe = Recipe.of("one-step", steps=60, lr=0.1, start="noise", if_not_exact="stop", settle=9)
    recipe = shared_m.for_shared_m(recipe)
    assert recipe.settle == 0
    jobs = [Job(p, recipe.margin) for p in passages(2, 2)]
    Shared(copy(one_step(tiny())), recipe, batch_size=4, storage="float32").run(jobs)
    assert len(seen) == 2  # two passages, once each


def test_no_step_of_a_shared_m_depends_on_the_slots(monkeypatch):
    """The vectors of all steps are equal, not only those of the best one."""
    update, seen = shared_m.Best.update, []

    def recorded(best, vectors, leading):
        seen.append(vectors.map(torch.clone))
        update(best, vectors, leading)

    monkeypatch.setattr(shared_m.Best, "update", recorded)
    recipe = shared_m.for_shared_m(Recipe.of("one-step", steps=8, lr=0.1, schedule="growing"))
    recipe = replace(recipe, look_ahead=8, start="noise", margin=1e3)
    lm, jobs = one_step(tiny()), [Job(p, 1e3) for p in passages(40, 12, 30)]
    one, all_ = (
        Shared(lm, recipe, batch_size=n, storage="float32").run(list(jobs)) for n in (1, 3)
    )
    assert [o.spent for o in one] == [o.spent for o in all_]
    assert len(seen) == 2 * (recipe.steps + 1)
    for alone, beside in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        torch.testing.assert_close(alone.e, beside.e, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.m, beside.m, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen[0].m, seen[-1].m, atol=0.1)


def test_columns_that_a_shared_m_gains_count_from_the_next_step(monkeypatch):
    """That holds beside a longer passage too; the time of a step is shared equally."""
    monkeypatch.setattr(
        shared_m, "horizon", lambda right: torch.full(right.shape[:1], right.shape[1])
    )
    recipe = shared_m.for_shared_m(Recipe.of("one-step", steps=1, lr=0.1, schedule="growing"))
    recipe = replace(recipe, look_ahead=8, start="noise", margin=1e3)
    lm, jobs, made = one_step(tiny()), [Job(p, 1e3) for p in passages(40, 12, 30)], []
    for slots in (1, 3):
        clock = SimpleNamespace(perf_counter=iter([10.0, 16.0]).__next__)
        monkeypatch.setattr(shared_m, "time", clock)
        made.append(Shared(lm, recipe, batch_size=slots, storage="float32")._cram(jobs, 1))
    assert [o.spent for o in made[0]] == [16, 12, 16]  # at most the columns that were read
    for alone, beside in zip(*made, strict=True):
        torch.testing.assert_close(alone.vectors, beside.vectors, atol=1e-4, rtol=1e-4)
        assert (alone.spent, alone.seconds) == (beside.spent, 2.0)


@pytest.mark.parametrize("limit", [4, 8])
def test_a_raised_margin_of_a_shared_m_gets_no_more_steps(monkeypatch, limit):
    """Passages that do not decode continue with a larger margin for the steps that are left."""
    honest, wrong = shared_m.outcomes_of, iter(range(10))

    def disagreeing(*args):
        for outcome in honest(*args):
            lies = outcome.status == "done" and next(wrong, 9) < 2
            yield replace(outcome, exact=False) if lies else outcome

    monkeypatch.setattr(shared_m, "outcomes_of", disagreeing)
    recipe = shared_m.for_shared_m(Recipe.of("one-step", steps=limit, lr=0.1, start="noise"))
    lm = copy(one_step(tiny()))
    lm.logit_spread = 40.0  # these steps cannot reach a raised margin
    jobs = [Job(p, recipe.margin) for p in passages(2, 2)]
    outcomes = Shared(lm, recipe, batch_size=4, storage="float32").run(jobs)
    assert next(wrong) >= 2  # certification ran again
    assert all(0 < outcome.steps <= limit for outcome in outcomes)


def moving(**changes) -> tuple[Shared, list[Job]]:
    """A `Shared` whose steps reach no margin, and jobs that have costs of earlier runs."""
    recipe = shared_m.for_shared_m(Recipe.of("one-step", steps=9, lr=0.1, schedule="growing"))
    recipe = replace(recipe, look_ahead=8, start="noise", margin=1e3, **changes)
    asked = passages(40, 12, 30)
    jobs = [Job(p, 1e3, steps=3, spent=5 + i, seconds=2.0) for i, p in enumerate(asked)]
    return Shared(one_step(tiny()), recipe, batch_size=3, storage="float32"), jobs


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 9), ({"patience": 4}, 4), ({"budget": 23}, 2), ({"budget": 24}, 3)],
)
def test_a_shared_m_ends_by_its_limits_and_adds_to_earlier_costs(changes, steps):
    """Each step costs 8 tokens of each passage; the budget is that of one passage."""
    shared, jobs = moving(**changes)
    for i, finished in enumerate(shared._cram(jobs, 9)):
        assert (finished.status, finished.steps) == ("budget", 3 + steps)
        assert finished.spent == 5 + i + 8 * steps
        assert finished.seconds > 2.0
    assert (shared.steps, shared.tokens) == (steps, 3 * 8 * steps)


def test_the_best_step_of_a_shared_m_is_the_first_with_the_most_tokens():
    made = [shared_m.Pair(torch.full((2, 1, 3), v), torch.full((1, 1, 3), v)) for v in (1.0, 2, 3)]
    best = shared_m.Best(made[0], torch.zeros(2, dtype=torch.long))
    for vectors, leading in zip(made, ([1, 4], [3, 2], [2, 2]), strict=True):
        best.update(vectors, torch.tensor(leading))
        vectors.e.zero_()  # the optimiser moves them in place
    assert (best.total, best.stale) == (5, 2)
    assert best.leading.tolist() == [3, 4]
    assert best.vectors.e.eq(1).all()
    assert best.vectors.m.eq(1).all()


@pytest.mark.parametrize("spoilt", [None, 0, 1, 2])
def test_measures_of_a_shared_m_do_not_depend_on_the_groups(spoilt):
    """Each passage counts to 8 columns after its best length; one loss that is NaN is noticed."""
    shared, jobs = moving()
    task, vectors = shared_m.Task.of(jobs, shared.lm.device), shared._start(jobs)
    if spoilt is not None:
        vectors.e[spoilt] = torch.nan
    best = torch.tensor([20, 5, 9])
    measured = [
        shared._measure_all(groups, vectors, task, best)
        for groups in ([torch.tensor([i]) for i in (0, 2, 1)], [torch.tensor([0, 2, 1])])
    ]
    for each in measured:
        assert each.counted.tolist() == [28, 12, 17]
        assert each.finite == (spoilt is None)
    if spoilt is None:
        alone, together = (each.gradient for each in measured)
        torch.testing.assert_close(alone.e, together.e, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.m, together.m, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("limit", [2, 99])
def test_only_margins_of_passages_that_do_not_decode_are_raised(monkeypatch, limit):
    """They double at most four times, while steps are left; earlier steps do not count."""
    shared, jobs = moving(steps=limit)
    rounds: list[list[Job]] = []

    def crammed(jobs, max_steps):
        rounds.append(jobs)
        rows = [torch.full((2, shared.lm.width), float(len(rounds)))] * len(jobs)
        after = [
            replace(job, vectors=row, steps=job.steps + 1)
            for job, row in zip(jobs, rows, strict=True)
        ]
        return [job.finished("done") for job in after]

    def disagreeing(lm, finished, *_):
        measures = PositionScores(*torch.ones(4, 2)).measures(2, 2)
        for f in finished:
            yield Outcome(**vars(f), exact=f.passage.document != 1, metrics=measures)

    monkeypatch.setattr(shared, "_cram", crammed)
    monkeypatch.setattr(shared_m, "outcomes_of", disagreeing)
    outcomes = shared.run([replace(job, steps=limit, margin=1.0) for job in jobs])
    assert len(rounds) == min(limit, 1 + shared_m.RAISES)
    assert {o.steps for o in outcomes} == {limit + len(rounds)}
    for number, asked in enumerate(rounds):
        assert [job.margin for job in asked] == [1.0, 2.0**number, 1.0]
        if number:  # they continue from the vectors of the last round
            assert all(job.vectors.eq(number).all() for job in asked)


def test_a_shared_m_is_measured_as_it_will_be_stored():
    exact, jobs = moving()
    rough = Shared(exact.lm, exact.recipe, batch_size=3, storage="bfloat16")
    task, vectors, best = shared_m.Task.of(jobs, exact.lm.device), exact._start(jobs), [0, 0, 0]
    stored = vectors.map(lambda rows: rows.bfloat16().float())
    of_rough, of_stored, of_exact = (
        each._measure(given.map(torch.clone), task, torch.tensor(best)).gradient
        for each, given in ((rough, vectors), (exact, stored), (exact, vectors))
    )
    assert torch.equal(of_rough.m, of_stored.m)
    assert not torch.equal(of_rough.m, of_exact.m)


def test_passages_that_share_an_m_continue_from_their_earlier_m():
    """A new passage, as a half of an earlier one, gets a new e and the earlier m."""
    shared, jobs = moving()
    had = torch.arange(2.0 * shared.lm.width).reshape(2, -1)
    fresh = shared._start(jobs)
    continued = shared._start([jobs[0], replace(jobs[1], vectors=had), jobs[2]])
    assert torch.equal(continued.m[0, 0], had[1])
    assert torch.equal(continued.e[1, 0], had[0])
    assert torch.equal(continued.e[[0, 2]], fresh.e[[0, 2]])
    other = shared._start([jobs[0], jobs[2]])  # the first m depends on all passages
    assert not torch.allclose(fresh.m, other.m, atol=1e-3)


@pytest.mark.parametrize("layout", ["one-step", "one-step-shared"])
def test_a_one_step_view_has_no_facts_or_encoders_of_vectors_in_front(layout):
    """The model that is read as `prefix` again has them."""
    lm = copy(tiny())
    lm.facts, lm.encoder, lm.usable_encoder = {"fill": 0.9}, Guess(0.5, 6), Guess(0.5, 6)
    view = lm.read_as(layout)
    assert (view.facts, view.encoder, view.usable_encoder) == ({}, None, None)
    assert view.read_as("prefix") is lm
    assert (lm.facts, lm.encoder.tokens) == ({"fill": 0.9}, 6)
