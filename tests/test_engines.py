"""Engines: the runner's protocol, with transformers in this Python, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from conftest import QUICK, build, reader, tiny
from memvec import codec, engines
from memvec.engines import run
from memvec.errors import MemvecError
from memvec.passages.passage import ids_hash
from memvec.vectors import MemVectors
from test_interop import crammed

pytestmark = pytest.mark.slow  # left out of `make check`


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model's weights, of a family."""

    def save(family):
        build(family).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.mark.parametrize("rule", ["vectors", "bos", "first-token"])
def test_an_engine_gives_the_passages_back(rule, saved):
    mem = crammed(tiny(), rule)
    version, ids = engines.decode_with("transformers", mem, tiny(), model=saved("llama"), batch=4)
    assert version.startswith("transformers ")
    assert [ids_hash(row) for row in ids] == [p.sha256 for p in mem.passages]


def test_another_models_vectors_are_refused_before_the_engine_starts(saved):
    mem = crammed(tiny())
    for lm, why in ((tiny(seed=1), "other weights"), (tiny("opt-projected"), "numbers each")):
        with pytest.raises(MemvecError, match=why):
            engines.decode_with("vllm", mem, lm, model="nowhere", python="/no/python")


def test_a_model_that_the_engine_cannot_take_is_refused():
    with pytest.raises(MemvecError, match="mlx-lm takes no input embeddings for models of the"):
        run.refuse("mlx", tiny("gpt2"))
    with pytest.raises(MemvecError, match="scales"):
        run.refuse("vllm", tiny("gemma3"))


def test_a_damaged_request_is_refused_before_the_engine_is_imported(tmp_path):
    """The engine vllm is not installed here, so an import of it would say so."""
    run.write_request(tmp_path, "nowhere", "float32", [torch.zeros(2, 4)], [3])
    prompt, request = tmp_path / "prompt-0000.npy", tmp_path / "request.json"
    whole, asked = prompt.read_bytes(), request.read_text()
    prompt.write_bytes(whole[:-4])
    with pytest.raises(MemvecError, match=r"prompt-0000\.npy .* cut short"):
        run.start("vllm", sys.executable, tmp_path)
    prompt.write_bytes(whole)
    request.write_text(json.dumps({**json.loads(asked), "width": 8}))
    with pytest.raises(MemvecError, match="takes vectors of 8"):
        run.start("vllm", sys.executable, tmp_path)
    request.write_text(asked[:-9])
    with pytest.raises(MemvecError, match=r"no whole request\.json"):
        run.start("vllm", sys.executable, tmp_path)


def test_an_engine_that_fails_says_why(tmp_path):
    with pytest.raises(MemvecError, match="did you mean 'vllm'"):
        engines.run_engine("vlm", sys.executable, "x", "float32", [torch.zeros(1, 4)], [1])
    with pytest.raises(MemvecError, match="there is no Python to run transformers"):
        engines.run_engine(
            "transformers", tmp_path / "none", "x", "float32", [torch.zeros(1, 4)], [1]
        )
    with pytest.raises(MemvecError, match="transformers did not generate: "):
        engines.run_engine(
            "transformers", sys.executable, tmp_path, "float32", [torch.zeros(1, 4)], [1]
        )


def test_the_command_certifies_in_an_engine(command, folder, tmp_path):
    lm = reader()
    mem = codec.cram(lm, ["the fox"], vectors=2, tokens=2, recipe=QUICK)
    mem.save(tmp_path / "a.mem")
    words = ["verify", tmp_path / "a.mem", "--model", folder, "--engine", "transformers"]
    ran = command(*words, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["decoded_by"].startswith("transformers ")
    MemVectors(-mem.vectors, mem.header).save(tmp_path / "b.mem")
    words[1] = tmp_path / "b.mem"
    assert command(*words).code == 3
