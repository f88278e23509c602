"""One-pass encoders: training, files, the vectors that they give, and measures."""

from __future__ import annotations

import json
import math
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import QUICK, build, byte_tokenizer, reader, tiny
from memvec.cli.encoder import _print_comparison
from memvec.cli.training_text import alone_at, drawn, token_stream
from memvec.companions.encoder import OnePassEncoder
from memvec.companions.encoder_files import (
    FILE_NAME,
    load_encoder,
    read_encoders,
    save_encoder,
    shape_of,
)
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Finished, Outcome
from memvec.cramming.recipe import Recipe
from memvec.encoders import measure
from memvec.encoders.adapted_training import AdaptedPlan, AdaptedTraining
from memvec.encoders.checkpoint import _alike, model_of
from memvec.encoders.measure import compare, crammed_in_order
from memvec.encoders.slots import SlotEncoder, SlotNetwork, position_codes
from memvec.encoders.summary import SummaryEncoder
from memvec.encoders.training import GRID, SlotsPlan, Training
from memvec.errors import MemvecError
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.results import PositionScores
from trainings import (
    assert_gradient_of,
    assert_reads_in_another_dtype,
    one_step,
    stopped_and_resumed,
    stream,
)

SMALL = SlotsPlan(steps=6, slots=2, hidden=16, layers=1, heads=2, positions=64, first_target=3.0)


