"""`memvec plan`: estimates from a sample agree with what cramming the whole text takes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from conftest import QUICK, reader
from memvec import codec
from memvec.cli.plan import _print_plan
from memvec.cram_job import CramJob, CramStatus
from memvec.cramming.batch import Progress
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab.plan import _apart, _Clock, _cost, _sample, _Times, _Total, plan
from memvec.passages.documents import Document
from memvec.passages.passage import Passage
from memvec.statistics import Mean
from memvec.storage import storage_of

TEXT = "the cat sat on the lazy dog while the fox ran over the hill and the cow ate the grass. " * 6
WORDS = "the lazy dog sat on the cat"


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_short_text_is_crammed_whole_and_has_no_interval(vectors, storage):
    lm = reader()
    options = {"vectors": vectors, "tokens": 2, "recipe": QUICK, "storage": storage}
    planned = plan(lm, Document.of(lm, WORDS), **options)
    mem = codec.cram(lm, [WORDS], **options)
    assert planned.sampled_tokens == planned.tokens
    for total, truth in (
        (planned.vectors, vectors * len(mem.passages)),
        (planned.vector_bytes, mem.summary()["vector_bytes"]),
    ):
        assert (total.mean, total.low, total.high) == (pytest.approx(truth),) * 3
    assert 0 < planned.seconds.mean < 600
    assert planned.inexact == 0


@pytest.mark.parametrize("tokens", [1, 2])
def test_exact_passages_of_one_length_give_an_estimate_without_deviation(tokens):
    """Every passage of the sample needs the same number of vectors."""
    lm = reader()
    document = Document.of(lm, TEXT)
    planned = plan(lm, document, vectors=2, tokens=tokens, recipe=QUICK, sample=6)
    assert planned.sampled == 6
    assert planned.sampled_tokens == 6 * tokens < planned.tokens == len(document.ids)
    assert planned.vectors.mean == pytest.approx(2 * planned.tokens / tokens)
    assert planned.vectors.sd == pytest.approx(0)
    assert planned.tokens_per_vector.mean == pytest.approx(tokens / 2)
    assert planned.seconds.low <= planned.seconds.mean <= planned.seconds.high


@pytest.mark.slow
def test_tokens_per_vector_count_the_vectors_of_all_pieces_of_a_passage():
    """A passage of seven tokens that is cut has as many vectors as pieces."""
    lm = reader()
    planned = plan(lm, Document.of(lm, WORDS), tokens=8, recipe=Recipe(steps=1), batch_size=1)
    assert (planned.sampled, planned.tokens) == (1, 7)
    assert planned.vectors.mean > 1
    assert planned.tokens_per_vector.mean == pytest.approx(7 / planned.vectors.mean)


@pytest.mark.parametrize(("sample", "sampled"), [(3, 3), (4, 7), (6, 7)])
def test_a_text_of_which_more_than_half_would_be_sampled_is_measured_whole(sample, sampled):
    lm = reader()
    document = Document.of(lm, WORDS)
    planned = plan(lm, document, tokens=1, recipe=QUICK, sample=sample)
    assert (len(document.ids), planned.sampled, planned.sampled_tokens) == (7, sampled, sampled)


def test_sampled_passages_have_the_ids_of_the_text_at_their_offsets():
    lm = reader()
    document, options = Document.of(lm, TEXT), {"recipe": QUICK, "batch_size": 1}
    job = CramJob(lm, [document], 1, tokens=3, storage=storage_of("float32"), **options)
    sample, seconds = _sample(job, document, 12, 0)
    assert len(sample) > 6
    for p in sample:
        assert p.ids == tuple(document.ids[p.offset : p.offset + 3])
    assert len({p.ids for p in sample}) > 1
    assert seconds > 0


def test_the_seconds_of_a_passage_are_those_of_all_its_pieces():
    """They have the steps with padding, filling and certification of every piece that was tried."""
    job = CramJob(
        reader(), [], 1, tokens=None, recipe=QUICK, batch_size=1, storage=storage_of("float32")
    )
    job.spent = {(0, 4, 6): 100, (0, 4, 3): 40, (0, 7, 3): 60, (0, 10, 5): 999}
    cost = _cost(job, Passage((1,) * 6, 0, 4), 1, _Times(0.01, 1.5, 0.25, 7.0))
    assert cost.seconds == pytest.approx(200 * 1.5 * 0.01 + 3 * 0.25)


def test_the_costs_of_a_passage_and_of_each_of_its_halves_are_kept():
    """The first half has the offset of its passage, but its own entry."""
    lm = reader()
    document, options = Document.of(lm, "the cat sat on"), {"recipe": Recipe(steps=0)}
    job = CramJob(
        lm, [document], 1, tokens=4, batch_size=4, storage=storage_of("float32"), **options
    )
    job.cram([Passage(tuple(document.ids))])
    singles = {(0, at, 1) for at in range(4)}
    assert job.spent.keys() == {(0, 0, 4), (0, 0, 2), (0, 2, 2)} | singles


def test_the_rate_is_that_of_steps_with_busy_slots():
    """The engine's totals are of three slots at 10 ms a token, then of one slot at 50 ms."""
    clock = _Clock(None)
    for slots, tokens, seconds in [(3, 300, 3.0), (3, 600, 6.0), (1, 700, 11.0), (2, 900, 13.0)]:
        now = Progress(slots, 0, 1.0, steps=1, tokens=tokens, seconds=seconds)
        clock(CramStatus("cramming", tokens=9, done=0, vectors=0, split=0, engine=now))
    now = Progress(3, 0, 1.0, steps=1, tokens=10_000, seconds=0.0)
    clock(CramStatus("certifying", tokens=9, done=9, vectors=9, split=0, engine=now))
    assert clock.seconds_per_token() == pytest.approx((3.0 + 3.0 + 2.0) / (300 + 300 + 200))


