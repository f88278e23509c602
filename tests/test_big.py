"""Big models: options that save memory and change no number, loading, and estimates of memory."""

from __future__ import annotations

import gc
import importlib.util
import math
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import QUICK, build, passages, tiny
from memvec import MemVectors, cram
from memvec.big import keep_few_bits, loading_options, refuse_spilled
from memvec.cli.expected import memory
from memvec.cramming.engine import Engine
from memvec.errors import MemvecError
from memvec.lab.study.check import check_study
from memvec.lab.study.facts import facts_of_name
from memvec.lab.study.pool import LocalPool
from memvec.lab.study.price import hours
from memvec.lab.study.run import run_study
from memvec.loading import load_lm
from memvec.model.batch_size import default_batch_size
from memvec.model.configuration import context_length, setting
from memvec.model.estimate import (
    estimate,
    facts_of,
    facts_of_config,
    kept_bytes,
    layer_bytes,
    max_batch_size,
)
from memvec.model.large import layers_of, offloaded, recomputed, saved_bytes
from memvec.model.lm import FrozenLM
from memvec.model.memory import LOGITS_AT_ONCE
from memvec.model.mixed import put_under_autocast
from studies import HEAD, spec_in

LLAMA_8B = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
)
FAMILIES = ["llama", "gpt-neox", "gpt2", "gemma2", "mixtral", "falcon-h1", "opt-projected"]


def gradient(lm: FrozenLM) -> tuple[torch.Tensor, int]:
    """The gradient of two vectors in front of 24 tokens, and the bytes that autograd keeps."""
    ids = torch.tensor([p.ids for p in passages(24, 24)])
    vectors = torch.randn(2, 2, lm.width, generator=torch.Generator().manual_seed(0))
    vectors.requires_grad_()
    with saved_bytes(lm.model) as kept:
        states = lm.states(vectors, ids)
    return torch.autograd.grad(states.square().sum(), vectors)[0], kept()


def test_measuring_the_kept_bytes_leaves_no_tensor_behind():
    """Every cram measures these bytes, so a tensor left behind would add up."""
    lm = tiny()

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    kept_bytes(lm, 8)
    before = tensors()
    kept_bytes(lm, 8)
    assert tensors() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradient_in_less_memory(family):
    plain, spared = tiny(family), FrozenLM(build(family), name=family, checkpointing=True)
    truth, whole = gradient(plain)
    found, kept = gradient(spared)
    assert torch.equal(found, truth)
    assert kept < 0.6 * whole
    assert not any("forward" in vars(layer) for layer in layers_of(spared.model))


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_offloading_gives_the_same_gradient(family):
    found, _ = gradient(FrozenLM(build(family), name=family, offload=True))
    torch.testing.assert_close(found, gradient(tiny(family))[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama3.2"])
def test_offloading_copies_no_weights(family, monkeypatch):
    """Autograd keeps weights as well as activations; only the latter are copied."""
    lm, copied = FrozenLM(build(family), name=family, offload=True), []
    empty_like = torch.empty_like

    def aside(tensor, **options):
        copied.append(tensor.untyped_storage().data_ptr())
        return empty_like(tensor, **options)

    monkeypatch.setattr("memvec.model.large.torch.empty_like", aside)
    gradient(lm)
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    assert copied
    assert not weights & set(copied)


def test_offloading_to_pinned_memory_makes_no_gpu_wait():
    """Every copy of a forward pass to pinned memory is non-blocking."""
    lm, copies = FrozenLM(build("llama"), name="pinned"), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if kwargs.pop("pin_memory", False):
                pinned.append(1)
            if func is torch.ops.aten.copy_.default:
                copies.append(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            return func(*args, **kwargs)

    pinned: list[int] = []
    vectors = torch.zeros(1, 1, lm.width).requires_grad_()
    with Watching(), offloaded(lm.model, pin=True):
        lm.states(vectors, torch.ones(1, 4, dtype=torch.long))
    assert len(pinned) > 10
    assert copies == [True] * len(pinned)


def test_checkpointing_keeps_a_forward_that_a_layer_was_given():
    """accelerate sets such a forward on a layer, which moves data between devices."""
    lm = FrozenLM(build("llama"), name="moved", checkpointing=True)
    called, layers = [], layers_of(lm.model)
    first, forward = layers[0], layers[0].forward

    def moving(*args, **kwargs):
        called.append(1)
        return forward(*args, **kwargs)

    first.forward = moving
    found, _ = gradient(lm)
    assert first.forward is moving
    assert len(called) == 2  # on the way forward, and again on the way back
    assert torch.equal(found, gradient(tiny())[0])
    assert not any("forward" in vars(layer) for layer in layers[1:])


def test_checkpointing_and_offloading_change_no_vectors():
    lm = FrozenLM(build("llama"), name="both", checkpointing=True, offload=True)
    asked = passages(2, 3)
    plain = list(Engine(tiny(), QUICK, vectors=2, batch_size=2).run(asked))
    spared = list(Engine(lm, QUICK, vectors=2, batch_size=2).run(asked))
    for a, b in zip(plain, spared, strict=True):
        assert b.exact
        assert torch.equal(a.vectors, b.vectors)


def test_checkpointing_without_known_layers_is_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr("memvec.model.large.layers_of", lambda _: [])
    with pytest.raises(MemvecError, match="not marked for checkpointing"), recomputed(model):
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantize": "3bit"}, "unknown quantize '3bit'"),
        (
            {"quantize": "8bit"},
            r"quantize='8bit' needs the package .*'\.\[big\]' in the repository",
        ),
        (
            {"quantize": "4bit"},
            r"quantize='4bit' needs the package .*'\.\[big\]' in the repository",
        ),
        (
            {"device_map": "auto"},
            r"device_map needs the package accelerate.*'\.\[big\]' in the repository",
        ),
    ],
)
def test_a_missing_package_is_named(folder, monkeypatch, options, sentence):
    there = importlib.util.find_spec
    gone = ("accelerate", "bitsandbytes", "torchao")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in gone else there(name, *a)
    )
    with pytest.raises(MemvecError, match=sentence):
        load_lm(str(folder), **options)


