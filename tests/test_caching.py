"""The model's cache: how memvec finds it, its logits, and the warning where there is none."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from torch import nn

import memvec
from conftest import ALSO, FAMILIES, QUICK, TOO_NEW, WITHOUT_CACHE, build, passages, tiny
from memvec import decoding
from memvec.cramming.engine import Engine
from memvec.decoding import decode_ids
from memvec.errors import SlowPathWarning
from memvec.model.caching import KEEP_NONE, NAMES, cached_logits, find_cache
from memvec.model.lm import WHOLE_MODEL, FrozenLM
from memvec.model.probes import CACHE, checks
from test_families import REFUSED, as_mem
from test_lm import Wrong

CACHED = sorted((FAMILIES.keys() | ALSO.keys()) - set(WITHOUT_CACHE) - REFUSED - TOO_NEW)


class Hidden(nn.Module):
    """A tiny Llama that has a cache, as an argument whose name memvec does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama")
        self.config = self.inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=None, remembered=None):
        return self.inner(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False)


@pytest.mark.parametrize("family", CACHED)
def test_the_cache_of_every_family_is_used(family):
    """Releases of transformers have renamed the argument; the test fails if one does so again."""
    lm = tiny(family)
    assert lm.caching.reason is None
    assert lm.caching.argument in NAMES
    assert lm.has_cache


@pytest.mark.parametrize("family", WITHOUT_CACHE)
def test_a_family_without_a_usable_cache_decodes_exactly_with_a_warning(family):
    with pytest.warns(SlowPathWarning) as warned:
        lm = FrozenLM(build(family), name=family)
    said, *others = sorted({str(w.message) for w in warned})
    assert others == ([] if lm.has_split_head else [f"{family} {WHOLE_MODEL}"])
    assert said == f"{family} {lm.caching.sentence}"
    assert "each decoded token repeats the whole forward" in said
    assert not lm.caching.fault
    assert WITHOUT_CACHE[family] in said
    (check,) = [check for check in checks(lm) if check.name == CACHE]
    assert check.ok
    assert lm.caching.reason in check.detail
    outcomes = list(Engine(lm, QUICK, vectors=2, batch_size=2).run(passages(2, 3)))
    mem = as_mem(lm, outcomes, "vectors")
    certificate, exact = memvec.verify(lm, mem)
    assert exact == [True, True]
    assert certificate["cache"] == f"none: {lm.caching.reason}"


