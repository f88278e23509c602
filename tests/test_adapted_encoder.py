"""The adapted encoder, which is the frozen model with adapters and summaries: vectors, training."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import build, tiny
from memvec.companions.encoder_files import load_encoder, save_encoder
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_of, start_vectors
from memvec.decoding import decode_ids
from memvec.encoders.adapted import AdaptedEncoder, fresh, own_summary
from memvec.encoders.adapted_training import AdaptedPlan, AdaptedTraining
from memvec.encoders.adapters import called_maps
from memvec.encoders.recurrent_training import RecurrentPlan, RecurrentTraining
from memvec.encoders.summary import SummaryEncoder
from memvec.errors import MemvecError
from memvec.loading import load_lm
from memvec.metrics import horizon
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from trainings import (
    assert_gradient_of,
    assert_moves_the_encoder_alone,
    assert_reads_batched_and_reloaded,
    assert_reads_in_another_dtype,
    one_step,
    stopped_and_resumed,
    stream,
)

FAMILIES = ["llama", "gpt2", "gemma2", "opt-projected", "mamba"]
SMALL = AdaptedPlan(steps=6, slots=2, rank=4, positions=80, shortest=2, longest=4, warmup=2)


def encoder_of(lm: FrozenLM, seed: int = 0, slots: int = 2) -> AdaptedEncoder:
    """An encoder of random weights whose adapters change the model."""
    torch.manual_seed(seed)
    network = fresh(lm, rank=3).begun(lm, lm.embedding.weight.float().mean(0).cpu(), 2.0)
    for up in network.adapters.up:
        torch.nn.init.normal_(up, std=0.1)
    return AdaptedEncoder(network, slots)


def with_summary(lm: FrozenLM) -> FrozenLM:
    """A copy of the model with a summary encoder; the shared model does not change."""
    generator, D = torch.Generator().manual_seed(0), lm.width
    view = copy.copy(lm)
    summary, weight, bias = (torch.randn(*s, generator=generator) for s in ((1, D), (D, D), (D,)))
    view.encoder = SummaryEncoder(summary, weight / D**0.5, bias, tokens=3)
    view.encoder.identity = "its own"
    return view


# ---------------------------------------------------------------------- vectors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("K", "T"), [(1, 6), (2, 6), (2, 7), (5, 10), (2, 1)])
def test_batched_equals_single_and_reloaded_equals_saved(tmp_path, family, K, T):
    lm = tiny(family)
    encoder, ids = encoder_of(lm), stream(lm, 4 * T).view(4, T)
    again = assert_reads_batched_and_reloaded(lm, encoder, ids, K, tmp_path / "e.safetensors")
    assert (again.for_use, again.max_vectors, len(again.identity)) == (False, 2, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_is_read_after_the_earlier_parts(family):
    """The reference reads one part at a time, after all earlier parts and summaries."""
    lm = tiny(family)
    encoder, ids = encoder_of(lm, slots=3), stream(lm, 14).view(2, 7)
    network = encoder.network
    found, bounds = encoder.encode(lm, ids, 3), (0, 2, 4, 7)
    summary = network.summary.expand(2, 1, -1)
    so_far = lm.embed(ids)[:, :0]
    for i in range(3):
        part = lm.embed(ids[:, bounds[i] : bounds[i + 1]])
        so_far = torch.cat([so_far, part, summary], 1)
        with network.adapters.on(lm), torch.no_grad():
            expected = network.map(lm.hidden(so_far, keep=1)[:, 0])
        torch.testing.assert_close(found[:, i], expected, rtol=1e-4, atol=1e-4)
    changed = ids.clone()
    changed[:, 4] = changed[:, 4] % (lm.vocab_size - 3) + 2
    after = encoder.encode(lm, changed, 3)
    torch.testing.assert_close(after[:, :2], found[:, :2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[:, 2], found[:, 2], rtol=1e-3)


@pytest.mark.parametrize(("T", "K", "ends"), [(8, 3, (2, 5, 8)), (11, 4, (2, 5, 8, 11))])
def test_lengths_of_parts_differ_by_at_most_one(T, K, ends, monkeypatch):
    """Each summary follows its part."""
    lm, seen = copy.copy(tiny()), []
    encoder, ids, hidden = encoder_of(lm, slots=K), stream(lm, 20)[None, :T], lm.hidden
    monkeypatch.setattr(lm, "hidden", lambda x, **o: seen.append(x) or hidden(x, **o))
    encoder.encode(lm, ids, K)
    summary, pieces = encoder.network.summary, torch.tensor_split(lm.embed(ids)[0], ends[:-1])
    assert torch.equal(seen[0][0], torch.cat([row for part in pieces for row in (part, summary)]))


def test_another_thread_reads_the_model_without_adapters():
    lm, ids = tiny(), torch.tensor([[3, 4, 5]])
    encoder, plain, seen = encoder_of(lm), lm.own_logits(ids), []
    with encoder.network.adapters.on(lm):
        thread = threading.Thread(target=lambda: seen.append(lm.own_logits(ids)))
        thread.start()
        thread.join()
        assert not torch.equal(lm.own_logits(ids), plain)
    assert torch.equal(seen[0], plain)
    assert torch.equal(lm.own_logits(ids), plain)


def test_the_untrained_encoder_gives_the_vector_of_the_models_summary_encoder():
    lm = with_summary(tiny())
    network = fresh(lm, rank=2).begun(lm, torch.zeros(lm.width), 1.0)
    ids = stream(lm, 12).view(2, 6)
    found = AdaptedEncoder(network, 1).encode(lm, ids, 1)
    expected = replace_tokens(lm.encoder).encode(lm, ids, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def replace_tokens(encoder: SummaryEncoder) -> SummaryEncoder:
    """The same encoder without a limit of tokens."""
    return SummaryEncoder(encoder.summary, encoder.weight, encoder.bias)


@pytest.mark.parametrize("size", [1.0, 12.8])
def test_without_a_summary_encoder_the_first_vectors_have_the_given_size(size):
    lm = tiny()
    torch.manual_seed(0)
    network = fresh(lm, rank=2).begun(lm, torch.zeros(lm.width), size)
    found = AdaptedEncoder(network, 1).encode(lm, stream(lm, 60).view(10, 6), 1)
    assert 0.4 * size < float(found.square().mean().sqrt()) < 2.5 * size


def test_an_encoder_reads_for_its_model_in_half_precision(tmp_path):
    lm, file = tiny(), tmp_path / "encoder.safetensors"
    half = FrozenLM(build("llama").to(torch.bfloat16), name="half")
    assert_reads_in_another_dtype(encoder_of(lm), lm, half, file)


# ---------------------------------------------------------------------- use as a start


@pytest.mark.slow
def test_a_folder_may_have_an_adapted_and_a_summary_encoder(folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    plain = load_lm(str(own))
    D = plain.width
    tensors = {"summary": torch.ones(1, D), "map.weight": torch.eye(D), "map.bias": torch.zeros(D)}
    save_file(tensors, own / "encoder.safetensors", {"tokens": "3", "max_vectors": "1"})
    first = load_lm(str(own))
    assert isinstance(first.encoder, SummaryEncoder)
    adapted = encoder_of(first)
    adapted.tokens = 5
    save_encoder(own / "adapted-encoder.safetensors", adapted, first)
    lm = load_lm(str(own))
    assert isinstance(lm.encoder, AdaptedEncoder)
    assert (lm.encoder.tokens, lm.encoder.max_vectors) == (5, 2)
    assert lm.description()["encoder"] == lm.encoder.identity
    assert start_of(lm, Recipe()) == "encoder"
    ids = [row.tolist() for row in stream(lm, 24).view(2, 12)]
    taken = torch.stack(start_vectors(lm, ids, 2, Recipe()))
    torch.testing.assert_close(taken, lm.encoder.encode(lm, torch.tensor(ids), 2))
    assert own_summary(plain) is None
    assert own_summary(first) is first.encoder
    assert own_summary(lm).identity == first.encoder.identity
    moved = lm.encoder.to(torch.device("cpu"), torch.float32)
    assert torch.equal(moved.own.weight, first.encoder.weight)
    # Other trainings begin with the summary encoder, with and without the adapted one.
    runs = [RecurrentTraining(m, stream(m), RecurrentPlan(hidden=16)) for m in (first, lm)]
    assert runs[0].identity == runs[1].identity
    named = load_lm(str(folder), encoder=own / "adapted-encoder.safetensors")
    assert named.encoder.identity == lm.encoder.identity
    assert named.encoder.own is None


@pytest.mark.slow
def test_passages_crammed_from_its_vectors_are_exact_alone_and_in_a_batch():
    lm = copy.copy(tiny())
    lm.encoder = encoder_of(lm)
    asked = [Passage(tuple(row.tolist()), i) for i, row in enumerate(stream(lm, 12).view(3, 4))]
    recipe = Recipe(start="encoder")
    for batch_size in (1, 3):
        outcomes = list(Engine(lm, recipe, vectors=2, batch_size=batch_size).run(asked))
        assert all(outcome.exact for outcome in outcomes)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-projected", "mamba"])
def test_training_moves_the_encoder_and_nothing_else(family):
    lm = tiny(family)
    training = AdaptedTraining(lm, stream(lm), replace(SMALL, lr=0.1))
    encoder = assert_moves_the_encoder_alone(training)
    assert 1 <= encoder.tokens <= SMALL.longest


@pytest.mark.parametrize("slots", [1, 2])
def test_the_gradient_is_that_of_plain_cross_entropy(slots):
    lm = tiny()
    training = AdaptedTraining(lm, stream(lm), replace(SMALL, slots=slots, several=0.999))
    ids, found = one_step(training)
    vectors = AdaptedEncoder(training.network, slots).read(lm, ids, slots)
    logits = lm.logits(vectors, ids, "vectors")
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert_gradient_of(training, loss, found, rtol=2e-3, atol=2e-5)


def test_a_step_has_about_the_positions_of_its_plan():
    """The encoder and the model that decodes both read the tokens and K vectors."""
    training, seen = AdaptedTraining(tiny(), stream(tiny()), replace(SMALL, positions=300)), []
    training._descend = lambda vectors, ids: seen.append((vectors, ids)) or (1.0, 0.8)
    for training.step in range(12):
        training._train_step()
    for vectors, ids in seen:
        passage = 2 * (vectors.shape[1] + ids.shape[1])
        assert len(ids) == len(vectors) == 300 // passage
    assert {vectors.shape[1] for vectors, _ in seen} == {1, 2}


def test_the_target_is_updated_with_the_length_as_a_share_of_the_target():
    training, seen = AdaptedTraining(tiny(), stream(tiny()), replace(SMALL, slots=1)), []
    training._descend = lambda vectors, ids: seen.append(ids.shape[1]) or (1.0, 0.8)
    training._follow = lambda share, *_: seen.append(share)
    training.target = 3.0
    for training.step in range(6):
        training._train_step()
    assert training.grows
    assert seen[1::2] == pytest.approx([length / 3.0 for length in seen[::2]])
    assert len(set(seen[::2])) > 1


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch, own):
    lm = with_summary(tiny()) if own else tiny()
    partial = tmp_path / "e.partial"
    stopped_and_resumed(lambda: AdaptedTraining(lm, stream(lm), SMALL), partial, 3, monkeypatch)
    others = [(lm, replace(SMALL, rank=5)), (tiny() if own else with_summary(tiny()), SMALL)]
    for other, plan in others:
        with pytest.raises(MemvecError, match="another model, text or settings"):
            AdaptedTraining(other, stream(lm), plan).run(partial)


@pytest.mark.slow
def test_passages_grow_with_the_accuracy_without_a_summary_encoder(monkeypatch):
    """With a summary encoder, all lengths are drawn from the first step."""

    def lengths(training, accuracy):
        seen = []

        def descend(vectors, ids):
            seen.append(ids.shape[1])
            return 1.0, accuracy

        monkeypatch.setattr(training, "_descend", descend)
        for training.step in range(400):
            training._train_step()
        return seen

    plan = replace(SMALL, slots=1, shortest=1, longest=12)
    right = lengths(AdaptedTraining(tiny(), stream(tiny()), plan), 0.99)
    assert max(right[:10]) <= 5
    assert max(right[-100:]) == 12
    wrong = AdaptedTraining(tiny(), stream(tiny()), plan)
    assert max(lengths(wrong, 0.1)) == 4  # twice the first target
    assert wrong.target == 1.0
    own = AdaptedTraining(with_summary(tiny()), stream(tiny()), plan)
    assert max(lengths(own, 0.1)[:40]) == 12
    assert own.target == 12


@pytest.mark.slow
def test_a_training_can_begin_from_a_trained_encoder(tmp_path):
    """`--begin` takes its weights; its identity is part of the run's."""
    lm, file = tiny(), tmp_path / "first.safetensors"
    save_encoder(file, AdaptedTraining(lm, stream(lm), SMALL).run(), lm)
    first, plan = load_encoder(file, lm), replace(SMALL, begin=str(file), seed=1)
    training = AdaptedTraining(lm, stream(lm), plan)
    for key, value in training.network.state_dict().items():
        assert torch.equal(value, first.network.state_dict()[key])
        assert training.network.get_parameter(key).requires_grad
    assert training.identity["plan"]["begin"] == first.identity
    assert training.target == SMALL.longest
    assert not torch.equal(training.run().network.summary, first.network.summary)
    with pytest.raises(MemvecError, match="slots of rank 4: begin with the same"):
        AdaptedTraining(lm, stream(lm), replace(plan, rank=5))
    pocket = load_lm("pocket")
    own = str(own_summary(pocket).file)
    with pytest.raises(MemvecError, match="is no adapted encoder to begin from"):
        AdaptedTraining(pocket, stream(lm), replace(SMALL, begin=own))