@pytest.mark.parametrize(
    ("device", "device_map", "expected"),
    [
        ("cpu", None, None),
        ("cuda:1", None, {"": torch.device("cuda:1")}),
        ("cuda:1", "auto", "auto"),
    ],
)
def test_quantized_weights_are_loaded_on_their_device(device, device_map, expected):
    """On a CPU this needs no device map, and so no accelerate."""
    pytest.importorskip("torchao")
    pytest.importorskip("accelerate")
    options = loading_options(device_map, "8bit", torch.float32, torch.device(device))
    assert options.get("device_map") == expected


@pytest.mark.parametrize(
    ("places", "spilled"),
    [
        ({}, False),
        ({"": "cpu"}, False),
        ({"model.embed_tokens": 0, "model.layers.0": 0, "lm_head": 1}, False),
        ({"model.embed_tokens": 0, "model.layers.0": "cpu"}, True),
        ({"model.embed_tokens": "cpu", "model.layers.0": 0}, True),
        ({"model.embed_tokens": 0, "model.layers.0": "disk"}, True),
        ({"": "disk"}, True),
    ],
)
def test_a_device_map_that_leaves_weights_off_the_gpus_is_refused(places, spilled):
    """Cramming would silently keep a copy of these weights on the GPU until the backward pass."""
    model = torch.nn.Linear(1, 1)
    if places:
        model.hf_device_map = places
    if not spilled:
        refuse_spilled(model, "large")
        return
    with pytest.raises(MemvecError, match="large does not fit on the GPUs: device_map leaves"):
        refuse_spilled(model, "large")


def test_a_device_map_loads_the_same_model(folder):
    pytest.importorskip("accelerate")
    lm = load_lm(str(folder), device_map={"": "cpu"}, dtype="float32")
    again = load_lm(str(folder), dtype="float32")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(lm.own_logits(ids), again.own_logits(ids))
    assert lm.fingerprint.matches(again.fingerprint)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("bits", "dtype"), [("8bit", torch.float32), ("4bit", torch.bfloat16)])
