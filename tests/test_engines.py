"""Decoding in other engines: requests to the runners, what they give back, what is refused.

vLLM's runners run here with a fake `vllm` (engines_fake). If MEMVEC_ENGINES is a folder of the
environments `vllm`, `llama.cpp` and `mlx`, the engines themselves run too.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import memvec
from conftest import QUICK, build, passages, reader, tiny
from memvec import codec, engines
from memvec.cramming.recipe import Recipe
from memvec.engines import Answer, Prompt, decode, run
from memvec.engines.folder import folder_of, model_alone
from memvec.engines.request import write_request
from memvec.errors import MemvecError
from memvec.export import limits
from memvec.header import SpaceRecord
from memvec.loading import POCKET
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage, ids_hash
from memvec.vectors import MemVectors
from test_interop import crammed

pytestmark = pytest.mark.slow  # left out of `make check`
HERE = Path(__file__).parent
RUNNERS = Path(run.__file__).parent / "runners"
THERE = Path(os.environ.get("MEMVEC_ENGINES", "/nowhere"))


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model of a family and returns its folder."""

    def save(family="llama"):
        build(family).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


@pytest.fixture
def fake_vllm(tmp_path, python):
    """A Python in whose environment `vllm` is the fake one."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{HERE / "engines_fake"}" exec "{python}" "$@"\n')
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("rule", ["vectors", "bos", "first-token"])
@pytest.mark.parametrize("engine", ["transformers", "peft", "vllm", "vllm-server"])
def test_an_engine_gives_the_passages_back(engine, rule, saved, fake_vllm):
    lm = tiny()
    mem = crammed(lm, rule, (*passages(2, 3), Passage((5, 1, 7))))  # 1 is the model's EOS
    version, ids = engines.decode_with(
        engine, lm, mem, model=saved(), python=fake_vllm, batch=2, settings={"threads": 1}
    )
    assert version.startswith(engine.removesuffix("-server"))
    assert [ids_hash(row) for row in ids] == [p.sha256 for p in mem.passages]


def test_a_request_keeps_batches_and_plain_prompts_apart(saved, python):
    lm = tiny()
    mem = crammed(lm)
    prompts, _ = engines.decode.passage_prompts(mem, lm)
    plain = Prompt(None, [3, 4, 5], 4)
    asked = [*prompts, plain]
    answer = engines.run_engine(
        "transformers", python, saved(), "float32", asked, batches=[[3, 0], [2, 1], [3]]
    )
    assert [len(batch) for batch in answer.ids] == [2, 2, 1]
    assert answer.ids[0][0] == answer.ids[2][0]
    ids = lm.model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, min_new_tokens=4)
    assert answer.ids[2][0] == ids[0, 3:].tolist()
    for i, row in ((0, answer.ids[0][1]), (2, answer.ids[1][0]), (1, answer.ids[1][1])):
        assert ids_hash(row) == mem.passages[i].sha256


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_answer_after_usable_vectors_is_that_of_memvec_use(
    engine, folder, fake_vllm, monkeypatch
):
    lm = reader()
    recipe = Recipe.of(start_rule="bos", steps=600, patience=600)
    files = [
        codec.cram(lm, text, vectors=2, tokens=2, recipe=recipe) for text in ("the fox", "dog")
    ]
    for asked in (files[0], files):
        expected = memvec.use(lm, asked, " ran", max_new_tokens=9)
        _, text = engines.answer_with(
            engine, lm, asked, " ran", max_new_tokens=9, model=folder, python=fake_vllm
        )
        assert text == expected
    with pytest.raises(MemvecError, match="no passage 7"):
        engines.answer_with(engine, lm, files[0], "x", passages=[7], model=folder, python="/no")
    with pytest.raises(MemvecError, match="do not fit the context"):
        engines.answer_with(engine, lm, files, "x", max_new_tokens=9999, model=folder)
    plain = codec.cram(lm, "fox", vectors=2, tokens=2, recipe=QUICK)
    with pytest.raises(MemvecError, match="have no trigger"):
        engines.answer_with(engine, lm, plain, "x", model=folder, python="/no/python")
    with pytest.raises(MemvecError, match="no vectors to use"):
        engines.answer_with(engine, lm, [], "x", model=folder)


@pytest.fixture
def asked(monkeypatch):
    """No engine runs: `given` has the arguments of the calls, and `answers` what they return."""
    calls = SimpleNamespace(given=[], answers=[])

    def answered(*given, **named):
        calls.given.append((*given, named))
        return Answer("made 1.0", calls.answers)

    monkeypatch.setattr(decode, "run_engine", answered)
    return calls


def test_an_engine_is_asked_in_batches_for_the_tokens_that_are_not_given(asked):
    """A passage of one given token needs no engine; vectors are rounded to the model's dtype."""
    lm = FrozenLM(build("llama").to(torch.bfloat16), name="pocket")
    mem = crammed(tiny(), "first-token", tuple(passages(2, 3, 2, 4)))
    records = list(mem.passages)
    records[2] = records[2].model_copy(update={"tokens": 1})
    header = mem.header.model_copy(update={"passages": records})
    mem = MemVectors(mem.vectors, header)
    mem.check_model = lambda lm: None
    asked.answers = [[[1], [2, 3]], [[4]]]
    version, ids = engines.decode_with("vllm", lm, mem, batch=2, settings={"threads": 3})
    firsts = [record.first for record in mem.passages]
    new = ([1], [2, 3], [], [4])
    assert (version, ids) == ("made 1.0", [[f, *ids] for f, ids in zip(firsts, new, strict=True)])
    ((engine, python, model, dtype, prompts, named),) = asked.given
    assert (engine, python, model, dtype) == ("vllm", sys.executable, POCKET, "bfloat16")
    assert named == {"batches": [[0, 1], [3]], "settings": {"threads": 3}}
    assert [prompt.new_tokens for prompt in prompts] == [record.tokens - 1 for record in records]
    for prompt, vectors in zip(prompts, mem.vectors, strict=True):
        assert torch.equal(prompt.vectors, vectors.bfloat16().float())


