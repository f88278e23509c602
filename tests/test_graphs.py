"""Steps replayed from CUDA graphs equal computed steps; on a CPU the recorder replaces CUDA."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections import Counter
from copy import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
import transformers
from packaging.version import Version

from conftest import QUICK, build, passages, tiny
from memvec import cram, graphs, load_lm, metrics
from memvec.companions.around import CrammedTrigger, with_trigger
from memvec.cramming import engine as engine_module
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.model import memory
from memvec.model.lm import FrozenLM
from memvec.results import Score
from memvec.usable.trigger_training import TriggerPlan, train_trigger
from recorder import NoWaiting, Recorder

ENDLESS = Recipe(steps=12, margin=1000.0)  # no passage reaches the margin before the last step
LENGTHS = (9, 3, 6)  # in two slots: one of them is taken twice


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The recorder in place of CUDA; numbers of the CPU are read as rarely as those of a GPU."""
    monkeypatch.setattr(metrics, "SYNCHRONOUS_DEVICES", set())
    monkeypatch.setitem(graphs.BACKENDS, "cpu", Recorder)
    monkeypatch.setattr(Recorder, "made", [])


# An older transformers gives attention a mask in a capture: the results are right, and slower.
MASKED = Version(transformers.__version__) < Version("5.18")


def alike(engine):
    """The engine, whose computed passes take the kernels of a capture, which round alike."""
    stepper = engine.stepper
    if MASKED and isinstance(stepper.run_pass, graphs.Graphs):
        stepper.run_pass.work = masked(stepper.run_pass.work)
    elif MASKED:
        stepper.run_pass = masked(stepper.run_pass)
    return engine


def masked(passes):
    """The passes, each with the mask that an older transformers makes in a capture."""

    def run_pass(*inputs):
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            return passes(*inputs)

    return run_pass


def watched(engine):
    """A counter of the passes of each shape, which the engine updates while it runs."""
    shapes, passed = Counter(), engine.stepper.run_pass

    def counting(vectors, ids, temperature):
        shapes[vectors.shape, ids.shape] += 1
        return passed(vectors, ids, temperature)

    engine.stepper.run_pass = counting
    return shapes


def outcomes(engine, asked):
    """The results of each passage, by its ids."""
    return {
        o.passage.ids: (o.steps, o.spent, o.status, o.exact, o.min_mem_bits, o.vectors.tolist())
        for o in engine.run(asked)
    }


RECIPES = {
    "default": ENDLESS,
    "exact": replace(QUICK, steps=40),
    "whole, adamw": replace(ENDLESS, schedule="whole", optimizer="adamw", decay=9, warmup=2),
    "adam, stuck": replace(ENDLESS, optimizer="adam", stuck_after=3, patience=8),
    "principal, deficit": replace(ENDLESS, coordinates="principal", objective="deficit"),
    "margin, bos": replace(ENDLESS, objective="margin", start_rule="bos"),
    "first token": replace(ENDLESS, start_rule="first-token", corrections=1),
}


@pytest.mark.parametrize(("family", "K"), [("llama", 1), ("gpt2", 2)])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.slow
def test_replayed_steps_equal_computed_steps(family, K, name):
    """They are equal bit for bit at the same shapes, while passages of other lengths get slots."""
    lm, asked, recipe = tiny(family), passages(*LENGTHS, seed=3), RECIPES[name]
    sizes = {"vectors": K, "batch_size": 2, "storage": "bfloat16"}
    options = {**sizes, "fixed_shapes": True, "poll": 4}  # passages get the same slots in both
    replayed = alike(Engine(lm, recipe, graphs=True, **options))
    shapes = watched(replayed)
    assert outcomes(replayed, asked) == outcomes(alike(Engine(lm, recipe, **options)), asked)
    (recorder,) = Recorder.made
    again = sum(count > 1 for count in shapes.values())
    assert again >= 1
    assert len(recorder.tapes) == 2 * again  # forward and backward of each shape that is repeated


