"""Steps in bfloat16 leave the model unchanged, and margins are confirmed in its own dtype."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch

from conftest import FAMILIES, QUICK, build, one_step, passages, tiny
from memvec import metrics, registry
from memvec.cramming.engine import Engine
from memvec.cramming.objectives import score
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.errors import MemvecError, SlowPathWarning
from memvec.loading import load_lm
from memvec.model import precision
from memvec.model.lm import FrozenLM
from memvec.model.precision import ATTENTION, for_steps, widen_attention
from memvec.passages.passage import Passage

pytestmark = pytest.mark.filterwarnings("ignore:steps of .* are computed in float32")
HALF = replace(QUICK, compute="bfloat16")
SERVED = [family for family in FAMILIES if family != "rwkv"]  # refused: tests/test_families.py
SOME = ["llama", "opt-projected", "mamba", "gemma2", "mixtral"]


def crammed(lm, asked, recipe=HALF, **options):
    return {o.passage.ids: o for o in Engine(lm, recipe, **options).run(asked)}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("family", SOME)
def test_finished_passages_have_their_margins_in_float32(family, storage):
    lm, asked = tiny(family), passages(4, 3, 5, 2, seed=11)
    engine = Engine(lm, HALF, vectors=2, batch_size=3, storage=storage)
    assert engine.module is not lm
    assert engine.recipe.compute == "bfloat16"
    outcomes = list(engine.run(asked))
    done = [o for o in outcomes if o.status == "done"]
    assert len(done) >= 3
    for outcome in done:
        assert outcome.exact
        # the certificate was measured in another batch shape: equal up to rounding
        assert outcome.metrics.margin >= engine.recipe.margin - 1e-3
        decoded = decode_ids(lm, outcome.vectors[None].float(), [len(outcome.passage)])
        assert tuple(decoded[0]) == outcome.passage.ids


@pytest.mark.parametrize("family", SERVED)
def test_the_model_itself_is_not_changed(family):
    lm = tiny(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    kernel = lm.config._attn_implementation
    fast = precision.for_steps(lm, "bfloat16")
    if fast is lm:
        pytest.skip("its rounded copy does not agree with it, and is not used")
    assert fast.dtype == torch.bfloat16
    assert lm.dtype == torch.float32
    assert lm.config._attn_implementation == kernel
    after = lm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert precision.for_steps(lm, "bfloat16").model is fast.model  # rounded once


@pytest.mark.parametrize(("device", "rounds"), [("cpu", True), ("cuda", False)])
def test_auto_rounds_steps_on_a_cpu_only(device, rounds, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "MIN_PARAMETERS", 0)
    lm = FrozenLM(build("llama"), name="somewhere")
    assert precision.for_steps(lm, "auto") is not lm
    lm.device = torch.device(device)
    assert (precision.for_steps(lm, "auto") is not lm) is rounds


def test_quantized_weights_are_not_rounded_again():
    lm = FrozenLM(build("llama"), name="few-bits", quantize="8bit")
    assert precision.for_steps(lm, "bfloat16") is lm


def test_the_rounded_copy_of_a_trained_model_has_its_fingerprint():
    """The weights were changed before `FrozenLM` got the model; those of the copy never are."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    lm = FrozenLM(model, name="trained")
    fast = precision.for_steps(lm, "bfloat16")
    assert fast is not lm
    assert fast.fingerprint is lm.fingerprint


@pytest.mark.slow
def test_rounded_copies_agree_for_nearly_all_families():
    agree = [f for f in SERVED if precision.for_steps(tiny(f), "bfloat16") is not tiny(f)]
    assert len(agree) >= 0.8 * len(SERVED)


def test_auto_rounds_large_float32_models_only(monkeypatch):
    small, pocket = tiny(), load_lm()
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    assert precision.for_steps(small, "auto") is small
    assert precision.for_steps(pocket, "auto").dtype == torch.bfloat16
    assert precision.for_steps(pocket, "model") is pocket
    half = load_lm(dtype="bfloat16")
    assert precision.for_steps(half, "bfloat16") is half
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    assert precision.for_steps(pocket, "auto") is pocket


def test_a_model_that_is_trained_further_gets_a_new_copy():
    model = build("qwen2")
    before = precision.for_steps(FrozenLM(model), "bfloat16").model
    lm = FrozenLM(model)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight += 0.5
    with pytest.raises(MemvecError, match="weights of in-memory were changed after"):
        precision.for_steps(lm, "bfloat16")
    after = precision.for_steps(FrozenLM(model), "bfloat16").model
    assert not torch.equal(before.get_input_embeddings().weight, weight.bfloat16())
    assert torch.equal(after.get_input_embeddings().weight, weight.bfloat16())


def test_a_copy_that_disagrees_is_not_used(monkeypatch):
    lm = tiny("qwen2")
    precision.COPIES.pop(lm.fingerprint, None)
    monkeypatch.setattr(precision, "LARGEST_DIFFERENCE", -1.0)
    engine = Engine(lm, HALF)
    precision.COPIES.pop(lm.fingerprint, None)
    assert engine.module is lm
    assert engine.recipe.compute == "model"


def test_published_recipes_compute_in_the_models_own_dtype():
    for name in registry.names("preset"):
        recipe = Recipe.of(name)
        published = registry.BUILT_IN["preset"][name].startswith("memvec.arms.presets:")
        assert recipe.compute == ("model" if published else "auto"), name


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [1, 2])
def test_neighbours_do_not_matter_at_a_fixed_shape(vectors):
    lm, recipe = tiny(), replace(HALF, steps=30)
    me, a, long, b = passages(5, 4, 6, 3, seed=12)
    found = [  # the longest passage has the first slot
        crammed(lm, in_slots, recipe, vectors=vectors, batch_size=3, fixed_shapes=True)[me.ids]
        for in_slots in ([me, a, long], [long, me, b], [long, me])
    ]
    assert all(torch.equal(found[0].vectors, other.vectors) for other in found[1:])
    assert len({other.steps for other in found}) == 1


