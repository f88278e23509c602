"""Spaces: vectors as keys and values or as coefficients, with the same engine and file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import memvec
from conftest import QUICK, FrozenLM, build, one_step, passages, reader, tiny
from memvec import codec
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_vectors, view_for
from memvec.decoding import decode_ids
from memvec.errors import MemvecError
from memvec.export import export, target
from memvec.header import Header
from memvec.journal import Journal
from memvec.lab import slow, slow_use
from memvec.lab.report.report import write_report
from memvec.lab.study.check import check_study
from memvec.lab.study.spec import read_spec
from memvec.model.reading import in_space
from memvec.spaces import keys_values
from memvec.spaces.keys_values import _unit
from memvec.spaces.presets import prefix
from memvec.storage import STORAGES
from memvec.usable.columns import Column
from memvec.usable.contexts import after_each, contexts_of
from memvec.usable.generate import use
from memvec.usable.queries import queries_of
from memvec.vectors import MemVectors
from properties import moves, paths
from studies import HEAD, run, spec_in

pytestmark = pytest.mark.usefixtures("few_words")
FAMILIES = ["llama", "qwen3", "gpt2", "gpt-neox", "olmo2", "gemma3", "deepseek-v3"]
SPACES = {
    "prefix": replace(QUICK, space="prefix", start_rule="bos", compute="model"),
    "prefix-layer": replace(
        QUICK, space="prefix-layer", layer=1, start_rule="first-token", compute="model"
    ),
    "shared-basis": replace(QUICK, space="shared-basis", dimensions=24, compute="model"),
}
ASKED = passages(5, 4, 3, seed=3)
every_space = pytest.mark.parametrize("recipe", SPACES.values(), ids=SPACES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def numbers_of(view, recipe, K):
    """Noisy start vectors for passages that are not crammed."""
    starts = start_vectors(view, [p.ids for p in ASKED], K, recipe)
    noise = torch.randn(torch.stack(starts).shape, generator=torch.Generator().manual_seed(0))
    return torch.stack(starts) + 0.3 * noise


@every_space
@every_family
@pytest.mark.parametrize("K", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_logits_and_decoding_in_a_space_are_those_of_the_models_own_forward(recipe, family, K):
    """The reference fills a DynamicCache number by number, and makes a forward pass for each token.

    The sliding window of gemma3 is shorter than seven vectors.
    """
    view = view_for(tiny(family), recipe)
    vectors, rule = numbers_of(view, recipe, K), recipe.start_rule
    assert vectors.shape == (3, K, view.numbers)
    ids = torch.tensor([p.ids[:3] for p in ASKED])
    ours = view.head(view.states(vectors, ids, rule))
    given = ids[:, :1].tolist() if rule == "first-token" else [list(view.trigger)] * 3
    given = [[]] * 3 if rule == "vectors" else given
    greedy = []
    for row, (numbers, before) in enumerate(zip(vectors, given, strict=True)):
        true = ids[row].tolist()[int(rule == "first-token") :]
        table = slow.logits(view, numbers, [*before, *true])[-len(true) - 1 : -1]
        torch.testing.assert_close(ours[row].double(), torch.tensor(table), atol=2e-4, rtol=1e-3)
        greedy.append(slow.greedy(view, numbers, before, 9))
    first = [before[0] for before in given] if rule == "first-token" else None
    for cached in (True, False):
        lengths = [9 + int(rule == "first-token")] * 3
        options = {"start_rule": rule, "first": first, "cached": cached}
        decoded = decode_ids(view, vectors, lengths, **options)
        assert [ids[-9:] for ids in decoded] == greedy


@every_space
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt-neox", "olmo2"])
def test_what_is_crammed_is_exact_by_an_independent_decode(recipe, family):
    lm = tiny(family)
    engine = Engine(lm, recipe, vectors=2, batch_size=3)
    outcomes = list(engine.run(ASKED))
    assert all(o.exact for o in outcomes)
    for o in outcomes:
        ids, rule = list(o.passage.ids), engine.start_rule
        given = list(engine.lm.trigger) if rule == "bos" else ids[: int(rule == "first-token")]
        wanted = ids[int(rule == "first-token") :]
        assert slow.greedy(engine.lm, o.vectors.float(), given, len(wanted)) == wanted
        bits, margin = slow.teacher_forced(engine.lm, o.vectors, ids, rule)
        assert o.metrics.mem_bits == pytest.approx(float(bits.sum()), abs=1e-2)
        assert o.metrics.margin == pytest.approx(float(margin.min()), abs=2e-3)


@pytest.mark.slow
@every_space
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_passages_do_not_depend_on_each_other(recipe, family):
    """Equal bit by bit with other neighbours at one batch shape, and up to rounding at another."""
    lm, few = tiny(family), replace(recipe, steps=8, margin=1e3)
    options = {"vectors": 2, "batch_size": 3, "fixed_shapes": True}
    together = paths(Engine(lm, few, **options), ASKED)[ASKED[0]]
    assert moves(together)
    assert torch.equal(paths(Engine(lm, few, **options), ASKED[:2])[ASKED[0]], together)
    alone = paths(Engine(lm, few, vectors=2, batch_size=1), ASKED[:1])[ASKED[0]]
    torch.testing.assert_close(alone, together, atol=2e-2, rtol=2e-2)


USED = {"term": "use", "query_count": 3, "query_tokens": 5, "settle": 12, "lr_large": 0.0}
BOS = {"start_rule": "bos"}


@every_space
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "olmo2"])
def test_the_loss_of_use_is_the_kl_of_the_models_own_forward(recipe, family):
    """The reference is numpy, token by token; in prefixes the first token of a query is given."""
    recipe = replace(recipe, **USED, **BOS)
    engine = Engine(tiny(family), recipe, vectors=2, batch_size=3)
    for passage in ASKED:
        engine.push(passage)
    engine.fill(3)
    batch, view = engine.batch, engine.lm
    loss = engine.stepper.measure(batch, engine.columns).term.loss
    given = int(recipe.space.startswith("prefix"))
    for row, job in enumerate(engine.jobs):
        words = batch.term.queries[row, 0, : int(batch.term.length[row, 0])].tolist()
        text = [view.bos_id, *job.passage.ids]
        numbers = batch.parameters[row].detach()
        slow_kl, _ = slow_use.divergence_and_nll(view, numbers, [], text, [words], given)
        assert float(loss[row]) == pytest.approx(slow_kl, abs=2e-3, rel=2e-2)
    # Inputs of the query's pass: those in front of it, and the query without its last token.
    front = 0 if given else 2
    assert engine.stepper.term.inputs(torch.tensor([3])).tolist() == [front + 5 - 1]


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_usable_vectors_of_a_space_are_certified_and_continued(space, tmp_path):
    lm, recipe = reader(), replace(SPACES[space], **USED, **BOS)
    text = "the cat sat on the mat"
    mem = codec.cram(lm, [text], vectors=2, tokens=3, recipe=recipe)
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert again.exact
    assert codec.decode(lm, again) == [text]
    worth = again.header.use["held_out"]["contexts"]
    assert {"nothing", "vectors", "exact-only vectors"} <= set(worth)
    view, ids = again.view(lm), again.tokens(lm)
    given = int(space.startswith("prefix"))
    words = queries_of(lm, ids[0], Recipe(query_count=2, query_tokens=6, seed=1))[0]
    contexts = contexts_of(view, again.vectors[0].float(), ids[0], None)
    for name, figures in after_each(view, contexts, words).items():
        vectors = again.vectors[0].float() if name == "vectors" else None
        before = [] if vectors is not None else slow_use.context_ids(lm, ids[0], 2)[name]
        own = [lm.bos_id, *ids[0]]
        kl, nll = slow_use.divergence_and_nll(view, vectors, before, own, words.tolist(), given)
        assert (figures.kl, figures.nll) == pytest.approx((kl, nll), abs=1e-4)
    # The context is the file twice, with all passages of both in a row; the prompt follows.
    prompt = lm.tokenize("the dog")
    rows = torch.cat([*again.vectors, *again.vectors]).float()
    written = lm.text(slow.greedy(view, rows, prompt, 5))
    assert use(lm, [again, again], "the dog", max_new_tokens=5) == written
    assert use(lm, again, "the dog", context="nothing", max_new_tokens=5)


# Each storage with a prefix; the other spaces in float32 and int8.
@pytest.mark.parametrize(
    ("recipe", "storage"),
    [(SPACES["prefix"], storage) for storage in STORAGES]
    + [(SPACES[name], storage) for name in SPACES for storage in ("float32", "int8")][2:],
)
def test_a_file_decodes_as_what_was_saved(recipe, storage, tmp_path):
    lm, text = reader(), "the fox"
    mem = codec.cram(lm, [text], vectors=2, tokens=2, recipe=recipe, storage=storage)
    assert mem.exact
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert again.header == mem.header
    assert torch.equal(again.vectors, mem.vectors)
    assert again.decode_passages(lm) == mem.decode_passages(lm)
    assert codec.decode(lm, again) == [text]
    assert memvec.verify(lm, again)[0]["exact"] is True
    results = memvec.measure(lm, again, text)
    assert [r.mem_bits for r in results] == pytest.approx([p.mem_bits for p in mem.passages])
    figures = again.summary()
    assert (figures["space"], figures["width"]) == (recipe.space, again.header.space.numbers)
    held = len(mem.passages) * 2
    assert again.size == STORAGES[storage].size(held, again.header.space.numbers)


def test_a_resumed_run_gives_the_same_vectors(tmp_path):
    lm, options = reader(), {"vectors": 2, "tokens": 2, "recipe": SPACES["prefix"]}

    def stop(status):
        if status.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codec.cram(
            lm,
            ["the fox sat"],
            **options,
            batch_size=1,
            on_status=stop,
            journal=(journal := Journal(tmp_path / "j", {"a": 1})),
        )
    assert len(journal) > 0
    journal.close(delete=False)
    journal = Journal(tmp_path / "j", {"a": 1})
    again = codec.cram(lm, ["the fox sat"], **options, batch_size=1, journal=journal)
    uninterrupted = codec.cram(lm, ["the fox sat"], **options, batch_size=1)
    assert torch.equal(again.vectors, uninterrupted.vectors)
    assert codec.decode(lm, again) == ["the fox sat"]
    journal.close(delete=True)


# ---------------------------------------------------------------------- the numbers of a vector


def test_the_space_of_inputs_is_the_default_and_not_recorded():
    """Naming it changes neither the model nor the record; files without the field can be read."""
    lm = tiny()
    assert view_for(lm, replace(QUICK, space="inputs")) is lm
    assert "space" not in QUICK.record()
    assert Recipe(**QUICK.record()) == QUICK
    named = SPACES["prefix-layer"]
    assert Recipe(**named.record()) == named
    mem = codec.cram(reader(), ["the fox"], vectors=2, tokens=2, recipe=QUICK)
    assert mem.header.space is None
    older = mem.header.model_dump(mode="json")
    del older["space"]  # files of earlier versions have no such field
    assert Header.model_validate(older) == mem.header


def test_a_prefix_begins_with_the_keys_and_values_of_inputs():
    """They give the logits of the inputs, and the stored numbers are of size 1."""
    recipe = SPACES["prefix"]
    lm = tiny("gpt-neox")
    view = view_for(lm, recipe)
    inputs = lm.embed(torch.tensor([[3, 5, 7]]))
    vectors = view.reading.begun_at(view, inputs[0])[None]
    ids = torch.tensor([[4, 2, 6]])
    torch.testing.assert_close(
        view.head(view.states(vectors, ids, "bos")),
        lm.head(lm.states(inputs, ids, "bos")),
        atol=1e-4,
        rtol=1e-4,
    )
    size = vectors.square().mean().sqrt()
    assert 0.5 < float(size) < 2


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("dimensions", 16)])
def test_a_view_takes_the_options_of_another_recipe_of_its_space(name: str, value: int) -> None:
    """With its own options, a file of another seed would decode to other tokens."""
    lm, recipe = reader(), SPACES["shared-basis"]
    view = view_for(lm, recipe)
    assert view_for(view, recipe) is view
    other = replace(recipe, steps=5, **{name: value})
    mem = codec.cram(lm, "as it was", recipe=other)
    again, alone = (view_for(v, other).reading for v in (view, lm))
    assert again.options == alone.options
    assert torch.equal(again.basis, alone.basis)
    assert not torch.equal(again.basis, view.reading.basis)
    assert mem.decode_passages(view) == mem.decode_passages(lm)


def test_the_filler_of_other_layers_is_an_option_that_a_file_keeps():
    """The filler is another token than the default, BOS."""
    lm, ids = tiny(), torch.tensor([[5, 6, 7]])
    view = in_space(lm, "prefix-layer", {"layer": 1, "filler": 4})
    vectors = torch.randn(1, 2, view.numbers, generator=torch.Generator().manual_seed(0))
    again = in_space(lm, "prefix-layer", dict(view.reading.options))
    assert torch.equal(again.logits(vectors, ids, "bos"), view.logits(vectors, ids, "bos"))
    plain = in_space(lm, "prefix-layer", {**view.reading.options, "filler": lm.bos_id})
    assert not torch.equal(plain.logits(vectors, ids, "bos"), view.logits(vectors, ids, "bos"))


def test_coefficients_begin_at_the_nearest_vectors_of_the_basis():
    """Vectors of coefficients give them back; the rest of others is orthogonal to the basis."""
    view = view_for(tiny(), SPACES["shared-basis"])
    reading, generator = view.reading, torch.Generator().manual_seed(0)
    z = torch.randn(3, 24, generator=generator)
    torch.testing.assert_close(reading.begun_at(view, reading.vectors_of(z)), z)
    vectors = torch.randn(3, view.width, generator=generator)
    left = vectors - reading.vectors_of(reading.begun_at(view, vectors))
    assert (left @ reading.basis.T).abs().max() < 1e-4 < left.abs().max()
    assert reading.basis.square().sum(1) == pytest.approx(view.width / 24)


def test_units_are_exponents_of_the_nearest_powers_of_two():
    for size, unit in [(0.37, -1), (1.4, 0), (1.5, 1), (3.0, 2), (0.0, 0), (float("inf"), 0)]:
        assert _unit(torch.full((1, 2, 3, 4), size)) == unit


def test_a_prefix_in_one_layer_leaves_fillers_in_the_others():
    """With a prefix in the last layer, the first one has the keys and values of K fillers."""
    lm = tiny("llama")
    recipe = SPACES["prefix-layer"]
    view = view_for(lm, recipe)
    vectors = numbers_of(view, recipe, 2)
    cache = view.reading.cache(view, vectors)
    with torch.no_grad():
        own = view_for(lm, SPACES["prefix"])
        fillers = own.reading.begun_at(own, lm.embed(torch.tensor([[lm.bos_id] * 2]))[0])
        plain = own.reading.cache(own, fillers[None])
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys.expand(3, -1, -1, -1))
    assert torch.equal(cache.layers[0].values, plain.layers[0].values.expand(3, -1, -1, -1))
    assert not torch.allclose(cache.layers[1].keys, plain.layers[1].keys.expand(3, -1, -1, -1))


def test_numbers_of_a_vector_in_each_space():
    heads, width, layers = 2, 8, 2
    assert view_for(tiny("llama"), SPACES["prefix"]).numbers == layers * 2 * heads * width
    assert view_for(tiny("llama"), SPACES["prefix-layer"]).numbers == 2 * heads * width
    assert view_for(tiny("llama"), SPACES["shared-basis"]).numbers == 24


def test_keys_and_values_count_as_no_inputs_in_the_cost():
    lm, recipe = tiny(), replace(SPACES["prefix"], steps=4, margin=1e3, schedule="whole")
    (outcome,) = Engine(lm, recipe, vectors=3, batch_size=1).run(ASKED[:1])
    assert outcome.spent == 4 * 5  # BOS and four tokens are read, for five predictions


@pytest.mark.slow
def test_prefixes_are_exact_with_steps_in_bfloat16():
    recipe = replace(SPACES["prefix"], compute="bfloat16")
    assert all(o.exact for o in Engine(tiny(), recipe, vectors=2, batch_size=3).run(ASKED))
    assert all(o.exact for o in Engine(tiny("llama", "bfloat16"), recipe, vectors=2).run(ASKED))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "its cache is of another kind: list"),
        ("rwkv", "without a cache"),
        ("falcon-h1", ""),
        ("lfm2", ""),
        ("xlm", ""),
    ],
)
def test_a_model_without_a_cache_of_keys_and_values_is_refused(family, reason):
    sentence = f"^tiny-{family} keeps no keys and values .*{reason}.*use the space 'inputs'.$"
    for space in ("prefix", "prefix-layer"):
        with pytest.raises(MemvecError, match=sentence):
            Engine(tiny(family), SPACES[space])


@pytest.mark.parametrize("change", [lambda t: t[:, :, :-1], lambda t: t[0], None])
def test_a_cache_without_a_key_for_every_token_is_refused(monkeypatch, change):
    """A window of recent tokens, tables of other dimensions, and a cache without layers."""
    own = keys_values.keys_values

    def changed(lm, inputs):
        return [(change(k), change(v)) for k, v in own(lm, inputs)] if change else []

    monkeypatch.setattr(keys_values, "keys_values", changed)
    with pytest.raises(MemvecError, match=r"\(its cache is of another kind\)"):
        in_space(tiny(), "prefix", {})


def test_a_model_that_reads_its_cached_keys_differently_is_refused(monkeypatch):
    lm, honest = tiny(), keys_values.agree
    monkeypatch.setattr(
        keys_values, "agree", lambda ours, own, dtype: honest(ours + 0.1 * own, own, dtype)
    )
    for space in ("prefix", "prefix-layer"):
        with pytest.raises(MemvecError, match="its own, handed in again, give others"):
            Engine(lm, SPACES[space])


def test_what_a_space_does_not_support_is_refused(tmp_path):
    lm, prefix = tiny(), SPACES["prefix"]
    with pytest.raises(MemvecError, match=r"^tiny-llama has layers 0 to 1: no prefix stands in la"):
        Engine(lm, replace(SPACES["prefix-layer"], layer=2))
    with pytest.raises(MemvecError, match=r"^the recipe's layer must be at least 0, not -1\.$"):
        replace(SPACES["prefix-layer"], layer=-1)
    with pytest.raises(MemvecError, match=r"^in the space 'prefix' a token stands before .*bos"):
        Engine(lm, replace(prefix, start_rule="vectors"))
    with pytest.raises(MemvecError, match=r"^vectors read in one step are inputs: leave out the"):
        Engine(one_step(lm), prefix, vectors=2)
    with pytest.raises(MemvecError, match=r"^the recipe's space cannot be 'prefixes': it is one"):
        replace(prefix, space="prefixes")
    with pytest.raises(MemvecError, match="1 to 32 dimensions, not 256: change"):
        Engine(lm, Recipe(space="shared-basis"))
    sparing = FrozenLM(build("llama"), name="tiny", checkpointing=True)
    with pytest.raises(MemvecError, match=r"^tiny keeps no keys .*checkpointing computes"):
        Engine(sparing, prefix)
    text = reader()
    mem = codec.cram(text, ["the fox"], vectors=1, tokens=1, recipe=prefix)
    for name in ("transformers", "npy"):
        with pytest.raises(MemvecError, match=r"^vectors in the space 'prefix' are no inputs, whi"):
            export(text, mem, target(name), tmp_path / name)
    with pytest.raises(MemvecError, match=r"^vectors in the space 'prefix' predict nothing by th"):
        use(text, mem, "")
    with pytest.raises(MemvecError, match=r"^in the space 'prefix' the first token of a query is"):
        Engine(lm, replace(prefix, term="use", query_tokens=1))
    inputs = codec.cram(text, ["the fox"], vectors=1, tokens=1, recipe=replace(QUICK, **BOS))
    with pytest.raises(MemvecError, match=r"^files of different spaces cannot stand in one row"):
        use(text, [mem, inputs], "the")
    with pytest.raises(MemvecError, match=r"^a context is crammed into inputs here: leave out"):
        Column(text, "crammed", recipe=prefix)
    with pytest.raises(MemvecError, match=r"^keys and values stand before no states, so nothing"):
        Engine(lm, replace(prefix, term="alignment", align_layers=1))


def test_a_header_cannot_claim_another_space():
    lm = reader()
    mem = codec.cram(lm, ["the fox"], vectors=1, tokens=1, recipe=SPACES["prefix"])
    space = mem.header.space

    def with_space(**changes):
        changed = space.model_copy(update=changes)
        return MemVectors(mem.vectors, mem.header.model_copy(update={"space": changed}))

    with pytest.raises(MemvecError, match=r"^vectors in the space 'prefix' have 7 numbers by"):
        with_space(numbers=7)
    for name, options, sentence in (
        ("prefix", {"units": [0]}, r"^a prefix in this model has \d+ units"),
        ("prefix", {"units": [99] * len(space.options["units"])}, "^the units of a prefix"),
        ("prefix-layer", {"layer": 9}, "no prefix stands in layer 9"),
        ("prefix-layer", {"layer": 0, "filler": -1}, "has no token -1"),
        ("prefix-layer", {"layer": 0}, "numbers each and"),
        ("shared-basis", {"dimensions": "x"}, "a shared basis has 1 to"),
        (
            "shared-basis",
            {"dimensions": 2, "seed": 2**70},
            "a shared basis must fit 64 bits",
        ),
        ("elsewhere", {}, "^unknown space 'elsewhere'"),
    ):
        with pytest.raises(MemvecError, match=sentence):
            with_space(name=name, options=options).decode_passages(lm)
    bare = mem.header.model_copy(update={"space": None})
    with pytest.raises(MemvecError, match="numbers each and"):
        MemVectors(mem.vectors, bare).decode_passages(lm)
    rule = mem.header.model_copy(update={"start_rule": "vectors"})
    with pytest.raises(MemvecError, match=r"^in the space 'prefix' a token stands before"):
        MemVectors(mem.vectors, rule).decode_passages(lm)


# ---------------------------------------------------------------------- the study

STUDY = HEAD.replace('name = "small"', 'name = "spaces"') + "".join(
    f"""