@pytest.mark.parametrize("poll", [1, 4])
@pytest.mark.slow
def test_rounded_shapes_are_few_and_replayed_steps_equal_computed_ones(poll):
    lm, asked = tiny(), passages(40, 33, 21, 40, 9, 18, seed=5)
    recipe = replace(ENDLESS, look_ahead=6, margin=0.0, steps=30)
    replayed = alike(Engine(lm, recipe, batch_size=3, graphs=True, poll=poll))
    plain = Engine(lm, recipe, batch_size=3, graphs=True, poll=poll)
    plain.stepper.run_pass = plain.stepper.forward  # the same shapes, nothing captured
    shapes = watched(replayed)
    assert outcomes(replayed, asked) == outcomes(alike(plain), asked)
    assert {vectors[0] for vectors, _ in shapes} <= {1, 2, 3}
    assert {ids[1] for _, ids in shapes} <= {16, 32, *map(len, asked)}


def test_rows_and_columns_are_rounded_up():
    taken = (1, 2, 3, 4, 5, 8, 9, 12)
    assert [graphs.rows_for(n, 12) for n in taken] == [1, 2, 4, 4, 8, 8, 12, 12]
    for need in range(1, 3000):
        columns = graphs.columns_for(need)
        assert need <= columns <= max(32, 1.5 * need)
        assert columns % graphs.COLUMNS == 0
    assert len({graphs.columns_for(need) for need in range(1, 1025)}) == 12


class Unsteady(torch.autograd.Function):
    """The identity with a gradient that differs each time, as of kernels that add in any order."""

    @staticmethod
    def forward(ctx, vectors):
        return vectors.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 0.03 * torch.randn_like(gradient))


def test_the_check_of_a_replay_allows_what_a_step_differs_from_itself(monkeypatch):
    """In bfloat16 with 32 layers, two backward passes on a GPU may differ by more than 2 %."""
    lm = copy(tiny())
    states = lm.states

    def unsteady(vectors, ids, start_rule):
        return states(vectors if vectors is None else Unsteady.apply(vectors), ids, start_rule)

    monkeypatch.setattr(lm, "states", unsteady)
    engine = Engine(lm, replace(ENDLESS, steps=4), batch_size=2, graphs=True, fixed_shapes=True)
    assert len(outcomes(engine, passages(5, 5))) == 2
    assert Recorder.made[0].tapes


@pytest.mark.slow
@pytest.mark.parametrize("missing", range(3))
def test_an_input_that_is_not_copied_is_noticed(missing, monkeypatch):
    """The vectors, the ids or the temperatures stay those of the capture. The engine's check
    raises; without the check, the outcomes differ."""
    lm, asked = tiny(), passages(*LENGTHS, seed=3)
    recipe = replace(ENDLESS, stuck_after=2, margin=0.1)
    options = {"batch_size": 2, "fixed_shapes": True, "vectors": 2, "poll": 4}
    whole = outcomes(Engine(lm, recipe, **options), asked)
    capture = graphs.Graphs._capture

    def careless(self, *given):
        captured = capture(self, *given)
        kept = list(captured.inputs)
        kept[missing] = kept[missing].detach().clone()  # a tensor that the graph does not read
        return replace(captured, inputs=tuple(kept))

    monkeypatch.setattr(graphs.Graphs, "_capture", careless)
    with pytest.raises(MemvecError, match="gives other figures than the step itself"):
        outcomes(Engine(lm, recipe, graphs=True, **options), asked)
    monkeypatch.setattr(graphs.Graphs, "_check", lambda *_: None)
    assert outcomes(Engine(lm, recipe, graphs=True, **options), asked) != whole


def test_small_outputs_are_copies_and_large_ones_are_overwritten():
    lm = tiny()
    one = Engine(lm, ENDLESS, graphs=True).stepper
    vectors = torch.zeros(2, 1, lm.width, requires_grad=True)
    ids, temperature = torch.ones(2, 5, dtype=torch.long), torch.ones(2)
    one.run_pass(vectors, ids, temperature)
    states, first = one.run_pass(vectors, ids, temperature)
    kept, held = first.margin.clone(), first.gradient.clone()
    (gradient,) = torch.autograd.grad(states, vectors, first.gradient)
    of_vectors = gradient.clone()
    states, second = one.run_pass(vectors + 1, ids, temperature)
    (other,) = torch.autograd.grad(states, vectors, second.gradient)
    assert torch.equal(first.margin, kept)
    assert not torch.equal(first.margin, second.margin)
    assert torch.equal(gradient, of_vectors)
    assert not torch.equal(gradient, other)
    assert not torch.equal(first.gradient, held)  # valid until the next call


# ---------------------------------------------------------------------- memory


