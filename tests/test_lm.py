"""Loading models, refusals, fingerprints, the checks of a model, and the doctor."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import ALSO, build, byte_tokenizer, passages, reader, tiny
from memvec.certificate import measure, verify
from memvec.codec import cram, decode
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.errors import MemvecError, SlowPathWarning
from memvec.lab.doctor import examine, speed
from memvec.loading import load_lm
from memvec.model.agreement import agree
from memvec.model.configuration import context_length
from memvec.model.fingerprint import fingerprint_of
from memvec.model.heads import unwrapped
from memvec.model.lm import FrozenLM
from memvec.model.probes import checks
from memvec.model.spread import logit_spread

SMALL = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
BERT = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def refused(name: object, sentence: str, **options) -> None:
    """Loading the model is refused in one line that matches `sentence`."""
    with pytest.raises(MemvecError, match=sentence) as error:
        load_lm(str(name), **options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- loading


def test_a_model_loaded_from_a_folder_has_the_logits_that_were_saved(folder):
    lm, again = load_lm(str(folder)), reader()
    assert lm.fingerprint.matches(again.fingerprint)
    assert lm.name == str(folder)
    ids = torch.tensor([lm.tokenize("the fox")])
    assert torch.equal(lm.own_logits(ids), again.own_logits(ids))
    assert not lm.adds_bos
    assert lm.description()["weights"] == again.description()["weights"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_fingerprint_does_not_depend_on_the_dtype(folder, dtype):
    lm = load_lm(str(folder), dtype=dtype)
    assert lm.dtype == getattr(torch, dtype)
    assert lm.fingerprint.matches(reader().fingerprint)
    assert reader().fingerprint.matches(lm.fingerprint)


@pytest.mark.slow
def test_the_fingerprint_of_a_deep_model_does_not_depend_on_the_dtype():
    """Rounding errors add up over 48 layers; one matrix with the opposite sign is recognised."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 48}
    model = build("llama", vocab_size=2000, initializer_range=0.15, **sizes).to(torch.bfloat16)
    short, full = FrozenLM(model).fingerprint, FrozenLM(copy.deepcopy(model).float()).fingerprint
    off = [abs(a - b) - 0.02 * abs(b) for a, b in zip(short.probe, full.probe, strict=True)]
    assert max(off) > 0.1
    assert short.matches(full)
    assert full.matches(short)
    with torch.no_grad():
        model.get_submodule("model.layers")[20].mlp.down_proj.weight.mul_(-1)
    other = FrozenLM(model).fingerprint
    assert (other.config, other.weights) == (full.config, full.weights)
    assert not other.matches(full)
    assert not short.matches(other)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"]
)
def test_the_fingerprint_depends_on_each_weight_matrix(folder, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name] * 1.5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert not load_lm(str(copy)).fingerprint.matches(reader().fingerprint)


@pytest.mark.parametrize("trained", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_model_whose_weights_were_trained_after_loading_is_refused(trained, monkeypatch):
    """Its old fingerprint would be stored with new vectors and would fit old ones."""
    tokenizer = byte_tokenizer()
    model = build("llama", vocab_size=len(tokenizer))
    lm = FrozenLM(model, tokenizer)
    mem = cram(lm, "abc", recipe=Recipe(steps=2))
    weight = model.get_parameter(trained)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    new = FrozenLM(model, tokenizer)
    assert not new.fingerprint.matches(lm._fingerprint)
    monkeypatch.setattr(Engine, "run", None)  # the refusal comes before any step
    for use in (lambda: decode(lm, mem), lambda: cram(lm, "abc", recipe=Recipe(steps=2))):
        with pytest.raises(MemvecError, match="weights of in-memory were changed after"):
            use()
    with pytest.raises(MemvecError, match="made for other weights"):
        decode(new, mem)


def test_a_model_in_training_mode_is_refused():
    """Its dropout would change every pass; `eval` makes the model usable again."""
    tokenizer = byte_tokenizer()
    model = build("gpt2", vocab_size=len(tokenizer))
    lm = FrozenLM(model.train(), tokenizer)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    mem = cram(lm, "abc", recipe=Recipe(steps=2))
    model.train()
    for use in (lambda: cram(lm, "abc"), lambda: measure(lm, mem, "abc"), lambda: verify(lm, mem)):
        with pytest.raises(MemvecError, match="is in training mode, with dropout"):
            use()
    model.eval()
    measure(lm, mem, "abc")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda lm: pickle.loads(pickle.dumps(lm))])
