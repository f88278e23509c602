"""The protocol `usable`: attention knocked out by layer, directions of both modes, its report."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import QUICK, passages, reader, tiny
from memvec.cramming.engine import Engine
from memvec.errors import MemvecError
from memvec.lab import slow_use
from memvec.lab.protocols import usable_figures
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report.report import write_report
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.check import check_study
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.usable import directions
from memvec.usable.knockout import attention_modules, knocked_out, layer_count
from memvec.usable.modes import BothModes
from studies import HEAD, USABLE, run, spec_in
from test_protocols import falsify, restore

pytestmark = pytest.mark.slow  # left out of `make check`

# Sliding windows of 5, grouped heads, norms on queries and keys, partial rotary embeddings.
KNOCKED = ["llama", "olmo2", "qwen3", "mistral", "gemma3", "phi", "gpt-neox", "falcon"]


def vectors_of(lm, K=2, seed=0):
    return torch.randn(K, lm.width, generator=torch.Generator().manual_seed(seed))


def states(lm, vectors, ids):
    table = torch.tensor([ids])
    return lm.states_of(torch.cat([vectors[None], lm.embed(table)], 1), keep=len(ids))


# ---------------------------------------------------------------------- knocking out attention


@pytest.mark.parametrize("family", KNOCKED)
def test_without_attention_to_the_vectors_in_any_layer_they_have_no_effect(family):
    lm, ids = tiny(family), list(passages(7, seed=1)[0].ids)
    one, other = vectors_of(lm), vectors_of(lm, seed=9)
    assert not torch.allclose(states(lm, one, ids), states(lm, other, ids), atol=1e-3)
    everywhere = range(len(attention_modules(lm)))
    with knocked_out(lm, everywhere, len(one)):
        torch.testing.assert_close(states(lm, one, ids), states(lm, other, ids))


@pytest.mark.parametrize("family", KNOCKED)
@pytest.mark.parametrize("layers", [[0], [1], [0, 1]])
def test_a_mask_agrees_with_attention_computed_without_the_vectors(family, layers):
    """The fast path masks positions in the softmax; the slow one computes it without them."""
    lm, ids = tiny(family), list(passages(6, seed=2)[0].ids)
    vectors = vectors_of(lm)
    whole = states(lm, vectors, ids)
    with knocked_out(lm, layers, len(vectors)):
        masked = states(lm, vectors, ids)
    with slow_use.apart(lm, layers, len(vectors)):
        split = states(lm, vectors, ids)
    torch.testing.assert_close(masked, split, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(masked, whole, atol=1e-3)
    # Both context managers restore the model.
    assert torch.equal(states(lm, vectors, ids), whole)


def test_hooks_are_removed_after_an_error():
    lm = tiny()
    before = [len(m._forward_pre_hooks) for m in attention_modules(lm)]
    with pytest.raises(ZeroDivisionError), knocked_out(lm, [0, 1], 2):
        raise ZeroDivisionError
    assert [len(m._forward_pre_hooks) for m in attention_modules(lm)] == before


@pytest.mark.parametrize("family", ["gpt2", "mamba", "falcon-h1", "falcon-alibi", "minimax"])
def test_a_model_with_attention_unlike_llamas_is_refused(family):
    with pytest.raises(MemvecError, match="cannot be knocked out layer by layer: leave out"):
        layer_count(tiny(family))


# ---------------------------------------------------------------------- directions


def test_directions_are_the_gradients_computed_one_at_a_time():
    lm, ids = tiny(), passages(5, seed=3)[0].ids
    vectors, words = vectors_of(lm), torch.tensor([p.ids for p in passages(6, 6, seed=4)])
    text = directions.directions_of_text(lm, vectors, ids)
    places = directions.places_of(2, 6, 5)
    use = directions.directions_of_use(lm, vectors, words, places)
    assert len(set(places)) == 5
    slow_text = slow_use.margin_gradients(lm, vectors, ids)
    slow_words = slow_use.word_gradients(lm, vectors, words.tolist(), 5)
    np.testing.assert_allclose(text, slow_text, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(use, slow_words, atol=1e-4, rtol=1e-3)
    assert directions.overlap(text, use) == pytest.approx(
        slow_use.share_inside(slow_text, slow_words), abs=1e-3
    )


def test_the_overlap_is_the_share_of_squared_length_inside_the_span():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 400, generator=generator)
    mixed = torch.randn(4, 4, generator=generator) @ a
    assert directions.overlap(a, mixed) == pytest.approx(1, abs=1e-6)
    b = torch.zeros(2, 400)
    b[0, 0], b[1, 1] = 1.0, 5.0
    c = torch.zeros(1, 400)
    c[0, 2] = 2.0
    assert directions.overlap(b, c) == 0
    c[0, 0] = 2.0  # half of its squared length is in the span
    assert directions.overlap(c, b) == pytest.approx(0.5)
    others = torch.randn(200, 4, 400, generator=generator)
    by_chance = np.mean([directions.overlap(other, a) for other in others])
    assert by_chance == pytest.approx(4 / 400, rel=0.2)


def test_vectors_without_a_span_have_no_component_in_it():
    a, vectors = torch.randn(3, 12), torch.randn(2, 6)
    left = directions.without(vectors, a)
    assert (a @ left.flatten()).abs().max() < 1e-4
    assert not torch.allclose(left, vectors)
    torch.testing.assert_close(directions.without(left, a), left)


def test_random_directions_are_uniform_and_depend_on_the_seed():
    """40 of 400 dimensions have a tenth of the squared length of any vector."""
    found, again = (directions.random_directions(40, 400, 7) for _ in range(2))
    assert torch.equal(found, again)
    assert not torch.equal(found, directions.random_directions(40, 400, 8))
    vectors = torch.zeros(100, 4, 100)
    vectors.view(100, -1)[torch.arange(100), torch.arange(100)] = 1.0
    left = [float(directions.without(v, found).square().sum()) for v in vectors]
    assert np.mean(left) == pytest.approx(0.9, abs=0.02)


# ---------------------------------------------------------------------- the protocol


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("usable")
    # Enough steps for some exact passages; a second recipe, and one without further measurements.
    text = USABLE.replace(
        "settle = 8, decay = 8, steps = 12", "settle = 60, decay = 60, steps = 200"
    )
    text += text.replace("query_count", "term_weight = 0.0, query_count")
    plain = USABLE.replace("lengths = [4]", "lengths = [3]").replace("true", "false")
    run(spec_in(base, HEAD + text + plain), base, base / "out")
    return base / "out"


def extras_of(folder: Path) -> list[dict]:
    with Store(folder) as store:
        return [json.loads(e) for (e,) in store.db.execute("SELECT extra FROM rows")]


def test_the_study_agrees_with_its_slow_recomputation(small, monkeypatch):
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    checked = check_study(small)
    assert checked["wrong"] == []
    assert "the values of words were not computed again" in str(checked["unchecked"])
    assert {"contexts", "rms", "layers", "directions"} <= checked["worst"].keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda e: e["contexts"]["nothing"].__setitem__(0, 9.5), "contexts nothing is stored"),
        (lambda e: e["contexts"]["vectors"].__setitem__(1, 9.5), "contexts vectors is stored"),
        (lambda e: e["contexts"].pop("vectors"), "contexts, entries is stored"),
        (lambda e: e["words"].pop(), "words, texts and tokens is stored"),
        (lambda e: e["words"][0].__setitem__(0, 7), "contexts nothing is stored"),
        (lambda e: e.update(rms=7.0), "rms is stored"),
        (lambda e: e["layers"]["1"].__setitem__(1, 99.0), "layers 1 is stored"),
        (lambda e: e["layers"].pop("0+"), "layers, entries is stored"),
        (lambda e: e["directions"].__setitem__("use in text", [0.9]), "directions use in text is"),
        (lambda e: e["directions"]["without random"].__setitem__(2, 9.5), "without random is"),
        (lambda e: e.update(directions={}), "directions, entries is stored"),
        (lambda e: e.update(layers=3), "which protocol 'usable' does not write"),
    ],
)
def test_the_check_notices_each_falsified_measurement(small, monkeypatch, change, sentence):
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    extra = next(e for e in extras_of(small) if e["layers"])
    change(extra)
    before = falsify(small, json.dumps(extra), "usable")
    wrong = check_study(small)["wrong"]
    restore(small, before)
    assert any(sentence in s for s in wrong), wrong


def test_the_report_shows_the_frontier_and_the_layers(small, tmp_path):
    page = write_report(small, tmp_path / "report").page.read_text("utf-8")
    folder = tmp_path / "report"
    for name in ("usable", "usable-contexts", "usable-directions"):
        assert (folder / f"tables/{name}.csv").is_file(), name
    for name in ("usable", "usable-layers"):
        assert (folder / f"figures/{name}.svg").is_file(), name
    assert "the passage needs layer" in page
    extras = extras_of(small)
    spans = pd.read_csv(folder / "tables/usable-directions.csv")
    assert spans["vectors"].tolist()[:3] == ["whole", "without text", "without use"]
    measured = [e["directions"]["without text"] for e in extras if e["directions"]]
    shown = spans[spans["vectors"] == "without text"]
    assert shown["n"].sum() == len(measured)
    assert (shown["KL"] * shown["n"]).sum() == pytest.approx(sum(kl for _, _, kl in measured))
    for name, low, high in (("tokens", "low", "high"), ("KL", "low.1", "high.1")):
        assert (spans[low] <= spans[name]).all()
        assert (spans[name] <= spans[high]).all()
    table = pd.read_csv(folder / "tables/usable-contexts.csv")
    shown = table[table["context"] == "nothing"]["KL"]
    assert len(shown) == 3  # two passages each
    ours = [e["contexts"]["nothing"][0] for e in extras]
    assert shown.mean() == pytest.approx(sum(ours) / len(ours), rel=1e-6)


def test_no_layer_knocked_out_gives_the_figures_of_the_row(small):
    with Store(small) as store:
        rows = store.db.execute("SELECT extra, horizon FROM rows").fetchall()
    for extra, horizon in rows:
        if layers := json.loads(extra)["layers"]:
            assert layers["none"][0] == horizon
            assert layers["none"][2] == pytest.approx(
                json.loads(extra)["contexts"]["vectors"][0], abs=1e-5
            )


def test_both_modes_agree_with_their_slow_computation():
    lm, ids = tiny(), passages(5, seed=6)[0].ids
    words = torch.tensor([p.ids for p in passages(6, 6, seed=7)])
    vectors = vectors_of(lm)
    again, _ = slow_use.both_modes(lm, vectors, ids, words.tolist())
    assert BothModes(lm, ids, words)(vectors) == pytest.approx(again, abs=1e-4)


def test_a_start_rule_without_a_trigger_is_refused():
    with pytest.raises(MemvecError, match=r"run 1 \(usable\) reads the vectors with and without"):
        parse_spec(
            HEAD + USABLE.replace("recipe = {", 'recipe = { start_rule = "vectors",'), "spec"
        )


def test_a_model_without_bos_is_refused():
    lm = copy(tiny())
    lm.bos_id = None
    outcome = next(iter(Engine(tiny(), QUICK, vectors=1, batch_size=1).run(passages(3))))
    sourced = SourcedPassage(0, outcome.passage, "random-tokens")
    with pytest.raises(MemvecError, match="has no BOS token, so it can read nothing at all"):
        protocol_of("usable").extra(lm, sourced, outcome, "bos", {})


def test_a_series_is_named_by_the_fields_that_differ():
    one = ["novels, weight 4, bos", "novels, weight 1, bos"]
    assert list(usable_figures._labels(one).values()) == ["weight 4", "weight 1"]
    several = [*one, "novels, weight 4, #1"]
    assert list(usable_figures._labels(several).values()) == ["usual recipe", "weight 1", "#1"]
    assert usable_figures._labels(["novels, weight 4"]) == {"novels, weight 4": "novels"}
