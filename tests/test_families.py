"""Models of every architecture: cramming, files, decoding, the doctor, and docs/models.md.

Each model is tiny and has random weights. The properties depend on the code, not on the weights.
"""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch

import support
from conftest import (
    ALSO,
    FAMILIES,
    QUICK,
    SERVED_SINCE,
    TOO_NEW,
    WITHOUT_CACHE,
    V,
    build,
    passages,
    tiny,
)
from memvec.cramming.batch import Job
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.errors import MemvecError
from memvec.header import DocumentRecord, Header, PassageRecord
from memvec.lab.doctor import round_trip
from memvec.machine import environment
from memvec.model.caching import cached_logits
from memvec.model.lm import FrozenLM
from memvec.model.probes import checks
from memvec.model.reading import START_RULES
from memvec.passages.passage import ids_hash
from memvec.storage import STORAGES
from memvec.vectors import MemVectors
from properties import moves, paths
from support import shows

REFUSED = {"reformer"}  # its forward gives gradients to inputs in training mode only
SERVED = sorted(FAMILIES)


def as_mem(
    lm: FrozenLM, outcomes: list[Outcome], rule: str, storage: str = "float32"
) -> MemVectors:
    """A file's content for passages of token ids without a text."""
    outcomes = sorted(outcomes, key=lambda o: o.passage.document)
    records = [
        PassageRecord(
            **o.result.model_dump(),
            sha256=ids_hash(o.passage.ids),
            first=o.passage.ids[0] if rule == "first-token" else None,
        )
        for o in outcomes
    ]
    nothing = hashlib.sha256(b"").hexdigest()
    header = Header(
        model=lm.description(),
        start_rule=rule,
        packing=STORAGES[storage].packing,
        recipe=QUICK.record(),
        environment=environment(),
        documents=[DocumentRecord(name="ids", sha256=nothing, size=1, passages=len(records))],
        passages=records,
    )
    return MemVectors(torch.stack([o.vectors for o in outcomes]), header)


@pytest.mark.parametrize("rule", START_RULES)
@shows("file", SERVED)
def test_passages_decode_from_their_file(family, rule, tmp_path):
    lm, asked = tiny(family), passages(2, 3, 2, seed=2)
    engine = Engine(
        lm, Recipe.of(start_rule=rule, steps=600, patience=600), vectors=2, batch_size=2
    )
    outcomes = list(engine.run(asked))
    assert [o.exact for o in outcomes] == [True] * 3
    as_mem(lm, outcomes, rule).save(tmp_path / "a.mem")
    mem = MemVectors.load(tmp_path / "a.mem")
    assert mem.exact
    assert mem.tokens(lm) == [list(p.ids) for p in asked]


@pytest.mark.parametrize("rule", START_RULES)
@shows("cache", SERVED)
def test_decoding_gives_the_same_tokens_with_and_without_the_cache(family, rule):
    lm = tiny(family)
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(1))
    first = [3, 4, 5] if rule == "first-token" else None
    lengths = [9, 4, 7]
    fast = decode_ids(lm, vectors, lengths, start_rule=rule, first=first)
    slow = decode_ids(lm, vectors, lengths, start_rule=rule, first=first, cached=False)
    assert fast == slow
    assert [len(ids) for ids in fast] == lengths


@pytest.mark.parametrize("family", SERVED)
def test_cached_logits_are_those_of_one_forward_pass(family):
    lm = tiny(family)
    ids = torch.tensor([p.ids for p in passages(7, 7, 7)])
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            cached_logits(lm.model, lm.caching.argument, vectors, ids),
            lm.logits(vectors, ids),
            rtol=1e-3,
            atol=1e-3,
        )