def network_of(lm, seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"hidden": 16, "layers": 1, "heads": 2, "slots": 2} | changes
    network = SlotNetwork(lm.width, **shape)
    return network.scaled(lm.embedding.weight.mean(0), lm.embedding_std, 3.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-projected", "mamba"])
def test_training_moves_the_encoder_and_nothing_else(family):
    lm = tiny(family)
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    text = stream(lm)
    with (
        torch.inference_mode(),
        torch.device("meta"),
    ):  # settings of the caller that must not matter
        training = Training(lm, text, SMALL)
    start = {k: v.clone() for k, v in training.network.state_dict().items()}
    with torch.inference_mode(), torch.device("meta"):
        encoder = training.run()
    for key, value in lm.model.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.grad is None
    moved = {k for k, v in encoder.network.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == start.keys() - {"mean", "std", "size"}
    assert encoder.tokens in GRID


def test_the_gradient_is_that_of_plain_cross_entropy():
    lm, plan = tiny(), replace(SMALL, slots=1)
    training = Training(lm, stream(lm), plan)
    ids, found = one_step(training)
    logits = lm.logits(training.network(lm.embed(ids), 1), ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert found.keys() == dict(training.network.named_parameters()).keys()
    assert_gradient_of(training, loss, found, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_training_reduces_the_loss():
    """The mean loss of the last 20 steps is more than a tenth below that of the first 20."""
    lm = tiny()
    plan = SlotsPlan(
        steps=150, hidden=32, layers=2, heads=2, positions=256, lr=3e-3, largest_share=1.2
    )
    losses = []
    Training(lm, stream(lm), plan).run(on_progress=lambda now: losses.append(now.loss_bits))
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch, stop):
    lm, partial = tiny(), tmp_path / "e.partial"
    stopped_and_resumed(lambda: Training(lm, stream(lm), SMALL), partial, stop, monkeypatch)
    for other in (replace(SMALL, lr=0.01), replace(SMALL, steps=9)):
        with pytest.raises(MemvecError, match="another model, text or settings"):
            Training(lm, stream(lm), other).run(partial)
    with pytest.raises(MemvecError, match="another model, text or settings"):
        Training(lm, stream(lm, seed=1), SMALL).run(partial)
    with pytest.raises(MemvecError, match="another model, text or settings"):
        Training(tiny(dtype="bfloat16"), stream(lm), SMALL).run(partial)
    body = build("llama", seed=5)
    with torch.no_grad():
        body.get_input_embeddings().weight.copy_(lm.embedding.weight)
    with pytest.raises(MemvecError, match="another model, text or settings"):
        Training(FrozenLM(body, name="another body"), stream(lm), SMALL).run(partial)
    good = partial.read_bytes()
    changed = bytes([*good[:9000], good[9000] ^ 1, *good[9001:]])
    for bad in (b"", b"not a checkpoint", good[:-1], changed):
        partial.write_bytes(bad)
        with pytest.raises(MemvecError, match="is damaged: delete it to start over"):
            Training(lm, stream(lm), SMALL).run(partial)


def test_a_checkpoint_does_not_fit_the_quantized_model():
    lm = copy(tiny())
    whole = {"plan": {}, "model": model_of(lm)}
    assert _alike(whole, {"plan": {}, "model": model_of(tiny())})
    lm.quantize = "int8"
    assert not _alike(whole, {"plan": {}, "model": model_of(lm)})


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2"])
def test_a_network_reads_embeddings_of_unit_size(family):
    """These are the inputs of the first layer: Gemma scales its stored embeddings."""
    lm = tiny(family)
    network = Training(lm, stream(lm), SMALL).network
    with torch.no_grad():
        handed_in = lm.embed(torch.arange(len(lm.embedding.weight)))
    read = (handed_in.float() - network.mean) / network.std
    assert float(read.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_the_target_length_follows_the_accuracy_up_to_the_context(monkeypatch):
    """The longest passage is as long as the context allows."""
    lm = tiny()
    training = Training(lm, stream(lm, 20_000), replace(SMALL, slots=33, positions=1))
    assert training.longest == 2  # 33 x 2 tokens after 33 vectors, in a context of 128
    training = Training(lm, stream(lm), SMALL)
    for accuracy, target in [(0.99, training.longest), (0.8, training.longest), (0.1, 1.0)]:
        monkeypatch.setattr(training, "_descend", lambda *_, a=accuracy: (1.0, a))
        for training.step in range(400):
            training._train_step()
        assert training.target == target


@pytest.mark.slow
def test_the_shortest_possible_text_can_be_trained_on():
    lm = tiny()
    plan = AdaptedPlan(steps=2, rank=2, longest=100, shortest=2, slots=1, positions=64, warmup=0)
    encoder = AdaptedTraining(lm, stream(lm, n=3450), plan).run()
    assert 1 <= encoder.tokens <= 69


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "^steps must"),
        ({"hidden": 30, "heads": 4}, "^hidden must be a multiple of 4"),
        ({"lr": 2.0}, "^lr must"),
        ({"size": float("inf")}, "^size must"),
    ],
)
def test_wrong_plans_are_refused(changes, says):
    with pytest.raises(MemvecError, match=says):
        SlotsPlan(**changes)


def test_too_little_text_too_many_slots_and_a_loss_that_is_not_finite_are_refused():
    lm = tiny()
    with pytest.raises(MemvecError, match="too few"):
        Training(lm, stream(lm, 100), SMALL)
    for slots in (60, 200):
        with pytest.raises(MemvecError, match=rf"^{slots} slot\(s\) leave no room"):
            Training(lm, stream(lm), replace(SMALL, slots=slots))
    training = Training(lm, stream(lm), SMALL)
    with torch.no_grad():
        training.network.slots.fill_(float("nan"))
    with pytest.raises(MemvecError, match="not finite at step 1"):
        training.run()


# ---------------------------------------------------------------------- vectors, files, measures


@pytest.mark.parametrize(("T", "K", "tokens"), [(17, 5, 0), (17, 5, 2), (20, 4, 3), (3, 5, 1)])
def test_a_passage_is_read_in_equal_parts_in_order(T, K, tokens, monkeypatch):
    """Of each part, `tokens` leading ones per vector are read; with `whole`, all of them are.

    A passage of fewer tokens than vectors has some of its tokens in two parts.
    """
    lm, read = tiny(), []
    encoder = SlotEncoder(network_of(lm), tokens)

    def noted(lm, ids, K):
        read.append((ids[0].tolist(), K))
        return torch.zeros(len(ids), K, lm.width)

    monkeypatch.setattr(encoder, "read", noted)
    ids = torch.arange(T)[None]
    assert encoder.encode(lm, ids, K).shape == (1, K, lm.width)
    vectors = [k for _, k in read]
    assert (sum(vectors), max(vectors)) == (K, encoder.max_vectors)
    whole, read[:] = read[:], []
    encoder.encode(lm, ids, K, whole=True)
    if T >= K:
        assert [token for part, _ in read for token in part] == list(range(T))
        assert all(abs(len(part) / k - T / K) < 1 for part, k in read)
    for (leading, k), (part, _) in zip(whole, read, strict=True):
        assert leading == part[: tokens * k or None] != []


@pytest.mark.parametrize("K", [1, 2])
def test_vectors_are_the_scaled_outputs_at_the_first_slots(K):
    lm = tiny()
    network, embedded = network_of(lm), torch.randn(3, 5, lm.width)
    with torch.no_grad():
        forth, back = network(embedded, K), network(embedded.flip(1), K)
        assert not torch.allclose(forth, back, atol=1e-3)  # the order of tokens matters
        network.layers = torch.nn.Identity()
        found, at_slots = network(embedded, K), network.out(network.slots[:K])
    expected = 3.0 * at_slots + lm.embedding.weight.mean(0)
    torch.testing.assert_close(found, expected.expand(3, -1, -1))


def test_the_codes_of_positions_are_sines_and_cosines_of_longer_and_longer_waves():
    codes = position_codes(3, 5, torch.device("cpu"))
    for position in range(3):
        angles = [position / 10_000 ** (2 * i / 5) for i in range(3)]
        waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert codes[position].tolist() == pytest.approx(waves[:5], abs=1e-6)


@pytest.fixture
def letter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.txt").write_bytes(b"The boats came in, one by one.\n")
    return tmp_path / "letter.txt"


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_batched_equals_single_and_reloaded_equals_saved(tmp_path, K, tokens):
    lm = tiny()
    encoder = SlotEncoder(network_of(lm), tokens)
    ids = stream(lm, 40).view(4, 10)
    together = encoder.encode(lm, ids, K)
    assert together.shape == (4, K, lm.width)
    alone = torch.cat([encoder.encode(lm, row[None], K) for row in ids])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=3e-5)
    file = tmp_path / "encoder.safetensors"
    save_encoder(file, encoder, lm, {"steps": 1})
    again = load_encoder(file, lm)
    assert (again.tokens, again.max_vectors) == (tokens, 2)
    torch.testing.assert_close(again.encode(lm, ids, K), together, rtol=1e-4, atol=3e-5)
    assert len(again.identity) == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_reads_for_its_model_in_half_precision(tmp_path, dtype):
    lm, file = tiny(), tmp_path / "encoder.safetensors"
    half = FrozenLM(build("llama").to(dtype), name="half")
    assert_reads_in_another_dtype(SlotEncoder(network_of(lm)), lm, half, file)