def test_an_answer_ends_before_the_first_end_of_text(asked, folder):
    lm = reader()
    recipe = Recipe.of(start_rule="bos", steps=600, patience=600)
    mem = codec.cram(lm, "dog", vectors=2, tokens=2, recipe=recipe)
    words, end = lm.tokenize(" ran"), lm.model.generation_config.eos_token_id
    said = {"model": folder, "settings": {"threads": 3}, "max_new_tokens": 20}
    for ids in (words, [*words, end], [*words, end, *words, end]):
        asked.answers = [[ids]]
        assert engines.answer_with("vllm", lm, mem, " to", **said) == ("made 1.0", " ran")
    *given, dtype, (prompt,), named = asked.given[-1]
    assert (given, dtype) == (["vllm", sys.executable, folder], "float32")
    assert named == {"settings": {"threads": 3}}
    assert (prompt.tokens, prompt.new_tokens, prompt.text) == (lm.tokenize(" to"), 20, " to")
    assert torch.equal(prompt.vectors, memvec.context_inputs(lm, mem))
    room = lm.context - len(prompt.vectors) - len(prompt.tokens)
    engines.answer_with("vllm", lm, mem, " to", **(said | {"max_new_tokens": room}))
    with pytest.raises(MemvecError, match="do not fit the context"):
        engines.answer_with("vllm", lm, mem, " to", **(said | {"max_new_tokens": room + 1}))


def test_the_servers_chat_puts_the_vectors_in_front_of_the_text(saved, fake_vllm):
    lm, path = tiny(), saved()
    vectors, tokens = torch.randn(2, lm.width), [3, 9, 4]
    after = lm.embed(torch.tensor(tokens)).detach()
    asked = Prompt(vectors, tokens, 5, after, "3 9 4")  # the fake tokenizer is `int`
    found = [
        engines.run_engine(name, fake_vllm, path, "float32", [asked], settings=settings).ids
        for name, settings in (("vllm", {}), ("vllm-server", {"chat": True}))
    ]
    assert found[0] == found[1]
    long = Prompt(vectors, tokens, 50, after)
    with pytest.raises(MemvecError, match=r"the server refused: .*too many tokens"):
        engines.run_engine("vllm-server", fake_vllm, path, "float32", [long])