def test_a_copy_of_a_model_is_changed_if_and_only_if_the_model_was(copied):
    """PyTorch counts the changes of a copy from 0; a worker gets a copy of the model."""
    lm = FrozenLM(build("llama"))
    copied(lm).check_unchanged()
    lm.model.half()
    for changed in (lm, copied(lm), copied(copied(lm)), copy.copy(lm)):
        with pytest.raises(MemvecError, match="were changed after"):
            changed.check_unchanged()


def test_a_model_in_float64_is_crammed_and_decoded():
    model = build("llama").double()
    lm = FrozenLM(model)
    (outcome,) = Engine(lm, Recipe(steps=400)).run(passages(3))
    assert outcome.exact
    assert decode_ids(lm, outcome.vectors[None], [3]) == [list(outcome.passage.ids)]


# PEFT 0.21 reads a deprecated attribute of transformers 5.24 (2026-11-30).
@pytest.mark.filterwarnings(r"ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_compiled_and_adapted_models_are_unwrapped_and_prompt_tuning_is_refused():
    """PEFT computes LoRA in the inner model, but prompt tuning outside it."""
    model, compiled = build("llama"), nn.Module()
    compiled._orig_mod = model  # as torch.compile keeps it
    assert FrozenLM(compiled).model is model
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig("CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, lora)
    lm, ids = FrozenLM(tuned), torch.tensor([[3, 4, 5]])
    assert lm.has_cache
    assert lm.has_split_head
    with torch.no_grad():
        assert torch.equal(lm.own_logits(ids), tuned(input_ids=ids).logits)
        assert not torch.equal(lm.own_logits(ids), tiny().own_logits(ids))
    virtual = peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(MemvecError, match="cannot be crammed"):
        FrozenLM(peft.get_peft_model(build("llama"), virtual))


def test_the_fingerprint_depends_on_each_number_of_the_embedding():
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 4] += 0.1
    assert not FrozenLM(model).fingerprint.matches(tiny().fingerprint)


def test_a_gated_model_is_named_as_such(monkeypatch):
    """Its error has an address of the Hub, and is not about the network."""
    reason = (
        "You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/a/b.\n401 Client Error. (Request ID: 1)\n\nCannot access gated "
        "repo for url https://huggingface.co/a/b/resolve/main/config.json."
    )

    def gated(*_, **__):
        raise OSError(reason)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", gated)
    refused("a/b", r"a/b is gated on the Hub: accept its terms on the model's page, then log in")


def test_names_that_are_no_model_are_refused(tmp_path):
    refused("nobody-at-all/nothing-here", "could not be reached|neither a folder nor a model")
    refused(tmp_path, r"there is no config\.json")
    refused("./no/such/folder", r"there is no config\.json")
    refused("~/no-such-folder", r"there is no config\.json")
    refused("two words / not a name", "neither a folder nor a model|could not be")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8': did you mean"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "meta"}, "unknown device 'meta'"),
    ],
)
def test_unknown_devices_and_dtypes_are_refused(folder, options, sentence):
    refused(folder, sentence, **options)


def test_a_missing_gpu_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(folder, "no usable GPU", device="cuda:0")
    assert load_lm(str(folder)).device.type == "cpu"


def test_models_that_are_no_causal_lm_are_refused(tmp_path):
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL))
    t5.save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", "is an encoder-decoder")
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    bert.save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", r"is a bert \(BertForMaskedLM\), not a causal LM")
    vit = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    vit.save_pretrained(tmp_path / "vit")
    refused(tmp_path / "vit", "is a vit .*not a causal LM")


