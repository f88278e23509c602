"""The start `saved`, which is the vectors of a file, and cramming without halves."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch

import memvec
from conftest import reader
from memvec import MemVectors, Recipe
from memvec.cramming.starts import start_vectors
from memvec.errors import MemvecError
from memvec.passages.passage import Passage
from memvec.resume import settings_of
from memvec.usable.recipe_files import named_files

TEXT = "the cat sat on the mat and the dog ran over it"


def few(steps: int, **fields) -> Recipe:
    return Recipe.of(steps=steps, patience=steps, **fields)


@pytest.fixture(scope="module")
def lm():
    return reader("words")


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("tokens", [4, 8])
def test_without_halving_every_passage_stays_whole(lm, vectors, tokens):
    """Each passage of the text is in the result with its horizon, so one length is measured."""
    mem = memvec.cram(lm, TEXT, vectors=vectors, tokens=tokens, recipe=few(2), halve=False)
    ids = lm.tokenize(TEXT)
    assert [p.tokens for p in mem.passages] == [
        len(ids[at : at + tokens]) for at in range(0, len(ids), tokens)
    ]
    assert not mem.exact
    for outcome, p in zip(memvec.measure(lm, mem, TEXT), mem.passages, strict=True):
        assert (outcome.horizon, outcome.exact) == (p.horizon, p.exact)
        assert p.exact == (p.horizon == p.tokens)
    halved = memvec.cram(lm, TEXT, vectors=vectors, tokens=tokens, recipe=few(2))
    assert len(halved.passages) > len(mem.passages)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("start_rule", ["vectors", "bos"])
def test_cramming_continues_from_the_vectors_of_a_file(lm, start_rule, storage, tmp_path):
    options = {"tokens": 6, "storage": storage, "halve": False}
    begun = memvec.cram(lm, TEXT, recipe=few(4, start_rule=start_rule), **options)
    assert not begun.exact
    file = begun.save(tmp_path / "begun.mem")
    start = f"saved(file='{file}')"
    recipe = few(300, start_rule=start_rule, start=start)
    passages = [Passage(tuple(ids)) for ids in token_ids(lm, begun)]
    first = start_vectors(lm, [p.ids for p in passages], 1, recipe)
    assert torch.equal(torch.stack(first), begun.vectors.float())
    usable = Recipe.of("usable", start=start, context_scale=0.25)
    scaled = start_vectors(lm, [passages[0].ids], 1, usable)
    assert torch.allclose(scaled[0], begun.vectors[0].float())
    on = memvec.cram(lm, TEXT, recipe=recipe, **options)
    assert on.exact
    done = on.save(tmp_path / "done.mem")
    recipe = few(300, start_rule=start_rule, start=f"saved(file='{done}')")
    again = memvec.cram(lm, TEXT, recipe=recipe, **options)
    assert again.exact
    assert sum(p.steps for p in again.passages) <= len(again.passages), "nothing is left to do"
    assert on.header.recipe["start"] == start


def token_ids(lm, mem: MemVectors) -> list[list[int]]:
    ids, at, found = lm.tokenize(TEXT), 0, []
    for p in mem.passages:
        found.append(ids[at : at + p.tokens])
        at += p.tokens
    return found


def test_a_start_file_that_does_not_fit_is_refused(lm, tmp_path):
    file = memvec.cram(lm, TEXT, tokens=6, recipe=few(2), halve=False).save(tmp_path / "a.mem")
    shared = memvec.cram(lm, TEXT, tokens=2, recipe=few(2), layout="one-step", halve=False)
    one_step = shared.save(tmp_path / "b.mem")

    def cram(start: str, text: str = TEXT, **options):
        recipe = few(2, start=start)
        return memvec.cram(lm, text, **({"tokens": 6, "halve": False} | options), recipe=recipe)

    with pytest.raises(MemvecError, match="needs a file"):
        cram("saved")
    with pytest.raises(MemvecError, match="there is no file"):
        cram(f"saved(file='{tmp_path}/none.mem')")
    with pytest.raises(MemvecError, match="no vectors of a passage of 5 tokens"):
        cram(f"saved(file='{file}')", tokens=5)
    with pytest.raises(MemvecError, match="no vectors of a passage"):
        cram(f"saved(file='{file}')", text="a dog ran")
    with pytest.raises(MemvecError, match="has 1 vectors of 64 numbers for each passage, not 2"):
        cram(f"saved(file='{file}')", vectors=2)
    with pytest.raises(MemvecError, match="are read otherwise"):
        cram(f"saved(file='{one_step}')")


def test_a_start_file_that_was_replaced_is_read_again(lm, tmp_path):
    """Its time of change may be that of the old file, on file systems with rough times."""
    first = []
    for seed in (0, 1):
        mem = memvec.cram(lm, TEXT, tokens=6, recipe=few(1, seed=seed), halve=False)
        file = mem.save(tmp_path / "a.mem", force=True)
        os.utime(file, (1e9, 1e9))
        (ids, *_) = token_ids(lm, mem)
        first += start_vectors(lm, [ids], 1, few(1, start=f"saved(file='{file}')"))
        assert torch.equal(first[-1], mem.vectors[0])
    assert not torch.equal(*first)


def test_the_setting_of_a_start_file_is_its_content(lm, tmp_path):
    file = memvec.cram(lm, TEXT, tokens=6, recipe=few(2), halve=False).save(tmp_path / "a.mem")
    recipe = few(2, start=f"saved(file='{file}')")
    before = settings_of(lm, recipe, vectors=1, storage="float32", layout="prefix")
    assert named_files(recipe) == {"start": hashlib.sha256(file.read_bytes()).hexdigest()}
    memvec.cram(lm, TEXT, tokens=6, recipe=few(3), halve=False).save(file, force=True)
    assert settings_of(lm, recipe, vectors=1, storage="float32", layout="prefix") != before