[[runs]]
protocol = "spaces"
sources = ["book"]
lengths = [6]
vectors = [{K}]
passages = 2
texts = 2
words = 5
storage = "{storage}"
recipe = {{ {recipe}, steps = 16 }}
"""
    for K, storage, recipe in (
        (2, "float32", 'preset = "default"'),
        (1, "float32", 'preset = "prefix"'),
        (1, "bfloat16", 'preset = "prefix"'),
        (2, "float32", 'preset = "prefix-layer", layer = 1'),
        (2, "float32", 'space = "shared-basis", dimensions = 16'),
        (2, "float32", 'coordinates = "low-dim", dimensions = 4'),
        (1, "float32", 'preset = "usable", space = "prefix", settle = 4, query_count = 2'),
    )
)


@pytest.mark.slow
def test_a_study_compares_spaces(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    out = tmp_path / "out"
    run(spec_in(tmp_path, STUDY), tmp_path, out)
    checked = check_study(out)
    assert checked["wrong"] == []
    (sentence,) = checked["unchecked"]
    assert "the values of words were not computed again" in sentence
    assert checked["rows"] == 14
    write_report(out, out / "report", figures=False)
    with (out / "report" / "tables" / "spaces.csv").open() as file:
        table = pd.read_csv(file)
    D, layer, every = (
        64,
        2 * 32,
        2 * 2 * 32,
    )  # reader() has two layers with two key-value heads of 16
    sizes = dict(zip(table["space"] + " " + table["storage"], table["numbers"], strict=True))
    assert sizes == {
        "inputs float32": 2 * D,
        "prefix float32": every,
        "prefix bfloat16": every,
        "prefix, for use float32": every,
        "prefix-layer 1 float32": 2 * layer,
        "shared-basis 16 float32": 2 * 16,
        "inputs, low-dim float32": 2 * D,
    }
    bits = dict(zip(table["space"] + " " + table["storage"], table["stored bits"], strict=True))
    assert bits["prefix bfloat16"] * 2 == bits["prefix float32"] == 32 * every
    assert table["numbers"].is_monotonic_increasing
    used = pd.read_csv(out / "report" / "tables" / "utilisation.csv")
    limits = (
        used["theoretical tokens"].sort_values().to_numpy()
    )  # from the numbers of a vector, not from D
    assert limits / limits[0] == pytest.approx(table["numbers"].to_numpy() / 32, rel=1e-6)
    assert (table["n"] == 2).all()
    assert (table["exact tokens"] <= 6).all()
    assert "Where the numbers stand" in (out / "report" / "index.html").read_text("utf-8")
    with pytest.raises(MemvecError, match=r"run 1 \(spaces\) compares spaces after one"):
        spec_in(tmp_path, STUDY.replace('preset = "default"', 'start_rule = "vectors"'))


def test_the_shipped_spec_is_valid():
    spec = read_spec(Path(__file__).parent.parent / "studies" / "spaces.toml")
    asked = {run.recipe.get("preset", run.recipe.get("space", "inputs")) for run in spec.runs}
    assert asked >= {"inputs", "prefix", "prefix-layer", "shared-basis"}


# ---------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_command_crams_and_decodes_a_prefix(tmp_path, folder, command):
    text, file = tmp_path / "a.txt", tmp_path / "a.mem.safetensors"
    text.write_text("the fox", "utf-8")
    ran = command("cram", text, "-m", folder, "--space", "prefix", "--tokens", 3, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["space"] == "prefix"
    header = MemVectors.load(file).header
    assert (header.start_rule, header.recipe["lr"]) == ("bos", prefix().lr)
    shown = command("inspect", file)
    assert "128 numbers (space prefix)" in " ".join(shown.out.decode().split())
    assert command("decode", file, "-m", folder).out == b"the fox"
    assert command("verify", file, "-m", folder).code == 0
    wrong = ["cram", text, "-m", folder, "--force", "--space"]
    for options in (
        ["prefix", "--one-step"],
        ["prefix-layer", "--layer", 2],
        ["prefix", "--start-rule", "vectors"],
        ["prefixes"],
    ):
        ran = command(*wrong, *options)
        assert ran.code == 2
        assert ran.out == b""
    out = tmp_path / "out"
    assert command("export", file, "-m", folder, "--to", "npy", "-o", out).code == 2