def test_folders_with_missing_or_damaged_files_are_refused(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "model.safetensors").unlink()
    refused(bare, "no weights that transformers can load")
    headless = tmp_path / "headless"
    shutil.copytree(folder, headless)
    weights = load_file(headless / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    refused(headless, r"no weights for 1 tensors of a causal LM \(first: lm_head\.weight\)")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    refused(broken, "could not be loaded|no weights")
    (broken / "config.json").write_text("{")
    refused(broken, "could not be loaded|not a valid JSON")
    (broken / "config.json").write_text('{"model_type": "no-such-type"}')
    refused(broken, "could not be loaded|no-such-type")


def test_facts_and_encoder_of_a_folder_are_read_and_checked(folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    (own / "memvec.json").write_text(json.dumps({"bits_per_vector": {"1": 9.0}}))
    D = 64
    tensors = {
        "summary": torch.randn(2, D),
        "map.weight": torch.randn(D, D),
        "map.bias": torch.randn(D),
    }
    save_file(tensors, own / "encoder.safetensors", {"tokens": "3"})
    lm = load_lm(str(own))
    assert lm.facts["bits_per_vector"] == {"1": 9.0}
    assert (lm.encoder.max_vectors, lm.encoder.tokens) == (2, 3)
    save_file({k: v[..., :8].clone() for k, v in tensors.items()}, own / "encoder.safetensors")
    refused(own, "made for another model")
    save_file({"x": torch.zeros(1)}, own / "encoder.safetensors")
    refused(own, "not an encoder")
    (own / "encoder.safetensors").write_bytes(b"short")
    refused(own, "not an encoder")


# ---------------------------------------------------------------------- the one-pass encoder


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("K", [1, 2, 3, 5])
def test_the_summary_encoder_maps_the_last_states_of_each_part(K, tokens):
    """The reference is a loop over parts; more than 2 vectors are made of equal parts."""
    from memvec.encoders.summary import SummaryEncoder

    lm = tiny()
    D, generator = lm.width, torch.Generator().manual_seed(0)
    summary, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in [(2, D), (D, D), (D,)]
    )
    ids = torch.tensor([p.ids for p in passages(10, 10)])
    found = SummaryEncoder(summary, weight, bias, tokens).encode(lm, ids, K)
    assert found.shape == (2, K, D)
    bounds = {1: [0, 1], 2: [0, 2], 3: [0, 2, 3], 5: [0, 2, 3, 5]}[K]
    for b in range(2):
        rows = []
        for i in range(len(bounds) - 1):
            first, last = bounds[i], bounds[i + 1]
            part = ids[b, 10 * first // K : 10 * last // K]
            part = part[: tokens * (last - first)] if tokens else part
            inputs = torch.cat([lm.embedding.weight[part], summary[: last - first]])[None]
            with torch.no_grad():
                states = lm.model.model(inputs_embeds=inputs).last_hidden_state[0]
            rows += [weight @ state + bias for state in states[-(last - first) :]]
        torch.testing.assert_close(found[b], torch.stack(rows), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- checks of a model


class Wrong(nn.Module):
    """A tiny Llama with one fault, in its inputs, cache or logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, build("llama")
        self.config = self.inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids=None, inputs_embeds=None, cache=None, use_cache=None):
        if self.kind == "refuses vectors" and inputs_embeds is not None:
            raise ValueError("inputs_embeds is not supported\nby this model")
        free = inputs_embeds is not None
        if not free:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if self.kind == "scales tokens" and not free:
            inputs_embeds = inputs_embeds * 3
        if self.kind == "cuts gradients":
            inputs_embeds = inputs_embeds.detach()
        if self.kind == "looks ahead":
            inputs_embeds = inputs_embeds + inputs_embeds[:, -1:] * (inputs_embeds.shape[1] > 1)
        name = tiny().caching.argument  # it depends on the version of transformers
        out = self.inner(inputs_embeds=inputs_embeds, **{name: cache}, use_cache=use_cache)
        out["cache"] = out.get(name)
        if self.kind == "short memory":  # each block of three positions is read alone
            blocks = inputs_embeds.split(3, dim=1)
            out.logits = torch.cat([self.inner(inputs_embeds=b).logits for b in blocks], 1)
        if self.kind == "not finite":
            out.logits = out.logits * torch.nan
        if self.kind == "forgets" and cache is not None:
            out.logits = out.logits.flip(-1)
        return out


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "scales tokens",
            "'takes free input vectors' fails, largest difference .* std of the logits",
        ),
        ("looks ahead", "'is causal' fails, a later token changes an earlier prediction"),
        ("short memory", "'vectors reach every later token' fails, gradient norm .* 0.0e\\+00 at"),
        ("cuts gradients", "'vectors reach every later token' fails"),
        ("not finite", "its logits are not finite"),
    ],
)
def test_a_model_that_fails_a_check_is_refused(kind, sentence):
    with pytest.raises(MemvecError, match=sentence) as error:
        FrozenLM(Wrong(kind), name="wrong")
    assert "wrong cannot be crammed: " in str(error.value)


def test_a_model_with_a_wrong_cache_is_decoded_without_it():
    with pytest.warns(SlowPathWarning) as warned:
        lm = FrozenLM(Wrong("forgets"), name="forgetful")
    assert "its cached decoding disagrees with its own forward" in str(warned[0].message)
    assert not lm.has_cache
    assert not lm.caching.fault
    vectors = torch.randn(2, 2, lm.width, generator=torch.Generator().manual_seed(0))
    assert decode_ids(lm, vectors, [4, 5]) == decode_ids(tiny(), vectors, [4, 5])


def test_a_model_that_refuses_free_vectors_is_refused():
    with pytest.raises(MemvecError, match="inputs_embeds is not supported") as error:
        FrozenLM(Wrong("refuses vectors"), name="wrong")
    assert "\n" not in str(error.value)


def test_a_model_without_a_known_body_computes_all_its_logits():
    with pytest.warns(SlowPathWarning, match="computes and keeps logits everywhere"):
        lm = FrozenLM(Wrong("nothing"), name="whole")
    assert not lm.has_split_head
    ids = torch.tensor([[3, 4, 5, 6]])
    vectors = torch.randn(1, 2, lm.width)
    torch.testing.assert_close(lm.logits(vectors, ids), tiny().logits(vectors, ids))
    with pytest.raises(MemvecError, match="hidden states apart"):
        lm.hidden(vectors, 1)


def test_a_bidirectional_model_in_memory_is_refused():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=False))
    with pytest.raises(MemvecError, match="cannot be crammed"):
        FrozenLM(model, name="bert")


def test_a_model_that_cannot_read_tokens_is_refused(monkeypatch):
    model = build("llama")

    def strange(*_, **__):
        raise AttributeError("'NoneType' object has no attribute 'shape'\n  in its own code")

    monkeypatch.setattr(model, "forward", strange)
    with pytest.raises(MemvecError, match="its own forward on plain tokens fails") as error:
        FrozenLM(model, name="strange")
    assert "\n" not in str(error.value)


def test_a_configuration_that_builds_no_model_is_refused(folder, tmp_path):
    """The class of a configuration may raise any exception."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    config = json.loads((broken / "config.json").read_text())
    for change in ({"num_attention_heads": 0}, {"hidden_act": "no-such"}, {"rope_parameters": 3}):
        (broken / "config.json").write_text(json.dumps(config | change))
        refused(broken, "could not be loaded|cannot be crammed")


def test_a_model_without_an_embedding_matrix_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model, "get_input_embeddings", lambda: None)
    with pytest.raises(MemvecError, match="no input embedding matrix"):
        FrozenLM(model, name="strange")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bos_token_id": 5}, 5),
        ({"bos_token_id": None, "eos_token_id": [7, 8]}, 7),
        ({"bos_token_id": None, "eos_token_id": None}, None),
    ],
)
def test_bos_is_the_configured_token_or_the_first_eos(changes, expected):
    lm = FrozenLM(build("llama", **changes), name="it")
    assert lm.bos_id == expected
    assert lm.context == 128