@shows("batch", SERVED)
def test_a_batch_crams_like_single_passages(family):
    """Another batch shape changes only the rounding: with lr 0.01, eight steps agree to 1e-4."""
    lm, asked = tiny(family), passages(4, 3, 4)
    recipe = Recipe(steps=8, margin=1000.0, lr=0.01, lr_large=0.0)
    together = paths(Engine(lm, recipe, batch_size=3), asked)
    for passage in asked:
        alone = paths(Engine(lm, recipe, batch_size=1), [passage])[passage]
        assert moves(alone)
        torch.testing.assert_close(alone, together[passage], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@shows("grid", SERVED)
def test_certified_vectors_decode_in_every_way(family, dtype, tmp_path):
    """For every batch size, with the cache and without, from every storage format."""
    lm, asked = tiny(family, dtype), passages(2, 3)
    crammed = [o for o in Engine(lm, QUICK, vectors=2, batch_size=2).run(asked) if o.exact]
    assert len(crammed) == 2
    vectors, expected = [], []
    for name, storage in STORAGES.items():
        engine = Engine(lm, QUICK, vectors=2, batch_size=2, storage=storage)
        for outcome in crammed:
            engine.waiting.push(Job.from_outcome(outcome))  # crammed on, with this rounding
        stored = [outcome for outcome in engine.run() if outcome.exact]
        assert stored, f"rounding to {name} may cost one of them, not more"
        as_mem(lm, stored, "vectors", name).save(tmp_path / "a.mem", force=True)
        mem = MemVectors.load(tmp_path / "a.mem")
        assert mem.storage.name == name
        stored.sort(key=lambda o: o.passage.document)
        vectors += mem.vectors.float()
        expected += [(name, list(o.passage.ids)) for o in stored]
    for rows, cached in itertools.product((1, 7, 32), (True, False)):
        many = [i % len(expected) for i in range(max(rows, len(expected)))]
        found = decode_ids(
            lm,
            torch.stack([vectors[i] for i in many]),
            [len(expected[i][1]) for i in many],
            batch=rows,
            cached=cached,
        )
        assert [(expected[i][0], ids) for i, ids in zip(many, found, strict=True)] == [
            expected[i] for i in many
        ], (rows, cached)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@shows("doctor", SERVED)
def test_the_doctor_passes(family, dtype):
    """Every check in both dtypes, and in float32 the round trip at the end of `memvec doctor`."""
    lm = tiny(family, dtype)
    found = [*checks(lm), *([round_trip(lm)] if dtype == "float32" else [])]
    assert [check.name for check in found if not check.ok] == []
    assert lm.has_cache


@pytest.mark.parametrize("family", sorted(set(ALSO) - REFUSED - TOO_NEW))
def test_passages_of_a_further_family_decode_from_their_file(family, tmp_path):
    lm, asked = tiny(family), passages(2, 3)
    outcomes = list(Engine(lm, QUICK, vectors=2, batch_size=2).run(asked))
    as_mem(lm, outcomes, "vectors").save(tmp_path / "a.mem")
    mem = MemVectors.load(tmp_path / "a.mem")
    assert mem.tokens(lm) == [list(p.ids) for p in asked]
    slow = decode_ids(lm, mem.vectors.float(), [2, 3], batch=1, cached=False)
    assert slow == [list(p.ids) for p in asked]
    assert lm.has_cache == (family not in WITHOUT_CACHE)


def refusals() -> dict[str, str]:
    """The error for each family that memvec does not support."""
    said = {}
    for family in sorted(REFUSED):
        with pytest.raises(MemvecError) as error:
            FrozenLM(build(family), name=family)
        said[family] = str(error.value)
    return said


def models_page() -> str:
    """The text of docs/models.md."""
    return support.page(refusals(), WITHOUT_CACHE, SERVED_SINCE)


def test_the_page_says_what_is_tested():
    written = support.PAGE.read_text(encoding="utf-8")
    assert written == models_page(), "run: pytest tests/test_families.py --models docs/models.md"
    assert {f for covered in support.CLAIMS.values() for f in covered} == set(SERVED)
    assert set(support.KNOWN_AS) == set(FAMILIES) | set(ALSO)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_that_fails_a_self_check_is_refused_with_the_reason(family):
    with pytest.raises(
        MemvecError, match="cannot be crammed: 'vectors reach every later token' fails"
    ):
        FrozenLM(build(family), name=family)


@pytest.mark.parametrize("family", SERVED)
def test_cramming_does_not_change_the_model(family):
    lm = tiny(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
    list(Engine(lm, Recipe(steps=5), batch_size=2).run(passages(3, 2)))
    after = lm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in lm.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert hooks == sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()
    )


@pytest.mark.parametrize("family", SERVED)
def test_logits_are_the_models_own(family):
    """They come from the hidden states and the split head, with its soft caps and scales."""
    lm = tiny(family)
    ids = torch.tensor([p.ids for p in passages(8, 8)])
    with torch.no_grad():
        own = lm.model(input_ids=ids, use_cache=False).logits
        ours = lm.logits(lm.embed(ids[:, :3]), ids[:, 3:])
    assert ours.shape == (2, 5, V)
    torch.testing.assert_close(ours, own[:, 2:-1], rtol=1e-3, atol=1e-3)
    assert lm.has_split_head


def test_a_vector_is_as_wide_as_an_input_of_the_model():
    """OPT-350m projects its inputs, so a vector is narrower than a hidden state."""
    lm = tiny("opt-projected")
    assert (lm.width, lm.config.hidden_size) == (24, 32)
    (outcome,) = Engine(lm, Recipe(steps=2)).run(passages(2))
    assert outcome.vectors.shape == (1, 24)
