"""Exports: other software decodes every passage from an export, or no export is written."""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from conftest import QUICK, build, passages, reader, tiny
from memvec import codec, engines, loading
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError, NotExactError
from memvec.export import export, names
from memvec.export import target as target_of
from memvec.export.target import Item, stock_attention
from memvec.model.lm import FrozenLM
from memvec.model.precision import widen_attention
from memvec.model.reading import START_RULES
from memvec.passages.passage import Passage, ids_hash
from memvec.usable import certificate
from memvec.vectors import MemVectors
from test_families import as_mem

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "src/memvec/pocket/model.safetensors"
PAGE = (ROOT / "docs/interop.md").read_text(encoding="utf-8")
FAMILIES = ["llama", "gpt-neox", "opt", "opt-projected", "gpt2", "mamba", "gemma3", "bloom"]
ENGINES = ["vllm", "sglang"]  # inference servers
# Fields of GenerateReqInput and SamplingParams in SGLang 0.5.23, and what they hold.
SGLANG = {"input_embeds": list, "sampling_params": dict}
SAMPLING = {
    "temperature": int,
    "max_new_tokens": int,
    "ignore_eos": bool,
    "skip_special_tokens": bool,
    "spaces_between_special_tokens": bool,
}
# peft 0.21 reads an attribute that transformers 5.23 renamed, and warns that it ignores the
# position ids of generate (November 2026).
PEFT_SAYS = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Position ids are not supported:UserWarning",
)


@functools.cache
def crammed(
    lm: FrozenLM, rule: str = "vectors", asked: tuple[Passage, ...] = tuple(passages(2, 3, 2))
) -> MemVectors:
    """Exact vectors of a few passages, crammed once for all tests."""
    recipe = Recipe.of(start_rule=rule, steps=600, patience=600)
    engine = Engine(lm, recipe, vectors=2, batch_size=4)
    mem = as_mem(lm, list(engine.run(asked)), rule)
    assert mem.exact
    return mem


@functools.cache
def in_dtype(family: str, dtype: torch.dtype) -> FrozenLM:
    return FrozenLM(build(family).to(dtype), name=f"tiny-{family}")


def hashes(mem: MemVectors) -> list[str]:
    return [p.sha256 for p in mem.passages]


# ---------------------------------------------------------------------- transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_passages_back(family, tmp_path):
    mem = crammed(tiny(family))
    manifest = export(tiny(family), mem, target_of("transformers"), tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    model, found = build(family), []
    model.generation_config = GenerationConfig(pad_token_id=0)
    for passage in manifest["passages"]:
        inputs = load_file(tmp_path / "out" / passage["file"])["inputs_embeds"]
        assert inputs.shape == (1, 2, tiny(family).width)
        ids = model.generate(
            inputs_embeds=inputs, max_new_tokens=passage["new_tokens"], do_sample=False
        )
        found.append(ids_hash(ids[0].tolist()))
    assert found == hashes(mem)


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=[pytest.mark.slow] * (r == "bos")) for r in START_RULES]
)
@pytest.mark.parametrize("target", names())
def test_every_target_writes_the_given_tokens_of_every_start_rule(target, rule, tmp_path):
    """The file of a passage also has its given tokens, and `new_tokens` does not count them."""
    lm = in_dtype("llama", torch.bfloat16)
    mem = crammed(lm, rule)
    manifest = export(lm, mem, target_of(target), tmp_path / "out")
    for passage, record in zip(manifest["passages"], mem.passages, strict=True):
        assert (tmp_path / "out" / passage["file"]).exists()
        assert len(passage["starts_with"]) + passage["new_tokens"] == record.tokens
        assert passage["starts_with"] == ([record.first] if rule == "first-token" else [])
        assert len(passage["given"]) == (rule != "vectors")
    assert manifest["certificate"]["decoded_in"] == manifest["dtype"] == "bfloat16"