def test_autograd_keeps_no_dequantized_weights(bits, dtype):
    """With them a step would take more memory than the weights before quantization."""
    quantize_ = pytest.importorskip("torchao.quantization").quantize_
    model = build("llama").to(dtype)
    options = loading_options(None, bits, dtype, torch.device("cpu"))
    quantize_(
        model.model.layers,
        options["quantization_config"].quant_type,
        lambda module, _: isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0,
    )
    lm = FrozenLM(model, name="few bits", quantize=bits, check=False)
    matrices = [p for p in model.parameters() if hasattr(p, "__tensor_flatten__")]
    wide = sum(weight.numel() for weight in matrices) * dtype.itemsize
    assert wide
    truth, before = gradient(lm)
    assert before > wide
    keep_few_bits(model)
    found, after = gradient(lm)
    assert torch.equal(found, truth)
    assert after <= before - wide
    lm.checkpointing = True
    assert torch.equal(gradient(lm)[0], truth)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_crams_and_decodes(folder, tmp_path, bits, dtype):
    """In a batch, alone, and from a file, which the same model without quantization refuses."""
    pytest.importorskip("torchao")
    plain = load_lm(str(folder), dtype=dtype)
    lm = load_lm(str(folder), dtype=dtype, quantize=bits)
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.equal(lm.own_logits(ids), plain.own_logits(ids))
    together = list(Engine(lm, QUICK, vectors=2, batch_size=3).run(passages(2, 3, 4)))
    alone = list(Engine(lm, QUICK, vectors=2, batch_size=1).run(passages(2, 3, 4)))
    assert all(outcome.exact for outcome in (*together, *alone))
    mem = cram(lm, "ab", vectors=4, recipe=QUICK)
    path = mem.save(tmp_path / "few.mem")
    again = load_lm(str(folder), dtype=dtype, quantize=bits)
    assert MemVectors.load(path).documents(again) == [b"ab"]
    with pytest.raises(MemvecError, match="were made for"):
        MemVectors.load(path).documents(plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_study_of_quantized_weights_agrees_with_its_recomputation(folder, tmp_path):
    """`study check` loads the model with the same weights; a pool with others is refused."""
    pytest.importorskip("torchao")
    text = HEAD.replace('"tiny"', f'"{folder}"\nquantize = "8bit"')
    text += '[[runs]]\nprotocol = "exact"\nsources = ["random-tokens"]\nlengths = [3]\n'
    spec = spec_in(tmp_path, text + "passages = 2\nrecipe = { steps = 60 }\n")

    def pool(quantize):
        return LocalPool(load_lm(str(folder), dtype="float32", quantize=quantize))

    with pytest.raises(MemvecError, match="pass quantize to load_lm"):
        run_study(spec, tmp_path / "plain", lambda model: pool(None), base=tmp_path)
    run_study(spec, tmp_path / "few", lambda model: pool(model.quantize), base=tmp_path)
    found = check_study(tmp_path / "few")
    assert found["wrong"] == []
    assert found["rows"] == 2


# ---------------------------------------------------------------------- the estimate


def sized(kind: str, layers: int = 6) -> transformers.PretrainedConfig:
    """A configuration in which no part of the memory is negligible, small enough for a test."""
    common = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    gated = common | {"intermediate_size": 176, "num_key_value_heads": 2}
    if kind == "gpt2":
        return transformers.GPT2Config(**common)
    if kind == "gpt-neox":
        return transformers.GPTNeoXConfig(**common, intermediate_size=256)
    if kind == "llama":
        return transformers.LlamaConfig(**gated)
    if kind == "qwen2":
        return transformers.Qwen2Config(**gated, layer_types=["full_attention"] * layers)
    return {"olmo2": transformers.Olmo2Config, "qwen3": transformers.Qwen3Config}[kind](**gated)


SIZED = ["llama", "qwen2", "qwen3", "olmo2", "gpt-neox", "gpt2"]


def test_vectors_in_front_are_inputs_too():
    """The last token is predicted and not read."""
    facts = replace(facts_of_config(tiny().config, 4), kept=10.0)
    assert estimate(facts, batch_size=2, tokens=9, vectors=4).activations == 2 * 12 * 10
    assert estimate(facts, batch_size=2, tokens=9).activations == 2 * 9 * 10


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_channels_through_norms_are_those_of_a_layer(family):
    """Families differ in the norms around attention and MLP, and inside attention."""
    lm, seen = tiny(family), []
    norms = [m for m in layers_of(lm.model)[0].modules() if type(m).__name__.endswith("Norm")]
    hooks = [m.register_forward_hook(lambda *a: seen.append(a[-1].numel())) for m in norms]
    try:
        lm.own_logits(torch.tensor([[5]]))
    finally:
        for hook in hooks:
            hook.remove()
    facts = facts_of_config(lm.config, 4)
    assert facts.norms + facts.normed == sum(seen)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SIZED)