@pytest.mark.slow
def test_training_from_random_weights_learns_to_give_tokens_back():
    """The model has random weights; one pass gives more leading tokens back after training."""
    lm = tiny()
    ids = stream(lm, 20_000)
    plan = AdaptedPlan(
        steps=250,
        slots=1,
        rank=8,
        positions=256,
        lr=1e-2,
        shortest=1,
        longest=4,
        warmup=5,
        size=4.0,
    )
    training = AdaptedTraining(lm, ids, plan)
    unseen = training.held_out[: 2 * 64].view(64, 2)

    def leading(encoder):
        decoded = torch.tensor(decode_ids(lm, encoder.encode(lm, unseen, 1), [2] * 64))
        return float(horizon(decoded == unseen).float().mean())

    before = leading(AdaptedEncoder(copy.deepcopy(training.network), 1))
    assert leading(training.run()) > before + 0.5


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "rank"),
        ({"shortest": 0}, "shortest"),
        ({"longest": 1}, "longest must be at least 2"),
        ({"size": 0.0}, "^size must"),
        ({"lr": 0.0}, "^lr must"),
    ],
)
def test_wrong_plans_are_refused(changes, says):
    with pytest.raises(MemvecError, match=says):
        replace(SMALL, **changes)


def test_models_and_texts_that_do_not_fit_the_plan_are_refused():
    lm = tiny()
    with pytest.raises(MemvecError, match=r"do not fit the context.*fewer slots"):
        AdaptedTraining(lm, stream(lm), replace(SMALL, longest=64))
    mamba = tiny("mamba")  # its context has no limit
    with pytest.raises(MemvecError, match="too few to train an encoder on passages of 4000"):
        AdaptedTraining(mamba, stream(mamba), replace(SMALL, longest=2000))
    sparing = FrozenLM(build("llama"), name="sparing", checkpointing=True)
    with pytest.raises(MemvecError, match="without checkpointing"):
        AdaptedTraining(sparing, stream(lm), SMALL)