def test_a_target_may_be_given_by_name(tmp_path):
    lm = in_dtype("llama", torch.float32)
    mem = crammed(lm)
    manifest = export(lm, mem, "npy", tmp_path / "out")
    assert manifest["target"] == "npy"
    assert (tmp_path / "out" / manifest["passages"][0]["file"]).is_file()


def test_an_eos_in_a_passage_and_the_models_own_sampling_are_ignored(tmp_path):
    lm = FrozenLM(build("llama"), name="sampler")
    own = GenerationConfig(do_sample=True, temperature=9.0, eos_token_id=1, max_length=3)
    lm.model.generation_config = own
    mem = crammed(lm, asked=(Passage((5, 1, 7)),))
    export(lm, mem, target_of("transformers"), tmp_path / "out")
    assert lm.model.generation_config is own


def test_a_model_whose_generate_takes_no_vectors_is_refused(tmp_path, monkeypatch):
    lm = FrozenLM(build("llama"), name="stubborn")
    mem = crammed(lm)

    def generate(**_):
        raise ValueError("You passed `inputs_embeds`, and this model takes none.\nMore.")

    monkeypatch.setattr(lm.model, "generate", generate)
    with pytest.raises(MemvecError, match=r"generate\(\) of stubborn does not take inputs_embeds"):
        export(lm, mem, target_of("transformers"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- PEFT


@PEFT_SAYS
@pytest.mark.parametrize(
    ("family", "rule"),
    [("llama", r) for r in START_RULES]
    + [(f, "vectors") for f in ("gpt-neox", "opt-projected", "gpt2")],
)
def test_peft_loads_the_adapter_and_generates_the_passage(family, rule, tmp_path):
    from peft import PeftConfig, PeftModel

    lm = tiny(family)
    mem = crammed(lm, rule)
    manifest = export(lm, mem, target_of("peft"), tmp_path / "out")
    found = []
    for i, passage in enumerate(manifest["passages"]):
        adapter = tmp_path / "out" / passage["file"]
        config = PeftConfig.from_pretrained(adapter)
        assert (config.peft_type, config.num_virtual_tokens) == ("PROMPT_TUNING", 2)
        assert config.base_model_name_or_path == lm.name
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert list(tensors) == ["prompt_embeddings"]
        assert torch.equal(tensors["prompt_embeddings"], mem.vectors[i])
        model = build(family)
        model.generation_config = GenerationConfig(pad_token_id=0)
        given = torch.tensor([passage["given"]], dtype=torch.long)
        ids = PeftModel.from_pretrained(model, adapter).generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=passage["new_tokens"],
            do_sample=False,
            use_cache=False,
        )
        new = ids[0, given.shape[1] :].tolist()
        found.append(ids_hash(passage["starts_with"] + new))
    assert found == hashes(mem)


def test_peft_certifies_and_leaves_the_model_unchanged(tmp_path, monkeypatch):
    lm = FrozenLM(build("llama"), name="adapted")
    mem = crammed(lm)
    before = [(m, dict(vars(m))) for m in lm.model.modules()]
    manifest = export(lm, mem, target_of("peft"), tmp_path / "out")
    assert manifest["certificate"]["decoded_by"].startswith("peft ")
    assert [m for m, _ in before] == list(lm.model.modules())
    for module, attributes in before:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[name] is value for name, value in attributes.items())
    assert not any(p.requires_grad for p in lm.model.parameters())
    monkeypatch.setattr("memvec.export.peft.find_spec", lambda name: None)
    manifest = export(lm, mem, target_of("peft"), tmp_path / "without")
    assert manifest["certificate"]["decoded_by"].startswith("memvec ")