def test_every_family_listed_without_a_cache_is_known_to_transformers():
    """The list holds model types of transformers; any other word would never match."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert set(KEEP_NONE) <= set(CONFIG_MAPPING)


@pytest.mark.parametrize("family", ["llama", "mamba", "gemma3", "jamba"])
def test_logits_with_the_cache_are_those_without_it(family):
    lm = tiny(family)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
    ours = cached_logits(lm.model, lm.caching.argument, lm.embed(ids[:, :2]), ids[:, 2:])
    truth = lm.own_logits(ids)[:, 1:-1]
    torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)


def test_a_cache_that_memvec_does_not_find_is_an_error_of_memvec():
    with pytest.warns(SlowPathWarning) as warned:
        lm = FrozenLM(Hidden(), name="hidden")
    said, _ = (str(w.message) for w in warned)
    assert "an error of memvec, please report it" in said
    assert "its configuration says that it keeps one" in said
    assert lm.caching.fault
    (check,) = [check for check in checks(lm) if not check.ok]
    assert check.name == CACHE


def test_the_doctor_exits_2_where_a_cache_is_hidden(command, folder, monkeypatch):
    monkeypatch.setattr(
        "memvec.lab.doctor.load_lm", lambda *_, **__: FrozenLM(Hidden(), name="hidden", check=False)
    )
    ran = command("doctor", "--model", folder)
    assert ran.code == 2
    said = " ".join(ran.out.decode().split())
    assert "its configuration says that it keeps one, under none of the known names" in said
    assert "This model cannot be crammed here: 'decodes with its cache' fails" in said


def test_a_forward_that_takes_a_cache_and_returns_none_has_none():
    class Empty(Hidden):
        def forward(self, input_ids=None, inputs_embeds=None, use_cache=None, cache=None):
            return super().forward(input_ids, inputs_embeds)

    model = Empty()
    assert "cache" in inspect.signature(Empty.forward).parameters
    found = find_cache(model, model.get_input_embeddings())
    assert found.argument is None
    assert found.fault


def test_a_model_whose_configuration_has_no_cache_is_no_error_of_memvec():
    model = Hidden()
    model.config = types.SimpleNamespace(model_type="of-ones-own")
    model.config.get_text_config = lambda: model.config
    found = find_cache(model, model.get_input_embeddings())
    assert (found.argument, found.fault, found.reason) == (None, False, "it keeps none")


@pytest.mark.parametrize("kind", ["mean", "first"])
def test_a_cache_that_mixes_the_rows_of_a_batch_is_not_used(kind):
    """Its logits are right for one text and for two equal texts only."""

    class MixesRows(Wrong):
        def forward(self, input_ids=None, inputs_embeds=None, cache=None, use_cache=None):
            if cache is not None:  # reads a token at a time
                rows = self.get_input_embeddings()(input_ids)
                other = rows.mean(0, keepdim=True) if kind == "mean" else rows[:1]
                input_ids, inputs_embeds = None, other.expand(len(rows), -1, -1)
            return super().forward(input_ids, inputs_embeds, cache, use_cache)

    with pytest.warns(SlowPathWarning):
        lm = FrozenLM(MixesRows("nothing"), name="mixing")
    assert not lm.has_cache
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(0))
    assert decode_ids(lm, vectors, [6, 5, 4]) == decode_ids(tiny(), vectors, [6, 5, 4])


@pytest.mark.parametrize("start_rule", ["vectors", "bos", "first-token"])
def test_a_batch_takes_one_forward_pass_for_each_token_that_it_predicts(start_rule, monkeypatch):
    """Without the cache, each pass reads all inputs again, and no pass gets a cache."""
    lm = tiny()
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(1))
    predicted = 6 - (start_rule == "first-token")
    cached, read = [], []
    forward = decoding.forward_with_cache
    monkeypatch.setattr(
        decoding, "forward_with_cache", lambda *a, **k: cached.append(1) or forward(*a, **k)
    )
    handle = lm.model.register_forward_pre_hook(
        lambda _, args, given: read.append(
            next(given[k].shape[1] for k in ("inputs_embeds", "input_ids") if k in given)
        ),
        with_kwargs=True,
    )
    options = {"start_rule": start_rule, "first": [3, 4, 5]}
    try:
        found = decode_ids(lm, vectors, [6, 5, 4], **options)
        assert len(cached) == predicted
        assert read[1:] == [1] * (predicted - 1)
        first = read.pop(0)
        read.clear()
        assert decode_ids(lm, vectors, [6, 5, 4], cached=False, **options) == found
    finally:
        handle.remove()
    assert len(cached) == predicted
    assert read == [first + i for i in range(predicted)]


@pytest.mark.parametrize("start_rule", ["vectors", "first-token"])
@pytest.mark.parametrize("listed", [None, [[(2, 7)], [], [(1, 5), (3, 0)], [(0, 9)], [(2, 1)]]])
def test_passages_are_decoded_alike_in_batches_of_any_size(start_rule, listed):
    """Lengths, given tokens and corrections are those of each passage, not of its batch."""
    lm = tiny()
    vectors = torch.randn(5, 2, lm.width, generator=torch.Generator().manual_seed(2))
    lengths = [6, 5, 4, 3, 7]
    options = {"start_rule": start_rule, "corrections": listed, "first": [3, 4, 5, 9, 10]}
    alone = decode_ids(lm, vectors, lengths, batch=1, **options)
    assert list(map(len, alone)) == lengths
    if start_rule == "first-token":
        assert [ids[0] for ids in alone] == [3, 4, 5, 9, 10]
    for batch in (2, 3, 32):
        assert decode_ids(lm, vectors, lengths, batch=batch, **options) == alone
