"""Texts to certified vectors and back: cutting, halving, the journal, and refusals."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import memvec
from conftest import QUICK, build, byte_tokenizer, passages, reader, tiny
from memvec import codec, cram_job
from memvec.cli.common import account
from memvec.cli.display import failures
from memvec.cli.expected import sentence
from memvec.codec import cram, decode
from memvec.cram_job import CramJob, CramStatus
from memvec.cramming import engine as engine_module
from memvec.cramming import outcomes as outcomes_module
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, NotExactError
from memvec.journal import Journal
from memvec.model import batch_size as batch_size_module
from memvec.model.estimate import facts_of
from memvec.model.lm import FrozenLM
from memvec.model.reading import START_RULES
from memvec.passages.cutting import surprisals
from memvec.passages.documents import Document
from memvec.passages.passage import Passage
from memvec.resume import settings_of
from memvec.storage import storage_of
from memvec.vectors import MemVectors

TEXT = "the cat sat on the lazy dog, é\r\n"
OPTIONS = {"vectors": 2, "tokens": 2, "recipe": QUICK}
HASTY = Recipe(steps=30, patience=10)  # long passages run out of patience soon, and are halved


# ---------------------------------------------------------------------- texts to vectors and back


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("rule", START_RULES)
def test_several_texts_come_back(kind, rule, tmp_path):
    lm, texts = reader(kind), ["the fox", "Dog, über\t👍\r\n", "x"]
    if rule == "first-token":
        texts = ["the fox", "Dog, über\t👍\r\n"]  # a passage of one token has none to predict
    recipe = Recipe(steps=600, patience=600, start_rule=rule)
    mem = codec.cram(lm, texts, vectors=2, tokens=2, recipe=recipe)
    assert mem.exact
    assert mem.header.certificate is not None
    assert mem.header.certificate["exact"] is True
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert codec.decode(lm, again) == texts
    assert again.header.start_rule == rule
    # The only token of the text in the file is the first one, if decoding is given it.
    assert {p.first is not None for p in again.passages} == {rule == "first-token"}


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_passages_are_exact_in_each_storage_of_floats(storage):
    mem = codec.cram(reader(), ["the fox"], storage=storage, **OPTIONS)
    assert mem.exact
    assert mem.vectors.dtype == getattr(torch, storage)
    assert codec.decode(reader(), mem) == ["the fox"]


@pytest.mark.slow
def test_passages_are_cut_by_bits_if_no_length_is_given(monkeypatch):
    """The bits per vector are estimated on passages of the text, or are a fact of the model."""
    lm = reader()
    estimated = codec.cram(lm, [TEXT], vectors=3, recipe=QUICK)
    assert codec.decode(lm, estimated) == [TEXT]
    monkeypatch.setattr(lm, "facts", {"bits_per_vector": {"1": 3.0, "4": 99.0}})
    known = codec.cram(lm, [TEXT], vectors=3, recipe=QUICK)
    assert codec.decode(lm, known) == [TEXT]
    budget = cram_job.FILL * 3 * 3.0
    assert all(p.tokens == 1 or p.lm_bits <= budget + 1e-3 for p in known.passages)
    assert len(known.passages) >= len(estimated.passages)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "whole"), [("the fox and a dog", True), (TEXT * 3, False)])
def test_a_text_that_fits_in_one_passage_is_not_cut(monkeypatch, text, whole):
    """The probed length doubles until a probe is not exact, or until it is the whole text."""
    lm, probed, once = reader(), [], cram_job.CramJob._probed

    def seen(self, ids, length):
        probed.append(length)
        return once(self, ids, length)

    monkeypatch.setattr(cram_job.CramJob, "_probed", seen)
    monkeypatch.setattr(cram_job, "PROBE_TOKENS", 1)
    mem = codec.cram(lm, [text], vectors=2, recipe=replace(QUICK, steps=200, patience=60))
    n = len(lm.tokenize(text))
    assert probed == [min(2 * 2**i, n) for i in range(len(probed))]
    assert (probed[-1] == n) == whole == (len(mem.passages) == 1)
    assert codec.decode(lm, mem) == [text]


def test_a_passage_that_does_not_fit_is_halved_until_it_does():
    lm, seen = reader(), []
    mem = codec.cram(lm, [TEXT], vectors=1, tokens=8, recipe=HASTY, on_status=seen.append)
    assert mem.exact
    assert codec.decode(lm, mem) == [TEXT]
    ids = lm.tokenize(TEXT)
    assert len(mem.passages) > -(-len(ids) // 8)
    assert sum(p.tokens for p in mem.passages) == len(ids)
    assert seen[-1].split > 0
    stages = list(dict.fromkeys(status.stage for status in seen))
    assert stages == ["preparing", "measuring", "cutting", "cramming", "certifying"]
    assert seen[-1].done == seen[-1].tokens == len(ids)


@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_every_half_has_a_token_to_predict_after_its_first_token(tokens):
    """With the start rule 'first-token', a half of one token would have none to predict."""
    recipe = Recipe(steps=0, start_rule="first-token", if_not_exact="stop")
    mem = codec.cram(reader(), ["the cat sat on the mat"], tokens=tokens, recipe=recipe)
    lengths = [passage.tokens for passage in mem.passages]
    assert min(lengths) >= 2
    assert sum(lengths) == 6


def test_passages_that_are_not_exact_are_named():
    """Without any step, passages are halved until they have fewer than two tokens per vector."""
    lm = reader()
    mem = codec.cram(lm, [TEXT], vectors=2, tokens=8, recipe=Recipe(steps=0))
    assert not mem.exact
    assert min(p.tokens for p in mem.passages) >= 2
    assert all(p.tokens < 4 for p in mem.passages if not p.exact)  # a longer one is halved
    failed = [i for i, p in enumerate(mem.passages) if not p.exact]
    sentences = list(failures(mem))
    assert len(sentences) == len(failed)
    for i, failure in zip(failed, sentences, strict=True):
        assert failure.startswith(f"passage {i} ")
        assert "it was given up at step 0" in failure
    with pytest.raises(NotExactError):
        codec.decode(lm, mem)


def test_a_passage_that_is_not_finite_is_named_and_the_others_can_be_saved(monkeypatch, tmp_path):
    lm, start = reader(), engine_module.starts.start_vectors
    sick = tuple(lm.tokenize(TEXT)[2:4])

    def poisoned(lm, everyone, K, recipe, **options):
        vectors = start(lm, everyone, K, recipe, **options)
        return [
            v * torch.nan if set(ids) & set(sick) else v
            for ids, v in zip(everyone, vectors, strict=True)
        ]

    monkeypatch.setattr(engine_module.starts, "start_vectors", poisoned)
    mem = codec.cram(lm, [TEXT], **OPTIONS)
    assert {p.status for p in mem.passages} == {"done", "not-finite"}
    assert any("the loss was not finite" in sentence for sentence in failures(mem))
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert [p.exact for p in again.passages] == [p.exact for p in mem.passages]
    _, exact = memvec.verify(lm, again)
    assert exact == [p.exact for p in mem.passages]


def test_a_passage_that_fails_the_last_decode_is_crammed_with_a_larger_margin(monkeypatch):
    """The engine called it exact, but the decode of the whole file fails: the margin doubles."""
    lm, honest, disagreed = reader(), cram_job.certificate_of, []

    def disagreeing(lm, mem, decoded):
        certificate, exact = honest(lm, mem, decoded)
        if not disagreed:
            disagreed.append(0)
            return certificate | {"exact": False}, [False, *exact[1:]]
        return certificate, exact

    monkeypatch.setattr(cram_job, "certificate_of", disagreeing)
    mem = codec.cram(lm, [TEXT], **OPTIONS)
    assert disagreed
    assert mem.exact
    asked = mem.header.recipe["margin"]
    assert mem.passages[0].margin_asked == pytest.approx(2 * asked)
    assert {p.margin_asked for p in mem.passages[1:]} == {asked}


def test_the_certificate_of_use_gets_vectors_and_passages_in_the_order_of_the_text(monkeypatch):
    """Passages finish in any order, and the term compares each with its own vectors."""
    lm, seen = reader(), []
    options = {"tokens": 2, "batch_size": 4, "storage": storage_of("float32"), "halve": False}
    recipe = Recipe(steps=0, if_not_exact="stop")
    work = CramJob(lm, [Document.of(lm, "the cat sat on the mat")], 2, recipe=recipe, **options)
    cut = list(work.make_cutter().cut(work.documents[0].ids))
    work.cram(cut)
    work.done = dict(sorted(work.done.items(), reverse=True))
    monkeypatch.setattr(work.engine.stepper.term, "certificate", lambda *asked: seen.append(asked))
    mem = work.certified()
    ((of, ids),) = seen
    assert torch.equal(of.vectors, mem.vectors)
    assert ids == [passage.ids for passage in cut]
    assert len(ids) == len(mem.passages) == 3


def test_a_passage_that_fails_the_last_decode_is_kept_if_the_recipe_says_stop(monkeypatch):
    lm, honest, decodes = reader(), cram_job.certificate_of, []

    def disagreeing(lm, mem, decoded):
        decodes.append(decoded)
        certificate, exact = honest(lm, mem, decoded)
        return certificate | {"exact": False}, [False, *exact[1:]]

    monkeypatch.setattr(cram_job, "certificate_of", disagreeing)
    options = OPTIONS | {"recipe": replace(OPTIONS["recipe"], if_not_exact="stop")}
    mem = codec.cram(lm, [TEXT], **options)
    assert len(decodes) == 1
    assert [p.exact for p in mem.passages] == [False] + [True] * (len(mem.passages) - 1)
    assert {p.margin_asked for p in mem.passages} == {mem.header.recipe["margin"]}


def test_a_text_with_passages_that_are_not_exact_is_decoded_once(monkeypatch):
    honest, decodes = cram_job.certificate_of, []

    def counted(lm, mem, decoded):
        decodes.append(decoded)
        return honest(lm, mem, decoded)

    monkeypatch.setattr(cram_job, "certificate_of", counted)
    mem = codec.cram(reader(), [TEXT], vectors=2, tokens=8, recipe=Recipe(steps=0))
    assert not mem.exact
    assert len(decodes) == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_a_passage_that_fails_the_last_decode_without_steps_left_is_halved(
    monkeypatch, tmp_path, resumed
):
    """A resumed run also has the halves: the journal kept them."""
    lm, honest = reader(), cram_job.certificate_of
    options = OPTIONS | {"tokens": 4, "recipe": Recipe(steps=0, margin=1e3)}
    everything_decodes(monkeypatch)

    def disagreeing(lm, mem, decoded):
        certificate, _ = honest(lm, mem, decoded)
        exact = [p.tokens <= 2 for p in mem.passages]
        return certificate | {"exact": all(exact)}, exact

    monkeypatch.setattr(cram_job, "certificate_of", disagreeing)
    record = journal(tmp_path / "j")
    mem = codec.cram(lm, [TEXT], journal=record, **options)
    if resumed:
        monkeypatch.setattr(cram_job, "certificate_of", honest)
        record.close()
        record = journal(tmp_path / "j")
        mem = codec.cram(lm, [TEXT], journal=record, **options)
    record.close()
    assert max(p.tokens for p in mem.passages) == 2
    assert {p.status for p in mem.passages} == {"budget"}
    assert sum(p.tokens for p in mem.passages) == len(lm.tokenize(TEXT))


@contextlib.contextmanager
def numbers_in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def products_in_bfloat16() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(numbers_in_float64, marks=pytest.mark.slow),
        pytest.param(products_in_bfloat16, marks=pytest.mark.slow),
        torch.inference_mode,
        pytest.param(lambda: torch.device("meta"), marks=pytest.mark.slow),
        pytest.param(lambda: torch.autocast("cpu", dtype=torch.bfloat16), marks=pytest.mark.slow),
    ],
)
def test_global_settings_of_torch_do_not_change_results(settings):
    lm = reader()
    truth = cram(lm, TEXT[:20], tokens=4, recipe=QUICK)

    def state() -> tuple[object, ...]:
        products = torch.backends.mkldnn.matmul.fp32_precision
        devices = torch.get_default_dtype(), torch.get_default_device(), products
        return *devices, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    with settings():
        before = state()
        mem = cram(lm, TEXT[:20], tokens=4, recipe=QUICK)
        assert memvec.verify(lm, mem)[1] == [True] * len(mem.passages)
        assert decode(lm, mem) == [TEXT[:20]]
        (measured, *_) = memvec.measure(lm, mem, TEXT[:20])
        assert memvec.FrozenLM(lm.model, lm.tokenizer).logit_spread == lm.logit_spread
        assert state() == before
    assert torch.equal(mem.vectors, truth.vectors)
    assert not mem.vectors.is_inference()
    assert measured.mem_bits == memvec.measure(lm, truth, TEXT[:20])[0].mem_bits


def everything_decodes(monkeypatch) -> None:
    """Let certification call every outcome of the engine exact."""
    honest = engine_module.outcomes_of

    def all_exact(*args):
        return (replace(outcome, exact=True) for outcome in honest(*args))

    monkeypatch.setattr(engine_module, "outcomes_of", all_exact)


@pytest.mark.parametrize(
    ("texts", "options", "sentence"),
    [
        ([], {}, "no text to cram"),
        ([""], {}, "text 0 is empty"),
        (["a", b""], {}, "text 1 is empty"),
        (["a"], {"storage": "int3"}, "unknown storage 'int3'"),
        (["a"], {"vectors": 0}, "vectors must be at least 1"),
        (["a"], {"batch_size": -1}, "batch_size must be at least 1"),
        (["a"], {"tokens": 0}, "tokens must be at least 1"),
        (["a"], {"tokens": 128}, "128 tokens do not fit the context"),
        (["a"], {"vectors": 128}, "128 vectors leave no room for text"),
        (["a"], {"recipe": Recipe(start_rule="first-token")}, "too short for the start rule"),
    ],
)
def test_bad_input_is_refused_in_one_line(texts, options, sentence):
    with pytest.raises(MemvecError, match=sentence) as error:
        codec.cram(reader(), texts, **options)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("texts", "options", "sentence"),
    [
        (Path("letter.txt"), {}, "text 0 is no str or bytes but of the type PosixPath."),
        (["a", [1, 2, 3]], {}, "text 1 is no str or bytes but of the type list."),
        (torch.tensor([3, 4]), {}, "text 0 is no str or bytes but of the type Tensor."),
        (None, {}, "text 0 is no str or bytes but of the type NoneType."),
        (np.array([]), {}, "there is no text to cram."),
        ("a", {"recipe": "paper"}, "recipe is a memvec.Recipe, as Recipe.of('paper') gives, not "),
        ("a", {"vectors": "2"}, "vectors must be a whole number, not '2'."),
        ("a", {"vectors": [1, 2]}, "vectors must be a whole number, not [1, 2]."),
        ("a", {"tokens": np.array([8])}, "tokens must be a whole number, not array([8])."),
        ("a", {"vectors": 1.5}, "vectors must be a whole number, not 1.5."),
        ("a", {"tokens": 2.0}, "tokens must be a whole number, not 2.0."),
        ("a", {"recipe": {}}, "recipe is a memvec.Recipe, as Recipe.of('paper') gives, not {}."),
        ({"text": "the"}, {}, "text 0 is no str or bytes but of the type dict."),
        (pd.DataFrame({"text": ["the"]}), {}, "but of the type DataFrame."),
        ("a", {"storage": None}, "unknown storage 'None': known: "),
    ],
)
def test_input_of_a_wrong_type_is_refused(texts, options, sentence):
    with pytest.raises(MemvecError, match=re.escape(sentence)):
        codec.cram(reader(), texts, **options)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("path", ["letter.mem", Path("letter.mem"), None])
@pytest.mark.parametrize(
    "given",
    [
        lambda lm, mem: memvec.decode(lm, mem),
        lambda lm, mem: memvec.verify(lm, mem),
        lambda lm, mem: memvec.measure(lm, mem, "the"),
        lambda lm, mem: memvec.use(lm, mem, "the"),
        lambda lm, mem: memvec.context_inputs(lm, mem),
        lambda lm, mem: memvec.certify_use(lm, mem),
    ],
)
def test_a_path_in_place_of_vectors_is_refused(given, path):
    sentence = f"mem is a memvec.MemVectors, as MemVectors.load gives, not {path!r}."
    with pytest.raises(MemvecError, match=re.escape(sentence)):
        given(reader(), path)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("given", [lambda: torch.rand(2, 3, 4), lambda: reader().model])
def test_a_large_object_in_place_of_vectors_is_refused_in_a_short_line(given):
    with pytest.raises(MemvecError, match=re.escape("as MemVectors.load gives, not ")) as error:
        memvec.decode(reader(), given())
    assert len(str(error.value)) < 140
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("untyped")
def test_a_name_in_place_of_a_model_is_refused():
    mem = codec.cram(reader(), "the", vectors=2, recipe=QUICK)
    for given in (
        lambda: memvec.cram("pocket", "the"),
        lambda: memvec.decode("pocket", mem),
        lambda: memvec.verify("pocket", mem),
        lambda: memvec.measure("pocket", mem, "the"),
        lambda: memvec.use("pocket", mem, "the"),
        lambda: memvec.context_inputs("pocket", mem),
        lambda: memvec.certify_use("pocket", mem),
    ):
        with pytest.raises(MemvecError, match=r"as memvec\.load_lm gives, not 'pocket'"):
            given()
    with pytest.raises(MemvecError, match="the prompt is no str but of the type NoneType"):
        memvec.use(reader(), mem, None)


@pytest.mark.usefixtures("untyped")
def test_any_collection_of_texts_is_crammed():
    expected = ["the", "cat"]
    for texts in (tuple(expected), iter(expected), np.array(expected), dict.fromkeys(expected)):
        mem = codec.cram(reader(), texts, vectors=2, recipe=QUICK)
        assert codec.decode(reader(), mem) == expected
        assert len(memvec.measure(reader(), mem, iter(expected))) == len(mem.passages)


def test_a_token_without_an_embedding_is_refused():
    """The tokenizer has an added token, and the model was not resized."""
    tokenizer = deepcopy(byte_tokenizer())
    tokenizer.add_tokens(["<new>"])
    lm = copy(reader())
    lm.tokenizer = tokenizer
    assert codec.decode(lm, codec.cram(lm, ["the"], vectors=2, recipe=QUICK)) == ["the"]
    with pytest.raises(MemvecError, match=f"no row for the token {lm.vocab_size} of its tokenizer"):
        codec.cram(lm, ["the<new>cat"], vectors=2)


def test_a_text_needs_a_tokenizer():
    with pytest.raises(MemvecError, match="loaded without a tokenizer, and this needs one"):
        codec.cram(tiny(), ["a"])


@pytest.mark.parametrize(("free", "batch_size"), [(10**15, 32), (0, 1)])
def test_the_number_of_slots_depends_on_free_memory(monkeypatch, free, batch_size):
    monkeypatch.setattr(batch_size_module, "free_memory", lambda: free)
    assert batch_size_module.default_batch_size(reader(), 100) == batch_size


# ---------------------------------------------------------------------- interruptions


def journal(path: Path, **changes) -> Journal:
    """The journal of a run of `OPTIONS`."""
    return Journal(path, {"vectors": 2} | changes)


@functools.cache
def uninterrupted(tokens: int) -> MemVectors:
    return codec.cram(reader(), [TEXT], vectors=2, tokens=tokens, recipe=HASTY, batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("tokens", [2, 8])
def test_a_resumed_run_gives_the_vectors_of_an_uninterrupted_one(
    tmp_path, monkeypatch, after, tokens
):
    """Finished passages are not crammed again, nor are those that were halved."""
    lm, path = reader(), tmp_path / "j"
    options = {"vectors": 2, "tokens": tokens, "recipe": HASTY, "batch_size": 1}
    whole = uninterrupted(tokens)
    record = journal(path)

    def interrupt(_: CramStatus):
        if len(record) >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codec.cram(lm, [TEXT], journal=record, on_status=interrupt, **options)
    finished = len(record)
    assert finished >= after
    record.close()

    again, crammed = journal(path), []
    push = engine_module.Engine.push
    monkeypatch.setattr(
        engine_module.Engine, "push", lambda s, p: crammed.append(p.ids) or push(s, p)
    )
    resumed = codec.cram(lm, [TEXT], journal=again, **options)
    assert torch.equal(resumed.vectors, whole.vectors)
    assert [p.sha256 for p in resumed.passages] == [p.sha256 for p in whole.passages]
    assert len(again) == finished + len(crammed)
    exact = [p.exact for p in whole.passages]  # how many are depends on how a processor rounds
    assert [p.exact for p in resumed.passages] == memvec.verify(lm, resumed)[1] == exact
    assert sum(exact) > len(exact) / 2
    again.close(delete=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_same_call_with_a_journal_resumes_and_another_recipe_does_not(tmp_path, monkeypatch):
    """The journal is a path here; each call unlocks it when it ends."""
    lm, path = reader(), tmp_path / "kept"
    options = {"vectors": 2, "tokens": 8, "recipe": HASTY, "batch_size": 1, "journal": str(path)}
    crammed, push = [], engine_module.Engine.push
    monkeypatch.setattr(
        engine_module.Engine, "push", lambda s, p: crammed.append(p.ids) or push(s, p)
    )

    def interrupt(status: CramStatus):
        if status.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codec.cram(lm, [TEXT], on_status=interrupt, **options)
    whole = uninterrupted(8)
    crammed.clear()
    for journal, fewer in ((str(path), 0), (path, len(whole.passages))):
        before = len(crammed)
        mem = codec.cram(lm, [TEXT], **options | {"journal": journal})
        assert torch.equal(mem.vectors, whole.vectors)
        assert (len(crammed) == before) == bool(fewer)
    assert len(crammed) < len(whole.passages)
    before = len(crammed)
    codec.cram(lm, [TEXT], **options | {"recipe": replace(HASTY, seed=1)})
    assert len(crammed) >= before + len(whole.passages)


def test_a_journal_in_a_missing_folder_is_refused():
    with pytest.raises(MemvecError, match=r"^there is no folder no/folder to keep kept in\.$"):
        codec.cram(reader(), [TEXT], journal="no/folder/kept", vectors=2)


def test_the_settings_of_a_journal_include_all_that_changes_the_vectors(tmp_path, monkeypatch):
    trigger = tmp_path / "t.safetensors"
    trigger.write_bytes(b"1")
    recipe, sizes = replace(QUICK, trigger=str(trigger)), {"vectors": 1, "storage": "float32"}
    sizes["layout"] = "prefix"
    found = [settings_of(reader(), recipe, **sizes)]
    for change in ({"vectors": 2}, {"storage": "int8"}, {"layout": "one-step"}):
        found.append(settings_of(reader(), recipe, **(sizes | change)))
    found.append(settings_of(reader(seed=1), recipe, **sizes))
    found.append(settings_of(reader(), replace(recipe, seed=1), **sizes))
    trigger.write_bytes(b"2")
    found.append(settings_of(reader(), recipe, **sizes))
    with monkeypatch.context() as patch:
        patch.setattr("memvec.resume.__version__", "0")
        found.append(settings_of(reader(), recipe, **sizes))
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)

    monkeypatch.setenv("HOME", str(tmp_path))
    asked, opened = {}, codec.opened

    def noted(*args, **sizes):
        asked.update(sizes)
        return opened(*args, **sizes)

    monkeypatch.setattr(codec, "opened", noted)
    given = {"layout": "one-step", "storage": "bfloat16", "journal": "~/kept"}
    codec.cram(reader(), "fox", tokens=2, recipe=replace(QUICK, steps=0), **given)
    assert asked == {"vectors": 2, "layout": "one-step", "storage": "bfloat16"}
    assert (tmp_path / "kept").is_file()


def test_errors_of_a_journal_do_not_advise_to_delete_an_intact_file(tmp_path):
    """The path is that of a text, or the journal is closed or of another thread."""
    letter, record = tmp_path / "letter.txt", journal(tmp_path / "j")
    letter.write_text("Dear John,\n" * 9)
    with pytest.raises(MemvecError, match=r"letter.txt is no file of finished passages: name an"):
        codec.cram(reader(), [TEXT], journal=letter)
    assert letter.read_text() == "Dear John,\n" * 9
    with (
        ThreadPoolExecutor() as pool,
        pytest.raises(MemvecError, match="j cannot be written or re"),
    ):
        pool.submit(len, record).result()
    record.close()
    with pytest.raises(
        MemvecError, match="j cannot be written or read: Cannot operate on a closed"
    ):
        len(record)


@pytest.mark.parametrize(
    "change",
    [
        "vectors = zeroblob(length(vectors))",
        "vectors = substr(vectors, 1, 10)",
        "vectors = 'text'",
        "record = '{}'",
        "record = replace(record, 'true', 'false')",
    ],
)
def test_a_changed_row_of_a_journal_is_refused(tmp_path, change):
    lm, path, (passage,) = tiny(), tmp_path / "j", passages(4)
    (outcome,) = engine_module.Engine(lm, HASTY, vectors=2).run([passage])
    record = journal(path)
    record.put(outcome)
    assert torch.equal(record.get(passage).vectors, outcome.vectors)
    record.close()
    with sqlite3.connect(path) as rows:
        rows.execute(f"UPDATE finished_passages SET {change}")
    rows.close()
    with pytest.raises(MemvecError, match=r"is damaged \(a row was changed\): delete it"):
        (changed := journal(path)).get(passage)
    changed.close()


def test_vectors_that_were_changed_are_not_saved(tmp_path):
    lm = reader()
    mem = codec.cram(lm, [TEXT], **OPTIONS)
    path = mem.save(tmp_path / "a.mem")
    before = path.read_bytes()
    broken = mem.vectors.clone()
    broken[0, 0, 0] = math.nan
    header = mem.header
    for vectors in (broken, mem.vectors[:-1]):
        mem.vectors, mem.header = vectors, header
        with pytest.raises(MemvecError, match="were changed after they were certified"):
            mem.save(path, force=True)
        mem.header = header.model_copy(update={"certificate": None})  # nor without a certificate
        with pytest.raises(MemvecError, match="were changed or are not finite"):
            mem.save(path, force=True)
    assert path.read_bytes() == before


KILLED = """
import os, signal, sys
from pathlib import Path
from memvec import codec, cram_job
from memvec.cramming.recipe import Recipe
from memvec.journal import Journal
from memvec.loading import load_lm