@pytest.mark.slow
def test_at_most_max_shapes_graphs_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_SHAPES", 1)
    lm, asked = tiny(), passages(40, 33, 21, 5, seed=5)
    recipe = replace(ENDLESS, schedule="whole")
    engine = Engine(lm, recipe, batch_size=2, graphs=True)
    replays, shapes = engine.stepper.run_pass, watched(engine)
    plain = Engine(lm, recipe, batch_size=2, graphs=True)
    plain.stepper.run_pass = plain.stepper.forward
    assert outcomes(engine, asked) == outcomes(plain, asked)
    assert len(shapes) > 1
    assert len(replays.captured) == 1


def test_the_least_recently_replayed_graph_is_dropped(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_SHAPES", 2)
    kept = object.__new__(graphs.Graphs)
    row = torch.zeros(1, 1)
    given = (row[..., None], Score(row, row, row[..., None]))
    kept.captured, kept.seen, kept.work = {}, set(), lambda *inputs: given
    kept._capture = lambda *inputs: kept.work
    kept._check = lambda *inputs: None
    for columns in (1, 1, 2, 2, 1, 3, 3):  # the third shape replaces the second
        kept(torch.zeros(1, 1, 4), torch.zeros(1, columns).long(), torch.ones(1))
    assert [ids[1] for _, ids in kept.captured] == [1, 3]


@pytest.mark.slow
def test_a_capture_out_of_memory_halves_the_slots_and_drops_the_graphs(monkeypatch):
    """As in CUDA, the end of the failed capture raises another error."""
    lm, asked, held = tiny(), passages(5, 4, 3, 5, seed=2), []

    class Small(Recorder):
        def capture(self, work):
            replay, outputs = super().capture(work)
            if len(outputs) > 1 and len(outputs[0]) > 2:  # a forward pass of more than two rows
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                finally:
                    raise RuntimeError("CUDA error: capture was invalidated")
            held.append(weakref.ref(outputs[0]))
            return replay, outputs

    monkeypatch.setitem(graphs.BACKENDS, "cpu", Small)
    engine = Engine(lm, QUICK, vectors=2, batch_size=4, graphs=True)
    found = list(engine.run(asked))
    assert engine.batch_size == 2
    assert {o.exact for o in found} == {True}
    assert len(found) == len(asked)
    assert held
    Recorder.made.clear()
    memory.forget_freed_memory()
    gc.collect()
    assert all(output() is None for output in held)


def test_a_certification_out_of_memory_drops_the_graphs_and_continues_in_halves(monkeypatch):
    lm, asked, captured = tiny(), passages(5, 4, 3, 5, seed=2), []
    engine = Engine(lm, QUICK, vectors=2, batch_size=4, graphs=True)
    replays, certify = engine.stepper.run_pass, engine_module.outcomes_of

    def narrow(lm, finished, *others):
        captured.append(len(replays.captured))
        if len(finished) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return certify(lm, finished, *others)

    monkeypatch.setattr(engine_module, "outcomes_of", narrow)
    found = list(engine.run(asked))
    assert {o.passage for o in found} == set(asked)
    assert {o.exact for o in found} == {True}
    assert captured[0] > 0  # at the first certification, which fails
    assert captured[1] == 0


def test_a_passage_that_cannot_be_decoded_alone_is_an_error(monkeypatch):
    def nowhere(lm, finished, *others):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine_module, "outcomes_of", nowhere)
    engine = Engine(tiny(), replace(ENDLESS, steps=1), batch_size=3)
    with pytest.raises(MemvecError, match=r"up to 5 tokens cannot be decoded in the memory of cpu"):
        list(engine.run(passages(5, 4, 3)))


def test_graphs_are_freed_with_their_engine():
    engine = Engine(tiny(), ENDLESS, graphs=True)
    replays = weakref.ref(engine.stepper.run_pass)
    assert engine.poll == 8  # reading the batch costs as much as a step
    assert replays() in memory.HOLDERS
    del engine
    gc.collect()
    assert replays() is None


# ---------------------------------------------------------------------- what cannot be captured


def no_graphs(lm, word, **options):
    with pytest.raises(MemvecError, match=f"^graphs cannot be used: .*{word}") as said:
        Engine(lm, Recipe(**options), graphs=True)
    assert "\n" not in str(said.value)
    assert str(said.value).endswith(" Leave them out.")