@pytest.mark.parametrize("tokens", [12, 60])
def test_a_sample_is_scaled_to_the_tokens_of_the_document(tokens):
    """Passages of 4 and 8 tokens cost 2 and 2 vectors; what each token costs is added to it."""
    passages = [Passage((1,) * 4), Passage((1,) * 8, 0, 4)]
    total = _Total(tokens, passages)([2.0, 2.0], scale=3.0, per_token=0.5)
    if tokens == 12:  # all of it: no interval
        assert (total.mean, total.low, total.high) == (12 + 6, 12 + 6, 12 + 6)
    else:
        assert total.mean == pytest.approx(60 * ((6 / 4 + 6 / 8) / 2 + 0.5))
        assert total.low < total.mean < total.high


@pytest.mark.slow
def test_a_passage_that_is_halved_counts_with_all_its_pieces(capsys):
    """With three steps, passages are halved down to single tokens, as in a cram."""
    lm = reader()
    document = Document.of(lm, WORDS)
    options = {"vectors": 1, "tokens": 8, "recipe": Recipe(steps=3)}
    planned = plan(lm, document, **options)
    mem = codec.cram(lm, [WORDS], **options)
    assert planned.vectors.mean == pytest.approx(len(mem.passages))
    assert planned.inexact == sum(not p.exact for p in mem.passages)
    _print_plan(
        replace(planned, inexact=3), "letter.txt", "float32"
    )  # three pieces of one sampled passage
    said = " ".join(capsys.readouterr().out.split())
    assert "; 3 of their pieces did not become exact" in said


@pytest.mark.slow
def test_the_same_seed_samples_the_same_places():
    lm = reader()
    document = Document.of(lm, TEXT)
    options = {"vectors": 2, "recipe": Recipe(steps=30), "sample": 4}
    one, two, other = (plan(lm, document, seed=seed, **options) for seed in (0, 0, 1))
    assert (one.vectors, one.bits_per_vector) == (two.vectors, two.bits_per_vector)
    assert one.bits_per_vector != other.bits_per_vector