def test_an_adapter_from_which_peft_generates_other_tokens_is_not_written(tmp_path, monkeypatch):
    """PEFT's `generate` decides: if it gives other tokens, nothing is written."""
    from peft import PeftModelForCausalLM

    lm = tiny()
    real = PeftModelForCausalLM.generate
    monkeypatch.setattr(
        PeftModelForCausalLM, "generate", lambda self, **kw: real(self, **kw).flip(-1)
    )
    with pytest.raises(NotExactError, match="as peft reads them"):
        export(lm, crammed(lm), target_of("peft"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- servers, NumPy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vllm_can_load_the_request(dtype, tmp_path):
    """Its loader takes base64 of a dense tensor (K, D) that torch loads with `weights_only`; D is
    the hidden size."""
    lm = in_dtype("llama", dtype)
    mem = crammed(lm)
    manifest = export(lm, mem, target_of("vllm"), tmp_path / "out")
    for passage, vectors in zip(manifest["passages"], mem.vectors, strict=True):
        path = tmp_path / "out" / passage["file"]
        body = json.loads(path.read_text())
        data = base64.b64decode(body["prompt_embeds"], validate=True)
        assert data == path.with_suffix(".pt").read_bytes()
        tensor = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        assert tensor.layout == torch.strided
        assert tensor.dtype == dtype
        assert tensor.shape == (2, lm.config.hidden_size)
        assert torch.equal(tensor, vectors.to(dtype))
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert body["max_tokens"] == passage["new_tokens"]
        assert body["ignore_eos"] is True
        assert (body["temperature"], body["prompt"]) == (0, None)
        assert {name: body[name] for name in body.keys() - {"prompt_embeds", "max_tokens"}} == {
            "model": lm.name,
            "prompt": None,
            "temperature": 0,
            "ignore_eos": True,  # an EOS in a passage is a token like any other
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }


def test_the_sglang_request_has_the_exact_numbers(tmp_path):
    lm = in_dtype("llama", torch.bfloat16)
    mem = crammed(lm)
    manifest = export(lm, mem, target_of("sglang"), tmp_path / "out")
    for passage, vectors in zip(manifest["passages"], mem.vectors, strict=True):
        body = json.loads((tmp_path / "out" / passage["file"]).read_text())
        numbers = torch.tensor(body["input_embeds"])
        assert torch.equal(numbers.bfloat16(), vectors.bfloat16())
        assert torch.equal(numbers.bfloat16().float(), numbers)  # SGLang's cast loses nothing
        assert body["sampling_params"]["max_new_tokens"] == passage["new_tokens"]
        assert {name: type(value) for name, value in body.items()} == SGLANG
        assert {name: type(value) for name, value in body["sampling_params"].items()} == SAMPLING
        assert body["sampling_params"] == {
            "temperature": 0,
            "max_new_tokens": passage["new_tokens"],
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }


def test_numpy_files_hold_the_vectors(tmp_path):
    mem = crammed(tiny())
    manifest = export(tiny(), mem, target_of("npy"), tmp_path / "out")
    files = [tmp_path / "out" / p["file"] for p in manifest["passages"]]
    assert np.array_equal(np.stack([np.load(f) for f in files]), mem.vectors.numpy())


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32")]
)
@pytest.mark.parametrize("target", ["npy", "llama.cpp"])
def test_numpy_files_have_a_dtype_that_numpy_has(target, dtype, kept, tmp_path):
    """The files for llama.cpp have float32 for every dtype of the model."""
    lm = in_dtype("llama", getattr(torch, dtype))
    item, path = Item(torch.randn(2, lm.width), (), 1), tmp_path / "a.npy"
    target_of(target).write(path, item, lm)
    assert np.load(path).dtype == (kept if target == "npy" else "float32")
    assert np.array_equal(np.load(path), item.vectors.to(lm.dtype).float().numpy())


def test_the_adapter_names_the_models_revision(tmp_path):
    lm = copy.copy(tiny())
    lm.revision = "a1b2c3"
    target_of("peft").write(tmp_path / "a", Item(torch.zeros(2, lm.width), (), 1), lm)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["revision"], config["inference_mode"]) == ("a1b2c3", True)