def test_an_engine_that_cannot_be_captured_is_refused_at_once(monkeypatch):
    no_graphs(tiny(), "reads along in the layers", term="alignment", align_layers=1)
    for name, value, word in [("offload", True, "offload"), ("quantize", "4bit", "quantized")]:
        lm = copy(tiny())
        setattr(lm, name, value)
        no_graphs(lm, word)
    lm = copy(tiny())
    lm.device = torch.device("meta")
    monkeypatch.setitem(graphs.BACKENDS, "meta", Recorder)
    assert "spread over several devices" in graphs.why_not(lm, Engine(tiny()).stepper.term)
    no_graphs(tiny().read_as("one-step-shared"), "share a vector")
    monkeypatch.delitem(graphs.BACKENDS, "cpu")
    no_graphs(tiny(), "CUDA graphs, and tiny-llama is on the cpu")


def test_a_step_that_reads_a_number_cannot_be_captured(monkeypatch):
    """The first step is computed; the second one, which would be captured, raises."""
    lm = copy(tiny())
    states = lm.states

    def looking(vectors, ids, start_rule):
        return states(vectors, ids, start_rule) * (1.0 if float(vectors.detach().sum()) else 2.0)

    monkeypatch.setattr(lm, "states", looking)
    engine = Engine(lm, ENDLESS, graphs=True)
    for passage in passages(4):
        engine.push(passage)
    engine.fill(1)
    engine.step()
    with pytest.raises(MemvecError, match=r"step of tiny-llama cannot be captured \(operation"):
        engine.step()


# ---------------------------------------------------------------------- other ways to compute


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {"space": "prefix", "start_rule": "bos"}),
        ("llama", {"space": "shared-basis", "dimensions": 8}),
        ("llama", {"term": "use", "start_rule": "bos", "query_tokens": 4}),
        ("gpt-neox", {"compute": "bfloat16"}),
        ("gemma3", {}),
        ("mixtral", {}),
    ],
)
@pytest.mark.slow
def test_steps_of_other_recipes_and_models_are_replayed(family, recipe):
    lm, asked = tiny(family), passages(*LENGTHS, seed=3)
    recipe = replace(ENDLESS, **recipe)
    options = {"batch_size": 2, "fixed_shapes": True, "poll": 4}
    replayed = Engine(lm, recipe, graphs=True, **options)
    assert outcomes(replayed, asked) == outcomes(Engine(lm, recipe, **options), asked)
    assert Recorder.made[0].tapes


@pytest.mark.slow
def test_the_engines_of_a_model_that_was_loaded_with_graphs_use_them():
    """So do those of its views; an engine that asks otherwise does not."""
    lm = load_lm("pocket", graphs=True, check=False)
    mem = cram(lm, "Two boats lay on the sand.", recipe=Recipe(start="noise"), batch_size=1)
    assert mem.exact
    assert Recorder.made[0].tapes
    assert Engine(lm.read_as("one-step"), vectors=2).graphs is True
    assert Engine(lm, graphs=False).graphs is False
    assert Engine(tiny()).graphs is False


def test_a_trigger_is_trained_without_graphs(tmp_path):
    """A replay gives gradients of the vectors only."""
    lm, passage = copy(tiny()), passages(4)[0]
    lm.graphs = True
    plan = TriggerPlan(rows=1, front=1, vectors=1, tokens=4, batches=1, batch_size=1)
    recipe = Recipe.of("usable", query_tokens=2, settle=3, decay=3)
    trained = train_trigger(lm, [passage.ids], plan, recipe, tmp_path / "trigger.safetensors")
    assert trained.table.isfinite().all()
    assert not Recorder.made


@pytest.mark.parametrize("name", ["checkpointing", "one-step", "no split head", "soft tokens"])
@pytest.mark.slow
def test_other_forward_passes_are_replayed(name):
    lm, asked = copy(tiny()), passages(*LENGTHS, seed=3)
    if name == "checkpointing":
        lm.checkpointing = True
    elif name == "one-step":
        lm = lm.read_as("one-step")
    elif name == "soft tokens":
        lm = with_trigger(lm, CrammedTrigger(torch.ones(3, lm.width)))
    else:
        lm._body, lm._head = None, lambda states: states
    options = {"batch_size": 2, "fixed_shapes": True, "vectors": 2, "poll": 4}
    recipe = replace(ENDLESS, start_rule="bos") if name == "soft tokens" else ENDLESS
    replayed = Engine(lm, recipe, graphs=True, **options)
    assert outcomes(replayed, asked) == outcomes(Engine(lm, recipe, **options), asked)
    assert Recorder.made[0].tapes