def test_the_command_prints_the_plan_and_writes_no_file(command, folder, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = ["-m", folder, "--vectors", 2, "--tokens", 2, "--sample", 4, "--set", "steps=600"]
    planned = json.loads(command("plan", text, *options, "--json").out)
    assert Mean(**planned["vectors"]).mean == pytest.approx(planned["tokens"])
    shown = command("plan", text, *options)
    assert shown.code == 0
    assert all(word in shown.out.decode() for word in ("tokens per vector", "vectors", "time"))
    assert not list(tmp_path.glob("*.mem*"))  # a plan writes nothing


def test_the_options_of_the_command_are_those_of_the_plan(command, folder, tmp_path, monkeypatch):
    asked: dict[str, object] = {}

    def noted(lm, document, **options):
        asked.update(options)
        raise MemvecError("noted.")

    monkeypatch.setattr("memvec.lab.plan.plan", noted)
    (text := tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    given = {"vectors": 2, "tokens": 3, "sample": 4, "seed": 5, "batch_size": 6, "storage": "int8"}
    words = [
        word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    assert command("plan", text, "-m", folder, "--set", "steps=7", *words).code == 2
    assert {name: asked[name] for name in given} == given
    assert asked["recipe"].steps == 7


@pytest.mark.parametrize(
    "words",
    [
        ("--steps", 7),
        ("--space", "prefix"),
        ("--space", "prefix", "--steps", 7, "--set", "margin=0.5"),
        ("--space", "inputs", "--preset", "paper"),
    ],
)
def test_a_plan_has_the_recipe_that_cram_has_for_the_same_words(
    command, folder, tmp_path, monkeypatch, words
):
    recipes = []

    def noted(*_, recipe, **__):
        recipes.append(recipe)
        raise MemvecError("noted.")

    monkeypatch.setattr("memvec.lab.plan.plan", noted)
    monkeypatch.setattr("memvec.codec.cram", noted)
    (text := tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    for verb in ("plan", "cram"):
        assert command(verb, text, "-m", folder, *words).err.endswith("noted.\n")
    planned, crammed = recipes
    assert planned == crammed != Recipe()


def test_no_total_of_a_plan_is_below_zero(capsys):
    """The symmetric interval of few passages may begin below 0; it is printed from 0."""
    lm = reader()
    planned = plan(lm, Document.of(lm, WORDS), tokens=1, recipe=QUICK, sample=2)
    total = Mean(20.0, -5.0, 45.0, 9.0, 3)
    _print_plan(replace(planned, seconds=total, vectors=total), "letter.txt", "float32")
    said = " ".join(capsys.readouterr().out.split())
    assert "20, 0 to 45" in said
    assert "20 s, 0 s to 45 s" in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--sample", 1], "--sample must be at least 2"),
        (["--vectors", 0], "--vectors must be at least 1"),
        (["--max-bytes", 0], "--max-bytes must be at least 1"),
        (["--seed", 2**64], "--seed must fit 64 bits"),
        (["--tokens", 9999], "9999 tokens do not fit the context"),
        (["--preset", "papr"], "unknown preset 'papr'"),
        (["--steps", 7, "--set", "steps=8"], "steps is given by --set and by its option"),
    ],
)
def test_bad_input_is_one_sentence(command, folder, tmp_path, changes, sentence):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    ran = command("plan", tmp_path / "a.txt", "-m", folder, *changes)
    assert ran.code == 2
    assert sentence in ran.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("plan", "--sample", 1), "--sample must be at least 2"),
        (("plan", "--encoding", "utf-99"), "unknown encoding 'utf-99'"),
        (("cram", "--encoding", "base64"), "unknown encoding 'base64'"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(command, tmp_path, words, sentence):
    """A large model takes minutes to load. Here it is missing, which would be another error."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    ran = command(words[0], tmp_path / "a.txt", "-m", tmp_path / "no-model", *words[1:])
    assert (ran.code, sentence in ran.err) == (2, True), ran.err


def test_small_samples_are_refused_in_python():
    lm = reader()
    with pytest.raises(MemvecError, match=r"^sample must be at least 2"):
        plan(lm, Document.of(lm, TEXT), sample=0)


def test_the_length_of_a_passage_does_not_decide_whether_it_is_sampled():
    """Of two passages that overlap the earlier one is kept, whatever its length."""
    kept = []
    for seed in range(400):
        draw = random.Random(seed)
        places = [50 * i + draw.randrange(50) for i in range(20)]
        asked = [Passage((1,) * (4 if place % 4 else 40), 0, place) for place in places]
        sample = _apart(asked)
        assert all(p.offset + len(p) <= q.offset for p, q in pairwise(sample))
        assert sample[0] == asked[0]
        kept += sample
    assert sum(len(p) == 40 for p in kept) / len(kept) == pytest.approx(0.25, abs=0.02)
