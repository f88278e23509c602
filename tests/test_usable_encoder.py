"""The usable encoder, which makes the first usable vectors of a passage in one pass with adapters.

The tests cover its adapters, its vectors, when it is the start, its training, files and commands.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import memvec
from conftest import build, tiny
from memvec.companions.around import CrammedTrigger
from memvec.companions.encoder_files import load_encoder, save_encoder
from memvec.companions.triggers import save_trigger
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_of, start_vectors, view_for
from memvec.encoders.adapters import called_maps, linear_maps
from memvec.encoders.summary import SummaryEncoder
from memvec.encoders.usable import UsableEncoder, fresh
from memvec.encoders.usable_training import UsablePlan, UsableTraining
from memvec.errors import MemvecError
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.usable.queries import text_inputs
from memvec.usable.starts import last_tokens
from memvec.usable.teacher import log_p_after
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
SMALL = UsablePlan(
    steps=6, slots=2, rank=4, positions=80, query_tokens=5, shortest=2, longest=4, warmup=2
)
USABLE = Recipe.of(
    "usable", settle=20, decay=20, steps=400, query_count=3, query_tokens=5, compute="model"
)


def encoder_of(lm: FrozenLM, seed: int = 0, slots: int = 2) -> UsableEncoder:
    """An encoder of random weights whose adapters change the hidden states."""
    torch.manual_seed(seed)
    network = fresh(lm, slots=slots, rank=3).begun(lm, lm.embedding.weight.float().mean(0).cpu())
    for up in network.adapters.up:
        torch.nn.init.normal_(up, std=0.1)
    return UsableEncoder(network)


def with_encoder(lm: FrozenLM, encoder: UsableEncoder | None = None) -> FrozenLM:
    """A copy of the model with a usable encoder; the model that tests share is not changed."""
    view = copy.copy(lm)
    view.usable_encoder = encoder or encoder_of(lm)
    return view


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_add_their_product_to_the_weights_and_are_gone_afterwards(family):
    """In the context the model has the weights W + U D; after it, also after an error, it has W."""
    lm = tiny(family)
    adapters, ids = encoder_of(lm).network.adapters, stream(lm, 12).view(2, 6)
    plain, inputs = lm.own_logits(ids), lm.embed(ids)
    merged = copy.deepcopy(lm.model)
    for name, down, up in zip(adapters.names, adapters.down, adapters.up, strict=True):
        product = (up @ down).detach()  # Conv1D of GPT-2 has its weights transposed
        merged.get_submodule(name).weight.data += product.T if family == "gpt2" else product
    with adapters.on(lm):
        found = lm.hidden(inputs, keep=6)
    expected = lm.computed_by(merged).hidden(inputs, keep=6)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((found - lm.hidden(inputs, keep=6)).detach().abs().max()) > 1e-3
    assert torch.equal(lm.own_logits(ids), plain)
    with pytest.raises(KeyboardInterrupt), adapters.on(lm):
        raise KeyboardInterrupt
    assert torch.equal(lm.own_logits(ids), plain)


def test_the_head_is_not_adapted():
    lm = tiny("llama")
    head = lm.model.get_output_embeddings()
    assert all(module is not head for module in linear_maps(lm).values())
    assert len(called_maps(lm)) == 2 * 7  # two layers of attention and gated products


def test_maps_that_the_model_does_not_call_get_no_adapters(monkeypatch):
    """A fused kernel of Mamba may read the weights of a map without a call of its module, so a hook
    has no effect. Which maps are called depends on the release of transformers."""
    lm, called = tiny("mamba"), set()
    maps = {id(module): name for name, module in linear_maps(lm).items()}
    forward = nn.Linear.forward

    def counted(module, x):
        called.add(maps.get(id(module)))
        return forward(module, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    lm.own_logits(torch.arange(8)[None] % lm.vocab_size)
    monkeypatch.undo()
    assert set(called_maps(lm)) == called & set(maps.values())
    assert set(linear_maps(lm)) - called <= {f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)}


# ---------------------------------------------------------------------- its vectors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("K", "T"), [(1, 6), (2, 6), (5, 10), (2, 1)])
def test_batched_equals_single_and_reloaded_equals_saved(tmp_path, family, K, T):
    lm = tiny(family)
    encoder, ids = encoder_of(lm), stream(lm, 4 * T).view(4, T)
    again = assert_reads_batched_and_reloaded(lm, encoder, ids, K, tmp_path / "e.safetensors")
    assert (again.for_use, again.max_vectors, len(again.identity)) == (True, 2, 16)


def test_an_untrained_encoder_gives_the_last_tokens():
    lm = tiny()
    encoder, ids = UsableEncoder(fresh(lm, slots=3, rank=2)), stream(lm, 10)
    with torch.no_grad():
        encoder.network.map.weight.zero_()
    found = encoder.encode(lm, ids[None], 3)[0]
    torch.testing.assert_close(found, last_tokens(lm, ids.tolist(), 3, Recipe()))


def test_the_encoder_reads_bos_the_passage_and_its_summaries(monkeypatch):
    """It reads the passage after BOS, as the model reads a text."""
    lm = copy.copy(tiny())
    encoder, ids, hidden, seen = encoder_of(lm, slots=3), stream(lm, 6)[None, :5], lm.hidden, []
    monkeypatch.setattr(lm, "hidden", lambda x, **o: seen.append(x) or hidden(x, **o))
    encoder.encode(lm, ids, 2)
    first = lm.embed(torch.tensor([[lm.bos_id]]))
    expected = torch.cat([first[0], lm.embed(ids)[0], encoder.network.summary[:2]])
    assert torch.equal(seen[0][0], expected)


def test_untrained_summaries_are_near_the_mean_embedding_and_differ():
    lm = tiny()
    mean = lm.embedding.weight.float().mean(0)
    away = fresh(lm, slots=64, rank=1).begun(lm, mean).summary.detach() - mean
    assert float(away.std() / mean.std()) == pytest.approx(0.1, rel=0.1)
    assert len(away.unique(dim=0)) == 64


def test_a_model_in_another_dtype_reads_with_the_encoder(tmp_path):
    lm, file = tiny(), tmp_path / "encoder.safetensors"
    half = FrozenLM(build("llama").to(torch.bfloat16), name="half")
    assert_reads_in_another_dtype(encoder_of(lm), lm, half, file)


# ---------------------------------------------------------------------- when it is the start


def test_auto_starts_from_the_usable_encoder_for_usable_vectors_only():
    lm = with_encoder(tiny())
    ids = [p.tolist() for p in stream(lm, 18).view(3, 6)]
    assert start_of(tiny(), USABLE) == "last-tokens"
    assert start_of(lm, USABLE) == "encoder"
    assert start_of(lm, Recipe()) == "noise"
    assert start_of(lm, replace(USABLE, start="last-tokens")) == "last-tokens"
    assert start_of(lm, replace(USABLE, trigger="bos")) == "last-tokens"
    assert start_of(lm, replace(USABLE, front="none")) == "last-tokens"
    assert start_of(lm, replace(USABLE, trigger="bos", start="encoder")) == "encoder"
    taken = torch.stack(start_vectors(view_for(lm, USABLE), ids, 2, USABLE))
    expected = lm.usable_encoder.encode(lm, torch.tensor(ids), 2)
    torch.testing.assert_close(taken, expected, rtol=1e-4, atol=1e-5)
    assert lm.read_as("one-step").usable_encoder is None
    other = copy.copy(lm)
    other.own_trigger = CrammedTrigger(torch.zeros(1, lm.width), "not the one it knows")
    assert start_of(other, USABLE) == "last-tokens"
    with pytest.raises(
        MemvecError, match=r"no usable encoder for such vectors: use start 'last-tokens'"
    ):
        start_vectors(tiny(), ids, 2, replace(USABLE, start="encoder"))
    for asked in ({"trigger": "bos"}, {"front": "none"}):
        with pytest.raises(MemvecError, match=r"knows one trigger and front, and these are others"):
            start_vectors(lm, ids, 2, replace(USABLE, start="encoder", **asked))


@pytest.mark.slow
def test_passages_from_the_encoder_do_not_depend_on_their_neighbours():
    """Alone and together they get the same first vectors up to rounding, and are exact."""
    lm, recipe = with_encoder(tiny()), replace(USABLE, settle=5, decay=5)
    rows = stream(lm, 10)[:9].view(3, 3)
    asked = [Passage(tuple(row.tolist()), i) for i, row in enumerate(rows)]
    together = list(Engine(lm, recipe, vectors=2).run(asked))
    assert len(together) == 3
    assert all(outcome.exact for outcome in together)
    for passage in asked:
        (alone,) = Engine(lm, recipe, vectors=2, batch_size=1).run([passage])
        assert alone.exact
    ids = [list(passage.ids) for passage in asked]
    view = view_for(lm, USABLE)
    batch = start_vectors(view, ids, 2, USABLE)
    for one, each in zip(start_vectors(view, ids, 2, USABLE, alone=True), batch, strict=True):
        torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)


def test_the_usable_encoder_of_a_models_folder_is_loaded_and_recorded(folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    plain = load_lm(str(own))
    save_encoder(own / "usable-encoder.safetensors", encoder_of(plain), plain)
    lm = load_lm(str(own))
    assert lm.encoder is None
    assert lm.description()["usable_encoder"] == lm.usable_encoder.identity
    assert "usable_encoder" not in plain.description()
    named = load_lm(str(folder), encoder=own / "usable-encoder.safetensors")
    assert named.usable_encoder.identity == lm.usable_encoder.identity
    assert named.encoder is None


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-projected", "mamba"])
def test_training_moves_the_encoder_and_nothing_else(family):
    lm = tiny(family)
    training = UsableTraining(lm, stream(lm), replace(SMALL, lr=0.1))
    assert_moves_the_encoder_alone(training)
    assert 0 < training.target < 5


@pytest.mark.parametrize("trigger", [False, True])
def test_the_gradient_of_a_step_is_that_of_both_losses(trigger):
    """A step's gradient equals that of autograd through whole distributions, for BOS as the trigger
    and for a trigger and a front of soft tokens."""
    lm = copy.copy(tiny())
    if trigger:
        rows = lm.embedding_std * torch.randn(5, lm.width)
        lm.own_trigger = CrammedTrigger(rows[:3], "of a test", front=rows[3:])
    training = UsableTraining(lm, stream(lm), replace(SMALL, weight=3.0, positions=150))
    both, found = one_step(training)
    assert len(both) > 1  # so that the mean over passages is tested
    ids, query = both[:, :-5], both[:, -5:]
    view = view_for(lm, Recipe.of("usable"))
    vectors = UsableEncoder(training.network).read(view, ids, SMALL.slots)
    logits = view.logits(vectors, ids, "bos")
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    for i, row in enumerate(ids.tolist()):
        true = log_p_after(lm, text_inputs(lm, row), query[i : i + 1])
        said = log_p_after(lm, view.after_front(vectors[i : i + 1]), query[i : i + 1])
        loss = loss + 3.0 / len(ids) * (true.exp() * (true - said)).sum(-1).mean()
    assert_gradient_of(training, loss, found, rtol=2e-3, atol=2e-5)


def test_the_divergence_that_is_shown_is_a_running_mean():
    training, seen = UsableTraining(tiny(), stream(tiny()), SMALL), []
    given = training._divergence
    training._divergence = lambda *a: seen.append(given(*a)) or seen[-1]
    for _ in range(4):
        training._train_step()
    nats = [value for value, _ in seen]
    assert training.target == pytest.approx(sum(nats) / 4)
    assert training.target != pytest.approx(nats[-1])


def test_a_stopped_training_goes_on_where_it_was(tmp_path, monkeypatch):
    lm, partial = tiny(), tmp_path / "e.partial"
    stopped_and_resumed(lambda: UsableTraining(lm, stream(lm), SMALL), partial, 3, monkeypatch)
    for other in (replace(SMALL, weight=1.0), replace(SMALL, rank=5)):
        with pytest.raises(MemvecError, match="another model, text or settings"):
            UsableTraining(lm, stream(lm), other).run(partial)
    lm, D = copy.copy(lm), lm.width
    lm.encoder = SummaryEncoder(torch.zeros(1, D), torch.zeros(D, D), torch.zeros(D))
    lm.encoder.identity = "its own"  # a training starts from this encoder's summary
    with pytest.raises(MemvecError, match="another model, text or settings"):
        UsableTraining(lm, stream(lm), SMALL).run(partial)


def test_a_stopped_training_goes_on_with_its_own_trigger_only(tmp_path):
    lm, partial = copy.copy(tiny()), tmp_path / "e.partial"
    rows = lm.embedding_std * torch.randn(3, lm.width)
    lm.own_trigger = CrammedTrigger(rows, "the one it began with")
    plan = replace(SMALL, steps=1)
    UsableTraining(lm, stream(lm), plan).run(partial)
    lm.own_trigger = CrammedTrigger(-rows, "another one")
    with pytest.raises(MemvecError, match="another model, text or settings"):
        UsableTraining(lm, stream(lm), plan).run(partial)


@pytest.mark.slow
def test_a_trained_encoder_goes_on_being_trained(tmp_path):
    """With `--begin` a training starts from the numbers of an encoder and records its identity; the
    encoder must have the same sizes."""
    lm, file, partial = tiny(), tmp_path / "first.safetensors", tmp_path / "e.partial"
    save_encoder(file, UsableTraining(lm, stream(lm), SMALL).run(), lm)
    first, plan = load_encoder(file, lm), replace(SMALL, begin=str(file), seed=1)
    training = UsableTraining(lm, stream(lm), plan)
    for key, value in training.network.state_dict().items():
        assert torch.equal(value, first.network.state_dict()[key])
        assert training.network.get_parameter(key).requires_grad
    assert training.identity["plan"]["begin"] == first.identity
    went_on = training.run(partial)
    assert not torch.equal(went_on.network.summary, first.network.summary)
    for changes, says in [
        ({"rank": 5}, "slots of rank"),
        ({"slots": 3}, "begin with the same slots and"),
        ({"begin": str(tmp_path / "none.safetensors")}, "there is no encoder"),
    ]:
        with pytest.raises(MemvecError, match=says):
            UsableTraining(lm, stream(lm), replace(plan, **changes))
    pocket = load_lm("pocket")
    with pytest.raises(MemvecError, match="is no usable encoder to begin from"):
        UsableTraining(pocket, stream(lm), replace(SMALL, begin=str(pocket.encoder.file)))


@pytest.mark.slow
def test_training_lowers_both_losses():
    """In the built-in model, because a model of random weights attends to the BOS in front instead
    of the vectors."""
    lm = load_lm("pocket")
    texts = sorted((Path(__file__).parent.parent / "studies" / "texts").glob("*.txt"))
    text = torch.tensor([i for path in texts[:3] for i in lm.tokenize(path.read_text())])
    plan = UsablePlan(steps=18, slots=2, rank=8, positions=140, query_tokens=6, warmup=5, lr=0.006)

    def trained(weight: float) -> tuple[list[float], float]:
        bits, nats = [], []

        def note(now):
            bits.append(now.loss_bits)
            nats.append(now.target)

        UsableTraining(lm, text, replace(plan, weight=weight)).run(on_progress=note)
        return bits, nats[-1]

    (bits, both), (_, exact_only) = trained(8.0), trained(0.0)
    assert sum(bits[-8:]) < 0.8 * sum(bits[:8])
    assert both < 0.7 * exact_only


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "rank"),
        ({"query_tokens": 0}, "query"),
        ({"longest": 1}, "longest must be at least 2"),
        ({"weight": -1.0}, "^weight must"),
        ({"lr": 0.0}, "^lr must"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes, says):
    with pytest.raises(MemvecError, match=says):
        replace(SMALL, **changes)


def test_trainings_that_cannot_run_are_refused():
    lm = tiny()
    with pytest.raises(MemvecError, match="do not fit the context"):
        UsableTraining(lm, stream(lm), replace(SMALL, longest=64))
    mamba = tiny("mamba")  # its context has no limit
    with pytest.raises(MemvecError, match="too few to train an encoder on passages of 4000"):
        UsableTraining(mamba, stream(mamba), replace(SMALL, longest=2000))
    nameless = copy.copy(lm)
    nameless.bos_id = None
    with pytest.raises(MemvecError, match=r"no trigger in its folder.*memvec trigger train"):
        UsableTraining(nameless, stream(lm), SMALL)
    sparing = FrozenLM(build("llama"), name="sparing", checkpointing=True)
    with pytest.raises(MemvecError, match="without checkpointing"):
        UsableTraining(sparing, stream(lm), SMALL)
    training = UsableTraining(lm, stream(lm), SMALL)
    with torch.no_grad():
        training.network.summary.fill_(float("nan"))
    with pytest.raises(MemvecError, match="not finite at step 1"):
        training.run()


def test_its_files_are_checked(tmp_path):
    lm, file = tiny(), tmp_path / "encoder.safetensors"
    save_encoder(file, encoder_of(lm), lm)
    with pytest.raises(MemvecError, match="was trained for other weights"):
        load_encoder(file, tiny(seed=1))
    # Copies, because the loaded tensors are a view of the file, which is written anew.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    modules = called_maps(lm)

    def written(tensors, modules):
        shape = json.dumps({"modules": modules})
        save_file(tensors, file, {"kind": "usable", "shape": shape})
        return file

    load_encoder(written(tensors, modules), lm)
    with pytest.raises(MemvecError, match=r"adapts model.nothing, which"):
        load_encoder(written(tensors, [*modules[:-1], "model.nothing"]), lm)
    with pytest.raises(MemvecError, match="does not fit"):
        load_encoder(written(tensors, modules[:-1]), lm)
    narrow = tensors | {"adapters.up.0": tensors["adapters.up.0"][:1].contiguous()}
    with pytest.raises(MemvecError, match="does not fit"):
        load_encoder(written(narrow, modules), lm)
    with pytest.raises(MemvecError, match="can read"):
        load_encoder(written({"map.bias": tensors["map.bias"]}, modules), lm)
    save_file(tensors, file, {"kind": "usable", "shape": "{}"})
    with pytest.raises(MemvecError, match="can read"):
        load_encoder(file, lm)


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_commands_train_the_encoder_and_cram_from_it(command, folder, tmp_path):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    books, letter = tmp_path / "books.txt", tmp_path / "letter.txt"
    books.write_text("the cat sat on the mat and the dog, and so it went on. " * 200)
    letter.write_text("the dog")
    lm = load_lm(str(own))
    soft = CrammedTrigger(0.1 * torch.randn(2, lm.width))
    save_trigger(own / "trigger.safetensors", soft, lm, {})
    sizes = ["--slots", 2, "--rank", 4, "--steps", 4, "--positions", 80]
    sizes += ["--shortest", 2, "--longest", 3, "--query-tokens", 4]
    train = ["encoder", "train", "--usable", "-m", own, "--text", books, *sizes]
    ran = command(*train)
    assert ran.code == 0, ran.err
    assert "nats a token to the text" in ran.err
    assert "memvec cram --usable --encoder" in ran.err
    file = own / "usable-encoder.safetensors"
    lm = load_lm(str(own))
    assert lm.usable_encoder.trigger == lm.own_trigger.identity
    assert start_of(lm, USABLE) == "encoder"
    assert command(*train).code == 2
    quick = ["--set", "settle=10", "--set", "decay=10", "--set", "query_count=2"]
    quick += ["--set", "query_tokens=4", "--set", "steps=900"]
    cram = ["cram", letter, "-m", own, "--usable", "--vectors", 2, "--tokens", 6, *quick]
    ran = command(*cram)
    assert ran.code == 0, ran.err
    header = json.loads(command("inspect", tmp_path / "letter.mem", "--json").out)
    identity = load_encoder(file, load_lm(str(own))).identity
    assert header["model"]["usable_encoder"] == identity
    assert command("decode", tmp_path / "letter.mem").out == b"the dog"
    quickly = ["cram", letter, "-m", own, "--usable", "--preset", "usable-quick", "--vectors", 2]
    ran = command(*quickly, "--tokens", 6, "--set", "query_tokens=4", "-o", tmp_path / "q.mem")
    assert ran.code == 0, ran.err
    assert command("decode", tmp_path / "q.mem").out == b"the dog"
    other = tmp_path / "other.safetensors"
    small = ["--steps", 1, "--hidden", 16, "--layers", 1, "--heads", 2, "--positions", 64]
    assert command("encoder", "train", "-m", own, "--text", books, "-o", other, *small).code == 0
    for wrong, says in [
        (("cram", letter, "-m", own, "--encoder", file, "-o", "n"), "add --usable"),
        (("cram", letter, "-m", own, "--usable", "--encoder", other, "-o", "n"), "is no start of"),
        (
            ("cram", letter, "-m", own, "--encoder", other, "--start", "noise", "-o", "n"),
            "and so is --start noise: leave out one",
        ),
        (("encoder", "train", "--usable", "--recurrent", "--text", books), "two kinds"),
        (("encoder", "train", "--usable", "--lags", 2, "--text", books), "--lags is not of usable"),
        (("encoder", "train", "--rank", 2, "--text", books), "--rank is of usable and adapted"),
        (("encoder", "train", "--use-weight", 2, "--text", books), "--use-weight is of usable"),
        (("encoder", "train", "--begin", file, "--text", books), "--begin is of usable and"),
        (("encoder", "measure", "-m", own, "--encoder", file, "--text", books), "cram --usable"),
        (
            ("cram", letter, "-m", folder, "--preset", "usable-quick", "-o", "n"),
            "no usable encoder",
        ),
    ]:
        ran = command(*wrong)
        assert (ran.code, ran.out) == (2, b"")
        assert says in ran.sentence


# ---------------------------------------------------------------------- the built-in model's


def test_the_built_in_model_has_a_usable_encoder_and_starts_from_it():
    lm = load_lm("pocket")
    assert (lm.usable_encoder.kind, lm.usable_encoder.max_vectors) == ("usable", 4)
    assert lm.description()["usable_encoder"] == lm.usable_encoder.identity
    assert start_of(lm, Recipe.of("usable")) == "encoder"


@pytest.mark.slow
def test_a_few_steps_from_the_encoder_give_exact_and_usable_vectors():
    """They are exact in fewer than 100 steps, and their KL is below half of that of no context."""
    text = (Path(__file__).parent.parent / "examples" / "letter.txt").read_text("utf-8")[:72]
    lm = load_lm("pocket")
    mem = memvec.cram(lm, text, vectors=4, tokens=24, recipe=Recipe.of("usable-quick"))
    assert mem.exact
    assert memvec.decode(lm, mem) == [text]
    assert max(p.steps for p in mem.passages) < 100
    contexts = mem.header.use["held_out"]["contexts"]
    assert contexts["vectors"]["kl"] < 0.5 * contexts["nothing"]["kl"]
