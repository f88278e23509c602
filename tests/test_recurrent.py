"""The recurrent encoder: its memory of earlier segments, training, files, measures and study."""

from __future__ import annotations

import copy
import importlib
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import QUICK, build, byte_tokenizer, tiny
from memvec.companions.encoder_files import load_encoder, save_encoder
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.encoders import recurrent_measure
from memvec.encoders.measure import compare
from memvec.encoders.recurrent import (
    RecurrentEncoder,
    RecurrentNetwork,
    recurrent_of,
    state_width,
)
from memvec.encoders.recurrent_measure import check_chain, compare_segments, crammed_leading, recall
from memvec.encoders.recurrent_training import RecurrentPlan, RecurrentTraining
from memvec.encoders.slots import SlotEncoder, SlotNetwork
from memvec.encoders.summary import SummaryEncoder
from memvec.errors import MemvecError
from memvec.lab.protocols import recurrent
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report.data import read_data
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.check import check_study
from memvec.lab.study.pool import LocalPool
from memvec.lab.study.run import run_study
from memvec.lab.study.spec import parse_spec, read_spec
from memvec.lab.study.store import Store
from memvec.loading import load_lm
from memvec.passages.passage import Passage
from test_encoders import stream
from test_protocols import falsify, restore
from trainings import assert_gradient_of, one_step, stopped_and_resumed

ROOT = Path(__file__).parent.parent
T = 3
SMALL = RecurrentPlan(
    steps=4, slots=2, hidden=16, layers=1, heads=2, positions=96, segments=3, lags=2,
    segment_tokens=T,
)  # fmt: skip


def network_of(lm, seed=0, own=None, **changes):
    """An untrained network with random gates and map, so that its update is not zero."""
    torch.manual_seed(seed)
    shape = {"hidden": 16, "layers": 1, "heads": 2, "slots": 2, "lags": 2, "segment": T} | changes
    network = RecurrentNetwork(lm.width, state_width(lm), **shape)
    network.begun(lm.embedding.weight.mean(0), lm.embedding_std, 3.0, own)
    torch.nn.init.normal_(network.gate.weight, std=0.3)
    torch.nn.init.normal_(network.map.weight, std=0.3)
    return network


def encoder_of(lm, **options):
    return RecurrentEncoder(network_of(lm, **options)).to(lm.device, lm.dtype)


def with_encoder(lm, encoder):
    view = copy.copy(lm)
    view.encoder = encoder
    return view


def test_batched_equals_single_and_reloaded_equals_saved(tmp_path):
    lm = tiny()
    encoder, ids = encoder_of(lm), stream(lm, 36).view(4, 9)
    together = encoder.memories(lm, ids, T)
    assert [m.shape for m in together] == [(4, 2, lm.width)] * 3
    for row, alone in enumerate(ids):
        for memory, whole in zip(encoder.memories(lm, alone[None], T), together, strict=True):
            torch.testing.assert_close(memory[0], whole[row], rtol=1e-4, atol=2e-4)
    file = tmp_path / "recurrent.safetensors"
    save_encoder(file, encoder, lm, {"steps": 1})
    again = load_encoder(file, lm)
    assert isinstance(again, RecurrentEncoder)
    assert (again.slots, again.lags, again.segment, again.max_vectors) == (2, 2, T, 3)
    for memory, whole in zip(again.memories(lm, ids, T), together, strict=True):
        assert torch.equal(memory, whole)
    assert torch.equal(again.asked(memory, 1), encoder.asked(memory, 1))
    with pytest.raises(MemvecError, match="was trained for other weights"):
        load_encoder(file, tiny(seed=1))


def test_a_memory_depends_on_its_own_and_all_earlier_segments():
    lm = tiny()
    encoder, ids = encoder_of(lm), stream(lm, 12)[None]
    before = encoder.memories(lm, ids, T)
    for changed in range(4):
        other = ids.clone()
        other[0, changed * T] = ids[0, changed * T] % (lm.vocab_size - 3) + 2
        after = encoder.memories(lm, other, T)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [i < changed for i in range(4)]