def test_foreign_and_damaged_files_are_refused(tmp_path):
    lm, file = tiny(), tmp_path / "encoder.safetensors"
    save_encoder(file, SlotEncoder(network_of(lm)), lm)
    sound = file.read_bytes()
    with pytest.raises(MemvecError, match="was trained for other weights"):
        load_encoder(file, tiny(seed=1))
    for damage in (b"", sound[: len(sound) // 2], b"\xff" * 64):
        file.write_bytes(damage)
        with pytest.raises(MemvecError, match="not an encoder that memvec can read"):
            load_encoder(file, lm)
    file.write_bytes(sound)
    # Tensors of older safetensors are views of the file, which is overwritten below.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    shape = json.dumps({"hidden": 16, "layers": 1, "heads": 2, "slots": 2})

    def written(tensors, **metadata):
        save_file(tensors, file, {"kind": "slots", "shape": shape} | metadata)
        return file

    huge = json.dumps({"hidden": 16_000, "layers": 200, "heads": 2, "slots": 2})
    for metadata, says in [
        ({"shape": huge}, "claims more than it holds"),
        ({"shape": shape.replace("16", "999999")}, "claims 999999 hidden"),
        ({"shape": "{}"}, "cannot|can read"),
        ({"shape": "no json"}, "can read"),
        ({"tokens": "many"}, "can read"),
        ({"tokens": "-4"}, "can read"),
        ({"shape": shape.replace("16", "1e999")}, "can read"),
        ({"shape": shape.replace("2}", "3}")}, "does not fit"),
    ]:
        with pytest.raises(MemvecError, match=says):
            load_encoder(written(tensors, **metadata), lm)
    with pytest.raises(MemvecError, match=r"no (map.bias|summary)"):
        load_encoder(written({"map.weight": torch.zeros(2, 2)}, kind="summary"), lm)
    D = lm.width
    maps = {"map.weight": torch.zeros(D, D), "map.bias": torch.zeros(D)}
    for summary, says in [
        (torch.zeros(()), "its width is not"),
        (torch.zeros(2, 0), "its width is not"),
        (torch.zeros(0, D), "can read"),
    ]:
        with pytest.raises(MemvecError, match=says):
            load_encoder(written(maps | {"summary": summary}, kind="summary"), lm)
    with pytest.raises(MemvecError, match="can read"):
        shape_of(written(tensors, shape="no json"))


def test_a_quantized_model_takes_no_encoder_from_its_folder(tmp_path):
    """They were trained for the weights before quantization; a named encoder is taken."""
    lm = copy(tiny())
    save_encoder(tmp_path / FILE_NAME, SlotEncoder(network_of(lm)), lm)
    read_encoders(lm, tmp_path, None)
    assert lm.encoder is not None
    lm.encoder, lm.quantize = None, "int8"
    read_encoders(lm, tmp_path, None)
    assert lm.encoder is None
    read_encoders(lm, tmp_path, tmp_path / FILE_NAME)
    assert lm.encoder is not None


class Asked(OnePassEncoder):
    """An encoder whose vectors are zeros; `seen` has the passages that it read."""

    def __init__(self):
        self.tokens, self.max_vectors, self.seen = 0, 1, []

    def to(self, device, dtype):
        return self

    def read(self, lm, ids, K):
        self.seen.append(ids)
        return torch.zeros(len(ids), K, lm.width)


def test_the_best_length_is_measured_on_the_held_out_end_of_the_text():
    """The shortest of equally good lengths is the best. Training gets the rest of the text."""
    lm, text = tiny(), stream(tiny(), n=4000)
    run = Training(lm, text, SMALL)
    assert torch.equal(run.text, text[:3920])
    assert torch.equal(run.held_out, text[3920:])
    run.text, run.held_out = torch.full((3920,), 2), torch.full((80,), 3)
    encoder = Asked()
    assert run.best_length(encoder, 4) == 1
    assert [tuple(ids.shape) for ids in encoder.seen] == [(64, T) for T in (1, 2, 3, 4)]
    assert all(bool((ids == 3).all()) for ids in encoder.seen)


def test_windows_begin_at_every_possible_place_of_a_text():
    run, draw = Training(tiny(), stream(tiny()), SMALL), torch.Generator().manual_seed(0)
    found = run._windows(torch.arange(7), 200, 5, draw)
    assert {tuple(row) for row in found.tolist()} == {tuple(range(a, a + 5)) for a in range(3)}
    assert run._windows(torch.arange(7), 2, 7, draw).tolist() == [list(range(7))] * 2


@pytest.mark.parametrize(
    ("share", "accuracy", "target"),
    [
        (1.0, 0.9, 10.2),
        (0.7, 0.9, 10.0),  # much shorter passages do not raise it
        (1.0, 0.8, 10.0),
        (1.0, 0.6, 10 / 1.02),
        (1.3, 0.6, 10.0),  # much longer passages do not lower it
    ],
)
def test_the_target_length_follows_passages_of_about_its_length(share, accuracy, target):
    run = Training(tiny(), stream(tiny()), SMALL)
    run.target = 10.0
    run._follow(share, accuracy, 12.0)
    assert run.target == pytest.approx(target)
    for _ in range(200):
        run._follow(share, accuracy, 12.0)
    assert 1.0 <= run.target <= 12.0


def test_steps_draw_every_number_of_vectors_and_lengths_about_the_target():
    """Lengths are from half to twice the target; a batch has about `positions` positions."""
    plan, seen = replace(SMALL, slots=3, positions=200), []
    run = Training(tiny(), stream(tiny()), plan)

    def descend(vectors, ids):
        seen.append((vectors.shape[:2], ids.shape))
        return 1.0, 0.8

    run._descend = descend
    for run.step in range(60):
        run._train_step()
    assert {K for (_, K), _ in seen} == {1, 2, 3}
    assert {T / K for (_, K), (_, T) in seen} == {2, 3, 4, 5, 6}
    for (rows, K), (count, T) in seen:
        assert rows == count == 200 // (T + K)


def test_gradients_are_clipped_to_length_1_and_cleared_after_a_step():
    run, seen = Training(tiny(), stream(tiny()), SMALL), []
    parameters = list(run.network.parameters())
    numbers = sum(p.numel() for p in parameters)
    run.optimizer.step = lambda: seen.append(sum(float(p.grad.square().sum()) for p in parameters))
    for scale in (100.0, 1e-3, 1e-3):
        run._move([scale * sum(p.sum() for p in parameters)])
    assert seen == pytest.approx([1.0, 1e-6 * numbers, 1e-6 * numbers], rel=1e-3)
    assert run.step == 3


def test_a_step_reports_bits_per_token_and_the_share_of_right_tokens():
    lm = tiny()
    run, ids = Training(lm, stream(lm), SMALL), stream(lm, 60).view(5, 12)
    vectors = 3 * torch.randn(5, 2, lm.width, generator=torch.Generator().manual_seed(1))
    logits = lm.logits(vectors, ids)
    ids[:3, 4] = logits[:3, 4].argmax(-1)  # three right tokens; earlier logits are unchanged
    ids[:, 5:] = ids[:, 5:].flip(0)
    logits = lm.logits(vectors, ids)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss, accuracy, _ = run._scored(lm.states(vectors, ids, "vectors"), ids)
    assert loss == pytest.approx(float(nats) / 0.6931472, rel=1e-4)
    right = logits.argmax(-1) == ids
    assert 3 <= int(right.sum()) < 60
    assert accuracy == pytest.approx(float(right.float().mean()))


def test_the_first_network_depends_only_on_the_seed_of_its_plan():
    lm, made = tiny(), []
    for seed, other_draws in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(other_draws)
        made.append(Training(lm, stream(lm), replace(SMALL, seed=seed)).network.slots)
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[1], made[2], atol=1e-3)


def test_outcomes_are_in_the_order_of_their_passages(monkeypatch):
    measures = PositionScores(*torch.ones(4, 2)).measures(2, 2)
    costs = {"steps": 0, "spent": 0, "seconds": 0.0}

    def last_first(engine, numbered):
        for passage in reversed(list(numbered)):
            ended = Finished(passage, torch.zeros(1, 4), "done", 0.0, **costs)
            yield Outcome(**vars(ended), exact=True, metrics=measures)

    monkeypatch.setattr(Engine, "run", last_first)
    found = crammed_in_order(object.__new__(Engine), [[5, 6], [7, 8], [9, 5]])
    assert [outcome.passage.ids for outcome in found] == [(5, 6), (7, 8), (9, 5)]


def test_measures_of_passages_have_exact_shares_means_and_intervals(monkeypatch):
    measures = [PositionScores(*torch.ones(4, 2)).measures(2, n) for n in (2, 1, 2, 1)]
    costs = {"steps": 0, "spent": 0, "seconds": 0.0}
    ended = [
        Outcome(Passage((5, 6), i), torch.zeros(1, 4), "done", 0.0, exact=True, metrics=m, **costs)
        for i, m in enumerate(measures)
    ]
    monkeypatch.setattr(measure, "decode_ids", lambda *_: [[5, 6], [7, 2], [9, 5], [8, 2]])
    monkeypatch.setattr(measure, "_cram", lambda *_: ended)
    lm = copy(tiny())
    lm.encoder = Asked()
    found = compare(lm, torch.tensor([[5, 6], [7, 8], [9, 5], [8, 8]]), [2])
    (row,) = found.rows
    half = (
        3.182446 * math.sqrt(1 / 3) / 2
    )  # Student's t with 3 degrees of freedom, for 2, 1, 2 and 1
    assert (row.one_pass_exact, row.one_pass_horizon) == pytest.approx((0.5, 1.5))
    assert (row.one_pass_interval, found.crammed_interval) == pytest.approx((half, half))
    assert (found.one_pass_lossless, found.crammed_n) == (2, 4)


def test_every_step_and_purpose_has_its_own_random_seed():
    run = Training(tiny(), stream(tiny()), SMALL)
    seeds = [
        run._generator(name, n).initial_seed() for name in ("step", "length") for n in range(999)
    ]
    assert len(set(seeds)) == len(seeds)


def test_a_summary_encoder_keeps_its_settings_in_another_dtype():
    width = tiny().width
    encoder = SummaryEncoder(torch.randn(2, width), torch.eye(width), torch.zeros(width), tokens=3)
    encoder.identity = "its own"
    moved = encoder.to(torch.device("cpu"), torch.bfloat16)
    assert (moved.tokens, moved.max_vectors, moved.identity) == (3, 2, "its own")
    assert torch.equal(moved.summary, encoder.summary.bfloat16())


def test_plans_with_different_seeds_have_different_random_seeds():
    first, second = (
        Training(tiny(), stream(tiny()), replace(SMALL, seed=seed))._generator("step", 3)
        for seed in (0, 1)
    )
    assert first.initial_seed() != second.initial_seed()


def test_a_text_that_is_too_short_is_refused_with_the_tokens_that_it_needs():
    lm = tiny()
    with pytest.raises(MemvecError, match=r"3350 tokens are too few .* at least 3351 tokens\.$"):
        Training(lm, stream(lm, 3350), SMALL)
    assert len(Training(lm, stream(lm, 3352)[:-1], SMALL).held_out) == 68


def test_the_comparison_crams_from_the_encoders_start_and_from_noise(capsys):
    """The encoder gives exact vectors here, so its start needs no step; noise needs some."""
    lm = tiny()
    ids = stream(lm, 8).view(4, 2)
    crammed = {
        o.passage.ids: o.vectors
        for o in Engine(lm, QUICK).run([Passage(tuple(r.tolist()), i) for i, r in enumerate(ids)])
    }

    class Remembers(SlotEncoder):
        def read(self, lm, ids, K):
            return torch.stack([crammed[tuple(row.tolist())] for row in ids])

    lm.encoder = Remembers(network_of(lm))
    try:
        found = compare(lm, ids, [2], QUICK, batch_size=4)
    finally:
        lm.encoder = None
    (row,) = found.rows
    assert (row.tokens, row.n, row.one_pass_exact, row.one_pass_horizon) == (2, 4, 1.0, 2.0)
    assert (row.encoder_exact, row.encoder_steps) == (1.0, 0)
    assert (row.noise_exact, row.noise_steps > 0) == (1.0, True)
    assert (found.one_pass_lossless, found.crammed_horizon, found.crammed_n) == (2, 2.0, 4)
    assert row.one_pass_interval == 0.0
    _print_comparison("tiny", found)
    printed = capsys.readouterr().out
    assert "│      2 │ 100 % [51, 100] │      2.0 ± 0.0 │" in printed
    saved = f"0 │ 100 % [51, 100] │ {row.noise_steps:g} │ {row.noise_steps:g} │"
    assert saved in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80
    with pytest.raises(MemvecError, match="no one-pass encoder"):
        compare(lm, ids, [2], QUICK)


def test_a_passage_that_is_not_exact_counts_as_all_steps_of_the_recipe(monkeypatch):
    """Its own steps would look cheap. A length is lossless if half of its passages are exact."""
    lm = copy(tiny())
    lm.encoder = SlotEncoder(network_of(lm))
    ids = stream(lm, 48).view(2, 24)
    seen = compare(lm, ids, [24], Recipe(steps=9, patience=1, if_not_exact="stop"))
    row = seen.rows[0]
    assert (row.noise_exact, row.noise_steps, row.encoder_steps) == (0, 9, 9)
    shares = {4: 1.0, 6: 0.5, 8: 0.49}

    def at_length(lm, ids, *_):
        return replace(row, tokens=ids.shape[1], one_pass_exact=shares[ids.shape[1]])

    monkeypatch.setattr("memvec.encoders.measure._at_length", at_length)
    few = Recipe(steps=1)
    assert compare(lm, ids[:, :8], [8, 4, 6], few).one_pass_lossless == 6


def test_one_pass_reads_all_tokens_and_a_start_the_best_number_of_them(monkeypatch):
    lm, read = tiny(), []

    class Records(SlotEncoder):
        def read(self, lm, ids, K):
            read.append(ids.shape[1])
            return super().read(lm, ids, K)

    monkeypatch.setattr(lm, "encoder", Records(network_of(lm), tokens=3))
    compare(lm, stream(lm, 16).view(4, 4), [4], replace(QUICK, steps=1), batch_size=4)
    assert read == [4, 3, 3]  # in one pass; for starts of this and of the longest length


@pytest.mark.slow
def test_the_command_trains_measures_and_crams_with_an_encoder(
    command, tmp_path, letter, monkeypatch
):
    """The encoder is trained for the model of a folder; decoding does not need it."""
    folder = tmp_path / "model"
    tokenizer = byte_tokenizer()
    model = build("llama", 0, vocab_size=len(tokenizer), hidden_size=64, head_dim=16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("The boats came in one by one, and nobody on the quay counted them. " * 90)
    small = ("--steps", 3, "--hidden", 16, "--layers", 1, "--heads", 2, "--positions", 64)
    train = ("encoder", "train", "-m", folder, "--text", text, *small)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_descend", interrupted)
        ran = command(*train)
        assert (ran.code, "Interrupted. Nothing was kept yet." in ran.err) == (130, True)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_finished", interrupted)
        ran = command(*train)
        assert (ran.code, "partial; the same command goes on" in ran.err) == (130, True)
    assert command(*train).code == 0
    assert load_lm(str(folder)).encoder is not None
    assert command(*train).code == 2
    assert "exists" in command(*train).err
    beside = tmp_path / "beside.safetensors"
    (folder / "encoder.safetensors").rename(beside)
    measured = command(
        *("encoder", "measure", "-m", folder, "--encoder", beside, "--text", text, "--json"),
        *("--lengths", "2,3", "--longest", 6, "--passages", 2, "--steps", 60),
    )
    assert measured.code == 0
    rows = json.loads(measured.out)["rows"]
    assert [row["tokens"] for row in rows] == [2, 3]
    ran = command("cram", letter, "-m", folder, "--encoder", beside, "--tokens", 2, "-o", "a.mem")
    assert ran.code == 0
    header = json.loads(command("inspect", "a.mem", "--json").out)
    assert header["model"]["encoder"] == load_encoder(beside, load_lm(str(folder))).identity
    assert command("decode", "a.mem").out == letter.read_bytes()
    for wrong, says in [
        (("encoder", "train", "-m", folder, "--text", tmp_path / "none.txt"), "no file"),
        (("encoder", "measure", "-m", folder, "--text", text), "no one-pass encoder"),
        (("encoder", "measure", "-m", folder, "--text", text, "--lengths", "a"), "numbers"),
        (("cram", letter, "-m", folder, "--encoder", letter, "-o", "b.mem"), "not an encoder"),
        (("cram", letter, "-m", folder, "--encoder", "none", "-o", "b.mem"), "there is no encoder"),
    ]:
        ran = command(*wrong)
        assert (ran.code, ran.out) == (2, b"")
        assert says in ran.err


@pytest.mark.parametrize("kind", ["encoder", "trigger"])
def test_a_training_overwrites_only_an_earlier_encoder_or_trigger(kind, command, tmp_path, folder):
    """Its text and the files of the model stay as they are, even with --force."""
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    (text := tmp_path / "text.safetensors").write_text("The boats came in one by one. " * 200)
    for target in (text, own / "model.safetensors", own / "config.json"):
        before = target.read_bytes()
        words = [kind, "train", "-m", own, "--text", text, "-o", target, "--force"]
        ran = command(*words)
        assert (ran.code, "is no earlier encoder or trigger" in ran.sentence) == (2, True)
        assert target.read_bytes() == before


def test_a_second_training_into_the_same_file_is_refused(tmp_path):
    partial = tmp_path / "a.safetensors.partial"
    with (
        alone_at(partial),
        pytest.raises(MemvecError, match=r"another memvec is writing a.safetensors"),
        alone_at(partial),
    ):
        pass
    with alone_at(partial):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "tokens", "count"), [(112, 8, 14), (200, 10, 12), (5000, 9, 30)])
def test_drawn_passages_do_not_overlap(size, tokens, count):
    found = drawn(torch.arange(size), "t", tokens, count, 3)
    assert found.shape == (count, tokens)
    assert len(found.unique()) == count * tokens
    with pytest.raises(MemvecError, match="too few for"):
        drawn(torch.arange(tokens * count - 1), "t", tokens, count, 3)


def test_where_is_refused_for_a_text_that_is_no_table(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    with pytest.raises(MemvecError, match="--where is of tables"):
        token_stream(reader(), str(tmp_path / "a.txt"), "text", ["split=train"])


def test_a_new_training_does_not_change_the_global_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Training(tiny(), stream(tiny()), SMALL)
    assert torch.equal(torch.rand(3), expected)