def test_the_estimate_of_a_layer_is_what_autograd_keeps(kind, dtype):
    """The difference between models of 6 and 2 layers is what 4 layers keep."""
    kept = {}
    for layers in (2, 6):
        model = transformers.AutoModelForCausalLM.from_config(sized(kind, layers)).to(dtype).eval()
        kept[layers] = kept_bytes(FrozenLM(model, name=kind), 64)
    facts = facts_of_config(sized(kind), torch.finfo(dtype).bits // 8)
    assert layer_bytes(facts) == pytest.approx((kept[6] - kept[2]) / 4, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SIZED)
def test_a_step_takes_the_estimated_memory(kind, dtype, checkpointing, monkeypatch):
    """Whole steps of an engine, as torch counts their tensors."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from memory import peak_tensors
    from peak import estimates, works

    model = transformers.AutoModelForCausalLM.from_config(sized(kind)).to(dtype).eval()
    lm = FrozenLM(model, name=kind, checkpointing=checkpointing, check=False)
    step = works(lm, batch_size=4, T=96)["step"]
    step()  # the first step also sets up what later steps use
    assert estimates(lm, batch_size=4, T=96)["step"] == pytest.approx(peak_tensors(step), rel=0.15)


def test_the_parameters_of_a_configuration_are_counted():
    for kind in ("llama", "gpt-neox", "qwen2"):
        config = sized(kind)
        model = transformers.AutoModelForCausalLM.from_config(config)
        counted = sum(p.numel() for p in model.parameters())
        assert facts_of_config(config, 4).parameters == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "jamba", "deepseek-v3", "llama"])
def test_all_experts_count_as_memory_and_active_experts_as_time(family, tmp_path):
    lm = tiny(family)
    lm.config.save_pretrained(tmp_path)
    facts, sizes = facts_of_name(str(tmp_path)), dict(lm.model.named_parameters())
    total = sum(p.numel() for p in sizes.values())
    assert facts.parameters * facts.number <= (facts.weights or math.inf)
    if family == "llama":
        assert facts.weights == 0
        assert facts.parameters == pytest.approx(total, rel=0.05)
        return
    assert facts.weights == 2 * total
    if family == "mixtral":  # two of four experts
        inside = sum(p.numel() for name, p in sizes.items() if "experts" in name)
        assert facts.parameters == total - inside / 2


def test_8b_at_1568_tokens_fits_16_slots_in_80_gb_with_checkpointing_only():
    facts = facts_of_config(LLAMA_8B, 2)
    assert facts.parameters == pytest.approx(8.03e9, rel=0.01)
    sparing = replace(facts, checkpointing=True)
    spared = estimate(sparing, batch_size=16, tokens=1568)
    plain = estimate(facts, batch_size=16, tokens=1568)
    assert spared.total < 80e9 < plain.total
    assert spared.weights == pytest.approx(16.06e9, rel=0.01)
    # By hand: 25,088 positions x (32 layer inputs of 8 KiB); on top, one layer in full.
    assert spared.activations == 25_088 * 32 * 8192
    assert spared.passing > 25_088 * layer_bytes(facts)
    free = 80e9 - spared.weights
    assert max_batch_size(sparing, free=free, tokens=1568) >= 16
    assert max_batch_size(facts, free=free, tokens=1568) < 16
    assert max_batch_size(facts, free=0.0, tokens=1568) == 1
    assert "GiB at the peak" in memory(spared)


def test_the_estimate_has_the_rounded_weights_that_autocast_keeps():
    model = build("llama")
    put_under_autocast(model)
    lm = FrozenLM(model, name="mixed")
    vectors = torch.zeros(1, 1, lm.width).requires_grad_()
    with saved_bytes(model) as kept:
        lm.states(vectors, torch.ones(1, 4, dtype=torch.long))
    facts, ends = facts_of(lm, 4), 2 * 2 * lm.embedding.weight.numel()  # embedding and head
    assert 0 < kept() - 4 * facts.kept <= facts.copies <= kept() - 4 * facts.kept + ends
    assert estimate(facts, batch_size=1, tokens=4).weights == facts.weights + facts.copies
    lm.checkpointing = True
    assert facts_of(lm, 4).copies == facts_of(tiny(), 4).copies == 0
    much = replace(facts, copies=1e15)  # copies leave less memory for slots
    assert default_batch_size(lm, 4, facts=much) == 1 < default_batch_size(lm, 4, facts=facts)


@pytest.mark.parametrize(("tokens", "vectors"), [(4, 1), (32, 1), (60, 4), (511, 1), (4000, 8)])
def test_a_gpu_gets_enough_slots_to_be_busy(monkeypatch, tokens, vectors):
    """The slots must fit in its memory; a CPU gets at most 32."""
    lm = tiny()
    facts = facts_of_config(LLAMA_8B, 2)
    on_gpu = copy(lm)
    on_gpu.device = torch.device("cuda")
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    for free in (2**44, 2**36, 0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        monkeypatch.setattr("memvec.model.batch_size.free_memory", lambda free=free: free)
        slots = default_batch_size(on_gpu, tokens, vectors, facts)
        fits = max_batch_size(facts, free=free / 4, tokens=tokens, vectors=vectors)
        assert slots == min(fits, max(32, 16_384 // (tokens + vectors)))
        assert default_batch_size(lm, tokens, vectors, facts) == min(fits, 32)


def test_memory_that_torch_reserves_but_does_not_use_counts_as_free(monkeypatch):
    """After a run, torch keeps unused blocks, which the driver does not count as free."""
    facts, on_gpu = facts_of_config(LLAMA_8B, 2), copy(tiny())
    on_gpu.device = torch.device("cuda")

    def slots(**sizes):
        sizes["mem_get_info"] = (sizes["mem_get_info"], 2**37)
        for name, size in sizes.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, size=size: size)
        return default_batch_size(on_gpu, 32, 1, facts)

    fresh = slots(mem_get_info=2**36, memory_reserved=0, memory_allocated=0)
    kept = slots(mem_get_info=2**35, memory_reserved=3 * 2**35, memory_allocated=2**36)
    assert kept == fresh > slots(mem_get_info=2**35, memory_reserved=2**36, memory_allocated=2**36)


@pytest.mark.parametrize("batch_size", [1, 64, 1024])
def test_logits_of_many_positions_are_never_in_memory_at_once(batch_size):
    """Beyond one chunk of logits, only the hidden states grow with the slots."""
    facts = facts_of_config(LLAMA_8B, 2)
    part = estimate(facts, batch_size=batch_size, tokens=64)
    states = 3 * batch_size * 64 * facts.hidden * facts.number
    rows = min(batch_size * 64, LOGITS_AT_ONCE // facts.vocabulary)
    assert part.logits == rows * facts.vocabulary * 4 * 3 + states


@pytest.mark.parametrize("name", ["max_position_embeddings", "max_seq_len", "max_sequence_length"])
def test_a_configuration_gives_the_context_of_the_loaded_model(name):
    config = transformers.PretrainedConfig(hidden_size=8, num_hidden_layers=1, **{name: 64})
    assert facts_of_config(config, 2).context == context_length(config) == 64


@pytest.mark.parametrize("family", ["gemma4", "llama", "gpt2", "mamba"])
def test_a_setting_that_differs_between_layers_is_the_largest(family):
    """transformers raises if such a setting is read from the configuration of the whole model."""
    config = build(family).config
    facts = facts_of_config(config, 4)
    if family == "gemma4" and hasattr(config, "per_layer_config"):  # newer releases
        assert [layer.head_dim for layer in config.per_layer_config] == [8, 16]
        assert (facts.attention, facts.keys) == (4 * 16, 2 * 16)
        assert setting(config, "head_dim") == 16
    assert (facts.hidden, facts.layers) == (32, 2)
    assert setting(config, "nothing") is None


def test_hours_are_operations_divided_by_speed():
    facts = facts_of_config(LLAMA_8B, 2)
    assert hours(facts, 1000.0, flops=facts.parameters) == pytest.approx(4000 / 3600)
