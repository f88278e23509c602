"""The recipe's `neighbours`: usable vectors are crammed beside vectors of other passages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import memvec
from conftest import passages, reader, tiny
from memvec import codec
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import with_padding
from memvec.errors import MemvecError
from memvec.lab import slow_use
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.usable.neighbours import MAX_BESIDE, PLACES, Neighbours
from memvec.usable.recipe_files import named_files
from memvec.usable.term import Use
from memvec.vectors import MemVectors

USABLE = Recipe.of(
    "usable",
    settle=20,
    decay=20,
    steps=400,
    query_count=len(PLACES),
    query_tokens=5,
    compute="model",
    teacher_top=10_000,
)
TEXT = "the cat sat on the mat and the dog"


def some(lm: FrozenLM, k: int, n: int = 3) -> Neighbours:
    """Passages of different lengths with vectors of noise."""
    generator = torch.Generator().manual_seed(2)
    ids = [list(p.ids) for p in passages(*range(3, 3 + n), seed=1)]
    return Neighbours(ids, lm.embedding_std * torch.randn(n, k, lm.width, generator=generator))


def with_neighbours(lm: FrozenLM, recipe: Recipe, beside: Neighbours, **options) -> Engine:
    """An engine whose passages have these neighbours, which come from no file."""
    engine = Engine(lm, recipe, vectors=2, **options)
    assert isinstance(engine.stepper.term, Use)
    engine.stepper.term.neighbours = beside
    return engine


def test_places_are_all_numbers_of_neighbours_in_front_and_after():
    assert len(set(PLACES)) == len(PLACES) == (MAX_BESIDE + 1) * (MAX_BESIDE + 2) // 2
    assert {sum(place) for place in PLACES} == set(range(MAX_BESIDE + 1))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("W", [1, 4])
def test_the_inputs_of_a_row_are_its_parts_in_order(k, K, W):
    beside = some(tiny(), k)
    D, N = beside.vectors.shape[2], len(PLACES)
    generator = torch.Generator().manual_seed(0)
    vectors, words = (torch.randn(N, n, D, generator=generator) for n in (K, W))
    which = torch.randint(3, (N, MAX_BESIDE), generator=generator)
    in_front = torch.tensor([front for front, _ in PLACES])
    count = torch.tensor([sum(place) for place in PLACES])
    inputs, used = beside.row(vectors, words, which, in_front, count)
    assert inputs.shape == (N, K + MAX_BESIDE * k + W, D)
    for i, (front, after) in enumerate(PLACES):
        others = [beside.vectors[j] for j in which[i].tolist()]
        parts = [*others[:front], vectors[i], *others[front : front + after], words[i]]
        expected = torch.cat(parts)
        assert torch.equal(inputs[i, : len(expected)], expected)
        assert int(used[i]) == (front + after) * k


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mamba", "opt-projected"])
@pytest.mark.parametrize("front", ["none", "auto"])
@pytest.mark.slow
def test_the_loss_of_use_beside_neighbours_equals_a_slow_computation(family, front):
    """At every place, for passages at different steps; the slow one computes one text at a time."""
    lm = tiny(family)
    trigger = "bos" if lm.bos_id is not None else "#3"
    recipe = replace(USABLE, front=front, trigger=trigger)
    beside = some(lm, 2)
    engine = with_neighbours(lm, recipe, beside, batch_size=2)
    asked = passages(5, 3, seed=4)
    for passage in asked:
        engine.push(passage)
    engine.fill(2)
    batch, term, view = engine.batch, engine.stepper.term, engine.lm
    texts = {row: job.passage.ids for row, job in enumerate(engine.jobs)}
    for at in range(len(PLACES)):
        batch.steps = torch.tensor([at, at + 2])  # at another place in each row
        vectors = batch.parameters.detach()
        rows = with_padding(vectors, 1).requires_grad_()
        loss = term.measure(rows, batch, engine.columns, 1).loss
        for row, ids in texts.items():
            m = int(batch.steps[row]) % len(PLACES)
            n_front, n_after = PLACES[m]
            which = batch.term.beside.neighbours[row, m].tolist()
            names = [*which[:n_front], None, *which[n_front : n_front + n_after]]
            text = [t for j in names for t in (ids if j is None else beside.ids[j])]
            parts = [vectors[row] if j is None else beside.vectors[j] for j in names]
            words = [batch.term.queries[row, m].tolist()]
            before = slow_use.context_ids(view, text, 2)["text"]
            row_vectors = torch.cat(parts).detach()
            kl, _ = slow_use.divergence_and_nll(view, row_vectors, [], before, words)
            assert float(loss[row]) == pytest.approx(kl, abs=2e-3, rel=2e-2)


@pytest.mark.slow
def test_the_gradient_beside_neighbours_is_the_slope_of_the_loss():
    lm = tiny()
    engine = with_neighbours(lm, USABLE, some(lm, 2), batch_size=2)
    for passage in passages(5, 3, seed=4):
        engine.push(passage)
    engine.fill(2)
    batch, term = engine.batch, engine.stepper.term
    generator = torch.Generator().manual_seed(0)
    move = torch.randn(batch.parameters.shape, generator=generator)
    for at in range(len(PLACES)):
        batch.steps[:] = at
        vectors = batch.parameters.detach().clone().requires_grad_()
        measured = term.measure(vectors, batch, engine.columns, 0)
        (gradient,) = torch.autograd.grad(measured.outputs, vectors, measured.gradients)
        step = 1e-3
        ends = [
            term.measure(vectors.detach() + s * move, batch, engine.columns, 0).loss
            for s in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = (gradient * move).sum((1, 2))
        torch.testing.assert_close(slope, expected, atol=2e-3, rtol=5e-2)


@pytest.mark.slow
def test_the_neighbours_of_a_passage_depend_on_it_alone():
    lm = tiny()
    beside = some(lm, 2)
    recipe = replace(USABLE, settle=10, decay=10, steps=10, if_not_exact="stop")
    options = {"batch_size": 3, "fixed_shapes": True}
    asked, others = passages(4, 4, 4, seed=5), passages(4, 4, 4, seed=6)
    together = {o.passage.ids: o for o in with_neighbours(lm, recipe, beside, **options).run(asked)}
    mixed = [asked[0], *others[1:]]
    found = {o.passage.ids: o for o in with_neighbours(lm, recipe, beside, **options).run(mixed)}
    first = asked[0].ids
    assert torch.equal(found[first].vectors, together[first].vectors)
    drawn = [beside.drawn(p.ids, recipe).neighbours.tolist() for p in asked]
    assert drawn[0] == beside.drawn(first, recipe).neighbours.tolist() != drawn[1]


@pytest.mark.slow
def test_vectors_crammed_beside_neighbours_are_better_context_there():
    """Over the same rows, their loss is lower than that of vectors crammed without neighbours."""
    lm, asked, n = tiny(), passages(4, 4, seed=3), 4 * len(PLACES)
    recipe = replace(USABLE, settle=60, decay=60, query_count=n, term_weight=30.0)
    beside = some(lm, 2)
    made = {
        "alone": Engine(lm, recipe, vectors=2, batch_size=2),
        "beside": with_neighbours(lm, recipe, beside, batch_size=2),
    }
    found = {}
    for name, engine in made.items():
        outcomes = {outcome.passage.ids: outcome for outcome in engine.run(asked)}
        measuring = with_neighbours(lm, recipe, beside, batch_size=2)
        for passage in asked:
            measuring.push(passage)
        measuring.fill(2)
        own = [outcomes[job.passage.ids] for job in measuring.jobs]
        assert all(outcome.exact for outcome in own)
        vectors, total = torch.stack([outcome.vectors.float() for outcome in own]), 0.0
        for at in range(n):
            measuring.batch.steps[:] = at
            measured = measuring.stepper.term.measure(
                vectors.requires_grad_(), measuring.batch, measuring.columns, 0
            )
            total += float(measured.loss.sum())
        found[name] = total
    assert found["beside"] < 0.9 * found["alone"]


# ---------------------------------------------------------------------- in a file


@pytest.mark.slow
def test_neighbours_are_a_file_of_usable_vectors(tmp_path):
    lm = reader("words")
    file = codec.cram(lm, [TEXT], vectors=2, tokens=3, recipe=USABLE).save(tmp_path / "n.mem")
    recipe = replace(USABLE, neighbours=str(file))
    mem = codec.cram(lm, ["a dog and the fox"], vectors=2, tokens=3, recipe=recipe)
    assert mem.exact
    assert mem.header.recipe["neighbours"] == str(file)
    assert "neighbours" not in MemVectors.load(file).header.recipe
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    file.unlink()  # decoding and use do not read it
    assert codec.decode(lm, again) == ["a dog and the fox"]
    assert memvec.use(lm, again, "the", max_new_tokens=2) is not None


def test_the_setting_of_neighbours_is_the_content_of_their_file(tmp_path, monkeypatch):
    """The name by which the file is found does not matter."""
    file = tmp_path / "n.mem.safetensors"
    recipes = [
        replace(USABLE, neighbours=name)
        for name in (str(file), str(tmp_path / "n.mem"), "~/n.mem.safetensors", "~/n.mem")
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        found.append({named_files(recipe)["neighbours"] for recipe in recipes})
    assert len(found[0]) == len(found[1]) == 1
    assert found[0] != found[1]


@pytest.mark.slow
def test_a_passage_is_not_its_own_neighbour():
    """A file of neighbours may hold the passage that is crammed."""
    lm = reader("words")
    mem = codec.cram(lm, [TEXT, TEXT], vectors=2, tokens=3, recipe=replace(USABLE, front="none"))
    held = Neighbours(mem.tokens(lm), mem.vectors.float())
    recipe = replace(USABLE, query_count=60)
    for ids in held.ids:
        beside = held.drawn(ids, recipe)
        drawn = {int(beside.neighbours[0, m, 0]) for m in range(60) if beside.count[0, m]}
        assert drawn == {j for j, own in enumerate(held.ids) if own != ids}
    alone = Neighbours(held.ids[:1], held.vectors[:1])
    with pytest.raises(MemvecError, match=r"^the file of neighbours holds no passage but the one"):
        alone.drawn(held.ids[0], recipe)


@pytest.mark.slow
def test_neighbours_that_cannot_be_used_are_refused_in_one_sentence(tmp_path):
    lm = reader("words")
    usable = codec.cram(lm, [TEXT], vectors=2, tokens=3, recipe=replace(USABLE, front="none"))
    plain = codec.cram(lm, ["the fox"], vectors=1, tokens=2, recipe=Recipe(compute="model"))
    files = {"usable": usable.save(tmp_path / "u.mem"), "plain": plain.save(tmp_path / "p.mem")}
    beside = replace(USABLE, neighbours=str(files["usable"]))
    with pytest.raises(MemvecError, match=r"^the recipe's neighbours is for use only"):
        Recipe(neighbours="n.mem")
    with pytest.raises(MemvecError, match=r"^there is no file"):
        Engine(lm, replace(USABLE, neighbours=str(tmp_path / "none.mem")), vectors=2)
    with pytest.raises(MemvecError, match=r"^the vectors in .*p.mem have no trigger"):
        Engine(lm, replace(USABLE, neighbours=str(files["plain"])), vectors=2)
    with pytest.raises(MemvecError, match=r"were crammed after other inputs in front"):
        Engine(lm, beside, vectors=2)
    with pytest.raises(MemvecError, match=r"^these vectors were made for other weights"):
        Engine(reader("words", seed=1), beside, vectors=2)
    with pytest.raises(MemvecError, match=r"leave out the queries 'samples'\.$"):
        Engine(lm, replace(beside, front="none", queries="samples"), vectors=2)
    with pytest.raises(MemvecError, match=r"leave out the space 'prefix'\.$"):
        Engine(lm, replace(beside, front="none", space="prefix"), vectors=2)
    narrow = replace(beside, front="none", query_tokens=122)
    with pytest.raises(
        MemvecError, match=r"^a passage of 3 tokens, neighbours of 3 and a query of 122 do not fit"
    ):
        list(Engine(lm, narrow, vectors=2).run([Passage((3, 4, 5))]))


def test_the_padding_of_a_row_is_finite():
    """Rows without neighbours are padded at the end with embeddings."""
    beside = some(tiny(), 2)
    words = torch.zeros(2, 3, beside.vectors.shape[2])
    which, none = torch.zeros(2, MAX_BESIDE, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    inputs, _ = beside.row(words[:, :2], words, which, none, none)
    assert np.isfinite(inputs.numpy()).all()


@pytest.mark.parametrize("front", ["none", "auto"])
@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_the_loss_beside_neighbours_is_that_of_vectors_times_the_scale(scale, front):
    lm = tiny()
    beside, losses = some(lm, 2), []
    for factor in (scale, 1.0):
        recipe = replace(USABLE, front=front, context_scale=factor)
        engine = with_neighbours(lm, recipe, beside, batch_size=2)
        for passage in passages(5, 3, seed=4):
            engine.push(passage)
        engine.fill(2)
        batch, draw = engine.batch, torch.Generator().manual_seed(2)
        batch.steps = torch.tensor([1, 2])
        rows = (scale / factor) * torch.randn(2, 2, lm.width, generator=draw)
        rows = with_padding(rows, 1).requires_grad_()
        losses.append(engine.stepper.term.measure(rows, batch, engine.columns, 1).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("front", ["none", "auto"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_step_of_the_term_costs_the_inputs_that_it_reads(k, front, monkeypatch):
    lm, read, states_of = tiny(), [], FrozenLM.states_of

    def watched(self, inputs, keep, cache=None):
        read.append(inputs.shape[1])
        return states_of(self, inputs, keep, cache)

    engine = with_neighbours(lm, replace(USABLE, front=front), some(lm, k) if k else None)
    engine.push(passages(5, seed=4)[0])
    engine.fill(1)
    monkeypatch.setattr(FrozenLM, "states_of", watched)
    batch, term = engine.batch, engine.stepper.term
    rows = batch.parameters.detach().requires_grad_()
    term.measure(rows, batch, engine.columns, 0)
    assert term.inputs(batch.length).tolist() == read