def test_one_step_vectors_are_exact_after_steps_in_bfloat16():
    lm, asked = one_step(tiny()), passages(2, 3, seed=13)
    engine = Engine(lm, replace(HALF, steps=300), vectors=2, batch_size=2)
    assert engine.module.reading.layout == "one-step"
    outcomes = list(engine.run(asked))
    assert [(o.status, o.exact) for o in outcomes] == [("done", True)] * 2


def test_a_margin_that_holds_in_bfloat16_only_raises_the_target_margin():
    """The passage is not confirmed, and so stays in its slot."""
    lm, (passage,) = tiny(), passages(3, seed=14)
    engine = Engine(lm, replace(HALF, margin=0.2), vectors=2, batch_size=1)
    engine.push(passage)
    engine.fill(1)
    batch = engine.batch
    states = lm.states(batch.vectors, batch.ids, engine.start_rule)
    least = score(lm.head, states, batch.ids, engine.recipe, V=lm.vocab_size).margin.min()
    batch.margin_asked = batch.target_margin = (least + 0.3)[None]
    batch.schedule.best = batch.length.clone()
    asked = batch.target_margin.clone()
    assert not engine.stepper.confirmed(engine.batch, torch.tensor([True])).any()
    assert float(batch.target_margin - asked) > 0.3
    assert int(batch.schedule.best) == len(passage) - 1
    batch.margin_asked = (least - 0.3).clamp_min(0)[None]
    assert bool(engine.stepper.confirmed(engine.batch, torch.tensor([True])).any()) == bool(
        least > 0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_attention_is_as_accurate_as_the_models_own(dtype):
    """The mean error of the logits against float32 is at most 1.2 times that without it."""
    truth = tiny("llama")
    model = type(truth.model)(truth.model.config.__class__(**truth.model.config.to_dict()))
    model.load_state_dict(truth.model.state_dict())
    model = model.eval().to(dtype)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits.float()
        precision.widen_attention(model)
        assert model.config._attn_implementation == precision.ATTENTION
        wide = model(input_ids=ids).logits.float()
    reference = truth.own_logits(ids)
    assert (wide - reference).abs().mean() <= 1.2 * (plain - reference).abs().mean()
    inputs = truth.embed(ids).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=inputs).logits.sum(), inputs)
    assert torch.isfinite(gradient).all()


def test_wide_attention_takes_a_mask_by_name():
    """Doge calls the kernel with `attention_mask=`."""
    model = build("doge").to(torch.bfloat16)
    plain = model(input_ids=torch.arange(2, 9)[None], use_cache=False).logits
    widen_attention(model)
    assert model.config._attn_implementation == ATTENTION
    wide = model(input_ids=torch.arange(2, 9)[None], use_cache=False).logits
    assert float((wide - plain).detach().abs().max()) < 0.1


def test_steps_in_another_dtype_than_requested_give_a_warning(monkeypatch):
    lm = tiny("gpt2", seed=3)
    monkeypatch.setattr(precision, "LARGEST_DIFFERENCE", -1.0)
    monkeypatch.setattr(precision, "COPIES", WeakKeyDictionary())
    with pytest.warns(SlowPathWarning, match=r"computed in float32, as a copy in bfloat16 differs"):
        assert for_steps(lm, "bfloat16") is lm


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_each_passage_is_confirmed_by_its_own_margins(factor, corrections, fixed):
    """Padding, neighbours and listed tokens do not matter."""
    lm, lengths = tiny(), [7, 5, 4, 3]
    vectors = 2 * torch.randn(4, 2, lm.width, generator=torch.Generator().manual_seed(3))
    missed = [[], [(1, 5)], [(0, 7), (2, 9)], [(2, 2)]]
    ids = decode_ids(lm, vectors, lengths, corrections=missed)
    recipe = replace(QUICK, compute="bfloat16", corrections=corrections)
    engine = Engine(lm, recipe, vectors=2, batch_size=5, fixed_shapes=fixed)
    for i, row in enumerate(ids):
        engine.push(Passage(tuple(row), i))
    engine.fill(5)
    batch, arrived = engine.batch, torch.tensor([True, True, True, False])
    batch.vectors, batch.schedule.best = vectors, batch.length.clone()
    smallest = []
    for row, rows in zip(ids, vectors, strict=True):
        logits = lm.logits(rows[None], torch.tensor([row]), engine.start_rule)
        alone = metrics.margins(logits, torch.tensor([row]))[0].sort().values
        smallest.append(float(alone[min(corrections, len(row) - 1)]))
    batch.margin_asked = factor * torch.tensor(smallest).abs()
    batch.target_margin = batch.margin_asked + 1.0  # it was raised before
    before = batch.target_margin.clone()
    found = engine.stepper.confirmed(batch, arrived, padding_rows=1)
    for i, least in enumerate(smallest):
        fine = factor < 1 and least > 0
        assert bool(found[i]) == (i < 3 and fine)
        lacks = 1.25 * (factor * abs(least) - least) + 0.01 * lm.logit_spread
        raised = 0 if fine or i == 3 else lacks
        assert float(batch.target_margin[i] - before[i]) == pytest.approx(raised, abs=1e-3)
        assert int(batch.schedule.best[i]) == lengths[i] - (raised > 0)