# ---------------------------------------------------------------------- wrong files


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_another_models_vectors_are_refused_before_the_engine_starts(engine):
    mem = crammed(tiny())
    for lm, why in ((tiny(seed=1), "other weights"), (tiny("opt-projected"), "numbers each")):
        with pytest.raises(MemvecError, match=why):
            engines.decode_with(engine, lm, mem, model="nowhere", python="/no/python")


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_vectors_of_another_width_are_refused_before_the_engine_starts(engine, saved, untyped):
    folder = saved()
    for width in (4, 64):
        asked = [Prompt(torch.zeros(2, width), [], 3)]
        with pytest.raises(MemvecError, match=f"have {width} numbers each and the model in .* 32"):
            engines.run_engine(engine, "/no/python", folder, "float32", asked)
    with pytest.raises(MemvecError, match=r"no config\.json"):
        engines.run_engine(engine, "/no/python", folder / "none", "float32", asked)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_damaged_request_is_refused_before_the_engine_is_imported(engine, tmp_path, monkeypatch):
    """The engine's runner does not exist here, so an import of it would raise another error."""
    monkeypatch.setitem(run.ENGINES, engine, "on_nothing")
    write_request(tmp_path, "nowhere", "float32", [Prompt(torch.zeros(2, 4), [], 3)], [[0]])
    prompt, request = tmp_path / "prompt-0000.npy", tmp_path / "request.json"
    whole, asked = prompt.read_bytes(), request.read_text()

    def refused(why):
        with pytest.raises(MemvecError, match=why) as error:
            run.start(engine, sys.executable, tmp_path)
        assert len(str(error.value).splitlines()) == 1

    prompt.write_bytes(whole[:-4])
    refused(r"prompt-0000\.npy .* cut short")
    prompt.unlink()
    refused("missing")
    prompt.write_bytes(whole)
    for changes, why in (
        ({"width": 8}, "takes vectors of 8"),
        ({"batches": [[1]]}, "a prompt that is not there"),
        ({"prompts": []}, "a prompt that is not there"),
    ):
        request.write_text(json.dumps({**json.loads(asked), **changes}))
        refused(why)
    given = json.loads(asked)
    given["prompts"][0]["tokens"] = [1, 2]
    request.write_text(json.dumps(given))
    refused("none is a vector")
    given["prompts"][0] |= {"tokens": [], "file": None}
    request.write_text(json.dumps(given))
    refused("neither vectors nor tokens")
    request.write_text(asked[:-9])
    refused(r"no whole request\.json")
    request.write_text(asked)
    refused("on_nothing")  # the whole request gets as far as the import


def test_a_request_holds_finite_vectors_of_one_width(tmp_path):
    def written(*prompts):
        write_request(tmp_path, "x", "float32", prompts, [[i] for i in range(len(prompts))])

    prompts = [Prompt(torch.ones(1, 4), [7], 2, text="7"), Prompt(None, [3], 5)]
    write_request(tmp_path, "x", "float16", prompts, [[1], [0]], settings={"threads": 3})
    request = json.loads((tmp_path / "request.json").read_text())
    digest = hashlib.sha256((tmp_path / "prompt-0000.npy").read_bytes()).hexdigest()
    vectors = {"tokens": [7], "new_tokens": 2, "text": "7", "file": "prompt-0000.npy"}
    assert request == {
        "model": "x",
        "dtype": "float16",
        "width": 4,
        "settings": {"threads": 3},
        "batches": [[1], [0]],
        "prompts": [
            vectors | {"sha256": digest},
            {"tokens": [3], "new_tokens": 5, "text": None, "file": None},
        ],
    }
    with pytest.raises(MemvecError, match="no prompt"):
        written()
    with pytest.raises(MemvecError, match="not one width"):
        written(Prompt(torch.zeros(1, 4), [], 1), Prompt(torch.zeros(1, 5), [], 1))
    with pytest.raises(MemvecError, match="not finite"):
        written(Prompt(torch.full((1, 4), torch.nan), [], 1))