# ---------------------------------------------------------------------- no waits


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "int4"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_once_it_is_captured(name, storage):
    engine = Engine(tiny(), RECIPES[name], vectors=2, storage=storage, graphs=True, poll=8)
    for passage in passages(6, 5, 4):
        engine.push(passage)
    engine.fill(3)
    engine.step()
    engine.step()
    with NoWaiting():
        for _ in range(4):
            engine.step()


def test_ties_are_counted_alike_with_and_without_reading_numbers(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randint(0, 3, (2, 50, 6)).float()  # ties everywhere
    ids = torch.randint(0, 6, (2, 50))
    with monkeypatch.context() as here:
        here.setattr(metrics, "SYNCHRONOUS_DEVICES", {"cpu"})
        looked = metrics.margins(logits, ids)
    with NoWaiting():
        unseen = metrics.margins(logits, ids)
    assert torch.equal(looked, unseen)
    assert (looked == metrics.TIED).any()
    assert (looked == 0).any()


@pytest.mark.parametrize(
    ("module", "name", "options", "single"),
    [
        ("masking_utils", "find_packed_sequence_indices", {}, None),
        ("modeling_flash_attention_utils", "_is_packed_sequence", {"batch_size": 1}, False),
    ],
)
def test_the_search_for_packed_sequences_is_off_in_a_capture_only(module, name, options, single):
    """For a batch of one passage, FlashAttention searches in every layer, which waits."""
    module = importlib.import_module(f"transformers.{module}")
    looks, positions = getattr(module, name), torch.tensor([[0, 1, 0, 1]])
    with graphs.consecutive_positions():
        assert getattr(module, name)(positions, **options) is single
    assert getattr(module, name) is looks
    found = looks(positions, **options)
    assert found is not None
    assert bool(found.any())
    with pytest.raises(ValueError, match="x"), graphs.consecutive_positions():
        raise ValueError("x")
    assert getattr(module, name) is looks


@pytest.mark.skipif(MASKED, reason="this transformers makes a mask in a capture")
def test_attention_has_no_mask_in_a_capture():
    """A mask of all positions would rule the flash kernel out on a GPU."""
    engine = Engine(tiny(), replace(ENDLESS, steps=3), graphs=True)
    list(engine.run(passages(5)))
    forward = Recorder.made[0].tapes[0]
    kernels = [step for step in forward.steps if "attention" in str(step[0])]
    assert kernels
    for _, args, kwargs, _ in kernels:
        assert kwargs.get("attn_mask") is None
        assert any(arg is True for arg in args)  # is_causal


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gpt2"])
def test_cuda_graphs_equal_computed_passes(family, dtype):
    """Single passes are compared, because kernels that add in any order differ after many steps."""
    lm = FrozenLM(build(family).cuda().to(dtype), name=f"cuda-{family}")
    one = Engine(lm, ENDLESS, vectors=2, graphs=True).stepper
    generator = torch.Generator().manual_seed(0)
    for i in range(12):  # two shapes in turn: each is computed, then captured, then replayed
        rows, columns = [(4, 9), (3, 17)][i % 2]
        vectors = torch.randn(rows, 2, lm.width, generator=generator).cuda().requires_grad_()
        ids = torch.randint(lm.vocab_size, (rows, columns), generator=generator).cuda()
        temperature = (0.5 + torch.rand(rows, generator=generator)).cuda()
        figures = []
        for passed in (one.forward, one.run_pass):
            with torch.enable_grad():
                states, scores = passed(vectors, ids, temperature)
            (gradient,) = torch.autograd.grad(states, vectors, scores.gradient)
            figures.append((scores.loss, scores.margin, gradient))
        for plain, replayed in zip(*figures, strict=True):
            torch.testing.assert_close(replayed, plain, rtol=1e-2, atol=1e-3 * float(plain.norm()))
    assert len(one.run_pass.captured) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_passages_are_exact_with_cuda_graphs():
    lm = FrozenLM(build("llama").cuda(), name="cuda-llama")
    engine = Engine(lm, QUICK, vectors=2, batch_size=2, graphs=True)
    assert [o.exact for o in engine.run(passages(5, 3, 4, 2, seed=3))] == [True] * 4
    assert engine.stepper.run_pass.captured
    memory.forget_freed_memory()
    assert not engine.stepper.run_pass.captured
