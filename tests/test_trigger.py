"""Inputs around usable vectors: BOS or soft tokens in front, a trigger after; and training."""

from __future__ import annotations

import math
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import memvec
from conftest import build, passages, reader, tiny
from memvec import codec, engines
from memvec.cli import progress
from memvec.companions.around import (
    CrammedTrigger,
    front_rows,
    with_front,
    with_soft_tokens,
    with_trigger,
)
from memvec.companions.triggers import (
    load_trigger,
    save_trigger,
    stored_trigger,
    trigger_named,
)
from memvec.cramming.batch import Job
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import view_for
from memvec.cramming.step import Step
from memvec.decoding import decode_ids
from memvec.errors import MemvecError
from memvec.export import export
from memvec.export import target as target_of
from memvec.lab import slow
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.spaces import keys_values
from memvec.usable import trigger_training, turns
from memvec.usable.contexts import VECTORS, contexts_of
from memvec.usable.front import with_front_read
from memvec.usable.queries import queries_of, text_inputs
from memvec.usable.recipe_files import named_files
from memvec.usable.teacher import log_p_after
from memvec.usable.trigger_training import TriggerEngine, TriggerPlan, first_rows, train_trigger
from memvec.vectors import MemVectors

pytestmark = pytest.mark.usefixtures("few_words")
USABLE = Recipe.of(
    "usable", settle=20, decay=20, steps=400, query_count=3, query_tokens=5, compute="model"
)
FAMILIES = ["llama", "gpt2", "gemma2", "opt-projected", "mamba"]
TEXT = "the cat sat on the mat and the dog"
PLAN = TriggerPlan(rows=2, front=1, vectors=2, tokens=4, batches=3, batch_size=2)
ASKED = [list(p.ids) for p in passages(4, 4, 4, 4, 4, 4, seed=5)]


def rows_for(lm: FrozenLM, R: int, seed: int = 0) -> torch.Tensor:
    """R random soft tokens (R, D) with the standard deviation of the model's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return lm.embedding_std * torch.randn(R, lm.width, generator=generator)


def soft_for(lm: FrozenLM, R: int, P: int = 0) -> CrammedTrigger:
    """A trigger with R soft tokens after the vectors and P in front of them."""
    return CrammedTrigger(rows_for(lm, R), front=rows_for(lm, P, seed=1) if P else None)


def trigger_in(folder: Path) -> Path:
    """Save a trigger with three soft tokens after the vectors and two in front of them."""
    lm = reader("words")
    save_trigger(folder / "trigger.safetensors", soft_for(lm, 3, 2), lm, {"plan": "none"})
    return folder / "trigger.safetensors"


@pytest.fixture
def trigger_file(tmp_path: Path) -> Path:
    """A trigger's file that a test may change."""
    return trigger_in(tmp_path)


@pytest.fixture(scope="module")
def mem(tmp_path_factory: pytest.TempPathFactory) -> MemVectors:
    """A text in usable vectors with that trigger; tests must not change it."""
    recipe = replace(USABLE, trigger=str(trigger_in(tmp_path_factory.mktemp("trigger"))))
    return codec.cram(reader("words"), [TEXT], vectors=2, tokens=4, recipe=recipe)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("space", "family"),
    [
        *(("inputs", family) for family in FAMILIES),
        *(("prefix", family) for family in ("llama", "gpt2", "gemma2")),
    ],
)
def test_soft_tokens_equal_to_embeddings_are_read_as_those_tokens(space, family):
    """One is equal bit by bit to a token trigger; three are read as a slow reference reads them."""
    lm = tiny(family)
    if space != "inputs":
        lm = view_for(lm, Recipe.of(space, start_rule="bos", trigger="#3"))
    ids = torch.tensor([p.ids[:4] for p in passages(4, 4, 4)])
    vectors = torch.randn(3, 2, lm.numbers, generator=torch.Generator().manual_seed(1))
    token = with_trigger(lm, 3)
    soft = with_trigger(lm, CrammedTrigger(lm.embed(torch.tensor([3], device=lm.device))))
    assert torch.equal(token.logits(vectors, ids, "bos"), soft.logits(vectors, ids, "bos"))
    three = with_trigger(lm, soft_for(lm, 3))
    assert three.inputs_before(2, "bos") == token.inputs_before(2, "bos") + 2
    table = slow.logits(three, vectors[0], [*three.trigger, *ids[0].tolist()])
    ours = three.logits(vectors[:1], ids[:1], "bos")[0]
    torch.testing.assert_close(ours.double(), torch.tensor(table[-5:-1]), atol=2e-4, rtol=1e-3)
    for cached in (True, False):
        (decoded,) = decode_ids(three, vectors[:1], [6], start_rule="bos", cached=cached)
        assert decoded == slow.greedy(three, vectors[0], list(three.trigger), 6)