# ---------------------------------------------------------------------- what an engine cannot do


def test_a_model_that_an_engine_cannot_run_is_refused():
    for engine in limits.NAMES:
        lm = tiny("gemma3", "bfloat16")
        with pytest.raises(MemvecError, match="scales"):
            limits.refuse(engine, lm)
        with pytest.raises(MemvecError, match="hidden size"):
            limits.refuse(engine, tiny("opt-projected", "bfloat16"))
    with pytest.raises(MemvecError, match="mlx-lm takes no input embeddings for models of the"):
        run.refuse_model("mlx", tiny("gpt2"))
    with pytest.raises(MemvecError, match="writes no GGUF file for models of the type gpt2"):
        run.refuse_model("llama.cpp", tiny("gpt2"))
    run.refuse_model("llama.cpp", tiny("gpt2"), "its.gguf")
    for engine in ("vllm", "vllm-server"):
        run.refuse_model(engine, tiny("gpt2"))
        with pytest.raises(MemvecError, match="vLLM may scale given vectors again"):
            run.refuse_model(engine, tiny("gemma3"))
    for dtype in ("float32", "bfloat16", "float16"):
        for engine in ("vllm", "llama.cpp", "mlx"):
            limits.refuse(engine, tiny(dtype=dtype))
    for engine in ("transformers", "peft"):
        run.refuse_model(engine, tiny("gemma3"))


@pytest.mark.parametrize("engine", limits.NAMES)
def test_token_ids_in_every_layer_and_another_dtype_are_refused(engine):
    lm = copy.copy(tiny(dtype="bfloat16"))
    lm.config = copy.deepcopy(lm.config)
    lm.config.hidden_size_per_layer_input = 8  # as Gemma 3n's
    with pytest.raises(MemvecError, match="feeds token ids into every layer"):
        limits.refuse(engine, lm)
    wide = copy.copy(tiny())
    wide.dtype = torch.float64
    with pytest.raises(MemvecError, match=r"takes vectors in .* loaded in float64"):
        limits.refuse(engine, wide)


def test_vectors_that_an_engine_cannot_decode_are_refused():
    lm = tiny()
    mem = crammed(lm)
    first = mem.passages[0].model_copy(update={"corrections": [(0, 3)]})
    header = mem.header.model_copy(update={"passages": [first, *mem.passages[1:]]})
    with pytest.raises(MemvecError, match="no corrections"):
        engines.decode_with("vllm", lm, MemVectors(mem.vectors, header), python="/no/python")
    wide, space = (
        torch.cat([mem.vectors] * 2, -1),
        SpaceRecord(name="prefix", numbers=64, options={}),
    )
    others = (
        MemVectors(mem.vectors, mem.header.model_copy(update={"layout": "one-step"})),
        MemVectors(wide, mem.header.model_copy(update={"space": space})),
    )
    for other in others:
        with pytest.raises(MemvecError, match="no one-step layout, no other space than inputs"):
            decode.check("vllm", other, lm)
    with pytest.raises(MemvecError, match="reads a model's folder, and tiny-llama is none"):
        engines.decode_with("vllm", lm, mem, python="/no/python")
    with pytest.raises(MemvecError, match=r"^batch must be at least 1, not 0"):
        engines.decode_with("vllm", lm, mem, python="/no/python", batch=0)