record = Journal(Path(sys.argv[2]), {"vectors": 2})

def kill(status):
    if len(record) >= 2:
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(steps=600, patience=600)
codec.cram(load_lm(sys.argv[1]), [sys.argv[3]], vectors=2, tokens=2, batch_size=1, recipe=recipe,
           journal=record, on_status=kill)
"""


@pytest.mark.slow
def test_passages_finished_before_sigkill_are_kept(folder, tmp_path, python):
    path = tmp_path / "j"
    ran = subprocess.run(
        [python, "-c", KILLED, folder, path, TEXT],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == -signal.SIGKILL
    again = journal(path)
    assert len(again) == 2
    lm = reader()
    ids = tuple(lm.tokenize(TEXT))
    known = [again.get(Passage(ids[at : at + 2])) for at in range(0, len(ids), 2)]
    assert sum(outcome is not None for outcome in known) == 2
    mem = codec.cram(lm, [TEXT], journal=again, batch_size=1, **OPTIONS)
    assert mem.exact
    for outcome in known:
        if outcome is not None:
            assert any(torch.equal(outcome.vectors, vectors) for vectors in mem.vectors)
    again.close()


@pytest.mark.slow
def test_a_second_writer_of_a_journal_is_refused(tmp_path):
    first = journal(tmp_path / "a.mem.partial")
    with pytest.raises(MemvecError, match=r"another memvec is writing a\.mem"):
        journal(tmp_path / "a.mem.partial")
    first.close()
    journal(tmp_path / "a.mem.partial").close(delete=True)


def test_a_journal_gives_only_passages_of_its_settings(tmp_path):
    lm, record = reader(), journal(tmp_path / "j")
    mem = codec.cram(lm, ["the fox"], journal=record, **OPTIONS)
    passage = Passage(tuple(lm.tokenize("the fox")[:2]))
    assert torch.equal(record.get(passage).vectors, mem.vectors[0])
    assert record.get(passage).exact
    assert record.get(Passage((5, 5))) is None
    record.close()
    other = journal(tmp_path / "j", vectors=3)
    assert other.get(passage) is None
    other.close()


def test_a_passage_that_is_crammed_again_replaces_its_row_in_the_journal(tmp_path):
    """The last decode may have a passage crammed again; the journal counts it once."""
    (outcome,) = engine_module.Engine(tiny(), HASTY, vectors=2).run(passages(4))
    record = journal(tmp_path / "j")
    record.put(outcome)
    record.put(replace(outcome, vectors=outcome.vectors + 1, steps=outcome.steps + 1))
    again = record.get(outcome.passage)
    assert (len(record), again.steps) == (1, outcome.steps + 1)
    assert torch.equal(again.vectors, outcome.vectors + 1)
    record.close()


def test_halves_of_an_earlier_run_are_not_crammed_again(tmp_path):
    """The passage is not exact: first in this run, then as a row of the journal."""
    lm, record, text = reader(), journal(tmp_path / "j"), "the cat sat on"
    (whole,) = [Passage(tuple(Document.of(lm, text).ids))]
    for outcome in Engine(lm, QUICK, vectors=2).run(whole.halves()):
        record.put(outcome)
    options = {"vectors": 2, "tokens": 4, "recipe": Recipe(steps=0), "journal": record}
    for _ in range(2):  # the second time, the journal also has the whole passage
        mem = codec.cram(lm, [text], **options)
        assert (mem.exact, len(mem.passages), len(record)) == (True, 2, 3)
    record.close()


def test_a_journal_ignores_rows_of_another_format(tmp_path, monkeypatch):
    record = journal(tmp_path / "j")
    codec.cram(reader(), ["the fox"], journal=record, **OPTIONS)
    assert len(record)
    record.close()
    monkeypatch.setattr("memvec.journal.FORMAT", 1)
    later = journal(tmp_path / "j")
    assert len(later) == 0
    later.close()


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "int8"])
def test_a_resumed_run_keeps_its_storage(tmp_path, storage):
    lm, record = reader(), journal(tmp_path / "j")
    first = codec.cram(lm, ["the fox"], journal=record, storage=storage, **OPTIONS)
    again = codec.cram(lm, ["the fox"], journal=record, storage=storage, **OPTIONS)
    record.close()
    assert again.storage.name == first.storage.name == storage
    assert torch.equal(again.vectors, first.vectors)


def test_a_damaged_or_unwritable_journal_is_refused(tmp_path, monkeypatch):
    (tmp_path / "j").write_bytes(b"not a database" * 1000)
    with pytest.raises(MemvecError, match="is damaged"):
        journal(tmp_path / "j")
    with pytest.raises(MemvecError, match="cannot be written"):
        journal(tmp_path / "no-such-folder" / "j")
    record = journal(tmp_path / "k")
    mem_outcomes = []
    put = record.put
    monkeypatch.setattr(record, "put", lambda outcome: mem_outcomes.append(outcome))
    codec.cram(reader(), ["the fox"], journal=record, **OPTIONS)

    class Full:
        def execute(self, *_):
            raise sqlite3.OperationalError("database or disk is full")

    database = record._db
    record._db = Full()
    with pytest.raises(MemvecError, match="database or disk is full"):
        put(mem_outcomes[0])
    record._db = database
    record.close()


# ---------------------------------------------------------------------- never a wrong text


def test_verify_and_decode_refuse_a_wrong_text(monkeypatch):
    lm = reader()
    mem = codec.cram(lm, [TEXT], **OPTIONS)
    noise = torch.randn(mem.vectors.shape) * mem.vectors.std()
    noisy = MemVectors(mem.vectors + noise, mem.header)
    certificate, exact = memvec.verify(lm, noisy)
    assert certificate["exact"] is False
    assert not all(exact)
    with pytest.raises(NotExactError):
        codec.decode(lm, noisy)
    with pytest.raises(NotExactError):
        noisy.documents(lm, force=True)


def test_one_wrong_passage_makes_the_whole_not_exact():
    lm = reader()
    mem = codec.cram(lm, [TEXT], **OPTIONS)
    vectors = mem.vectors.clone()
    vectors[1] = vectors[0]
    certificate, exact = memvec.verify(lm, MemVectors(vectors, mem.header))
    assert exact == [i != 1 for i in range(len(vectors))]
    assert (certificate["exact"], certificate["exact_passages"]) == (False, len(vectors) - 1)


@pytest.mark.slow
def test_the_account_counts_the_bytes_of_vectors_and_of_arithmetic_coding():
    lm = reader()
    mem = codec.cram(lm, [TEXT], **OPTIONS)
    counts = account(mem, TEXT.encode())
    assert counts["text"] == len(TEXT.encode())
    assert counts["vectors"] == mem.size
    assert 0 < counts["arithmetic"] < counts["vectors"]
    # Given first tokens count as bytes of both.
    given = replace(QUICK, start_rule="first-token")
    mem = codec.cram(lm, [TEXT], vectors=2, tokens=3, recipe=given)
    some = account(mem, TEXT.encode())
    bits = sum(p.lm_bits for p in mem.passages) + len(mem.passages) * math.log2(lm.vocab_size)
    assert some["vectors"] == mem.size + sum(1 + (p.first > 127) for p in mem.passages)
    assert some["arithmetic"] == math.ceil(bits / 8)


def test_documents_may_be_made_beforehand():
    lm = reader()
    document = Document.of(lm, "né".encode("latin-1"), encoding="latin-1", name="note")
    mem = codec.cram(lm, [document], **OPTIONS)
    assert mem.documents(lm) == [b"n\xe9"]
    assert codec.decode(lm, mem) == ["né"]
    assert mem.header.documents[0].name == "note"


def test_certifying_no_outcome_gives_no_outcome():
    assert list(outcomes_module.outcomes_of(tiny(), [], "vectors", storage_of("float32"))) == []


@pytest.mark.slow
def test_a_text_that_is_not_in_a_list_is_one_text():
    lm = reader()
    assert decode(lm, cram(lm, "abc", recipe=QUICK, vectors=2)) == ["abc"]
    assert decode(lm, cram(lm, b"abc", recipe=QUICK, vectors=2)) == ["abc"]


def test_cutting_and_certifying_report_their_progress():
    """Both take minutes for a book, and no passage is finished meanwhile."""
    statuses = []
    options = {"recipe": replace(HASTY, steps=2), "halve": False, "on_status": statuses.append}
    lm = copy(reader("words"))
    lm.facts = {"bits_per_vector": {"1": 20.0}}
    mem = codec.cram(lm, [TEXT * 3, TEXT * 6], **options)
    cut = [status.share for status in statuses if status.stage == "cutting"]
    assert len(cut) == 1 + len(mem.passages)
    second = [p for p, d in enumerate(mem.header.documents) for _ in range(d.passages)].index(1)
    assert cut[1 + second] == 0.5
    certified = [status.share for status in statuses if status.stage == "certifying"]
    assert certified[-1] == 1
    assert len(certified) == 1 + -(-len(mem.passages) // 32)
    for shares in (cut, certified):
        assert sorted(shares) == shares
        assert shares[0] == 0


@pytest.mark.parametrize("workers", [False, True])
def test_memory_and_time_are_estimated_before_the_first_step(workers, untyped):
    statuses = []
    work = CramJob(
        reader(),
        [Document.of(reader(), "abcdef")],
        2,
        tokens=3,
        recipe=QUICK,
        batch_size=2,
        storage=storage_of("float32"),
        on_status=statuses.append,
        workers=object() if workers else None,
    )
    work.choose_batch_size([Passage((1, 2, 3)), Passage((4, 5, 6))])
    assert (statuses[-1].expected.step > 0) is not workers
    said = sentence(statuses[-1].expected)
    assert said.startswith("2 slots of up to 3 tokens: about ")
    assert ("A step takes about" in said) is not workers
    assert work.engine.steps == 0
    assert statuses[-1].expected.fills == 1
    work.choose_batch_size([Passage((1, 2, 3)), Passage((4, 5, 6)), Passage((7, 8, 9))])
    assert statuses[-1].expected.fills == 1.5


def test_activations_are_measured_once_on_the_module_of_the_engine(monkeypatch):
    """One measurement gives the number of slots and the estimate that is shown."""
    measured = []

    def counted(lm, tokens, fast=None):
        measured.append((fast, tokens))
        return facts_of(lm, tokens, fast)

    for module in (cram_job, batch_size_module):
        monkeypatch.setattr(module, "facts_of", counted)
    monkeypatch.setattr(batch_size_module, "free_memory", lambda: 10**9)
    options = {"storage": storage_of("float32"), "on_status": lambda status: None}
    job = cram_job.CramJob(reader(), [], 2, tokens=3, recipe=QUICK, batch_size=None, **options)
    job.choose_batch_size([Passage((1, 2, 3)), Passage((4, 5))])
    assert measured == [(job.engine.module, 3)]
    assert job.expected.slots == 2


@pytest.mark.parametrize("batch_size", [0, -1])
def test_fewer_than_one_slot_is_refused(batch_size):
    with pytest.raises(MemvecError, match=r"batch_size must be at least 1"):
        codec.cram(reader(), "the fox", recipe=QUICK, batch_size=batch_size)


def test_a_trial_step_that_runs_out_of_memory_takes_0_seconds(monkeypatch):
    engine = Engine(copy(reader()), QUICK)
    assert engine.trial(4, 2) > 0

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine.module, "states", full)
    assert engine.trial(4, 2) == 0.0


@pytest.mark.parametrize(("device", "timed"), [("cpu", 8), ("cuda", 40)])
def test_a_trial_step_has_all_slots_on_a_gpu_and_at_most_8_on_a_cpu(device, timed, monkeypatch):
    """On a GPU a step of 32 slots may take as long as one of 8, on a CPU four times as long."""
    job = cram_job.CramJob(
        copy(reader()), [], 1, tokens=3, recipe=QUICK, batch_size=40, storage=storage_of("float32")
    )
    monkeypatch.setattr(job.engine, "trial", lambda tokens, slots: slots / 100)
    facts, asked = facts_of(job.lm, 3), [Passage((1, 2, 3))] * 40
    job.engine.batch_size, job.lm.device = 40, torch.device(device)
    assert job._expected(asked, facts).step == pytest.approx(0.4)
    tried = []
    monkeypatch.setattr(job.engine, "trial", lambda tokens, slots: tried.append(slots) or 1.0)
    assert job._expected(asked, facts).step == 40 / timed
    assert tried == [timed]


@pytest.mark.parametrize("K", [1, 2, 3, 8, 10, 40])
def test_bits_per_vector_are_those_of_the_largest_known_number_up_to_k(K, monkeypatch):
    """The keys are compared as numbers: '16' is more than '2'."""
    lm, known = reader(), {"16": 9.0, "2": 5.0, "1": 3.0, "8": 7.0}
    monkeypatch.setattr(lm, "facts", {"bits_per_vector": known})
    document = Document.of(lm, "the fox and the dog")
    options = {"recipe": Recipe(), "batch_size": 1, "storage": storage_of("float32")}
    job = CramJob(lm, [document], K, tokens=None, **options)
    wanted = known[str(max(int(k) for k in known if int(k) <= K))]
    assert job._bits_per_vector(None) == wanted
    assert job.make_cutter().bits == pytest.approx(0.4 * K * wanted)


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("length", [2, 3])
def test_the_bits_of_exact_probes_are_their_mean_per_vector(length, K):
    lm, statuses = reader(), []
    document = Document.of(lm, "the fox and the dog sat")
    options = {"recipe": QUICK, "batch_size": 4, "storage": storage_of("float32")}
    job = cram_job.CramJob(lm, [document], K, tokens=None, on_status=statuses.append, **options)
    bits, whole = job._probed(document.ids, length)
    assert statuses[-1].stage == "measuring"
    assert statuses[-1].engine.steps > 0
    room = len(document.ids) - length
    starts = {room * i // cram_job.PROBE_PASSAGES for i in range(cram_job.PROBE_PASSAGES)}
    each = [float(surprisals(lm, document.ids[at : at + length]).sum()) for at in starts]
    assert whole
    assert bits == pytest.approx(sum(each) / len(each) / K, rel=1e-5)


@pytest.mark.parametrize("K", [1, 2])
def test_the_bits_of_probes_that_are_not_exact_end_at_their_first_error(K, monkeypatch):
    """Probes with horizons 0 to 3; at least one token of each counts."""
    lm, given = reader(), []
    document = Document.of(lm, TEXT * 2)
    options = {"batch_size": 4, "storage": storage_of("float32")}
    job = CramJob(lm, [document], K, tokens=None, recipe=Recipe(steps=1), **options)
    run = Engine.run

    def reaching(engine, asked):
        for outcome in run(engine, asked):
            measures = outcome.metrics.model_copy(update={"horizon": len(given) % 4})
            given.append(outcome.passage.ids[: max(1, measures.horizon)])
            yield replace(outcome, metrics=measures, exact=False)

    monkeypatch.setattr(Engine, "run", reaching)
    bits, whole = job._probed(document.ids, 6)
    assert not whole
    assert {len(ids) for ids in given} == {1, 2, 3}
    each = [float(surprisals(lm, ids).sum()) for ids in given]
    assert bits == pytest.approx(sum(each) / len(each) / K, rel=1e-5)


@pytest.mark.parametrize("tokens", [3, 100])
def test_measure_refuses_other_texts_and_another_model(tokens):
    lm, texts = reader(), ["the fox", "the dog sat"]
    recipe = replace(QUICK, steps=5, if_not_exact="stop")
    mem = codec.cram(lm, texts, vectors=2, tokens=tokens, recipe=recipe)
    assert [r.tokens for r in memvec.measure(lm, mem, texts)] == [p.tokens for p in mem.passages]
    for wrong in (texts[::-1], ["the fix", texts[1]], texts[:1], ["the fox", "the dog s"]):
        with pytest.raises(MemvecError, match="is not in the texts: give the texts that were"):
            memvec.measure(lm, mem, wrong)
    for more in ([*texts, "on"], [texts[0], texts[1] + " on"]):
        with pytest.raises(MemvecError, match=r"go on after the last|is not in the texts"):
            memvec.measure(lm, mem, more)
    other = FrozenLM(build("llama", 1, vocab_size=lm.vocab_size, hidden_size=64), lm.tokenizer)
    with pytest.raises(MemvecError, match="made for other weights"):
        memvec.measure(other, mem, texts)