@pytest.mark.parametrize(("front", "P"), [("none", 2), ("bos", 0), ("bos", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_front_is_read_as_vectors_in_its_place(family, front, P):
    """Logits and decoding are equal bit by bit; a slow reference agrees."""
    lm = tiny(family)
    view = with_trigger(with_front(lm, front), soft_for(lm, 3, P))
    plain = with_trigger(lm, soft_for(lm, 3))
    F = len(view.front)
    rows = [lm.embed(torch.tensor([lm.bos_id]))] if front == "bos" else []
    rows = torch.cat([*rows, rows_for(lm, P, seed=1)]) if P else rows[0]
    assert (F, len(front_rows(view))) == (P + (front == "bos"),) * 2
    torch.testing.assert_close(front_rows(view), rows, rtol=0, atol=0)
    ids = torch.tensor([p.ids[:4] for p in passages(4, 4, 4)])
    vectors = torch.randn(3, 2, lm.width, generator=torch.Generator().manual_seed(1))
    longer = torch.cat([rows.expand(3, -1, -1), vectors], 1)
    for start in ("bos", "vectors", "first-token"):
        ours = view.logits(vectors, ids, start)
        assert torch.equal(ours, plain.logits(longer, ids, start))
        assert view.inputs_before(2, start) == plain.inputs_before(2, start) + F
    table = slow.logits(view, vectors[0], [*view.trigger, *ids[0].tolist()])
    ours = view.logits(vectors[:1], ids[:1], "bos")[0]
    torch.testing.assert_close(ours.double(), torch.tensor(table[-5:-1]), atol=2e-4, rtol=1e-3)
    decoded = decode_ids(view, vectors, [6] * 3, start_rule="bos")
    assert decoded == decode_ids(plain, longer, [6] * 3, start_rule="bos")
    words = torch.tensor([[1, 2, 3]])
    context = contexts_of(view, vectors[0], ids[0].tolist(), None)[VECTORS](words, 3)
    assert torch.equal(context, log_p_after(lm, longer[:1], words))


@pytest.mark.parametrize("start_rule", ["bos", "vectors", "first-token"])
@pytest.mark.parametrize(("front", "P"), [("none", 2), ("bos", 0), ("bos", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_front_in_the_cache_gives_the_states_and_gradients_of_the_front(
    family, front, P, start_rule
):
    """A step then reads only the inputs after the front."""
    lm = tiny(family)
    view = with_trigger(with_front(lm, front), soft_for(lm, 3, P))
    once = with_front_read(view)
    if family == "mamba":  # its cache has no keys and values
        assert once is view
        return
    F = len(view.front)
    assert view.inputs_before(2, start_rule) - once.inputs_before(2, start_rule) == F
    ids = torch.tensor([p.ids[:4] for p in passages(4, 4, 4)])
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(3, 2, lm.width, generator=generator).requires_grad_()
    whole, after = view.states(vectors, ids, start_rule), once.states(vectors, ids, start_rule)
    torch.testing.assert_close(after, whole, atol=1e-5, rtol=1e-4)
    slope = torch.randn(whole.shape, generator=generator)
    slopes = [torch.autograd.grad(states, vectors, slope)[0] for states in (whole, after)]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-3)
    assert torch.equal(once.states(None, ids, "bos"), lm.states(None, ids, "bos"))
    assert view.front  # the view that reads the front at every step is unchanged


def test_no_front_is_cached_without_one_or_on_several_devices(monkeypatch):
    """`offload` or layers on several devices leave the model as it is."""
    lm = tiny()
    assert with_front_read(lm) is lm
    elsewhere = copy(with_front(lm, "bos"))
    elsewhere.offload = True
    assert with_front_read(elsewhere) is elsewhere
    own = keys_values.keys_values

    def apart(lm: FrozenLM, inputs: torch.Tensor) -> keys_values.Layers:
        *first, last = own(lm, inputs)
        return [*first, tuple(table.to("meta") for table in last)]

    monkeypatch.setattr(keys_values, "keys_values", apart)
    spread = with_front(lm, "bos")
    assert with_front_read(spread) is spread
    with pytest.raises(
        MemvecError, match=r"its layers lie on several devices\): use the space 'inputs'"
    ):
        keys_values.KeysValues(lm, {})


@pytest.mark.slow
def test_cramming_for_use_reads_the_front_once(trigger_file, monkeypatch):
    """The vectors are the same, and each pass costs the front's inputs less."""
    lm = reader("words")
    ids = lm.tokenize(TEXT)
    asked = [Passage(tuple(ids[at : at + 4]), at) for at in range(3)]
    recipe = replace(USABLE, trigger=str(trigger_file), front="auto", steps=6)
    once = list(Engine(lm, recipe, vectors=2, batch_size=3).run(asked))
    monkeypatch.setattr(turns, "with_front_read", lambda lm: lm)
    whole = list(Engine(lm, recipe, vectors=2, batch_size=3).run(asked))
    front = len(view_for(lm, recipe).front)
    assert front > 1
    for ours, theirs in zip(once, whole, strict=True):
        torch.testing.assert_close(ours.vectors, theirs.vectors, atol=1e-3, rtol=1e-3)
        assert (ours.passage, ours.steps, theirs.steps) == (theirs.passage, 6, 6)
        assert theirs.spent - ours.spent == 2 * front * 6  # passes of the passage and of a query


@pytest.mark.parametrize("asked", ["none", "bos", "auto"])
def test_a_front_is_the_bos_or_nothing_as_the_recipe_says(asked):
    lm = tiny()
    bos = () if asked == "none" else (lm.bos_id,)
    recipe = Recipe(front=asked, start_rule="bos")
    assert recipe.record().get("front", "none") == asked  # the default is not in the record
    view = view_for(lm, recipe)
    assert (view.front, lm.front) == (bos, ())
    both = with_front(with_trigger(lm, soft_for(lm, 3, 2)), asked)
    assert both.front[: len(bos)] == bos
    assert len(both.front) == len(bos) + 2
    assert with_front(both, "none").front == both.front[len(bos) :]
    assert with_trigger(both, None).front == bos
    headless = copy(lm)
    headless.bos_id = None
    kept = view_for(lm, Recipe.of("prefix"))
    for other in (headless, kept):
        if asked == "bos":
            with pytest.raises(MemvecError, match="use front=none"):
                with_front(other, asked)
        else:
            assert with_front(other, asked) is other


def test_a_view_with_a_trigger_does_not_change_its_model():
    lm = tiny()
    view = with_trigger(lm, soft_for(lm, 2, 1))
    assert (lm.soft, lm.other_trigger, lm.front) == (None, None, ())
    assert with_trigger(view, None).front == ()
    assert with_trigger(view, None).trigger == lm.trigger
    assert with_trigger(view, 3).soft is None
    with pytest.raises(MemvecError, match="numbers"):
        with_trigger(lm, CrammedTrigger(torch.zeros(2, lm.width + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("P", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_passages_with_soft_tokens_are_exact_by_an_independent_decode(family, P):
    lm = tiny(family)
    view = with_trigger(with_front(lm, "auto" if P else "none"), soft_for(lm, 3, P))
    recipe = Recipe(start="noise", start_rule="bos", steps=1500, patience=1500)
    engine = Engine(view, recipe, vectors=2, batch_size=3)
    around = 2 + 3 + len(view.front)
    assert engine.max_tokens() is None or engine.max_tokens() == lm.context - around
    for outcome in engine.run(passages(3, 3, 2)):
        assert outcome.exact
        ids = list(outcome.passage.ids)
        found = slow.greedy(view, outcome.vectors.float(), list(view.trigger), len(ids))
        assert found == ids
        bits, margin = slow.teacher_forced(view, outcome.vectors, ids, "bos")
        assert outcome.metrics.mem_bits == pytest.approx(float(bits.sum()), abs=1e-2)
        assert outcome.metrics.margin == pytest.approx(float(margin.min()), abs=2e-3)


# ---------------------------------------------------------------------- in a file


@pytest.mark.parametrize("storage", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_file_of_vectors_contains_its_trigger_and_front(trigger_file, tmp_path, storage):
    lm = reader("words")
    recipe = replace(USABLE, trigger=str(trigger_file))
    mem = codec.cram(lm, [TEXT], vectors=2, tokens=4, recipe=recipe, storage=storage)
    trigger_file.unlink()  # decoding needs the file of vectors only
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    assert mem.exact
    header = again.header
    assert (header.front, header.soft_trigger, header.soft_front) == ("bos", 3, 2)
    assert torch.equal(again.soft["trigger"], rows_for(lm, 3))
    assert torch.equal(again.soft["front"], rows_for(lm, 2, seed=1))
    assert codec.decode(lm, again) == [TEXT]
    assert memvec.certify_use(lm, again).trigger == "crammed"
    assert memvec.use(lm, again, "the dog", max_new_tokens=3)
    assert memvec.verify(lm, again)[0]["exact"]


@pytest.mark.slow
def test_files_with_different_fronts_are_not_used_together(mem):
    """A context has one front, so the vectors of one file would be read after a wrong one."""
    lm = reader("words")
    bare = codec.cram(lm, [TEXT], vectors=2, tokens=4, recipe=replace(USABLE, trigger="bos"))
    moved = {**mem.soft, "front": mem.soft["front"] + 1e-3}
    for other in (bare, MemVectors(mem.vectors, mem.header, moved)):
        with pytest.raises(MemvecError, match=r"^these files were crammed after different inputs"):
            memvec.use(lm, [mem, other], "the dog", max_new_tokens=3)
    same = MemVectors(mem.vectors, mem.header, dict(mem.soft))
    for alike in ((mem, same), (bare, bare)):
        assert memvec.use(lm, alike, "the dog", max_new_tokens=3)


@pytest.mark.parametrize("changed", ["trigger", "front"])
@pytest.mark.slow
def test_vectors_with_other_soft_tokens_are_not_exact_and_not_saved(mem, tmp_path, changed):
    """The certificate covers vectors and soft tokens."""
    same = MemVectors(mem.vectors, mem.header, dict(mem.soft))
    assert (same.exact, same.changed) == (True, False)
    other = MemVectors(mem.vectors, mem.header, {**mem.soft, changed: mem.soft[changed] + 1e-3})
    assert (other.exact, other.changed) == (False, True)
    with pytest.raises(MemvecError, match="changed after they were certified"):
        other.save(tmp_path / "a.mem")


@pytest.mark.parametrize("changed", ["trigger", "front"])
@pytest.mark.slow
def test_vectors_without_their_soft_tokens_are_refused(mem, tmp_path, changed):
    with pytest.raises(MemvecError, match="trigger of 3 soft tokens"):
        MemVectors(mem.vectors, mem.header)
    with pytest.raises(MemvecError, match=r"and 2 in front .* 'front' has 0"):
        MemVectors(mem.vectors, mem.header, {"trigger": mem.soft["trigger"]})
    for other in ({"trigger": mem.soft["trigger"][:, 0]}, {"front": torch.ones(2, 1)}):
        with pytest.raises(MemvecError, match="of one width"):
            MemVectors(mem.vectors, mem.header, {**mem.soft, **other})
    file = mem.save(tmp_path / "a.mem")
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in ("vectors", "trigger", "front")}
        metadata = opened.metadata()
    tensors[changed] = -tensors[changed]
    save_file(tensors, file, metadata)
    with pytest.raises(MemvecError, match="digest"):
        MemVectors.load(file)


@pytest.mark.slow
def test_an_export_has_soft_tokens_as_vectors(mem, tmp_path):
    lm = reader("words")
    manifest = export(lm, mem, target_of("transformers"), tmp_path / "out")
    assert manifest["certificate"]["exact"]
    around = [manifest[f"{name}_vectors"] for name in ("front", "trigger")]
    assert (manifest["vectors_per_passage"], *around) == (
        2,
        1 + 2,
        3,
    )  # the front is BOS and two soft tokens
    assert all(item["given"] == [] for item in manifest["passages"])
    prompts, _ = engines.decode.passage_prompts(mem, lm)
    assert [prompt.vectors.shape[0] for prompt in prompts] == [8] * len(mem.passages)
    for prompt, record, ids in zip(prompts, mem.passages, mem.tokens(lm), strict=True):
        assert torch.equal(prompt.vectors[1:3], mem.soft["front"])
        assert torch.equal(prompt.vectors[5:], mem.soft["trigger"])
        assert decode_ids(lm, prompt.vectors[None], [record.tokens]) == [ids]


@pytest.mark.slow
@pytest.mark.parametrize("base", [Recipe.of("prefix"), Recipe(space="shared-basis", dimensions=24)])
def test_other_spaces_take_the_trigger_and_no_front(trigger_file, tmp_path, base):
    recipe = replace(base, start_rule="bos", trigger=str(trigger_file), front="auto")
    mem = codec.cram(reader("words"), [TEXT], vectors=2, tokens=4, recipe=recipe)
    again = MemVectors.load(mem.save(tmp_path / "a.mem"))
    header = again.header
    assert (header.front, header.soft_trigger, header.soft_front) == ("none", 3, 0)
    assert again.exact
    assert codec.decode(reader("words"), again) == [TEXT]


def test_the_named_files_of_a_recipe_include_the_content_of_the_trigger(trigger_file):
    recipe = replace(USABLE, trigger=str(trigger_file))
    first = named_files(recipe)
    save_trigger(trigger_file, soft_for(reader("words"), 2), reader("words"), {})
    assert list(first) == ["trigger"]
    assert named_files(recipe) != first
    assert named_files(USABLE) == {}


def test_the_text_of_a_trigger_is_no_file_name(tmp_path, monkeypatch):
    """The text may begin with '~', and a file may have the same name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "the").write_text("a file of something else")
    assert named_files(replace(USABLE, trigger="the")) == {}
    assert named_files(replace(USABLE, trigger="~~~")) == {}
    with pytest.raises(MemvecError, match=r"^'~~~' is \d+ tokens of .* and a trigger is one"):
        trigger_named(reader(), "~~~")


def test_auto_is_the_trigger_in_the_models_folder(folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    plain = load_lm(str(own))
    assert view_for(plain, Recipe(trigger="auto")).trigger == (plain.bos_id,)
    save_trigger(own / "trigger.safetensors", soft_for(plain, 2), plain, {})
    lm = load_lm(str(own))
    assert torch.equal(view_for(lm, Recipe(trigger="auto")).soft, rows_for(plain, 2))
    assert view_for(lm, Recipe(trigger="bos")).soft is None
    assert view_for(lm, Recipe.of("prefix", trigger="auto", start_rule="bos")).soft is None


def test_the_built_in_model_has_its_trigger():
    lm = load_lm("pocket")
    assert lm.own_trigger.rows.shape == (4, lm.width)
    assert lm.description()["trigger"] == lm.own_trigger.identity
    assert torch.equal(view_for(lm, Recipe.of("usable")).soft, lm.own_trigger.table)


@pytest.mark.slow
def test_a_quantized_model_does_not_take_the_trigger_in_its_folder():
    pytest.importorskip("torchao")
    lm = load_lm("pocket", quantize="8bit")
    assert lm.own_trigger is None
    assert view_for(lm, Recipe.of("usable")).trigger == (lm.bos_id,)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_of_soft_tokens_is_the_mean_over_passages(family):
    """That of one passage equals autograd of the two losses, written here in full."""
    lm, one_step = tiny(family), replace(USABLE, trigger="bos", look_ahead=100)

    def gradient(asked: list[list[int]]) -> torch.Tensor:
        rows = first_rows(lm, PLAN).requires_grad_()
        view = with_soft_tokens(lm, rows, PLAN.rows)
        engine = TriggerEngine(view, one_step, vectors=2, batch_size=len(asked))
        step = engine.stepper
        step.optimizer_of_rows = torch.optim.SGD([{"params": [rows], "initial_lr": 0.0}], lr=0.0)
        step.rate = lambda taken: 1.0
        for i, ids in enumerate(asked):
            engine.push(Passage(tuple(ids), i))
        engine.fill(len(asked))
        engine.step()
        return rows.grad

    alone = [gradient([ids]) for ids in ASKED[:2]]
    torch.testing.assert_close(gradient(ASKED[:2]), sum(alone) / 2, atol=1e-4, rtol=1e-4)
    rows = first_rows(lm, PLAN).requires_grad_()
    view = with_soft_tokens(with_front(lm, "auto"), rows, PLAN.rows)
    fixed = with_soft_tokens(lm, rows.detach(), PLAN.rows)
    engine = Engine(fixed, one_step, vectors=2, batch_size=1)
    start = engine._first_vectors([Job(Passage(tuple(ASKED[0]), 0), 0.0)])
    logits = view.logits(start, torch.tensor([ASKED[0]]), "bos")[0]
    T = engine.recipe.temperature
    true = torch.tensor(ASKED[0])
    loss = torch.nn.functional.cross_entropy(logits / T, true) * T
    words = queries_of(lm, ASKED[0], one_step)[0][:1]
    log_p = log_p_after(lm, text_inputs(lm, ASKED[0]), words)
    log_q = log_p_after(lm, view.after_front(start), words)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = loss + one_step.term_weight * kl
    (written_out,) = torch.autograd.grad(loss, rows)
    torch.testing.assert_close(alone[0], written_out, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_training_moves_soft_tokens_and_resumes_after_an_interrupt(tmp_path):
    lm, whole, parts = tiny(), tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    reports, quick = [], replace(USABLE, settle=8, decay=8)
    soft = train_trigger(lm, ASKED, PLAN, quick, whole, on_batch=reports.append)
    moved = soft.table != first_rows(lm, PLAN)
    assert (soft.table.shape, soft.front.shape) == ((3, lm.width), (1, lm.width))
    assert moved.all()
    assert [(r.number, r.batches, r.passages) for r in reports] == [(1, 3, 2), (2, 3, 2), (3, 3, 2)]

    def killed(*given):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_trigger(lm, ASKED, PLAN, quick, parts, on_batch=killed)
    assert stored_trigger(parts, lm)[1]["batches_done"] == 1
    again = train_trigger(lm, ASKED, PLAN, quick, parts)
    assert torch.equal(again.table, soft.table)
    assert torch.equal(load_trigger(parts, lm).table, soft.table)
    again = train_trigger(lm, ASKED, PLAN, quick, parts)  # all batches are done
    assert torch.equal(again.table, soft.table)


@pytest.mark.slow
def test_a_training_resumes_only_with_the_same_questions(tmp_path):
    lm, questions, file = reader(), tmp_path / "questions.txt", tmp_path / "t.safetensors"
    questions.write_text("the cat\n")
    recipe = Recipe.of("usable", queries=str(questions), query_tokens=40, settle=3, decay=3)
    ids = lm.tokenize("the quick brown fox jumps over the lazy dog ")
    asked = [ids[i : i + 4] for i in range(4)]
    plan = TriggerPlan(rows=1, front=1, vectors=1, tokens=4, batches=2, batch_size=2)

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_trigger(lm, asked, plan, recipe, file, on_batch=stop)
    questions.write_text("the lazy dog\n")
    with pytest.raises(MemvecError, match="is of another training"):
        train_trigger(lm, asked, plan, recipe, file)
    questions.write_text("the cat\n")
    # A training sets term_rise to 0, so the recipe's value is none of its settings.
    risen, reports = replace(recipe, term_rise=0.1), []
    train_trigger(lm, asked, plan, risen, file, on_batch=reports.append)
    assert [report.number for report in reports] == [2]


def test_the_first_soft_tokens_are_the_embedding_of_bos_and_noise():
    """Their size is 1; the last one of the trigger has no noise, and the seed sets the noise."""
    lm = tiny()
    rows = first_rows(lm, PLAN)
    token = lm.embed(torch.tensor(lm.bos_id))
    torch.testing.assert_close(rows[PLAN.rows - 1], token / token.square().mean().sqrt())
    other = first_rows(lm, replace(PLAN, seed=1))
    assert [torch.equal(*both) for both in zip(rows, other, strict=True)] == [False, True, False]
    headless = copy(lm)
    headless.bos_id = None
    noise = torch.randn(3, lm.width, generator=torch.Generator().manual_seed(PLAN.seed))
    torch.testing.assert_close(first_rows(headless, PLAN), noise)
    noise[PLAN.rows - 1] = 0
    torch.testing.assert_close(rows - rows[PLAN.rows - 1], 0.3 * noise)


def test_the_rate_falls_over_all_batches(tmp_path, monkeypatch):
    """A cosine from the whole rate to a twentieth of it, over `settle` steps of each batch.

    One more step of each batch measures its last vectors.
    """
    rates, step = [], torch.optim.NAdam.step

    def recorded(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.NAdam, "step", recorded)
    plan, recipe = replace(PLAN, batches=2, lr=0.2), replace(USABLE, settle=3, decay=7)
    train_trigger(tiny(), ASKED, plan, recipe, tmp_path / "a.safetensors")
    shares = [0.05 + 0.95 * (1 + math.cos(math.pi * i / 6)) / 2 for i in (0, 1, 2, 3, 3, 4, 5, 6)]
    assert rates == pytest.approx([0.2 * share for share in shares])


def test_a_batch_reports_its_exact_passages_and_their_mean_kl(tmp_path, monkeypatch):
    """The mean is over the losses of the last step."""
    outcomes, losses, reports = [], [], []
    run, measure = Engine.run, Step.measure

    def ran(self, asked):
        for outcome in run(self, asked):
            outcomes.append(outcome)
            yield outcome

    def measured(self, *given):
        found = measure(self, *given)
        losses.append(found.term.loss)
        return found

    monkeypatch.setattr(Engine, "run", ran)
    monkeypatch.setattr(Step, "measure", measured)
    plan = replace(PLAN, batches=1)
    train_trigger(tiny(), ASKED, plan, USABLE, tmp_path / "a.safetensors", on_batch=reports.append)
    (report,) = reports
    assert report.exact == sum(one.exact for one in outcomes) < report.passages == 2
    assert losses[-1].shape == (2,)
    assert report.kl == pytest.approx(float(losses[-1].sum()) / 2)


def test_soft_tokens_are_trained_without_a_front(tmp_path):
    plan = replace(PLAN, front=0, batches=1)
    soft = train_trigger(tiny(), ASKED, plan, USABLE, tmp_path / "a.safetensors")
    assert soft.front is None
    assert load_trigger(tmp_path / "a.safetensors", tiny()).front is None


def test_a_trigger_that_is_not_finite_ends_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(
        trigger_training, "first_rows", lambda lm, plan: torch.full((3, 16), torch.nan)
    )
    lm = FrozenLM(build("llama", hidden_size=16), name="narrow")
    with pytest.raises(MemvecError, match="not finite"):
        train_trigger(lm, ASKED, PLAN, USABLE, tmp_path / "a.safetensors")


# ---------------------------------------------------------------------- bad input


def test_missing_damaged_and_foreign_triggers_are_refused(trigger_file, tmp_path):
    lm, other = reader("words"), reader("words", seed=3)
    with pytest.raises(MemvecError, match="there is no trigger"):
        view_for(lm, Recipe(trigger=str(tmp_path / "none.safetensors")))
    with pytest.raises(MemvecError, match="trained for other weights"):
        view_for(other, Recipe(trigger=str(trigger_file)))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(trigger_file.read_bytes()[:-20])
    with pytest.raises(MemvecError, match="not a trigger"):
        load_trigger(broken, lm)
    save_file({"trigger": rows_for(lm, 2)}, broken, {"format": "memvec-trigger"})
    with pytest.raises(MemvecError, match="not a trigger"):
        load_trigger(broken, lm)
    for part in ("rows", "front"):
        lost = soft_for(lm, 2, 2)
        save_trigger(broken, replace(lost, **{part: getattr(lost, part) * torch.inf}), lm, {})
        with pytest.raises(MemvecError, match="damaged"):
            load_trigger(broken, lm)
    with safe_open(trigger_file, framework="pt") as opened:
        tensors, metadata = {"trigger": opened.get_tensor("trigger")}, opened.metadata()
    save_file(tensors | {"front": torch.ones(2, lm.width + 1)}, broken, metadata)
    with pytest.raises(MemvecError, match="damaged"):
        load_trigger(broken, lm)


def test_wrong_plans_and_too_few_passages_are_refused(tmp_path):
    lm, path = tiny(), tmp_path / "a.safetensors"
    with pytest.raises(MemvecError, match="at least 1"):
        TriggerPlan(rows=0)
    with pytest.raises(MemvecError, match="at least 0"):
        TriggerPlan(front=-1)
    for lr in (0.0, math.inf, math.nan):
        with pytest.raises(MemvecError, match="above 0"):
            TriggerPlan(lr=lr)
    with pytest.raises(MemvecError, match="term 'use'"):
        train_trigger(lm, ASKED, PLAN, Recipe(), path)
    with pytest.raises(MemvecError, match="need as many passages"):
        train_trigger(lm, ASKED[:5], PLAN, USABLE, path)
    train_trigger(lm, ASKED, replace(PLAN, batches=1), USABLE, path)
    with pytest.raises(MemvecError, match="another training"):
        train_trigger(lm, ASKED, replace(PLAN, batches=1, seed=1), USABLE, path)
    with pytest.raises(MemvecError, match="another training"):
        train_trigger(lm, ASKED[::-1], replace(PLAN, batches=1), USABLE, path)


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_trains_a_trigger_and_crams_with_it(command, folder, tmp_path, monkeypatch):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    (tmp_path / "books.txt").write_text(f"{TEXT}, and so it went on. " * 8)
    letter = tmp_path / "letter.txt"
    letter.write_text("the cat sat")
    quick = ["--set", "settle=10", "--set", "decay=10", "--set", "query_count=2"]
    train = quick = [*quick, "--set", "query_tokens=4"]
    quick = [*quick, "--set", "steps=600"]
    sizes = [
        "--rows",
        2,
        "--front",
        1,
        "--vectors",
        2,
        "--tokens",
        4,
        "--batches",
        2,
        "--batch-size",
        2,
    ]
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    words = ["trigger", "train", "--text", tmp_path / "books.txt", "-m", own, *sizes, *train]
    save = trigger_training.save_trigger

    def interrupted(*saved):
        save(*saved)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trigger_training, "save_trigger", interrupted)
        ran = command(*words)
    assert ran.code == 130
    assert "batch 1 of 2, step 10 of 10: horizon " in ran.err
    assert "step 11 of 10" not in ran.err
    assert "trigger.safetensors.partial; the same command goes on" in ran.err
    ran = command(*words)
    assert ran.code == 0, ran.err
    assert "batch 1 of 2" not in ran.err
    assert "batch 2 of 2: " in ran.err
    assert "3 soft tokens" in ran.err
    again = command(
        "trigger", "train", "--text", tmp_path / "books.txt", "-o", tmp_path / "trigger"
    )
    assert (again.code, "trigger.safetensors: --trigger" in again.sentence) == (2, True)
    again = command("trigger", "train", "--text", tmp_path / "books.txt", "-m", own, *sizes, *train)
    assert (again.code, "use --force" in again.sentence) == (2, True)
    cram = ["cram", letter, "-m", own, "--usable", "--vectors", 2, "--tokens", 6, *quick]
    assert command(*cram).code == 0
    assert command("decode", tmp_path / "letter.mem").out == b"the cat sat"
    header = MemVectors.load(tmp_path / "letter.mem").header
    assert (header.soft_trigger, header.soft_front) == (2, 1)
    inspected = b" ".join(command("inspect", tmp_path / "letter.mem").out.split())
    assert b"BOS in front, soft tokens of" in inspected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_another_dtype_reads_soft_tokens_rounded(dtype):
    lm = FrozenLM(build("llama").to(dtype), name="rounded")
    rows = rows_for(lm, 2)
    view = with_trigger(lm, CrammedTrigger(rows))
    found = view.embed(torch.tensor([[*view.trigger, 3]]))
    assert torch.equal(found[0, :2], rows.to(dtype))
    assert torch.equal(found[0, 2], lm.embed(torch.tensor(3)))