def test_the_reason_why_an_engine_fails_is_printed(tmp_path, saved, python):
    asked, folder = [Prompt(torch.zeros(1, 32), [], 1)], saved()
    with pytest.raises(MemvecError, match="did you mean 'vllm'"):
        engines.run_engine("vlm", python, folder, "float32", asked)
    with pytest.raises(MemvecError, match="there is no Python to run transformers"):
        engines.run_engine("transformers", tmp_path / "none", folder, "float32", asked)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MemvecError, match=r"transformers did not generate: \w+Error: "):
        engines.run_engine("transformers", python, folder, "float32", asked)
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -ILL $$\n")
    killed.chmod(0o755)
    with pytest.raises(MemvecError, match="it was ended by SIGILL"):
        engines.run_engine("transformers", killed, folder, "float32", asked)


@pytest.mark.parametrize(
    ("name", "kind"), [("n_embd", "gpt2"), ("word_embed_proj_dim", "opt-projected")]
)
def test_the_width_is_read_under_the_familys_own_name(name, kind, saved, tmp_path):
    """In a configuration of several parts, it is that of the text part."""
    config = json.loads((saved(kind) / "config.json").read_text())
    width = config[name]
    for i, parts in enumerate((config, {"hidden_size": 5, "text_config": config})):
        there = tmp_path / f"{i}"
        there.mkdir()
        (there / "config.json").write_text(json.dumps(parts))
        run._check_width(there, [Prompt(None, [3], 1), Prompt(torch.zeros(2, width), [], 1)])
        with pytest.raises(MemvecError, match=f"have 5 numbers each and the model .* {width}"):
            run._check_width(there, [Prompt(torch.zeros(2, 5), [], 1)])


