"""memvec's pipeline for transformers gives the passages of `decode` and the answers of `use`."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

import memvec
from conftest import QUICK, build, reader, tiny
from memvec import codec
from memvec.cramming.recipe import Recipe
from memvec.engines.pipeline import VectorsPipeline
from memvec.errors import MemvecError, NotExactError
from memvec.vectors import MemVectors
from test_interop import crammed


@pytest.fixture
def read(folder):
    """The pipeline of the folder's model."""
    return pipeline("memvec", model=str(folder), dtype="float32", device="cpu")


def test_the_pipeline_decodes_documents(read, tmp_path):
    mem = codec.cram(reader(), ["the fox", "dog"], vectors=2, tokens=2, recipe=QUICK)
    path = mem.save(tmp_path / "a.mem")
    own = read.model.generation_config
    texts = [one["text"] for one in read(path)]
    assert texts == ["the fox", "dog"]
    assert [[one["name"] for one in given] for given in read([str(path), mem])] == [
        [d.name for d in mem.header.documents]
    ] * 2
    assert read.model.generation_config is own


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["vectors", "bos", "first-token"])
def test_the_pipeline_decodes_passages_of_every_start_rule(rule):
    mem, model = crammed(tiny(), rule), build("llama")
    read = VectorsPipeline(model, device=torch.device("cpu"))
    assert read.passages(mem) == mem.tokens(tiny())


def test_the_answer_after_a_prompt_is_that_of_use(read):
    recipe = Recipe.of(start_rule="bos", steps=600, patience=600)
    mem = codec.cram(reader(), "the fox", vectors=2, tokens=2, recipe=recipe)
    answer = read(mem, prompt=" ran", max_new_tokens=9)
    assert answer == {"generated_text": memvec.use(reader(), mem, " ran", max_new_tokens=9)}
    with pytest.raises(MemvecError, match="no passage 7"):
        read(mem, prompt=" ran", passages=[7])


def test_vectors_that_do_not_decode_or_fit_the_model_are_refused(read):
    mem = codec.cram(reader(), ["the fox"], vectors=2, tokens=2, recipe=QUICK)
    with pytest.raises(NotExactError, match="passage 0 did not come back"):
        read(MemVectors(-mem.vectors, mem.header))
    with pytest.raises(MemvecError, match="have no trigger"):
        read(mem, prompt=" ran")
    with pytest.raises(MemvecError, match="numbers each"):
        read(crammed(tiny()))
    other = VectorsPipeline(build("llama", seed=1), device=torch.device("cpu"))
    with pytest.raises(MemvecError, match="other weights"):
        other(crammed(tiny()))
