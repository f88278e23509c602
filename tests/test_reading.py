"""The protocol `reading`: attention to the vectors, the logit lens, and the optimizer's path."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import QUICK, passages, reader, tiny
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab import inside, slow_inside
from memvec.lab.report.report import write_report
from memvec.lab.study.check import check_study
from memvec.lab.study.spec import read_spec
from studies import HEAD, run, spec_in

K = 2
(ASKED,) = passages(5, seed=4)


def inputs_of(lm):
    vectors = torch.randn(1, K, lm.width, generator=torch.Generator().manual_seed(1))
    return lm.reading.inputs(lm, vectors * 0.4, torch.tensor([ASKED.ids]), "bos")


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gpt-neox"])
def test_attention_shares_are_those_of_a_softmax_by_hand(family):
    """For Llama, they are computed from queries and keys of the first layer, head by head."""
    lm = tiny(family)
    inputs, before = inputs_of(lm), lm.config._attn_implementation
    whole = lm.states_of(inputs, keep=3)
    shares = inside.attention_shares(lm, inputs, K)
    assert lm.config._attn_implementation == before  # the model is restored
    assert torch.equal(lm.states_of(inputs, keep=3), whole)
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)
    if family != "llama":
        return
    layer = lm.model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(inputs)
        cos, sin = lm.model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        shares_by_hand = []
        for head in range(4):
            q = layer.self_attn.q_proj(x)[0].reshape(-1, 4, 8)[:, head]
            k = layer.self_attn.k_proj(x)[0].reshape(-1, 2, 8)[:, head // 2]
            q, k = (v * cos[0] + _turned(v) * sin[0] for v in (q, k))
            scores = (q @ k.T) / 8**0.5
            scores += torch.full_like(scores, -torch.inf).triu(1)
            shares_by_hand.append(float(scores.softmax(-1)[K:, :K].sum(-1).mean()))
    assert shares[0] == pytest.approx(np.mean(shares_by_hand), abs=1e-4)


def _turned(v):
    half = v.shape[-1] // 2
    return torch.cat([-v[..., half:], v[..., :half]], -1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gpt-neox", "gpt2", "mamba2"])
def test_the_lens_of_the_last_layer_is_the_models_answer(family):
    lm = tiny(family)
    inputs, token = inputs_of(lm), ASKED.ids[0]
    lens = inside.logit_lens(lm, inputs, K, token)
    logits = lm.model(inputs_embeds=inputs).logits[0, K].double()
    bits = float((logits.logsumexp(0) - logits[token]) / np.log(2))
    rank = 1 + int((logits > logits[token]).sum())
    assert len(lens) == 2
    assert lens[-1] == [pytest.approx(bits, abs=1e-3), rank, int(logits.argmax())]


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gpt-neox", "gpt2", "gemma"])
def test_the_slow_path_gives_the_same_shares_and_lens(family):
    """It takes shares from queries and keys, the lens from fewer layers, and restores the model."""
    lm = tiny(family)
    vectors = 0.4 * torch.randn(K, lm.width, generator=torch.Generator().manual_seed(1))
    ids, token = torch.tensor([ASKED.ids]), ASKED.ids[0]
    inputs = lm.reading.inputs(lm, vectors[None], ids, "bos")
    before, layers = lm.config._attn_implementation, lm.config.num_hidden_layers
    whole = lm.states_of(inputs, keep=3)
    shares = slow_inside.attention_shares(lm, vectors, [*lm.trigger, *ASKED.ids[:-1]])
    assert shares == pytest.approx(inside.attention_shares(lm, inputs, K), abs=1e-4)
    slow_lens = slow_inside.lens(lm, vectors, list(lm.trigger), token)
    fast = inside.logit_lens(lm, inputs, K, token)
    for ours, theirs in zip(fast, slow_lens, strict=True):
        assert ours == [pytest.approx(theirs[0], abs=1e-2), *theirs[1:]]
    assert (lm.config._attn_implementation, lm.config.num_hidden_layers) == (before, layers)
    assert torch.equal(lm.states_of(inputs, keep=3), whole)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt-oss", "vaultgemma"])
def test_attention_shares_respect_windows_soft_caps_and_sinks(family):
    """The families have a window of 5 tokens, soft caps on the scores, or a sink that takes a part
    of the weight."""
    lm, (passage,) = tiny(family), passages(9, seed=4)
    vectors = 0.4 * torch.randn(K, lm.width, generator=torch.Generator().manual_seed(1))
    inputs = lm.reading.inputs(lm, vectors[None], torch.tensor([passage.ids]), "bos")
    before, whole = lm.config._attn_implementation, lm.states_of(inputs, keep=3)
    shares = slow_inside.attention_shares(lm, vectors, [*lm.trigger, *passage.ids[:-1]])
    assert shares == pytest.approx(inside.attention_shares(lm, inputs, K), abs=1e-4)
    assert lm.config._attn_implementation == before
    assert torch.equal(lm.states_of(inputs, keep=3), whole)


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_models_without_attention_weights_are_refused(family):
    lm = tiny(family)
    with pytest.raises(MemvecError, match="has no attention whose weights could be read"):
        inside.attention_shares(lm, inputs_of(lm), K)


@pytest.mark.parametrize("family", ["opt-projected", "xlm"])
def test_a_model_without_a_final_norm_in_front_of_its_head_has_no_lens(family):
    lm = tiny(family)
    with pytest.raises(MemvecError, match="has no final norm where a logit lens could look"):
        inside.logit_lens(lm, inputs_of(lm), K, ASKED.ids[0])


def test_a_path_is_in_two_principal_components_and_ends_with_the_whole_passage(monkeypatch):
    """They are the eigenvectors of the covariance; the last point is positive in both."""
    lm, decomposed, svd = tiny(), [], torch.linalg.svd
    recipe = Recipe(start_rule="bos", steps=QUICK.steps, compute="model")
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", lambda a, **o: decomposed.append(a) or svd(a, **o))
        path = inside.path_of(lm, ASKED.ids, K, recipe, "float32")
    points = decomposed[-1].numpy()  # (steps + 1, K D)
    variances, directions = np.linalg.eigh(np.cov(points.T))
    first, second = (np.abs((points - points.mean(0)) @ directions[:, -i]) for i in (1, 2))
    np.testing.assert_allclose(np.abs(path.x), first, atol=1e-6 * first.max())
    np.testing.assert_allclose(np.abs(path.y), second, atol=1e-6 * first.max())
    assert path.explained == pytest.approx(variances[-2:].sum() / variances.sum())
    assert len(path.x) == len(path.y) == len(path.leading) > 3
    assert 0 < path.explained <= 1 + 1e-9
    assert path.leading == sorted(path.leading)
    assert path.leading[-1] == len(ASKED)
    assert np.mean(path.x) == pytest.approx(0, abs=1e-6 * np.ptp(path.x))
    assert np.std(path.x) >= np.std(path.y)
    assert path.x[-1] >= 0
    assert path.y[-1] >= 0
    again = inside.path_of(lm, ASKED.ids, K, recipe, "float32")
    assert again == path


STUDY = (
    HEAD.replace('name = "small"', 'name = "reading"')
    + """
