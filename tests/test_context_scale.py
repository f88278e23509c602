"""context_scale: the factor by which usable vectors are multiplied in context mode only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import memvec
from conftest import passages, reader, tiny
from memvec import codec
from memvec.cli.use_tables import show_use, stored_use
from memvec.companions.around import as_context_at
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import view_for
from memvec.engines.decode import use_prompt
from memvec.errors import MemvecError
from memvec.export import export
from memvec.export import target as target_of
from memvec.lab import slow_use
from memvec.lab.study.check import check_study
from memvec.usable.certificate import certify_use
from memvec.usable.columns import Column
from memvec.usable.contexts import EXACT_ONLY, VECTORS, after_each, contexts_of
from memvec.usable.generate import in_a_row
from memvec.usable.modes import BothModes
from memvec.usable.neighbours import neighbours_of
from memvec.vectors import MemVectors
from studies import HEAD, USABLE, run, spec_in

pytestmark = pytest.mark.usefixtures("few_words")
RECIPE = Recipe.of(
    "usable", settle=20, decay=20, steps=400, query_count=3, query_tokens=5, compute="model"
)
SCALE = 0.25
TEXT = "the cat sat on the mat and the dog"


@pytest.fixture(scope="module")
def mem() -> MemVectors:
    """Exact vectors that are multiplied by 0.25 in context mode."""
    recipe = replace(RECIPE, context_scale=SCALE, lr=1.2)
    mem = codec.cram(reader("words"), [TEXT], vectors=2, tokens=3, recipe=recipe)
    assert mem.exact
    return mem


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_the_scale_applies_in_context_mode_and_not_in_decoding_mode(family):
    lm, ids = tiny(family), passages(5)[0].ids
    lm = lm if lm.bos_id is not None else view_for(lm, replace(RECIPE, trigger="#3"))
    scaled = as_context_at(lm, SCALE)
    vectors, words = torch.randn(3, lm.width), torch.tensor([[4, 5, 6]])
    ours = after_each(scaled, contexts_of(scaled, vectors, ids, vectors), words)
    plain = after_each(lm, contexts_of(lm, SCALE * vectors, ids, vectors), words)
    assert ours[VECTORS] == pytest.approx(plain[VECTORS], rel=1e-4, abs=1e-6)
    assert ours[EXACT_ONLY] == pytest.approx(plain[EXACT_ONLY], rel=1e-4, abs=1e-6)
    table = torch.tensor([list(ids)])
    assert torch.equal(
        scaled.logits(vectors[None], table, "bos"), lm.logits(vectors[None], table, "bos")
    )
    fast = BothModes(scaled, ids, words)(vectors)
    slow, _ = slow_use.both_modes(scaled, vectors, ids, words.tolist())
    assert fast == pytest.approx(slow, rel=1e-3, abs=1e-4)


def test_cramming_starts_from_the_same_context_at_every_scale():
    lm = tiny()
    asked = list(passages(6, 2))
    begun = []
    for scale in (1.0, SCALE):
        recipe = replace(RECIPE, steps=0, context_scale=scale)
        outcomes = Engine(lm, recipe, vectors=2).run(asked)
        begun.append(
            [scale * o.vectors for o in sorted(outcomes, key=lambda o: o.passage.document)]
        )
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*begun, strict=True))


def test_a_scale_of_one_changes_nothing_and_is_not_recorded():
    lm = tiny()
    assert as_context_at(lm, 1.0) is lm
    assert "context_scale" not in RECIPE.record()
    assert replace(RECIPE, context_scale=SCALE).record()["context_scale"] == SCALE


# ---------------------------------------------------------------------- the file and its readers


@pytest.mark.slow
def test_the_file_records_the_scale_and_every_reader_applies_it(mem, tmp_path, capsys):
    lm = reader("words")
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert again.header.context_scale == again.view(lm).context_scale == SCALE
    assert codec.decode(lm, again) == [TEXT]
    show_use(stored_use(again, "a.mem"))
    assert "As context, the vectors times 0.25" in capsys.readouterr().out
    assert memvec.verify(lm, again)[0]["exact"]
    _, rows = in_a_row(lm, [again, again])
    row = SCALE * again.vectors.float().flatten(0, 1)
    assert torch.equal(rows[0].cpu(), torch.cat([row, row]))
    inputs = use_prompt(lm, [again], " the", 3).vectors
    assert torch.allclose(inputs[-len(row) :], row)
    manifest = export(lm, again, target_of("npy"), tmp_path / "x")
    assert manifest["context_scale"] == SCALE
    assert isinstance(memvec.use(lm, again, " the", max_new_tokens=2), str)


def test_the_certificate_of_use_is_that_of_vectors_times_the_scale(mem):
    lm = reader("words")
    header = mem.header.model_copy(update={"context_scale": 1.0})
    small = MemVectors(SCALE * mem.vectors.float(), header)
    ids = mem.tokens(lm)
    ours, theirs = (
        certify_use(lm, one, ids, exact_only=False).held_out.contexts for one in (mem, small)
    )
    assert ours[VECTORS].kl == pytest.approx(theirs[VECTORS].kl, rel=1e-3)
    assert mem.header.use["held_out"]["contexts"][VECTORS]["kl"] == pytest.approx(
        ours[VECTORS].kl, rel=1e-3
    )


def test_neighbours_and_contexts_of_an_evaluation_are_scaled(mem, tmp_path):
    lm = reader("words")
    file = mem.save(tmp_path / "n.mem")
    view = view_for(lm, replace(RECIPE, context_scale=0.5))
    held = neighbours_of(view, replace(RECIPE, neighbours=str(file)))
    assert torch.equal(held.vectors.cpu(), SCALE * mem.vectors.float())
    ids = tuple(lm.tokenize("the cat sat"))
    column = Column(lm, "crammed", vectors=2, tokens=3, recipe=replace(RECIPE, context_scale=0.5))
    inputs = column.stand_in(ids).inputs[0, -2:]
    (outcome,) = column._crammed[ids]
    assert torch.allclose(inputs.cpu(), 0.5 * outcome.vectors.float())


@pytest.mark.slow
def test_a_study_with_a_scale_is_recomputed(tmp_path, monkeypatch):
    text = HEAD + USABLE.replace('trigger = "#3"', 'trigger = "#3", context_scale = 0.5')
    run(spec_in(tmp_path, text), tmp_path, tmp_path / "out", text)
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    checked = check_study(tmp_path / "out")
    assert checked["rows"] == 2
    assert checked["wrong"] == []


# ---------------------------------------------------------------------- bad input


def test_a_scale_out_of_range_or_without_use_is_refused():
    with pytest.raises(MemvecError, match="the recipe's context_scale is for use only"):
        Recipe(context_scale=0.5)
    with pytest.raises(MemvecError, match=r"context_scale must be at least 0.001, not 0"):
        replace(RECIPE, context_scale=0.0)
    with pytest.raises(MemvecError, match=r"context_scale is of inputs in front of a passage"):
        Engine(tiny(), replace(RECIPE, space="prefix", front="none", context_scale=0.5))