def test_every_type_of_model_is_exported_for_llama_cpp_and_not_for_mlx(tmp_path):
    """memvec makes GGUF files of some types only; llama.cpp has a program for the others."""
    lm = tiny("gpt2")
    assert export(lm, crammed(lm), target_of("llama.cpp"), tmp_path / "out")["passages"]
    with pytest.raises(MemvecError, match="mlx-lm takes no input embeddings"):
        export(lm, crammed(lm), target_of("mlx"), tmp_path / "mlx")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_export_has_the_permissions_of_the_umask(tmp_path, umask):
    lm = tiny("llama")
    mem = crammed(lm)
    before = os.umask(umask)
    try:
        for force in (False, True):
            export(lm, mem, target_of("npy"), tmp_path / "out", force=force)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "out/manifest.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_manifest_says_what_was_exported_and_how(tmp_path):
    lm = FrozenLM(build("llama"), name="half", revision="a1b2c3")
    mem = crammed(lm)
    (whole,) = mem.header.documents
    documents = [whole.model_copy(update={"name": f"{n}", "passages": n}) for n in (1, 2)]
    header = mem.header.model_copy(update={"documents": documents})
    mem = MemVectors(mem.vectors, header)
    manifest = export(lm, mem, target_of("npy"), tmp_path / "out")
    names = [f"passage-000{i}.npy" for i in range(3)]
    assert [passage["file"] for passage in manifest["passages"]] == names
    assert manifest["files"].keys() == {*names}
    model = lm.description()
    assert manifest["model"] == {k: model[k] for k in ("name", "revision", "config", "weights")}
    for ours, theirs in zip(manifest["documents"], mem.header.documents, strict=True):
        assert ours["passages"] == theirs.passages
        assert ours.keys() == {"name", "sha256", "size", "encoding", "edits", "passages"}
    certificate = manifest["certificate"]
    assert (certificate["device"], certificate["batch"]) == (model["device"], 1)
    assert certificate["attention"] == model["attention"]
    assert certificate.keys() >= {"exact", "memvec", "torch", "transformers", "date"}
    whole = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    assert manifest["sha256"] == digest


@pytest.mark.parametrize(("named", "more"), [(3, ""), (2, " and 1 more"), (1, " and 2 more")])
def test_an_error_names_a_few_passages_and_counts_the_others(named, more, tmp_path, monkeypatch):
    lm = tiny()
    mem = crammed(lm)
    monkeypatch.setattr("memvec.export.folder.MAX_NAMED", named)
    rows = ", ".join(f"passage {i} ({mem.passages[i].tokens} tokens)" for i in range(named))
    with pytest.raises(NotExactError, match=re.escape(f"reads them: {rows}{more}; cram for it")):
        export(lm, MemVectors(-mem.vectors, mem.header), target_of("npy"), tmp_path / "out")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("family", "why"), [("gemma3", "scales"), ("opt-projected", "hidden")])
def test_a_model_whose_inputs_a_server_reads_differently_is_refused(engine, family, why, tmp_path):
    lm = in_dtype(family, torch.bfloat16)
    with pytest.raises(MemvecError, match=why):
        export(lm, crammed(lm), target_of(engine), tmp_path / "out")


# ---------------------------------------------------------------------- never a wrong export


@pytest.mark.parametrize("target", names())
def test_a_passage_that_is_not_exact_for_the_target_is_named_and_nothing_is_written(
    target, tmp_path
):
    lm = in_dtype("llama", torch.bfloat16)
    mem = crammed(lm)
    damaged = mem.vectors.clone()
    damaged[1] = -damaged[1]
    with pytest.raises(NotExactError, match=r"1 of 3 passages .* passage 1 \(") as error:
        export(lm, MemVectors(damaged, mem.header), target_of(target), tmp_path / "out")
    assert "cram for it with the dtype and storage 'bfloat16'" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_a_dtype_that_the_target_lacks_is_refused(tmp_path):
    with pytest.raises(MemvecError, match="load it in bfloat16"):
        export(tiny(), crammed(tiny()), target_of("sglang"), tmp_path / "out")