def test_foreign_and_damaged_files_are_refused(tmp_path):
    lm, file = tiny(), tmp_path / "encoder.safetensors"
    save_encoder(file, encoder_of(lm), lm)
    with pytest.raises(MemvecError, match="was trained for other weights"):
        load_encoder(file, tiny(seed=1))
    # Tensors of older safetensors are views of the file, which is overwritten below.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    modules = called_maps(lm)

    def written(tensors, **shape):
        save_file(tensors, file, {"kind": "adapted", "shape": json.dumps(shape)})
        return file

    load_encoder(written(tensors, modules=modules, slots=2), lm)
    for changed, says in [
        ({"modules": [*modules[:-1], "model.nothing"], "slots": 2}, r"adapts model.nothing, which"),
        ({"modules": modules[:-1], "slots": 2}, "does not fit"),
        ({"modules": modules, "slots": 0}, "claims 0 slots"),
        ({"modules": modules, "slots": 10**9}, "claims 1000000000 slots"),
        ({"modules": modules}, "can read"),
        ({"modules": modules, "slots": "many"}, "can read"),
    ]:
        with pytest.raises(MemvecError, match=says):
            load_encoder(written(tensors, **changed), lm)
    narrow = tensors | {"adapters.up.0": tensors["adapters.up.0"][:1].contiguous()}
    with pytest.raises(MemvecError, match="does not fit"):
        load_encoder(written(narrow, modules=modules, slots=2), lm)


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_trains_measures_and_crams_with_an_adapted_encoder(command, folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    books, letter = tmp_path / "books.txt", tmp_path / "letter.txt"
    books.write_text("the cat sat on the mat and the dog, and so it went on. " * 200)
    letter.write_text("the cat sat")
    sizes = ["--slots", 2, "--rank", 4, "--steps", 4, "--positions", 80, "--longest", 5]
    train = ["encoder", "train", "--adapted", "-m", own, "--text", books, *sizes]
    ran = command(*train)
    assert ran.code == 0, ran.err
    assert "tokens per vector" in ran.err
    file = own / "adapted-encoder.safetensors"
    encoder = load_lm(str(own)).encoder
    assert encoder.file == file
    assert command(*train).code == 2  # the file exists
    measured = ["--lengths", "2,3", "--longest", 4, "--passages", 2, "--steps", 30, "--json"]
    ran = command("encoder", "measure", "-m", own, "--text", books, *measured)
    assert ran.code == 0, ran.err
    assert [row["tokens"] for row in json.loads(ran.out)["rows"]] == [2, 3]
    ran = command("cram", letter, "-m", own, "--vectors", 2, "--tokens", 6)
    assert ran.code == 0, ran.err
    header = json.loads(command("inspect", tmp_path / "letter.mem", "--json").out)
    assert header["model"]["encoder"] == encoder.identity
    assert command("decode", tmp_path / "letter.mem").out == b"the cat sat"
    for wrong, says in [
        (("--adapted", "--recurrent"), "--recurrent and --adapted are two kinds"),
        (("--adapted", "--hidden", 16), "--hidden is not of adapted encoders"),
        (("--rank", 2), "--rank is of usable and adapted encoders: add --usable or --adapted"),
        (("--longest", 9), "--longest is of usable and adapted encoders: add --usable or"),
        (("--adapted", "--begin", letter), "memvec can read"),
    ]:
        ran = command("encoder", "train", *wrong, "-m", own, "--text", books, "-o", "n")
        assert ran.code == 2
        assert says in ran.err
        assert "Traceback" not in ran.err