@pytest.mark.parametrize("unknown", [None, 0, -1, 10**30])
def test_a_context_length_that_is_no_positive_number_is_ignored(unknown):
    config = SimpleNamespace(max_position_embeddings=unknown)
    assert context_length(config) is None
    config.n_positions = 64
    assert context_length(config) == 64


def test_a_token_after_the_last_row_is_refused():
    """Its id equals the number of rows."""
    lm = copy.copy(tiny())
    lm.tokenizer = lambda text, **_: {"input_ids": [int(text)]}
    assert lm.tokenize(str(lm.vocab_size - 1)) == [lm.vocab_size - 1]
    with pytest.raises(MemvecError, match=f"no row for the token {lm.vocab_size} of its tokenizer"):
        lm.tokenize(str(lm.vocab_size))


def test_masked_logits_do_not_change_the_spread():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    masked = torch.cat([logits, torch.full((3, 2), -1e9), torch.full((3, 1), -torch.inf)], 1)
    assert logit_spread(masked) == pytest.approx(float(logits.std(1).mean()))


def test_the_speed_of_a_model_is_measured_within_its_context():
    """This gpt2 has 128 positions, and a text of 500 tokens is asked for."""
    assert speed(tiny("gpt2"), tokens=500, batch_size=1, seconds=0.0) > 0