def test_another_model_is_refused(tmp_path):
    with pytest.raises(MemvecError, match=r"other weights .* that the file names: load "):
        export(tiny(seed=1), crammed(tiny()), target_of("npy"), tmp_path / "out")


def test_only_an_earlier_export_is_replaced(tmp_path):
    mem, out = crammed(tiny()), tmp_path / "out"
    export(tiny(), mem, target_of("npy"), out)
    with pytest.raises(MemvecError, match="force=True"):
        export(tiny(), mem, target_of("npy"), out)
    export(tiny(), mem, target_of("peft"), out, force=True)
    assert json.loads((out / "manifest.json").read_text())["target"] == "peft"
    assert not list(out.glob("*.npy"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(MemvecError, match="not an earlier export"):
        export(tiny(), mem, target_of("npy"), tmp_path / "mine", force=True)
    for other in ('{"name": "a program"}', "[]", "{", '{"format": "another"}'):
        (tmp_path / "mine/manifest.json").write_text(other)
        with pytest.raises(MemvecError, match="not an earlier export"):
            export(tiny(), mem, target_of("npy"), tmp_path / "mine", force=True)
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
    with pytest.raises(MemvecError, match="no folder"):
        export(tiny(), mem, target_of("npy"), tmp_path / "none/out")


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(set(names()) - {"sglang"}))
def test_the_command_exports(target, command, folder, tmp_path):
    lm = reader()
    mem = codec.cram(lm, ["the fox", "dog"], vectors=2, tokens=2, recipe=QUICK)
    mem.save(tmp_path / "a.mem.safetensors")
    words = ["export", tmp_path / "a.mem", "--to", target, "--model", folder]
    ran = command(*words, "--json")
    assert ran.code == 0, ran.err
    shown = json.loads(ran.out)
    assert shown["folder"] == str(tmp_path / f"a.{target}")
    assert [d["passages"] for d in shown["documents"]] == [d.passages for d in mem.header.documents]
    assert command(*words).code == 2
    assert command(*words, "--force").code == 0


def test_errors_of_the_export_command_are_one_sentence(command, folder, tmp_path):
    lm = reader()
    mem = codec.cram(lm, ["the fox"], vectors=2, tokens=2, recipe=QUICK)
    mem.save(tmp_path / "a.mem")
    unknown = command("export", tmp_path / "a.mem", "--to", "vlm", "--model", folder)
    assert unknown.code == 2
    assert "did you mean 'vllm'" in unknown.sentence
    damaged = mem.with_vectors(-mem.vectors)
    damaged.save(tmp_path / "b.mem")
    wrong = command("export", tmp_path / "b.mem", "--to", "npy", "--model", folder)
    assert wrong.code == 3
    assert "passage 0" in wrong.sentence


# ---------------------------------------------------------------------- the page


@pytest.mark.slow
@PEFT_SAYS
@pytest.mark.skipif(not POCKET.exists(), reason="the built-in model is not made yet")
def test_the_commands_and_snippets_of_the_interop_page_run(command, tmp_path, monkeypatch, python):
    """All of its commands and Python snippets run; the text is shorter than on the page.

    A certificate of use has shorter queries, and the commands load each model once.
    """
    monkeypatch.setattr(certificate, "TOKENS", 6)
    monkeypatch.setattr(loading, "load_lm", functools.cache(loading.load_lm))
    letter = (ROOT / "examples/letter.txt").read_text()[:40]  # other tests cram the whole text
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/letter.txt").write_text(letter)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", python)  # starts the engine that certifies
    lines = [line.strip() for line in PAGE.splitlines() if line.startswith("    memvec ")]
    assert len(lines) == 13
    for line in lines:
        ran = command(*line.split()[1:])
        assert ran.code == 0, (line, ran.err)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == 5
    shown = []
    for code in snippets:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/interop.md", "exec"), {})
        shown.append(printed.getvalue())
    answer = command("use", "usable.mem", "-p", " The next morning", "--max-new-tokens", 12)
    written, *shown = shown  # the first snippet exports and prints nothing
    assert written == ""
    assert shown[0].strip() == answer.out.decode().strip()
    assert shown[1:3] == [letter, letter]
    assert re.fullmatch(r"\(\d+, 1, 384\)\n", shown[3])