def test_encoding_one_segment_gives_its_memory_and_the_question_of_lag_0():
    lm = tiny()
    encoder, ids = encoder_of(lm), stream(lm, 12).view(4, T)
    (memory,) = encoder.memories(lm, ids, T)
    ordinary = encoder.encode(lm, ids, encoder.max_vectors)
    assert torch.equal(ordinary, encoder.asked(memory, 0))
    assert torch.equal(encoder.encode(lm, ids, 2), memory)
    assert torch.equal(encoder.encode(lm, ids, 1), memory[:, 1:])


def test_a_long_passage_is_read_up_to_the_context_without_memory_and_slots():
    """A segment is between 2 vectors and 2 slots; GPT-2 has no position after its context."""
    lm = tiny("gpt2")
    view = with_encoder(lm, encoder_of(lm))
    ids = stream(lm, 128)[None, :127]
    start = view.encoder.encode(view, ids, 2)
    assert torch.equal(start, view.encoder.encode(view, ids[:, : 128 - 4], 2))
    with pytest.raises(MemvecError, match=r"125 tokens do not fit the context .* at most 124"):
        compare(view, ids, [3, 125])
    with pytest.raises(MemvecError, match="lengths must be from 1 to 127"):
        compare(view, ids, [-1])


def test_each_lag_has_its_own_question_after_the_memory():
    encoder, memory = encoder_of(tiny(), lags=3), torch.randn(4, 2, tiny().width)
    for lag in range(3):
        asked = encoder.asked(memory, lag)
        assert torch.equal(asked[:, :-1], memory)
        assert torch.equal(asked[:, -1], encoder.network.questions[lag].expand(4, -1))
    assert len(encoder.network.questions.unique(dim=0)) == 3