def test_a_tokenizer_that_adds_bos_is_recognised():
    from tokenizers import processors

    tokenizer = byte_tokenizer.__wrapped__(3)
    lm = FrozenLM(build("llama", vocab_size=len(tokenizer)), tokenizer, name="it")
    assert not lm.adds_bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    assert lm.adds_bos
    assert lm.tokenize("a") == lm.tokenize("a")[-1:]


# ---------------------------------------------------------------------- doctor


def test_the_doctor_passes_a_sound_folder(folder, monkeypatch):
    monkeypatch.setattr(
        "memvec.lab.doctor.speed", lambda lm: speed(lm, tokens=4, batch_size=2, seconds=0.0)
    )
    report = examine(str(folder))
    assert report["can_be_crammed"] is True
    assert report["reason"] is None
    assert {check["name"] for check in report["checks"]} >= {"loads", "gives a passage back"}
    assert all(check["ok"] for check in report["checks"])
    assert report["facts"]["width D"] == 64
    assert report["facts"]["speed"].endswith("forward and backward")


def test_the_doctor_gives_the_reason_of_a_refusal(folder, tmp_path, monkeypatch):
    report = examine(str(tmp_path))
    assert report["can_be_crammed"] is False
    assert "config.json" in report["reason"]
    monkeypatch.setattr(
        "memvec.lab.doctor.load_lm", lambda *_, **__: FrozenLM(Wrong("scales tokens"), check=False)
    )
    report = examine(str(folder))
    assert report["can_be_crammed"] is False
    assert report["reason"].startswith("'takes free input vectors' fails")
    assert "speed" not in report["facts"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "opt", "gpt2", "mamba"])
def test_sound_models_pass_every_check_in_every_dtype(family, dtype):
    lm = FrozenLM(build(family).to(getattr(torch, dtype)), name=family, check=False)
    assert [check.name for check in checks(lm) if not check.ok] == []


def test_the_fingerprint_ignores_the_dtype_of_a_nested_configuration():
    """In models with a text_config (Gemma 3), it has the dtype in which the model was loaded."""
    weight, logits = torch.ones(4, 2), torch.zeros(4)

    def printed(dtype: str, layers: int = 2) -> str:
        inner = {"dtype": dtype, "layers": layers, "transformers_version": dtype}
        settings = {"model_type": "x", "dtype": dtype, "text_config": inner}
        config = SimpleNamespace(to_dict=lambda: copy.deepcopy(settings))
        return fingerprint_of(config, weight, logits).config

    assert printed("float32") == printed("bfloat16")
    assert printed("float32") != printed("float32", layers=3)