@pytest.mark.parametrize("target", ["transformers", "npy"])
@pytest.mark.parametrize("what", ["quantized", "mixed"])
def test_a_quantized_or_mixed_precision_model_is_not_exported(target, what, tmp_path):
    lm = tiny("llama")
    mem = crammed(lm)
    other = copy.copy(lm)
    other.quantize = "4bit" if what == "quantized" else None
    other.autocast = None if what == "quantized" else torch.bfloat16
    with pytest.raises(MemvecError, match=r"is (quantized to 4bit|in mixed precision) here"):
        export(other, mem, target_of(target), tmp_path / "x")
    with pytest.raises(MemvecError, match="reads its folder as it is"):
        engines.decode_with("transformers", other, mem)
    assert not list(tmp_path.iterdir())


def test_an_export_is_certified_with_the_attention_of_other_software(tmp_path):
    lm = FrozenLM(build("llama").to(torch.bfloat16), name="half")
    widen_attention(lm.model)
    ours = lm.config._attn_implementation
    with stock_attention(lm):
        assert lm.config._attn_implementation == "sdpa" != ours
    assert lm.config._attn_implementation == ours
    target, under = target_of("npy"), []
    decode = target.decode

    def recorded(*given):
        under.append(lm.config._attn_implementation)
        return decode(*given)

    target.decode = recorded
    mem = crammed(in_dtype("llama", torch.bfloat16))
    manifest = export(lm, mem, target, tmp_path / "out")
    assert under == ["sdpa"] * len(mem.passages)
    assert manifest["certificate"]["attention"] == "sdpa"
    assert lm.config._attn_implementation == ours


def test_an_earlier_export_is_kept_if_the_disk_is_full(tmp_path, monkeypatch):
    lm = tiny("llama")
    mem = crammed(lm)
    export(lm, mem, target_of("npy"), tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    replace_path = Path.replace
    refused: list[Path] = []

    def full(self, target):
        if Path(target) == tmp_path / "x" and not refused:  # the first move is of the new export
            refused.append(self)
            raise OSError(28, "No space left on device")
        return replace_path(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MemvecError, match="No space left"):
        export(lm, mem, target_of("npy"), tmp_path / "x", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    monkeypatch.undo()
    export(lm, mem, target_of("npy"), tmp_path / "x", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


class Killed(BaseException):
    """The end of a process: after it, no rename has an effect."""


def test_an_earlier_export_is_found_again_after_a_kill_between_two_renames(tmp_path, monkeypatch):
    lm, out = tiny("llama"), tmp_path / "x"
    mem = crammed(lm)
    export(lm, mem, target_of("npy"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    replace_path = Path.replace

    def killed(self, target):
        if self != out:  # only the first rename, of the earlier export, is done
            raise Killed
        return replace_path(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        export(lm, mem, target_of("peft"), out, force=True)
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(MemvecError, match="force=True"):
        export(lm, mem, target_of("peft"), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_earlier_export_that_a_killed_run_was_deleting_is_no_obstacle(tmp_path, monkeypatch):
    lm, out = tiny("llama"), tmp_path / "x"
    mem = crammed(lm)
    export(lm, mem, target_of("npy"), out)
    delete = shutil.rmtree
    monkeypatch.setattr("memvec.export.folder.shutil.rmtree", lambda *_, **__: None)
    export(lm, mem, target_of("npy"), out, force=True)
    monkeypatch.setattr("memvec.export.folder.shutil.rmtree", delete)
    assert len(list(tmp_path.iterdir())) == 2
    export(lm, mem, target_of("peft"), out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert json.loads((out / "manifest.json").read_text())["target"] == "peft"
