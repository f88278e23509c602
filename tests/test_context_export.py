"""Export of usable vectors as context: the inputs that stand in front of any prompt."""

from __future__ import annotations

import functools
import hashlib
import json
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memvec
from conftest import reader
from memvec import codec
from memvec.cli.export import _kept_gain
from memvec.companions.around import CrammedTrigger
from memvec.companions.triggers import save_trigger
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.export import export_context, names
from memvec.export import target as target_of
from memvec.export.target import Item, embedded
from memvec.export.transformers import generated
from memvec.model.lm import FrozenLM
from memvec.model.precision import widen_attention
from memvec.usable.certificate import certify_use
from memvec.vectors import MemVectors

SCALE = 0.5
pytestmark = pytest.mark.usefixtures("few_words")
RECIPE = Recipe.of(
    "usable", settle=8, decay=8, steps=300, query_count=3, query_tokens=5, compute="model"
)
RECIPE = replace(RECIPE, context_scale=SCALE)
TEXT = "the cat sat on the mat and the dog"
PROMPT = " the"


@functools.cache
def crammed(tmp: Path, soft: bool) -> MemVectors:
    """Usable vectors of a text of several passages, exact, with soft tokens around them or not."""
    lm, recipe = reader("words"), RECIPE
    if soft:
        rows = torch.randn(5, lm.width, generator=torch.Generator().manual_seed(1))
        file = tmp / "trigger.safetensors"
        save_trigger(file, CrammedTrigger(rows[:2], front=rows[2:]), lm, {})
        recipe = replace(recipe, trigger=str(file))
    mem = codec.cram(lm, [TEXT], vectors=2, tokens=3, recipe=recipe)
    assert mem.exact
    assert (mem.header.front, mem.header.context_scale) == ("bos", SCALE)
    return mem


@functools.cache
def in_dtype(dtype: str | None) -> FrozenLM:
    lm = reader("words")
    if dtype is None:
        return lm
    return FrozenLM(deepcopy(lm.model).to(getattr(torch, dtype)), lm.tokenizer, name=lm.name)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("context")


def slow_inputs(lm: FrozenLM, mem: MemVectors, scale: float, front: str) -> torch.Tensor:
    """What stands in front of a prompt, written out part by part."""
    parts = [] if front == "none" else [lm.embed(torch.tensor([lm.bos_id]))]
    if "front" in mem.soft:
        parts.append(mem.soft["front"])
    return torch.cat([*parts, *(scale * vectors.float() for vectors in mem.vectors)])