def test_masked_columns_do_not_hide_a_difference():
    truth, ours = torch.randn(6, 30), torch.randn(6, 30)
    for logits in (truth, ours):
        logits[:, :3] = -1e9
    assert not agree(ours, truth, torch.float32)[0]
    assert agree(truth.clone(), truth, torch.float32)[0]


def test_a_softcap_is_applied_if_the_models_logits_are_far_below_it():
    model = build("gemma2", final_logit_softcapping=30.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.05)
    lm = FrozenLM(model, name="small")
    assert float(lm.head(1000 * torch.randn(5, lm.width)).abs().max()) <= 30


def test_a_softcap_of_a_nested_text_model_is_applied():
    text = ALSO["gemma4"][1] | {"final_logit_softcapping": 3.0, "pad_token_id": 0}
    no_parts = {"vision_config": None, "audio_config": None}
    special = {f"{name}_token_id": 22 for name in ("image", "boi", "eoi", "audio", "boa", "video")}
    config = transformers.Gemma4Config(text_config=text, **no_parts, **special)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(60)  # logits near the cap
    lm = FrozenLM(model, name="whole")
    assert lm.has_split_head
    assert float(lm.head(1000 * torch.randn(5, lm.width)).abs().max()) <= 3


@pytest.mark.slow
def test_wrong_measured_facts_are_refused(folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    for text, reason in (
        ("", "Expecting value"),
        ("[1]", ""),
        ('{"fill": ', "Expecting value"),
        ('{"fill": "much"}', "fill: Input should be a valid number"),
        ('{"fill": 0}', "fill: Input should be greater than 0"),
        ('{"fill": NaN}', "fill: "),
        ('{"bits_per_vector": 3}', "bits_per_vector: "),
        ('{"bits_per_vector": {"one": 3}}', "bits_per_vector.one"),
        ('{"bits_per_vector": {"1": -3}}', "bits_per_vector.1: Input should be greater than 0"),
    ):
        (own / "memvec.json").write_text(text)
        refused(str(own), rf"memvec.json holds no measured facts \({re.escape(reason)}")


def test_a_folder_dtype_and_device_may_be_objects(folder):
    lm = load_lm(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (lm.name, lm.dtype, lm.device.type) == (str(folder), torch.bfloat16, "cpu")
    refused(folder, "unknown dtype 'float64'", dtype=torch.float64)


@pytest.mark.parametrize("changes", [{"sliding_window": 30}, {"max_position_embeddings": 64}])
def test_the_fingerprint_depends_on_settings_that_short_texts_do_not_show(changes):
    """Weights and logits of eight tokens are equal; those of a long passage would not be."""
    own = FrozenLM(build("mistral", sliding_window=20)).fingerprint
    same = FrozenLM(build("mistral", sliding_window=20)).fingerprint
    other = FrozenLM(build("mistral", **({"sliding_window": 20} | changes))).fingerprint
    assert (own.weights, own.probe) == (other.weights, other.probe)
    assert own.matches(same)
    assert not own.matches(other)
    assert not other.matches(own)


def test_nested_wrappers_are_opened_but_not_those_with_virtual_tokens():
    """A compiled model is in an adapter; one adapter with virtual tokens of several is enough."""
    inside, kinds = build("llama"), {"lora": False, "virtual": True}

    class Adapted(nn.Module):
        def __init__(self, *names):
            super().__init__()
            self.peft_config = {n: SimpleNamespace(is_prompt_learning=kinds[n]) for n in names}

        def get_base_model(self):
            compiled = nn.Module()
            compiled._orig_mod = inside
            return compiled

    assert unwrapped(Adapted("lora")) is inside
    both = Adapted("lora", "virtual")
    assert unwrapped(both) is both


def test_an_unknown_start_rule_is_refused(untyped):
    """Read as 'vectors', it would give the logits of other inputs."""
    lm, ids = tiny(), torch.tensor([[2, 3, 4]])
    with pytest.raises(MemvecError, match="unknown start rule 'box': did you mean 'bos'"):
        lm.logits(lm.embed(ids), ids, "box")