def test_before_training_the_memory_is_a_queue_of_summary_vectors():
    """The newest vector is nearly that of the summary encoder; the older ones move up."""
    lm = tiny()
    torch.manual_seed(0)
    D = lm.width
    own = SummaryEncoder(torch.randn(1, D), torch.randn(D, D) / D**0.5, torch.randn(D))
    network = RecurrentNetwork(D, D, hidden=16, layers=1, heads=2, slots=3, lags=2, segment=T)
    encoder = RecurrentEncoder(network.begun(torch.zeros(D), 0.01, 1.0, own))
    with torch.no_grad():
        network.first.zero_()
        for gates in (network.openness[:-1], -network.openness[-1:]):
            assert (gates < -2).all()
        network.openness.mul_(10)  # now the gates are nearly shut or open
        first, second = encoder.memories(lm, stream(lm, 6)[None], T)
        inputs = torch.cat([torch.zeros(1, 3, D), lm.embed(stream(lm, 6)[None, :T])], dim=1)
        slots = network.slots.expand(1, -1, -1)
        heard = lm.hidden(torch.cat([inputs, slots], dim=1), keep=1)
    expected = heard @ own.weight.T + own.bias
    torch.testing.assert_close(first[:, -1:], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(second[:, 1], first[:, 2], rtol=1e-3, atol=1e-4)


def test_a_gate_mixes_each_vector_with_its_new_value():
    """A shut gate moves the memory up by one place; an open one takes the new value."""
    lm = tiny()
    network = network_of(lm, slots=3)
    memory, embedded, heard = (torch.randn(2, n, lm.width) for n in (3, T, 3))
    with torch.no_grad():
        network.gate.weight.zero_()
        network.out.weight.zero_()
        network.out.bias.zero_()
        carried = {}
        for openness in (-50.0, 50.0, 1.0):
            network.openness.fill_(openness)
            carried[openness] = network(memory, embedded, heard)
    shut, new, between = carried.values()
    torch.testing.assert_close(shut, memory[:, [1, 2, 2]])
    torch.testing.assert_close(new, network.map(heard).detach())
    share = 1 / (1 + math.exp(-1.0))
    torch.testing.assert_close(between, (1 - share) * shut + share * new)
    assert not torch.allclose(new, shut, atol=0.1)


# ---------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt-projected", "mamba"])
def test_training_moves_the_encoder_and_nothing_else(family):
    lm = tiny(family)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    plan = replace(SMALL, positions=200)
    training = RecurrentTraining(lm, stream(lm), plan)
    training.step = 3  # chains are short at first
    training._longest_chain = lambda: 3
    start = {k: v.clone() for k, v in training.network.state_dict().items()}
    drawn = []
    given = training._windows
    training._windows = lambda *a: drawn.append(a[2]) or given(*a)
    while training.step < 8:
        training._train_step()
    for key, value in lm.model.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.grad is None
    assert {tokens // T for tokens in drawn} >= {1, 3}
    moved = {k for k, v in training.network.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == start.keys() - {"mean", "std", "size"}


def test_the_gradient_goes_through_the_chain_to_the_first_segment():
    """That of one step equals autograd of the cross-entropy of every lag."""
    lm = tiny()
    training = RecurrentTraining(lm, stream(lm), replace(SMALL, noise=0.0))
    training._longest_chain = lambda: 3

    def chain(step):
        return int(torch.randint(1, 4, (), generator=training._generator("step", step)))

    training.step = next(step for step in range(50) if chain(step) == 3)
    ids, found = one_step(training)
    encoder = RecurrentEncoder(training.network)
    memory = encoder.memories(lm, ids, T)[-1]
    losses = []
    for lag in range(2):
        truth = ids[:, (2 - lag) * T : (3 - lag) * T]
        logits = lm.logits(encoder.asked(memory, lag), truth)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten()))
    assert found.keys() == dict(training.network.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert_gradient_of(training, sum(losses) / 2, found, rtol=1e-3, atol=1e-6)


def test_chains_grow_over_the_first_half_of_the_steps():
    lm, longest = tiny(), []
    training = RecurrentTraining(lm, stream(lm), replace(SMALL, steps=8, segments=4))
    for training.step in range(8):
        longest.append(training._longest_chain())
    assert longest == [1, 2, 3, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(("steps", "segments"), [(5, 3), (7, 4), (9, 2), (3, 5)])
def test_the_longest_chain_is_the_completed_share_of_the_first_half_rounded_up(steps, segments):
    lm = tiny()
    plan = replace(SMALL, steps=steps, segments=segments)
    training = RecurrentTraining(lm, stream(lm), plan)
    for training.step in range(steps):
        reached = min(Fraction(2 * (training.step + 1), steps), 1) * segments
        assert reached <= training._longest_chain() < reached + 1


def test_a_step_has_about_the_positions_of_its_plan():
    """A segment is read between memory and slots, and predicted after memory and question."""
    training = RecurrentTraining(tiny(), stream(tiny()), replace(SMALL, steps=8, positions=400))
    seen: list[tuple[int, int, int]] = []
    given = training._windows

    def windows(text, count, tokens, draw):
        seen.append((count, tokens // T, 0))
        return given(text, count, tokens, draw)

    def descend(vectors, ids):
        seen[-1] = (*seen[-1][:2], len(ids) // seen[-1][0])
        return 1.0, 0.5

    training._windows, training._descend = windows, descend
    for training.step in range(8):
        training._train_step()
    assert {lags for *_, lags in seen} == {1, 2}
    for count, segments, lags in seen:
        assert lags == min(segments, SMALL.lags)
        assert count == 400 // (segments * (T + 4) + lags * (T + 3))


def test_the_last_memory_is_noisy_in_training():
    """The size of the noise is the plan's share of the memory's size."""

    def memories(noise):
        seen = []
        training = RecurrentTraining(lm, stream(lm), replace(SMALL, noise=noise, positions=2000))
        training._descend = lambda vectors, _: seen.append(vectors.detach()[:, :2]) or (1.0, 0.5)
        training._train_step()
        return seen[0]

    lm = tiny()
    without = memories(0.0)
    added = (memories(0.5) - without).square().mean() / without.square().mean()
    assert added.sqrt() == pytest.approx(0.5, rel=0.1)


def test_the_gradient_takes_the_noise_of_the_last_memory_as_constant():
    """Its size is a share of the memory's, but the memory is not trained to reduce it."""
    lm = tiny()
    training = RecurrentTraining(lm, stream(lm), replace(SMALL, noise=0.5))
    descend, seen = training._descend, []
    training._descend = lambda vectors, ids: seen.append(vectors.detach()) or descend(vectors, ids)
    ids, found = one_step(training)
    encoder = RecurrentEncoder(training.network)
    memory = encoder.memories(lm, ids, T)[-1]
    noise = seen[0][: len(ids), : SMALL.slots] - memory.detach()
    assert noise.square().mean() > 0.1 * memory.detach().square().mean()
    losses = []
    for lag in range(lags := len(seen[0]) // len(ids)):
        truth = torch.split(ids, T, dim=1)[-1 - lag]
        logits = lm.logits(encoder.asked(memory + noise, lag), truth)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten()))
    assert_gradient_of(training, sum(losses) / lags, found, rtol=1e-3, atol=1e-6)


def test_questions_and_first_memory_move_at_a_higher_rate():
    """Theirs is ten times as high; both fall linearly to a hundredth, as in every training."""
    lm, rates = tiny(), []
    training = RecurrentTraining(lm, stream(lm), replace(SMALL, warmup=0))
    groups = training.optimizer.param_groups
    training.run(on_progress=lambda _: rates.append([group["lr"] for group in groups]))
    bare = {id(p) for p in groups[1]["params"]}
    assert bare == {id(training.network.questions), id(training.network.first)}
    even = [SMALL.lr * (0.01 + 0.99 * left) for left in (1, 0.75, 0.5, 0.25)]
    assert [rate for rate, _ in rates] == pytest.approx(even)
    assert [rate for _, rate in rates] == pytest.approx([10 * rate for rate in even])


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    lm, partial = tiny(), tmp_path / "e.partial"
    _, seen = stopped_and_resumed(
        lambda: RecurrentTraining(lm, stream(lm), SMALL), partial, 2, monkeypatch
    )
    assert seen[-1].target == SMALL.segments
    with pytest.raises(MemvecError, match="another model, text or settings"):
        RecurrentTraining(lm, stream(lm), replace(SMALL, lags=1)).run(partial)


@pytest.mark.slow
def test_training_reduces_the_loss():
    """The mean loss of the last 15 steps is more than a tenth below that of the first 15."""
    lm = tiny()
    plan = replace(SMALL, steps=80, hidden=32, positions=200, lr=3e-3, segments=2)
    seen = []
    RecurrentTraining(lm, stream(lm), plan).run(on_progress=seen.append)
    early, late = (sum(now.loss_bits for now in part) for part in (seen[:15], seen[-15:]))
    assert late < 0.9 * early


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"segments": 0}, "^segments must be at least 1"),
        ({"lags": 0}, "^lags must be at least 1"),
        ({"lags": 4}, "^lags must be at most 3, the segments of a chain, not 4"),
        ({"segment_tokens": 0}, "^segment_tokens must be at least 1"),
        ({"hidden": 15}, "hidden must be a multiple of 2"),
    ],
)
def test_wrong_plans_are_refused(changes, says):
    with pytest.raises(MemvecError, match=says):
        replace(SMALL, **changes)


def test_texts_and_segments_that_do_not_fit_are_refused():
    lm = tiny()
    with pytest.raises(MemvecError, match="too few to train an encoder on chains of 3000"):
        RecurrentTraining(lm, stream(lm), replace(SMALL, segments=3000))
    with pytest.raises(MemvecError, match="a segment of 125 tokens between 2 vectors"):
        RecurrentTraining(lm, stream(lm), replace(SMALL, segment_tokens=125))
    encoder = encoder_of(lm)
    with pytest.raises(MemvecError, match="10 tokens is no chain of whole segments of 3"):
        encoder.memories(lm, stream(lm, 10)[None], T)
    (memory,) = encoder.memories(lm, stream(lm, 12)[:T][None], T)
    for lag in (-1, 2):
        with pytest.raises(MemvecError, match=f"lag {lag} is out of range: .* lags 0 to 1"):
            encoder.asked(memory, lag)


@pytest.mark.slow
def test_documents_and_encoders_that_cannot_be_compared_are_refused():
    lm = tiny()
    recurrent, ids = with_encoder(lm, encoder_of(lm)), stream(lm, 12).view(2, 6)
    slots = SlotEncoder(SlotNetwork(lm.width, hidden=16, layers=1, heads=2, slots=2))
    for other in (None, slots):
        with pytest.raises(MemvecError, match="no recurrent encoder"):
            compare_segments(with_encoder(lm, other), ids, 2)
    for segments, lags, says in [
        (0, None, "^segments must be at least 1"),
        (3, None, "a document of 6 tokens has 2 segments of 3, not 3"),
        (2, 0, "^lags must be at least 1"),
        (2, 3, "^lags must be at most 2"),
    ]:
        with pytest.raises(MemvecError, match=says):
            compare_segments(recurrent, ids, segments, lags=lags)
    with pytest.raises(MemvecError, match="do not fit the context"):
        compare_segments(recurrent, stream(lm, 150)[None], 50, recipe=Recipe(steps=1))
    back = compare_segments(recurrent, stream(lm, 150)[None], 50)  # nothing is crammed whole
    assert back.chains[-1].segments == 50
    for tokens in (126, 127):  # with two vectors, 126 tokens fill the context
        recurrent.encoder.segment = tokens
        refused = pytest.raises(MemvecError, match="do not fit the context")
        with refused if tokens == 127 else nullcontext():
            check_chain(lm, recurrent.encoder, tokens, 1, 1, crammed=True)


def test_damaged_files_are_refused(tmp_path):
    lm, file = tiny(), tmp_path / "recurrent.safetensors"
    save_encoder(file, encoder_of(lm), lm)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    shape = encoder_of(lm).settings()

    def written(**changes):
        metadata = {"kind": "recurrent", "shape": json.dumps(shape | changes)}
        save_file(tensors, file, metadata)
        return file

    for changes, says in [
        ({"slots": 999_999}, "claims 999999 slots"),
        ({"lags": 4000, "slots": 4000}, "claims more than it holds"),
        ({"lags": 3}, "does not fit"),
        ({"segment": "many"}, "can read"),
    ]:
        with pytest.raises(MemvecError, match=says):
            load_encoder(written(**changes), lm)
    del shape["lags"]
    with pytest.raises(MemvecError, match="can read"):
        load_encoder(written(), lm)


# ---------------------------------------------------------------------- measures


@pytest.mark.slow
def test_measured_leading_tokens_are_those_that_decode():
    lm = with_encoder(tiny(), encoder_of(tiny()))
    ids = stream(lm, 18, seed=3).view(2, 9)
    found = compare_segments(lm, ids, 3, recipe=QUICK)
    assert [(at.segments, at.lag) for at in found.lags] == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
    encoder = recurrent_of(lm)
    for at in found.lags:
        memory = encoder.memories(lm, ids, T)[at.segments - 1]
        end = (at.segments - at.lag) * T
        truth = ids[:, end - T : end]
        decoded = decode_ids(lm, encoder.asked(memory, at.lag), [T] * 2, cached=False)
        for row in range(2):
            right = [a == b for a, b in zip(decoded[row], truth[row].tolist(), strict=True)]
            assert at.leading[row] == ([*right, False].index(False))
            assert at.right[row] >= at.leading[row]
    assert (found.vectors, found.segment, found.documents) == (2, T, 2)
    assert found.alone == (T,) * 6  # three tokens in two vectors are exact here
    assert found.chains[0].whole == (T, T)
    for chain in found.chains:
        own = [at for at in found.lags if at.segments == chain.segments]
        exact = [sum(T for at in own if at.leading[row] == T) for row in range(2)]
        assert chain.exact_tokens == tuple(exact)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_lag_is_compared_with_its_own_segment(lag):
    """The segment of row 0 is what decodes; that of row 1 differs in the last token."""
    lm = with_encoder(tiny(), encoder_of(tiny()))
    memory = recurrent_of(lm).memories(lm, stream(lm, 18, seed=3).view(2, 9), T)[-1]
    decoded = torch.tensor(decode_ids(lm, recurrent_of(lm).asked(memory, lag), [T] * 2))
    decoded[1, -1] = 2 if decoded[1, -1] != 2 else 3
    ids = torch.where(decoded != 4, 4, 5).repeat(1, 3)  # no token of the other segments is right
    ids[:, (2 - lag) * T : (3 - lag) * T] = decoded
    found = recall(lm, memory, ids, lag)
    assert (found.segments, found.lag) == (3, lag)
    assert (found.leading, found.right) == ((T, T - 1), (T, T - 1))


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return importlib.import_module("recurrent")


def test_the_study_uses_the_encoder_that_the_recipe_trains(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipe makes its folder of work
    spec = read_spec(ROOT / "studies" / "recurrent.toml")
    words, options = recipe.command(["--text", "novels.parquet"]), recipe.OPTIONS
    (run,) = spec.runs
    assert run.options["encoder"] == words[words.index("--out") + 1]
    assert run.vectors == (options["slots"],)
    assert {length % options["segment-tokens"] for length in run.lengths} == {0}
    assert max(run.lengths) > options["segments"] * options["segment-tokens"]


@pytest.mark.slow
def test_the_command_trains_and_measures_a_recurrent_encoder(command, recipe, tmp_path):
    folder, text, file = (tmp_path / name for name in ("model", "text.txt", "encoder.safetensors"))
    tokenizer = byte_tokenizer()
    build("llama", 0, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text("The boats came in one by one, and nobody on the quay counted them. " * 90)
    small = ("--steps", 3, "--hidden", 16, "--layers", 1, "--positions", 64)
    chain = ("--slots", 2, "--segments", 3, "--lags", 2, "--segment-tokens", 2)
    at = ("--model", folder, "--text", text, "--where", "", "--work", tmp_path)
    words = recipe.command([str(word) for word in (*at, *small, *chain)])
    ran = command(*words)
    assert ran.code == 0
    assert "3 segments of 2 tokens" in ran.err
    train = ("encoder", "train", "-m", folder, "--text", text, *small, "-o", file)
    measure = ("encoder", "measure", "-m", folder, "--encoder", file, "--text", text)
    asked = (*measure, "--segments", 3, "--passages", 2, "--steps", 30)
    shown = command(*asked)
    assert shown.code == 0
    assert "After 3 segments of 2 tokens in 2 vectors" in shown.out.decode()
    record = json.loads(command(*asked, "--lags", 1, "--json").out)
    assert [(at["segments"], at["lag"]) for at in record["lags"]] == [(1, 0), (2, 0), (3, 0)]
    assert len(record["alone"]) == 6
    bare = json.loads(command(*asked[:-1], 0, "--json").out)
    assert [at["leading"] for at in bare["lags"]] != []
    assert (bare["alone"], bare["chains"][0]["whole"]) == ([], [])
    short = tmp_path / "short.txt"
    short.write_text("The boats")
    own = tmp_path / "own.safetensors"
    lm = load_lm(str(folder))
    save_encoder(own, SlotEncoder(SlotNetwork(lm.width, hidden=8, layers=1, heads=1, slots=1)), lm)
    for wrong, says in [
        ((*train, "--force", "--segments", 3), "--segments is of recurrent encoders"),
        ((*train, "--force", "--recurrent", *chain[:4], "--lags", 9), "--lags must be at most"),
        ((*measure, "--segments", 0), "--segments must be at least 1"),
        ((*measure, "--segments", 3, "--lags", 3), "--lags must be at most 2"),
        ((*measure, "--lags", 2), "--lags is of recurrent encoders"),
        ((*measure[:-1], short, "--segments", 60), "too few for 16 passages of 120"),
        ((*measure[:-3], own, "--text", text, "--segments", 2), "no recurrent encoder"),
    ]:
        ran = command(*wrong)
        assert (ran.code, ran.out) == (2, b""), wrong
        assert says in ran.err


# ---------------------------------------------------------------------- the study

STUDY = """
name = "carried"
batch_size = 4
[[models]]
name = "FOLDER"
[[sources]]
kind = "random-tokens"
[[runs]]
protocol = "recurrent"
encoder = "ENCODER"
vectors = [2]
lengths = [3, 9]
passages = 3
recipe = { steps = 40 }
"""


def written_encoder(folder: Path, file: Path) -> Path:
    lm = load_lm(str(folder))
    save_encoder(file, encoder_of(lm), lm)
    return file


def spec_text(folder: Path, encoder: Path) -> str:
    return STUDY.replace("FOLDER", str(folder)).replace("ENCODER", str(encoder))


@pytest.fixture(scope="module")
def study(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study")
    text = spec_text(folder, written_encoder(folder, out / "r.safetensors"))
    make = lambda model: LocalPool(load_lm(model.name))  # noqa: E731
    run_study(parse_spec(text, "test"), out / "out", make, base=folder, toml=text)
    return out / "out"


def test_rows_of_a_study_are_recomputed_and_reported(study):
    found = check_study(study)
    assert found["wrong"] == []
    (sentence,) = found["unchecked"]
    assert "the values of alone were not computed again" in sentence
    assert {"memory", "back", "right", "segment"} <= found["worst"].keys()
    with Store(study) as store:
        data = read_data(store)
        by_lag, by_chain = protocol_of("recurrent").tables(data, compare=False)
        (figure,) = protocol_of("recurrent").figures(data, compare=False)
        (card,) = protocol_of("recurrent").cards(data)
    lags = [dict(zip(by_lag.columns, row, strict=True)) for row in by_lag.rows]
    assert [(row["segments"], row["lag"], row["n"]) for row in lags] == [
        (1, 0, 3),
        (3, 0, 3),
        (3, 1, 3),
    ]
    extras = [json.loads(e) for e in data.rows[data.rows["length"] == 9]["extra"]]
    exact = [sum(e["back"][lag] == T for e in extras) for lag in range(2)]
    assert [row["exact"].split(" ")[0] for row in lags[1:]] == [f"{e / 3:.0%}"[:-1] for e in exact]
    chains = [dict(zip(by_chain.columns, row, strict=True)) for row in by_chain.rows]
    whole = data.rows[data.rows["length"] == 9]["horizon"].mean() / 2
    assert chains[1]["crammed whole"] == pytest.approx(whole)
    assert chains[1]["carried"] == pytest.approx(sum(exact) * T / 3 / 2)
    assert (chains[1]["its vectors"], chains[1]["crammed alone"]) == (6, T / 2)
    assert len(figure.panels) == 2
    assert card.value == f"{chains[1]['reach']} of 3 segments"


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_segments_crammed_for_comparison_have_the_storage_of_their_rows(monkeypatch, storage):
    asked = []

    class Seen(Engine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            asked.append(self.storage.name)

    monkeypatch.setattr(recurrent_measure, "Engine", Seen)
    crammed_leading(tiny(), [[3, 4, 5]], 2, QUICK, batch_size=1, storage=storage)
    assert asked == [str(storage).removeprefix("torch.")]


def test_segments_are_crammed_for_comparison_in_the_order_of_their_lags(monkeypatch):
    """Lag 0 is the newest segment."""
    lm, beside = tiny(), []
    (outcome,) = Engine(lm, QUICK, vectors=2).run([Passage((3, 4, 5, 6, 7, 8))])
    memory = torch.zeros(1, 2, lm.width)
    encoder = SimpleNamespace(segment=2, slots=2, memories=lambda *_: [memory] * 3)
    recalled = SimpleNamespace(leading=[0], right=[0])
    for name, value in (
        ("carried_by", lambda lm, path: lm),
        ("recurrent_of", lambda view: encoder),
        ("chain_of", lambda *_: (3, 2)),
        ("recall", lambda *_: recalled),
        ("crammed_leading", lambda lm, parts, *_: beside.extend(parts) or [2, 2]),
    ):
        monkeypatch.setattr(recurrent, name, value)
    sourced, options = SourcedPassage(0, outcome.passage, "x"), {"encoder": "r", "lags": 2}
    row = protocol_of("recurrent").extra_of_cell(lm, sourced, outcome, "vectors", QUICK, options)
    assert beside == [[7, 8], [5, 6]]
    assert (row["alone"], len(row["back"])) == ([2, 2], 2)


def test_the_check_of_a_study_names_changed_results(study):
    for changed in [
        {"back": [3, 3], "right": [0, 0], "segment": 4},
        {"memory": [[0.5] * 64] * 2},
    ]:
        with Store(study) as store:
            rows = store.db.execute("SELECT cell, number, extra FROM rows").fetchall()
        restore(study, [(c, n, json.dumps(json.loads(e) | changed)) for c, n, e in rows])
        wrong = str(check_study(study)["wrong"])
        assert all(f"{name} is stored as" in wrong for name in changed)
        restore(study, rows)
    before = falsify(study, '{"back": 1}', "recurrent")
    assert "does not write" in str(check_study(study)["wrong"])
    restore(study, before)


def test_a_missing_encoder_is_refused(study):
    file = study.parent / "r.safetensors"
    aside = shutil.move(file, study.parent / "aside")
    from memvec.lab.protocols import recurrent

    recurrent.carried_by.cache_clear()
    try:
        with pytest.raises(MemvecError, match=r"^there is no encoder .*: train one with"):
            check_study(study)
    finally:
        shutil.move(aside, file)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ('recipe = { start = "encoder" }', "start cannot be an encoder's"),
        ('recipe = { start_rule = "bos" }', "start_rule is 'vectors'"),
        ("lags = -1", "option lags"),
        ("", "needs the option 'encoder'"),
    ],
)
def test_wrong_options_of_a_run_are_refused(change, sentence):
    text = STUDY.split("encoder =")[0] + "lengths = [3]\n" + change
    if change:
        text += '\nencoder = "r.safetensors"\n'
    with pytest.raises(MemvecError, match=sentence):
        parse_spec(text.replace("FOLDER", "pocket"), "test")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("vectors = [2]", "vectors = [1]", "has a memory of 2 vectors"),
        ("lengths = [3, 9]", "lengths = [4]", "4 tokens is no chain of whole segments of 3"),
        ("vectors = [2]", "vectors = [2]\nlags = 3", "lags must be at most 2"),
    ],
)
def test_cells_that_do_not_fit_the_encoder_are_refused(tmp_path, folder, old, new, sentence):
    text = spec_text(folder, written_encoder(folder, tmp_path / "r.safetensors"))
    text = text.replace(old, new).replace("steps = 40", "steps = 2")
    spec = parse_spec(text, "test")
    with pytest.raises(MemvecError, match=sentence):
        run_study(spec, tmp_path / "out", lambda m: LocalPool(load_lm(m.name)), base=folder)
