"""Vectors changed after cramming lose their certificate; `certify` gives them a new one."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

import memvec
from conftest import reader
from memvec import MemVectors, NotExactError, certificate
from memvec.errors import MemvecError
from memvec.model.lm import FrozenLM
from memvec.storage import STORAGES

TEXTS = ["the cat sat on the mat and", "a dog ran"]


@pytest.fixture(scope="module", params=["vectors", "bos", "first-token"])
def crammed(request) -> tuple[FrozenLM, MemVectors]:
    lm = reader("words")
    recipe = memvec.Recipe.of(steps=400, start_rule=request.param)
    return lm, memvec.cram(lm, TEXTS, vectors=2, tokens=4, recipe=recipe)


def test_vectors_that_were_changed_are_not_exact_and_not_saved(crammed, tmp_path):
    _, mem = crammed
    assert mem.exact
    assert not mem.changed
    moved = MemVectors(mem.vectors + 0.5, mem.header, mem.soft)
    in_place = MemVectors(mem.vectors.clone(), mem.header, mem.soft)
    assert in_place.exact
    in_place.vectors[0, 0, 0] += 1
    for other in (moved, in_place):
        assert other.changed
        assert not other.exact
        assert not other.summary()["exact"]
        for save in (other.save, other.save_pretrained):
            with pytest.raises(MemvecError, match=r"changed after .*memvec\.certify"):
                save(tmp_path / "other.mem")
    assert not (tmp_path / "other.mem").is_file()


@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_certify_measures_unchanged_vectors_as_cramming_did(crammed, storage, tmp_path):
    """Another storage rounds them first; the certificate is then of the rounded vectors."""
    lm, mem = crammed
    unknown = mem.with_vectors(mem.vectors, storage)
    assert unknown.storage.name == (storage or "float32")
    assert not unknown.exact
    assert unknown.header.certificate is None
    assert all(math.isnan(p.margin) and math.isnan(p.mem_bits) for p in unknown.passages)
    again = MemVectors.load(unknown.save(tmp_path / "unknown.mem"))
    assert not again.exact
    known = memvec.certify(lm, again, TEXTS)
    assert known.header.certificate["exact_passages"] == sum(p.exact for p in known.passages)
    assert [p.exact for p in known.passages] == memvec.verify(lm, known)[1]
    if storage in (None, "float32"):
        for ours, theirs in zip(known.passages, mem.passages, strict=True):
            for name, value in theirs.model_dump().items():
                same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
                assert getattr(ours, name) == same, name
    if known.exact:
        file = known.save(tmp_path / "known.mem")
        assert memvec.decode(lm, MemVectors.load(file)) == TEXTS
        assert memvec.certify(lm, again).passages == known.passages, "the texts can be left out"


def test_measures_do_not_depend_on_the_number_of_passages_that_are_measured_at_once(
    crammed, monkeypatch
):
    """Nor does the number of the passage that an error names."""
    lm, mem = crammed
    assert len(mem.passages) > 2
    every = memvec.measure(lm, mem, TEXTS)
    monkeypatch.setattr(certificate, "BATCH", 2)
    for ours, theirs in zip(memvec.measure(lm, mem, TEXTS), every, strict=True):
        for name, value in theirs.model_dump().items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert getattr(ours, name) == same, name
    last = len(mem.passages) - 1
    with pytest.raises(MemvecError, match=f"^passage {last} of these vectors is not in the texts"):
        memvec.measure(lm, mem, [TEXTS[0], "a dog sat"])


def test_a_certificate_names_the_dtype_in_which_was_decoded(crammed):
    lm, mem = crammed
    other = FrozenLM(deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer, name=lm.name)
    certificate, _ = memvec.verify(other, mem, force=True)
    assert (mem.header.model["dtype"], certificate["decoded_in"]) == ("float32", "bfloat16")
    assert memvec.verify(lm, mem)[0]["decoded_in"] == "float32"


def test_a_certificate_of_use_is_lost_with_new_vectors_and_when_certified_again(crammed):
    """A certificate of decoding that is only attached keeps the certificate of use."""
    lm, mem = crammed
    used = mem.with_use({"trigger": "bos"})
    assert used.header.use == {"trigger": "bos"}
    assert used.with_certificate(mem.header.certificate, [True] * len(mem.passages)).header.use
    assert used.with_vectors(mem.vectors).header.use is None
    assert memvec.certify(lm, used).header.use is None


def test_noise_that_breaks_passages_is_reported(crammed):
    lm, mem = crammed
    noise = torch.randn(mem.vectors.shape, generator=torch.Generator().manual_seed(0))
    broken = memvec.certify(lm, mem.with_vectors(mem.vectors + 20 * noise), TEXTS)
    assert not broken.exact
    wrong = [p for p in broken.passages if not p.exact]
    assert wrong
    assert all(p.horizon < p.tokens for p in wrong)
    assert [p.steps for p in broken.passages] == [p.steps for p in mem.passages]
    with pytest.raises(NotExactError):
        memvec.certify(lm, mem.with_vectors(mem.vectors + 20 * noise))
    with pytest.raises(MemvecError, match="is not in the texts"):
        memvec.certify(lm, broken, TEXTS[::-1])


def test_certify_with_force_accepts_a_fine_tuned_model(crammed):
    lm, mem = crammed
    tuned = deepcopy(lm.model)
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.down_proj.weight.mul_(0.5)
    other = FrozenLM(tuned, lm.tokenizer, name="tuned")
    with pytest.raises(MemvecError, match="were made for other weights"):
        memvec.certify(other, mem, TEXTS)
    own = memvec.certify(other, mem, TEXTS, force=True)
    assert own.header.model["name"] == "tuned"
    assert [p.exact for p in own.passages] == memvec.verify(other, own)[1]
    with pytest.raises(MemvecError, match="were made for other weights"):
        memvec.verify(lm, own)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("vectors", ["vectors", None, [[0.0]], np.zeros((3, 2, 64))])
def test_vectors_that_are_no_tensor_are_refused(crammed, vectors):
    _, mem = crammed
    with pytest.raises(MemvecError, match="vectors is a tensor of shape"):
        mem.with_vectors(vectors)


@pytest.mark.parametrize("vectors", [torch.zeros(1, 2, 64), torch.zeros(3, 64)])
def test_vectors_of_another_shape_are_refused(crammed, vectors):
    _, mem = crammed
    with pytest.raises(MemvecError, match="need vectors of shape"):
        mem.with_vectors(vectors)
    with pytest.raises(MemvecError, match="unknown storage"):
        mem.with_vectors(mem.vectors, "int2")
