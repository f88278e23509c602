"""Corrections: decoding puts the listed tokens in their places; their bytes are counted."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from conftest import QUICK, V, one_step, passages, reader, tiny
from memvec import codec, metrics
from memvec.certificate import measure
from memvec.cli.common import account
from memvec.corrections import fixed_tokens, pick, size
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids, first_error
from memvec.errors import MemvecError
from memvec.export import export
from memvec.export import target as target_of
from memvec.header import PassageRecord
from memvec.journal import Journal
from memvec.model.reading import START_RULES
from memvec.vectors import MemVectors
from test_vectors import forged

TEXT = "the cat sat on the lazy dog"


def leb128(number: int) -> bytes:
    """The bytes of a number, whose length `size` computes without writing them."""
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize("seed", range(20))
def test_sizes_are_those_of_the_written_integers(seed):
    random_ = random.Random(seed)
    lists = []
    for _ in range(random_.randrange(1, 5)):
        places = sorted(random_.sample(range(40_000), random_.randrange(0, 200)))
        lists.append([(p, random_.randrange(2 ** random_.randrange(1, 20))) for p in places])
    written = b""
    for listed in lists:
        written += leb128(len(listed))
        for before, (position, token) in zip([(-1, 0), *listed], listed, strict=False):
            written += leb128(position - before[0] - 1) + leb128(token)
    assert size(lists) == (len(written) if any(lists) else 0)


def test_passages_cost_bytes_only_if_any_of_them_has_a_correction():
    assert size([]) == size([[], []]) == 0
    assert size([[], [(0, 127)], []]) == 1 + 3 + 1
    assert size([[(128, 128)]]) == 1 + 2 + 2


def test_wrong_tokens_are_picked_first_and_one_token_is_never_listed():
    margins, ids = torch.tensor([2.0, 0.3, -1.0, 0.5, 0.0]), [10, 11, 12, 13, 14]
    assert pick(margins, ids, 0.5, 0) == ()
    assert pick(margins, ids, 0.5, 1) == ((2, 12),)
    assert pick(margins, ids, 0.5, 2) == ((2, 12), (4, 14))
    assert pick(margins, ids, 0.5, 9) == ((1, 11), (2, 12), (4, 14))
    assert pick(margins, ids, 0.0, 9) == ((2, 12), (4, 14))  # a margin of 0 is a tie
    assert pick(margins - 9, ids, 0.5, 3) == ((0, 10), (1, 11), (2, 12))  # all wrong: the leading
    assert len(pick(margins - 9, ids, 0.5, 9)) == 4
    assert pick(margins.clamp_min(0.1), ids, 0.5, 1) == ((2, 12),)  # none wrong: the weakest
    assert pick(margins[1:], ids, 0.5, 1) == ((2, 12),)  # the first token was given


def test_the_table_puts_tokens_in_their_columns():
    found = fixed_tokens([[(0, 5), (3, 7)], []], 4)
    assert found.tolist() == [[5, -1, -1, 7], [-1] * 4]
    assert fixed_tokens([[(0, 5), (3, 7)]], 3, skip=1).tolist() == [[-1, -1, 7]]


@pytest.mark.parametrize("rule", START_RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_decoding_reads_the_corrected_token(family, rule):
    """The expected ids come from a loop over logits; tokens after a correction depend on it."""
    lm, (passage,) = tiny(family), passages(8, seed=3)
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(1))
    fixed = [[(2, 5), (6, 9)], [], [(1, 3)]]
    given, first = int(rule == "first-token"), [passage.ids[0]] * 3
    expected = []
    for v, listed in zip(vectors, fixed, strict=True):
        ids = [passage.ids[0]] * given
        while len(ids) < 8:
            logits = lm.logits(v[None], torch.tensor([[*ids, 0]]), rule)[0, -1]
            ids.append(dict(listed).get(len(ids), int(logits.argmax())))
        expected.append(ids)
    for cached in (True, False):
        found = decode_ids(
            lm, vectors, [8] * 3, start_rule=rule, first=first, corrections=fixed, cached=cached
        )
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "storage"), [("growing", "int4"), ("whole", "float32")])
def test_corrections_make_a_passage_exact_that_vectors_alone_cannot_hold(schedule, storage):
    """In the same number of steps; the tokens that are not listed reach the margin."""
    lm, asked = tiny(), passages(10, 10, seed=4)
    recipe = replace(QUICK, steps=150, schedule=schedule)
    alone = list(Engine(lm, recipe, vectors=1, storage=storage).run(asked))
    helped = list(Engine(lm, replace(recipe, corrections=7), vectors=1, storage=storage).run(asked))
    assert not any(o.exact or o.corrections for o in alone)
    for o in helped:
        assert o.exact
        assert o.status == "done"
        assert 0 < len(o.corrections) <= 7
        assert all(o.passage.ids[position] == token for position, token in o.corrections)
        assert o.metrics.margin >= o.margin_asked - 1e-4
        assert o.metrics.horizon == 10
        for cached in (True, False):
            options = {"corrections": [o.corrections], "cached": cached}
            (found,) = decode_ids(lm, o.vectors.float()[None], [10], **options)
            assert tuple(found) == o.passage.ids
        (without,) = decode_ids(lm, o.vectors.float()[None], [10])
        error = first_error(without, o.passage.ids)
        assert error is None or error in {at for at, _ in o.corrections}


@pytest.mark.parametrize("rule", ["vectors", "first-token"])
def test_measuring_a_file_again_applies_its_corrections(rule):
    lm = reader()
    recipe = Recipe(steps=60, patience=60, corrections=3, start_rule=rule)
    mem = codec.cram(lm, [TEXT], vectors=1, tokens=6, recipe=recipe)
    assert mem.exact
    assert any(p.corrections for p in mem.passages)
    for own, record in zip(measure(lm, mem, TEXT), mem.passages, strict=True):
        assert (own.exact, own.horizon) == (True, record.horizon)
        assert own.margin == pytest.approx(record.margin, abs=1e-4)
        assert own.information_gain == pytest.approx(record.information_gain, abs=1e-3)


def test_corrections_work_with_one_step_decoding():
    lm, asked = tiny().read_as("one-step"), passages(10, 10, seed=4)
    recipe = replace(QUICK, steps=150, corrections=8)
    for o in Engine(lm, recipe, vectors=2).run(asked):
        assert (o.exact, bool(o.corrections)) == (True, True)
        ids = [list(o.passage.ids)]
        assert decode_ids(lm, o.vectors[None], [10], corrections=[o.corrections]) == ids
        assert decode_ids(lm, o.vectors[None], [10]) != ids


def test_corrections_are_in_the_file_the_journal_and_the_byte_counts(tmp_path):
    lm = reader()
    recipe = Recipe(steps=200, patience=200, corrections=2)
    journal = Journal(tmp_path / "a.partial", {})
    options = {"vectors": 1, "tokens": 4, "recipe": recipe}
    mem = codec.cram(lm, [TEXT], journal=journal, **options)
    assert mem.exact
    listed = [p.corrections for p in mem.passages]
    assert any(listed)
    assert max(map(len, listed)) <= 2
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert again.header == mem.header
    assert codec.decode(lm, again) == [TEXT]
    s = again.summary()
    assert s["corrections"] == sum(map(len, listed))
    assert s["correction_bytes"] == size(listed) > 0
    counts = account(again, TEXT.encode())
    assert counts["vectors"] == s["vector_bytes"] + s["edit_bytes"] + s["correction_bytes"]
    with pytest.raises(MemvecError, match="has corrections, which only 'memvec decode'"):
        export(lm, mem, target_of("npy"), tmp_path / "exported")
    # A second cram takes the passages from the journal, with their corrections.
    known = codec.cram(lm, [TEXT], journal=journal, **options)
    journal.close()
    assert [p.corrections for p in known.passages] == listed
    # With a changed correction, the hash of the passage does not match.
    i = next(i for i, each in enumerate(listed) if each)
    (position, token), *_ = listed[i]
    for other in ([position, (token + 1) % V], [position, 2**31 - 1]):
        wrong = forged(mem, tmp_path / "b.mem", **{f"passages__{i}__corrections": [other]})
        with pytest.raises(MemvecError, match=f"passage {i} did not come back"):
            codec.decode(lm, MemVectors.load(wrong))


@pytest.mark.parametrize(
    "listed",
    [[[-1, 0]], [[0, -1]], [[0, 2**31]], [[4, 0]], [[1, 0], [1, 0]], [[1, 0], [0, 0]], [[0]], [7]],
    ids=str,
)
def test_corrections_that_are_not_in_the_passage_are_refused(tmp_path, listed):
    record = {f.alias or n: f.default for n, f in PassageRecord.model_fields.items()}
    record |= {"tokens": 4, "sha256": "0" * 64, "exact": True, "status": "done", "margin_asked": 0}
    record |= {"steps": 0, "spent": 0, "seconds": 0, "predicted": 4, "horizon": 4, "accuracy": 1}
    record |= {"margin": 1, "lm_bits": 1, "mem_bits": 1, "information_gain": 1, "token_gain": 1}
    assert PassageRecord(**record | {"corrections": [[0, 3], [3, 1]]}).corrections
    with pytest.raises(ValueError, match="corrections"):
        PassageRecord(**record | {"corrections": listed})


def test_the_commands_write_read_and_show_corrections(command, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.txt").write_text(TEXT[:11])
    options = ["-m", folder, "--tokens", 3, "--steps", 300]
    ran = command("cram", "letter.txt", *options, "--corrections", 2, "--storage", "int8", "--json")
    assert (ran.code, json.loads(ran.out)["storage"]) == (0, "int8")
    assert command("decode", "letter.mem").out == TEXT[:11].encode()
    seen = json.loads(command("inspect", "letter.mem", "--json").out)
    assert seen["recipe"]["corrections"] == 2
    assert seen["corrections"] > 0
    shown = command("inspect", "letter.mem").out.decode()
    assert f"{seen['corrections']} tokens listed, {seen['correction_bytes']} bytes" in shown
    sentence = command("cram", "letter.txt", *options, "--corrections", -1, "--force").sentence
    assert "the recipe's corrections must be at least 0" in sentence


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("layout", ["prefix", "one-step"])
@pytest.mark.parametrize("token", [0, 1, V - 1])
def test_any_token_of_the_vocabulary_may_be_listed(token, layout, cached):
    """Token 0 is not read as 'no correction'."""
    lm = one_step(tiny()) if layout == "one-step" else tiny()
    vectors = torch.randn(2, 2, lm.width, generator=torch.Generator().manual_seed(1))
    plain = decode_ids(lm, vectors, [6, 6], cached=cached)
    fixed = [[(i, token)] for i in range(6)]
    for i in range(6):
        found = decode_ids(lm, vectors, [6, 6], corrections=[fixed[i], []], cached=cached)
        assert found[0][: i + 1] == [*plain[0][:i], token]
        assert found[1] == plain[1]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["vectors", "bos", "first-token"])
@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_the_smallest_margin_is_of_the_tokens_that_are_not_listed(rule, corrections):
    """Computed position by position for each start rule, with a given first token and without."""
    lm, given = tiny(), int(rule == "first-token")
    recipe = replace(QUICK, steps=40, start_rule=rule, corrections=corrections)
    listed = 0
    for o in Engine(lm, recipe, vectors=1, batch_size=3).run(passages(9, 6, 12, seed=4)):
        ids = torch.tensor([o.passage.ids])
        margin = metrics.margins(lm.logits(o.vectors[None].float(), ids, rule), ids[:, given:])[0]
        positions = {position for position, _ in o.corrections}
        left = [float(m) for i, m in enumerate(margin, given) if i not in positions]
        assert o.metrics.margin == pytest.approx(min(left), abs=1e-4)
        listed += len(positions)
    assert bool(listed) == bool(corrections)