[[runs]]
protocol = "reading"
sources = ["random-tokens"]
lengths = [3]
vectors = [2]
passages = 2
"""
)


@pytest.mark.slow
def test_a_study_of_reading_is_recomputed_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("memvec.lab.study.stored_model.load_lm", lambda *_, **__: reader())
    out = tmp_path / "out"
    run(spec_in(tmp_path, STUDY), tmp_path, out)
    checked = check_study(out)
    assert checked["wrong"] == []
    (sentence,) = checked["unchecked"]
    assert "the values of path were not computed again" in sentence
    write_report(out, out / "report", figures=False)
    table = pd.read_csv(out / "report" / "tables" / "reading.csv")
    assert table["layer"].tolist() == [0, 1]
    assert table["attention share"].between(0, 1).all()
    assert table["left without it"].between(0, 1).all()
    assert (table["n"] == 2).all()
    # No layer is above the last one, so both columns agree there.
    last = table.iloc[-1]
    assert last["left without it"] == last["left without it and above"]
    page = (out / "report" / "index.html").read_text("utf-8")
    assert "The optimiser's paths" in page or "The optimiser&#x27;s paths" in page
    kinds = ("attention", [0.1]), ("lens", [1, 0, 0]), ("lens-rank", [0, 5, 0])
    for name, change in (*kinds, ("lens-arg-max", [0, 0, 1])):
        with contextlib.closing(sqlite3.connect(out / "study.sqlite")) as db:
            (kept,) = db.execute("SELECT extra FROM rows WHERE number = 0").fetchone()
            extra = json.loads(kept)
            layers = extra[name.split("-")[0]]
            first = layers[-1] if isinstance(layers[-1], list) else layers[-1:]
            changed = [value + more for value, more in zip(first, change, strict=True)]
            layers[-1] = changed if len(changed) > 1 else changed[0]
            db.execute("UPDATE rows SET extra = ? WHERE number = 0", (json.dumps(extra),))
            db.commit()
            assert f"{name} is stored as" in str(check_study(out)["wrong"])
            db.execute("UPDATE rows SET extra = ? WHERE number = 0", (kept,))
            db.commit()
    with pytest.raises(MemvecError, match=r"traces the path of its own recipe with seed 0"):
        spec_in(tmp_path, STUDY + "recipe = { lr = 0.2 }\n")


def test_the_spec_of_the_repository_is_valid():
    spec = read_spec(Path(__file__).parent.parent / "studies" / "reading.toml")
    assert [run.protocol for run in spec.runs] == ["reading"]