@pytest.mark.slow
@pytest.mark.parametrize("front", ["bos", "none"])
@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("soft", [False, True])
def test_context_inputs_are_what_use_reads(soft, scale, front, tmp):
    """The front and the scale are those of the file's header."""
    lm, mem = reader("words"), crammed(tmp, soft)
    header = mem.header.model_copy(update={"context_scale": scale, "front": front})
    mem = MemVectors(mem.vectors, header, mem.soft)
    inputs = memvec.context_inputs(lm, mem)
    assert torch.allclose(inputs, slow_inputs(lm, mem, scale, front), rtol=1e-6)
    both = memvec.context_inputs(lm, [mem, mem])
    first = len(inputs) - mem.vectors.shape[0] * mem.vectors.shape[1]
    assert torch.equal(both, torch.cat([inputs, inputs[first:]]))
    assert torch.equal(memvec.context_inputs(lm, mem, [0]), inputs[: first + mem.vectors.shape[1]])
    prompt = torch.cat([inputs, embedded(lm.tokenize(PROMPT), lm)])
    ids = generated(lm, prompt, 6)
    assert lm.text(ids) == memvec.use(lm, mem, PROMPT, max_new_tokens=6, eos_token_id=None)


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("to", names())
def test_every_target_holds_the_same_inputs(to, soft, tmp, tmp_path):
    mem, target = crammed(tmp, soft), target_of(to)
    lm = in_dtype(target.dtype)
    manifest = export_context(lm, mem, target, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert kept == manifest
    sealed = {name: value for name, value in kept.items() if name != "sha256"}
    whole = json.dumps(sealed, sort_keys=True).encode()
    assert kept["sha256"] == hashlib.sha256(whole).hexdigest()
    inputs = memvec.context_inputs(lm, mem)
    item = Item(inputs, (), 0)
    assert torch.equal(target.read(tmp_path / "out" / kept["file"], item, lm), inputs)
    assert (kept["mode"], kept["inputs"], kept["context_scale"]) == ("context", len(inputs), SCALE)
    assert kept["front_vectors"] == (4 if soft else 1)
    assert set(kept["use"]["held_out"]["contexts"]) >= {"vectors", "nothing"}
    # Exact-only vectors would have to be crammed first.
    assert "exact-only vectors" not in kept["use"]["held_out"]["contexts"]
    assert not list((tmp_path / "out").glob("*.py"))  # nothing there decodes passages


@pytest.mark.slow
def test_an_existing_folder_and_vectors_that_are_no_context_are_refused(tmp, tmp_path):
    lm, mem = reader("words"), crammed(tmp, False)
    export_context(lm, mem, target_of("npy"), tmp_path / "out")
    with pytest.raises(MemvecError, match="exists: use force=True"):
        export_context(lm, mem, target_of("npy"), tmp_path / "out")
    export_context(lm, mem, target_of("npy"), tmp_path / "out", force=True)
    plain = codec.cram(lm, [TEXT], vectors=2, tokens=3, recipe=Recipe(steps=300))
    with pytest.raises(MemvecError, match="cram the text with the preset 'usable'"):
        export_context(lm, plain, target_of("npy"), tmp_path / "plain")
    inputs, small = len(memvec.context_inputs(lm, mem)), copy(lm)
    small.context = inputs  # no room for a prompt
    with pytest.raises(MemvecError, match=f"need {inputs} inputs and .* reads {inputs}, a prompt"):
        export_context(small, mem, target_of("npy"), tmp_path / "small")
    long = MemVectors(mem.vectors.repeat(1, 500, 1), mem.header, mem.soft)
    with pytest.raises(MemvecError, match="fewer vectors"):
        export_context(lm, long, target_of("npy"), tmp_path / "long")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(MemvecError, match="no vectors to use"):
        memvec.context_inputs(lm, [])


@pytest.mark.slow
def test_a_context_that_its_target_reads_as_other_numbers_is_not_written(tmp, tmp_path):
    """Here the target's loader returns one number that differs by one bit."""
    lm, mem, target = reader("words"), crammed(tmp, False), target_of("npy")
    read = target.read

    def other(*given):
        numbers = read(*given).clone()
        numbers[-1, -1] = torch.nextafter(numbers[-1, -1], torch.tensor(torch.inf))
        return numbers

    target.read = other
    with pytest.raises(MemvecError, match="npy reads other numbers than were written in"):
        export_context(lm, mem, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_context_is_certified_with_the_attention_of_other_software(tmp, tmp_path, monkeypatch):
    lm, mem, under = reader("words"), crammed(tmp, False), []
    half = FrozenLM(deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer, name=lm.name)
    widen_attention(half.model)
    ours = half.config._attn_implementation

    def recorded(lm, mem, **options):
        under.append(lm.config._attn_implementation)
        return certify_use(reader("words"), mem, **options)

    monkeypatch.setattr("memvec.export.context.certify_use", recorded)
    monkeypatch.setattr(MemVectors, "check_model", lambda *_, **__: None)
    export_context(half, mem, target_of("npy"), tmp_path / "out")
    assert under == ["sdpa"]
    assert half.config._attn_implementation == ours != "sdpa"


@pytest.mark.slow
def test_vectors_that_are_no_inputs_are_refused():
    lm = reader("words")
    recipe = replace(RECIPE, context_scale=1.0, space="prefix")
    mem = codec.cram(lm, [TEXT], vectors=2, tokens=3, recipe=recipe)
    with pytest.raises(MemvecError, match="in the space 'prefix' are no inputs"):
        memvec.context_inputs(lm, mem)


@pytest.mark.slow
def test_the_command_writes_a_context(command, tmp, tmp_path):
    lm, mem = reader("words"), crammed(tmp, False)
    for part in (lm.model, lm.tokenizer):
        part.save_pretrained(tmp_path / "words")
    file = mem.save(tmp_path / "cat.mem")
    folder = tmp_path / "cat.transformers-context"
    exported = command(
        "export", file, "-m", tmp_path / "words", "--to", "transformers", "--context"
    )
    assert exported.code == 0, exported.err
    assert "inputs for transformers, to put in front of a prompt" in exported.err
    use = json.loads((folder / "manifest.json").read_text())["use"]
    kept = use["in_a_row"]["contexts"]["vectors"]["kept"]  # as they are exported, not one by one
    words = f"vectors keep {kept:.2f} of" if kept >= 0 else f"none ({kept:.2f} of"
    assert words in exported.sentence
    inputs = load_file(folder / "context.safetensors")["inputs_embeds"][0]
    assert torch.equal(inputs, memvec.context_inputs(lm, mem))


def test_a_context_worse_than_none_is_reported_as_such():
    assert _kept_gain(0.5) == "keep 0.50 of the text's gain"
    assert _kept_gain(-1.894) == "are a worse context than none (-1.89 of the text's gain)"