def test_the_engines_python_does_not_import_packages_of_this_one(monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "PYTHONHOME", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("KEPT", "1")
    seen = {}

    def ran(words, env, **_):
        seen.update(env, words=words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", ran)
    run.start("vllm-server", "its-python", tmp_path, tmp_path / "b")
    assert (seen["KEPT"], seen["HF_HUB_OFFLINE"], seen["TOKENIZERS_PARALLELISM"]) == (
        "1",
        "1",
        "false",
    )
    assert not {"PYTHONPATH", "PYTHONHOME"} & seen.keys()
    runner = [str(RUNNERS), "on_vllm_server", str(tmp_path), str(tmp_path / "b")]
    assert seen["words"] == ["its-python", *runner]


def test_the_reason_is_the_last_error_or_the_last_line_of_the_runner():
    output = "ValueError: first\nOSError: second\nleft the server\n"
    assert run._reason(1, output) == "OSError: second"
    assert run._reason(run.REFUSED, output) == "left the server"
    assert run._reason(1, "no memory\n\n") == "no memory"
    assert run._reason(7, "") == "exit code 7"


# ---------------------------------------------------------------------- the model's folder


def test_an_engine_sees_the_models_own_weights_only(saved):
    folder = saved()
    with model_alone(folder) as same:
        assert same == folder
    (folder / "encoder.safetensors").write_bytes(b"x")
    with model_alone(folder) as alone:
        assert {p.name for p in alone.iterdir()} == {p.name for p in folder.iterdir()} - {
            "encoder.safetensors"
        }
        assert (alone / "config.json").read_text() == (folder / "config.json").read_text()
    assert not alone.exists()


def test_weights_in_several_files_are_all_the_models_own(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with model_alone(tmp_path) as same:
        assert same == tmp_path
    (tmp_path / "encoder.safetensors").write_bytes(b"x")
    with model_alone(tmp_path) as alone:
        kept = {p.name for p in alone.iterdir()}
    assert kept == {p.name for p in tmp_path.iterdir()} - {"encoder.safetensors"}


def test_the_built_in_model_has_a_folder():
    lm = copy.copy(tiny())
    lm.name = "pocket"
    assert (folder_of(lm) / "config.json").is_file()


def test_a_model_of_the_hub_is_found_in_the_cache_at_its_revision(saved, monkeypatch):
    lm, there = copy.copy(tiny()), saved()
    lm.name, lm.revision = "somebody/llama", "a1b2c3"
    asked = []

    def cached(*given, **named):
        asked.append((given, named))
        return str(there / "config.json")

    monkeypatch.setattr("memvec.engines.folder.cached_file", cached)
    assert folder_of(lm) == there
    where = {"revision": "a1b2c3", "local_files_only": True}
    assert asked == [(("somebody/llama", "config.json"), where)]


# ---------------------------------------------------------------------- GGUF


def gguf_of():
    spec = importlib.util.spec_from_file_location("gguf_of", RUNNERS / "gguf_of.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_read_without_torch(dtype, tmp_path):
    build("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    found = dict(gguf_of().weights(tmp_path))
    expected = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor.float().numpy())


def test_gguf_rows_in_the_order_of_neighbours_give_the_same_rotary_embedding():
    """transformers rotates the two halves of a head; GGUF rotates pairs of neighbouring rows."""
    generator = np.random.default_rng(0)
    heads, size = 3, 8
    weight, x = generator.normal(size=(heads * size, 5)), generator.normal(size=5)
    angles = generator.normal(size=size // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    old = (weight @ x).reshape(heads, 2, size // 2)
    halves = np.stack([old[:, 0] * cos - old[:, 1] * sin, old[:, 1] * cos + old[:, 0] * sin], 1)
    new = (gguf_of().neighbours(weight, heads) @ x).reshape(heads, size // 2, 2)
    even, odd = new[..., 0], new[..., 1]
    turned = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
    assert np.allclose(turned.swapaxes(1, 2), halves)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("olmo2", True)])
def test_a_gguf_file_has_every_weight_once_and_rows_of_keys_by_their_own_heads(
    family, tied, tmp_path, monkeypatch
):
    """Two heads of keys for four of queries. llama.cpp takes the embeddings for a missing head, but
    not for OLMo 2."""
    build(family, num_key_value_heads=2, tie_word_embeddings=tied).save_pretrained(tmp_path)
    written = {}

    class Writer:
        """What gguf.GGUFWriter is told: the tensors are kept."""

        def __init__(self, *_):
            pass

        def add_tensor(self, name, array, raw_dtype):
            assert name not in written
            written[name] = array, raw_dtype

        def __getattr__(self, name):
            return lambda *_: None

    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    known = SimpleNamespace(get_name=lambda key, **_: names.get(key, key))
    gguf = SimpleNamespace(
        GGUFWriter=Writer,
        MODEL_ARCH=SimpleNamespace(LLAMA="llama", OLMO2="olmo2"),
        MODEL_ARCH_NAMES={"llama": "llama", "olmo2": "olmo2"},
        get_tensor_name_map=lambda *_: known,
        GGMLQuantizationType={"F32": "F32", "F16": "F16"},
        quants=SimpleNamespace(quantize=lambda array, kind: array),
    )
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    module = gguf_of()
    module.write(tmp_path, tmp_path / "model.gguf", "float16")
    read = dict(module.weights(tmp_path))
    has_head = not tied or family == "olmo2"
    assert written.keys() - {"output.weight"} == {names.get(k, k) for k in read} - {"output.weight"}
    assert ("output.weight" in written) == has_head
    if has_head:
        head = read["model.embed_tokens.weight" if tied else "lm_head.weight"]
        assert np.array_equal(written["output.weight"][0], head)
    for part, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 0)):
        key = f"model.layers.1.self_attn.{part}.weight"
        moved = heads and family == "llama"
        expected = module.neighbours(read[key], heads) if moved else read[key]
        assert np.array_equal(written[key][0], expected)
    assert {kind for array, kind in written.values() if array.ndim > 1} == {"F16"}
    assert {kind for array, kind in written.values() if array.ndim == 1} == {"F32"}


# ---------------------------------------------------------------------- the command


def test_the_command_certifies_in_an_engine(command, folder, tmp_path, fake_vllm):
    lm = reader()
    mem = codec.cram(lm, ["the fox"], vectors=2, tokens=2, recipe=QUICK)
    mem.save(tmp_path / "a.mem")
    words = ["verify", tmp_path / "a.mem", "--model", folder, "--engine", "transformers"]
    ran = command(*words, "--json")  # in the Python that runs the command
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["decoded_by"].startswith("transformers ")
    own = ["--engine-python", fake_vllm, "--engine-model", folder]
    shown = command(*words[:-1], "vllm", *own)
    assert shown.code == 0, shown.err
    assert b"vllm" in shown.out
    mem.with_vectors(-mem.vectors).save(tmp_path / "b.mem")
    words[1] = tmp_path / "b.mem"
    assert command(*words, *own).code == 3
    for option in ("--engine-python", "--engine-model"):
        alone = command(*words[:-2], option, folder)
        assert alone.code == 2
        assert alone.sentence.endswith(f"{option} is for an engine: name one with --engine.")


# ---------------------------------------------------------------------- the page


def test_the_engines_page_counts_exact_combinations_and_names_the_others(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    from engines_page import page

    def row(**changes):
        return {
            "engine": "vllm",
            "model": "llama",
            "dtype": "float32",
            "K": 1,
            "rule": "bos",
            "way": "batch 1",
            "passages": 16,
            "exact": 16,
            "eos": True,
            "why": "",
            "errors": [],
            "version": "vllm 7.1",
        } | changes

    tie = {"exact": 15, "errors": ["passage 3, token 2: the right token leads by 0.020"]}
    far = {"exact": 15, "errors": ["passage 3, token 2: the right token leads by 0.900"]}
    failed = {"engine": "mlx", "exact": 0, "version": ""}
    rows = [row(), row(K=2, dtype="bfloat16", **tie), row(K=8, dtype="bfloat16", **far)]
    rows += [row(why="mlx-lm takes none.", **failed)] * 2
    rows += [row(why="mlx did not generate: OSError: none", dtype="bfloat16", **failed)]
    text = page(rows, {"vllm": ["batch 1", "chat"], "mlx": ["batch 1"], "peft": ["batch 1"]})
    assert "**1 of 6 combinations are exact (16.7 %)**, 46 of 96 answers." in " ".join(text.split())
    assert "| vllm 7.1 | batch 1 | 1 of 1 | 0 of 2 | 46 of 48 |" in text
    assert "| mlx | batch 1 | refused | failed | 0 of 48 |" in text
    assert "by 0.020 standard deviations of the logits: bfloat16 rounds such ties" in text
    assert "by 0.900 standard deviations of the logits: this is no tie" in text
    assert "- mlx, llama, float32: mlx-lm takes none. (2 combinations)" in text
    assert "- vllm: way chat.\n- peft: none." in text


def test_cells_of_other_numbers_of_vectors_are_kept(monkeypatch, tmp_path):
    """A later run for one K replaces the cells of that K and leaves those of the others."""
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    from engines import keep, kept_in

    def cells(Ks, exact):
        same = {"engine": "vllm", "model": "llama", "dtype": "float32", "way": "batch 1"}
        return [same | {"K": K, "exact": exact} for K in Ks]

    keep(cells([1, 2, 8], 16), tmp_path / "cells.json")
    keep(cells([1], 15), tmp_path / "cells.json")
    kept = {row["K"]: row["exact"] for row in kept_in(tmp_path / "cells.json")}
    assert kept == {1: 15, 2: 16, 8: 16}


# ---------------------------------------------------------------------- installed engines


@pytest.mark.parametrize("engine", ["vllm", "vllm-server", "llama.cpp", "mlx"])
def test_an_installed_engine_gives_the_passages_back(engine, tmp_path, monkeypatch):
    python = THERE / engine.removesuffix("-server") / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"there is no {python}: set MEMVEC_ENGINES")
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    import engines_models as models

    folder = models.folder_of("llama", tmp_path)
    lm = models.lm_of("llama", "float32", folder)
    recipe = Recipe.of(start_rule="bos", steps=800, patience=800)
    asked = models.passages_of(lm, 2)[:4]
    mem = models.crammed(lm, recipe, 2, asked, tmp_path / "a.mem")
    _, ids = engines.decode_with(engine, lm, mem, model=folder, python=python, batch=4)
    assert [ids_hash(row) for row in ids] == [p.sha256 for p in mem.passages]
