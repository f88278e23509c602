"""The built-in model `pocket`: its files, its tokenizer, its encoder, and a text that is exact."""

from __future__ import annotations

import pytest
import torch

from memvec import codec, load_lm
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_vectors
from memvec.lab.doctor import examine
from memvec.loading import POCKET
from memvec.passages.passage import Passage
from memvec.vectors import MemVectors

pytestmark = pytest.mark.skipif(
    not (POCKET / "model.safetensors").exists(), reason="the built-in model is not made yet"
)

TEXT = """\
When the ferry had gone, the two of them stood on the landing stage with a trunk between them and
nobody to carry it. "There was to have been a cart," said Ellen. Her brother looked up the lane,
where nothing moved but a hen, and answered that there was to have been a great deal, and that for
his part he meant to sit down until some of it arrived. So they sat upon the trunk. The rain, which
had waited politely for the boat to leave, came on by degrees; and it was in this condition, wet,
cross, and a little inclined to laugh, that Captain Moore first beheld his two new tenants.
"""


@pytest.fixture(scope="module")
def pocket():
    return load_lm()


def test_pocket_loads_with_its_encoder_and_facts(pocket):
    assert pocket.name == "pocket"
    assert pocket.encoder is not None
    assert pocket.encoder.summary.shape[-1] == pocket.width
    assert float(pocket.facts["bits_per_vector"]["1"]) > 0
    assert sum(f.stat().st_size for f in POCKET.glob("*.safetensors")) <= 32 * 2**20


@pytest.mark.slow
def test_the_doctor_accepts_pocket(monkeypatch):
    monkeypatch.setattr("memvec.lab.doctor.speed", lambda lm: 1.0)
    report = examine("pocket")
    assert report["can_be_crammed"] is True
    assert report["reason"] is None


def test_the_tokenizer_of_pocket_gives_every_byte_back(pocket):
    strange = TEXT + "\t👍 敏捷的\r\n\x00\ufeff é e\u0301 \n\n"
    assert pocket.text(pocket.tokenize(strange)) == strange


@pytest.mark.slow
def test_a_hundred_words_come_back(pocket, tmp_path):
    mem = codec.cram(pocket, [TEXT])
    assert mem.exact
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert codec.decode(load_lm(), again) == [TEXT]
    assert len(TEXT.split()) >= 100


@pytest.mark.slow
def test_the_encoder_of_pocket_is_a_better_start_than_noise(pocket):
    ids = pocket.tokenize(TEXT)
    asked = [Passage(tuple(ids[at : at + 12])) for at in range(0, 96, 12)]
    steps = {}
    for start in ("encoder", "noise"):
        outcomes = list(Engine(pocket, Recipe(start=start), batch_size=8).run(asked))
        assert all(o.exact for o in outcomes)
        steps[start] = sum(o.steps for o in outcomes)
    assert steps["encoder"] < steps["noise"]


def test_the_encoder_of_pocket_gives_a_passage_the_same_vectors_in_a_batch(pocket):
    """The batch has mixed lengths; `alone` makes the vectors equal bit for bit."""
    ids = [pocket.tokenize(TEXT)[a:b] for a, b in ((0, 9), (3, 9), (1, 10), (2, 8))]
    together = start_vectors(pocket, ids, 2, Recipe())
    for part, found in zip(ids, together, strict=True):
        (alone,) = start_vectors(pocket, [part], 2, Recipe())
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
    each = start_vectors(pocket, ids, 2, Recipe(), alone=True)
    for part, found in zip(ids, each, strict=True):
        assert torch.equal(found, start_vectors(pocket, [part], 2, Recipe(), alone=True)[0])
