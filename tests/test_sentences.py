"""Modelling sentence by sentence: cutting, latents, the latent model, its study and commands."""

from __future__ import annotations

import itertools
import json
import shutil
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from conftest import QUICK, reader, tiny
from memvec import metrics
from memvec.cli import sentences as command_line
from memvec.cli.sentences import _print_steps, _progress_lines
from memvec.cli.training_text import alone_at, texts_of
from memvec.companions.encoder_files import save_encoder
from memvec.decoding import decode_ids
from memvec.encoders.adapted import AdaptedEncoder, fresh
from memvec.encoders.slots import SlotEncoder, SlotNetwork
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report.data import read_data
from memvec.lab.report.report import write_report
from memvec.lab.sentences import evaluate, latents
from memvec.lab.sentences.cutting import Sentence, cut_sentences, first_sentence
from memvec.lab.sentences.files import load_latent_model, model_of, save_latent_model
from memvec.lab.sentences.flops import Shape, costs, encoding, shape_of
from memvec.lab.sentences.inspect import Shown, look
from memvec.lab.sentences.model import LatentModel, LatentNetwork
from memvec.lab.sentences.plan import LatentPlan
from memvec.lab.sentences.training import LatentTraining, _parted
from memvec.lab.sources import written
from memvec.lab.sources.sentences import Sentences
from memvec.lab.study.check import check_study
from memvec.lab.study.pool import LocalPool
from memvec.lab.study.run import run_study
from memvec.lab.study.spec import parse_spec, read_spec
from memvec.lab.study.store import Store
from memvec.loading import load_lm
from test_protocols import falsify

K, LIMIT = 2, 12
SHAPE = {"hidden": 16, "layers": 2, "heads": 2}
PLAN = LatentPlan(
    steps=6, vectors=K, max_tokens=LIMIT, window=4, batch=2, lr=0.01, warmup=2, **SHAPE
)
NOUNS, VERBS = ("cat", "dog", "fox", "mat"), ("sat", "ran", "saw", "jumps")
PAIRS = [*itertools.product(NOUNS, VERBS, NOUNS)]
TEXT = " ".join(f"The {a} {b} the {c}." for a, b, c in [*PAIRS[::3], *PAIRS[1::3]])
LONG = "The quick brown fox jumps over the lazy dog and the cat sat on the mat with the dog."


def with_encoder(lm, seed: int = 0):
    """The model with a random slot encoder, whose vectors have the size of embeddings."""
    torch.manual_seed(seed)
    network = SlotNetwork(lm.width, hidden=16, layers=1, heads=2, slots=4)
    network.scaled(torch.zeros(lm.width), lm.embedding_std, lm.embedding_std)
    view = copy(lm)
    view.encoder = SlotEncoder(network.requires_grad_(False))
    return view


def untrained(lm, window: int = 4) -> LatentModel:
    torch.manual_seed(0)
    network = LatentNetwork(K * lm.width, **SHAPE).eval().requires_grad_(False)
    network.scaled(torch.randn(20, K * lm.width))
    return LatentModel(network, K, LIMIT, window, {})


def latents_of(lm, B: int, S: int):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, S, K, lm.width, generator=generator)


def ids_of(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random sentences of 1 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 7, (count,), generator=generator).tolist()
    return [tuple(torch.randint(2, 24, (n,), generator=generator).tolist()) for n in sizes]


# ---------------------------------------------------------------------- cutting


@pytest.mark.parametrize("limit", [3, 8, 100])
def test_sentences_in_a_row_are_the_text(limit):
    lm = reader()
    found = cut_sentences(lm, f"{TEXT}\n {LONG}", limit)
    assert lm.text([t for s in found for t in s.ids]) == f" {TEXT} {LONG}"
    assert max(len(s.ids) for s in found) <= limit
    assert all(s.whole for s in found) == (limit == 100)
    whole = [s for s in found if s.whole]
    assert all(lm.text(s.ids)[:2] == " T" and lm.text(s.ids)[-1] == "." for s in whole)
    assert cut_sentences(lm, f"{TEXT}\n {LONG}", limit, 5) == found[:5]


def test_a_long_sentence_is_cut_into_equal_parts():
    lm = reader()
    n = len(lm.tokenize(" " + LONG))
    parts = cut_sentences(lm, LONG, 10)
    assert len(parts) == -(-n // 10)
    assert {len(p.ids) for p in parts} <= {n // len(parts), n // len(parts) + 1}
    assert not any(p.whole for p in parts)


@pytest.mark.parametrize(
    ("wrote", "first"),
    [
        (" The cat sat. The dog", " The cat sat."),
        (' "The cat sat." The dog', ' "The cat sat."'),
        (" The cat sat on the", " The cat sat on the"),
        (" The cat, 3.5 dogs", " The cat, 3.5 dogs"),
        (".", "."),
    ],
)
def test_a_decoded_sentence_ends_with_its_punctuation(wrote, first):
    lm = reader()
    assert lm.text(first_sentence(lm, lm.tokenize(wrote))) == first


# ---------------------------------------------------------------------- latents


def test_latents_are_equal_encoded_together_and_alone():
    lm, asked = with_encoder(tiny()), ids_of(9)
    together = latents.encode(lm, asked, K)
    assert together.shape == (9, K, lm.width)
    for row, ids in zip(together, asked, strict=True):
        torch.testing.assert_close(row, latents.encode(lm, [ids], K)[0], atol=1e-5, rtol=1e-5)


def test_latents_are_called_exact_if_and_only_if_they_decode():
    lm = with_encoder(tiny())
    asked = [*ids_of(4, seed=3), ids_of(1, seed=3)[0]]  # one sentence occurs twice
    made = latents.crammed(lm, asked, K, QUICK)
    for vectors, exact, ids in zip(made.vectors, made.exact, asked, strict=True):
        (decoded,) = decode_ids(lm, vectors[None], [len(ids)])
        assert exact == (tuple(decoded) == ids)
    assert sum(made.exact) >= 4
    known = latents.encoded(lm, asked, K)
    unmoved = latents.crammed(lm, asked, K, replace(QUICK, start="noise", steps=0))
    torch.testing.assert_close(
        unmoved.vectors, known.vectors
    )  # the encoder's start replaces the recipe's
    assert known.exact == [
        tuple(decode_ids(lm, v[None], [len(ids)])[0]) == ids
        for v, ids in zip(known.vectors, asked, strict=True)
    ]


# ---------------------------------------------------------------------- the model


def test_later_sentences_do_not_change_earlier_predictions():
    lm = tiny()
    model, before = untrained(lm), latents_of(lm, 2, 5)
    whole = model.network(before.flatten(2))
    changed = before.clone()
    changed[:, 3:] += 5.0
    again = model.network(changed.flatten(2))
    torch.testing.assert_close(whole[:, :4], again[:, :4])
    assert (whole[:, 4:] - again[:, 4:]).abs().amax(-1).min() > 1e-4


def test_batched_predictions_are_those_of_each_alone():
    lm = tiny()
    model, before = untrained(lm), latents_of(lm, 3, 5)
    together = model.predict(before)
    for row, own in zip(before, together, strict=True):
        torch.testing.assert_close(model.predict(row[None])[0], own, atol=1e-5, rtol=1e-5)
    # Only the last window - 1 sentences are read.
    torch.testing.assert_close(together, model.predict(before[:, -3:]))
    assert model.predict(before[:, :0]).shape == (3, K, lm.width)


def test_continuous_predictions_are_inputs_of_the_next_step():
    lm = tiny()
    model, before = untrained(lm, window=9), latents_of(lm, 2, 3)
    first, second = model.continuous(before, 2)
    torch.testing.assert_close(first, model.predict(before))
    by_hand = model.predict(torch.cat([before, first[:, None]], 1))
    torch.testing.assert_close(second, by_hand)


def test_discretised_predictions_are_decoded_and_encoded_before_the_next_step():
    """Two sequences of different lengths are predicted one step and two steps ahead."""
    lm = with_encoder(reader())
    model, before = untrained(lm, window=9), latents_of(lm, 2, 3)
    found = model.discretised(lm, [before[0], before[1, :2]], [1, 2])
    assert [len(steps) for steps in found] == [1, 2]
    for seen, steps in zip((before[0], before[1, :2]), found, strict=True):
        for step in steps:
            predicted = model.network(seen[None].flatten(2))[0, -1].reshape(1, K, lm.width)
            (decoded,) = decode_ids(lm, predicted, [LIMIT], batch=1)
            ids = first_sentence(lm, decoded)
            assert step.ids == ids
            torch.testing.assert_close(step.predicted, predicted[0], atol=1e-5, rtol=1e-5)
            again = lm.encoder.encode(lm, torch.tensor([ids]), K)
            torch.testing.assert_close(step.again, again[0], atol=1e-5, rtol=1e-5)
            seen = torch.cat([seen, again])


def test_a_reloaded_latent_model_predicts_the_same(tmp_path):
    lm = with_encoder(tiny())
    model, file = untrained(lm), tmp_path / "s.safetensors"
    save_latent_model(file, replace(model, about={"steps": 3}), lm)
    again = load_latent_model(file, lm)
    before = latents_of(lm, 2, 3)
    torch.testing.assert_close(again.predict(before), model.predict(before))
    assert (again.vectors, again.max_tokens, again.window) == (K, LIMIT, 4)
    assert again.about == {"steps": 3}
    assert len(again.identity) == 16


def test_missing_damaged_and_foreign_latent_models_are_refused(tmp_path):
    lm = with_encoder(tiny())
    file = tmp_path / "s.safetensors"
    with pytest.raises(MemvecError, match="there is no latent model"):
        load_latent_model(file, lm)
    save_latent_model(file, untrained(lm), lm)
    with pytest.raises(MemvecError, match="trained beside other weights"):
        load_latent_model(file, with_encoder(tiny(seed=1)))
    other = with_encoder(tiny())
    other.encoder.identity = "another"
    with pytest.raises(MemvecError, match="latents of another encoder"):
        load_latent_model(file, other)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MemvecError, match="not a latent model that memvec can read"):
        load_latent_model(file, lm)
    save_encoder(file, lm.encoder, lm)
    for read in (model_of, lambda path: load_latent_model(path, lm)):
        with pytest.raises(MemvecError, match="is no latent model of sentences"):
            read(file)
    save_file({"x": torch.zeros(1)}, file, {"format": "memvec-sentences"})
    for read in (model_of, lambda path: load_latent_model(path, lm)):
        with pytest.raises(MemvecError, match=r"can read: it does not say its model\.$"):
            read(file)


def test_a_file_that_claims_more_than_it_holds_is_refused_before_it_is_built(tmp_path, monkeypatch):
    lm, file = with_encoder(tiny()), tmp_path / "s.safetensors"
    save_latent_model(file, untrained(lm), lm)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    huge = json.dumps(SHAPE | {"hidden": 16_000, "layers": 200})
    monkeypatch.setattr("memvec.lab.sentences.files.LatentNetwork", None)
    for change in ({"shape": huge}, {"vectors": "4096"}):
        save_file({"x": torch.zeros(1)}, file, metadata | change)
        with pytest.raises(MemvecError, match="it claims more than it holds"):
            load_latent_model(file, lm)


def test_a_training_overwrites_only_a_latent_model(tmp_path):
    file = tmp_path / "letter.txt"
    file.write_text("The cat sat. The dog ran.", "utf-8")
    for force, sentence in ((False, "exists: use --force"), (True, "is no earlier latent model")):
        with pytest.raises(MemvecError, match=sentence):
            command_line.train(str(file), file, force=force)
    with pytest.raises(MemvecError, match="is a directory"):
        command_line.train(str(file), tmp_path, force=True)
    assert [p.read_text("utf-8") for p in tmp_path.iterdir()] == ["The cat sat. The dog ran."]


def test_options_of_tables_are_refused_for_other_texts(tmp_path):
    file = tmp_path / "letter.txt"
    file.write_text("The cat sat.", "utf-8")
    assert texts_of(str(file), "text", None) == [("letter", "The cat sat.")]
    for text in (str(file), str(tmp_path), "-"):
        with pytest.raises(MemvecError, match="--where is of tables"):
            texts_of(text, "text", ["split=train"])
        with pytest.raises(MemvecError, match="--column is of tables"):
            texts_of(text, "body", None)


def test_a_tilde_in_the_path_of_a_table_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = ("split,body", "train,The cat sat.", "valid,The dog.")
    (tmp_path / "letters.csv").write_text("\n".join(rows), "utf-8")
    for text in ("~", "~/letters.csv"):
        ((_, content),) = texts_of(text, "body", ["split=train"])
        assert content == "The cat sat."


# ---------------------------------------------------------------------- training


def documents(n: int = 40) -> list[list[Sentence]]:
    """Two texts of n sentences, each a repetition of four sentences."""
    return [[Sentence(ids) for ids in (ids_of(4, seed) * n)[:n]] for seed in (1, 2)]


def test_text_of_a_model_cannot_control_the_terminal(capsys):
    wild = "\x1b]0;title\x07[red]a"
    _print_steps([Shown(1, wild, 2, True, False, wild, wild, 1.0, 1.0, 1.0, 1.0)])
    shown = capsys.readouterr().out
    assert shown.count(r"\x1b]0;title\x07[red]a") == 3
    assert shown.replace("\n", "").isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["tokens", "latents", "both"])
def test_training_moves_the_latent_model_and_nothing_else(loss, capsys):
    lm = with_encoder(tiny())
    everything = [*lm.model.parameters(), *lm.encoder.network.parameters()]
    before = [p.clone() for p in everything]
    seen = []
    training = LatentTraining(lm, documents(), replace(PLAN, loss=loss, steps=20))
    start = {k: v.clone() for k, v in training.network.state_dict().items()}
    training.run(None, seen.append)
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))
    assert all(p.grad is None for p in everything)
    moved = {k for k, v in training.network.state_dict().items() if not torch.equal(v, start[k])}
    assert moved >= {"start", "into.weight", "out.weight"}
    assert not moved & {"mean", "std"}
    measure = "distance" if loss == "latents" else "bits"
    values = [getattr(now, measure) for now in seen]
    assert sum(values[-4:]) < sum(values[:4])
    assert seen[-1].held_out is not None
    progress_line = _progress_lines()
    progress_line(replace(seen[-1], seconds=99.0))
    assert "bits per token of training text (none is held out)" in capsys.readouterr().err
    LatentTraining(lm, documents(100), replace(PLAN, steps=1)).run(None, seen.append)
    progress_line(replace(seen[-1], seconds=999.0))
    assert "bits per token held out," in capsys.readouterr().err


def test_the_gradient_at_latents_is_that_of_the_cross_entropy():
    """It goes through the frozen model in padded groups; the reference takes single sentences."""
    lm = with_encoder(tiny())
    training = LatentTraining(lm, documents(), PLAN)
    rows = torch.arange(7)
    predicted = torch.randn(7, K * lm.width, generator=torch.Generator().manual_seed(0))
    nats, slope = training._through_lm(predicted, rows)
    by_hand = predicted.clone().requires_grad_()
    total, tokens = torch.zeros(()), 0
    for i in range(7):
        ids = torch.tensor([training.sentences[i].ids])
        logits = lm.logits(by_hand[i].reshape(1, K, -1), ids)
        total = total + torch.nn.functional.cross_entropy(logits[0], ids[0], reduction="sum")
        tokens += ids.numel()
    (total / tokens).backward()
    assert nats == pytest.approx(float(total.detach()) / tokens, rel=1e-4)
    torch.testing.assert_close(slope, by_hand.grad, atol=1e-5, rtol=1e-3)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr("memvec.encoders.resumable.CHECKPOINT_EVERY", 1)
    lm, partial = with_encoder(tiny()), tmp_path / "a.partial"
    whole = LatentTraining(lm, documents(), PLAN).run()

    def stop(now):
        if now.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LatentTraining(lm, documents(), PLAN).run(partial, stop)
    rest = []
    resumed = LatentTraining(lm, documents(), PLAN).run(partial, rest.append)
    assert rest[0].step == 4  # the checkpoint is written after the display
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(MemvecError, match="another model, text or settings"):
        LatentTraining(lm, documents(), replace(PLAN, seed=5)).run(partial)
    partial.write_bytes(b"half")
    with pytest.raises(MemvecError, match="delete it to start over"):
        LatentTraining(lm, documents(), PLAN).run(partial)


def test_global_settings_of_torch_do_not_change_the_training():
    """In inference mode the loss would have no gradient."""
    lm = with_encoder(tiny())
    plain = LatentTraining(lm, documents(), PLAN).run()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LatentTraining(lm, documents(), PLAN).run()
    for a, b in zip(plain.network.parameters(), inside.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sentences_at_the_end_of_long_documents_are_held_out():
    """A held-out part has at least two sentences; of short documents alone, none is held out."""
    document = [Sentence((3,))] * 150
    assert _parted([document[:99], document]) == ([(0, 99), (99, 246)], [(246, 249)])
    assert _parted([document[:99]]) == ([(0, 99)], [(0, 99)])


def test_the_rate_without_warm_up_falls_from_the_first_step():
    lm = with_encoder(tiny())
    training = LatentTraining(lm, documents(), replace(PLAN, steps=2, warmup=0))
    training.run()
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(PLAN.lr * (1 - 0.99 / 2))


def test_wrong_plans_texts_and_encoders_are_refused():
    lm = with_encoder(tiny())
    with pytest.raises(MemvecError, match="no text of at least two sentences"):
        LatentTraining(lm, [[Sentence((3, 4))], []], PLAN)
    with pytest.raises(MemvecError, match="do not fit the context"):
        LatentTraining(lm, documents(), replace(PLAN, max_tokens=500))
    short = with_encoder(tiny())
    short.encoder.tokens = 3
    with pytest.raises(MemvecError, match=r"at most 6, which .* reads into 2 vector\(s\), not 12"):
        LatentTraining(short, documents(), PLAN)
    with pytest.raises(MemvecError, match="no one-pass encoder"):
        LatentTraining(tiny(), documents(), PLAN)
    for change, sentence in (
        ({"loss": "token"}, "did you mean 'tokens'"),
        ({"window": 1}, "^window must be at least 2"),
        ({"heads": 3}, "^hidden must be a multiple of"),
        ({"lr": 2.0}, "between 0 and 1"),
    ):
        with pytest.raises(MemvecError, match=sentence):
            replace(PLAN, **change)


# ---------------------------------------------------------------------- measures


@pytest.mark.slow
def test_bits_after_every_context_are_those_of_the_frozen_models_forward():
    lm, model = with_encoder(reader()), untrained(reader(), window=9)
    before = [s.ids for s in cut_sentences(lm, TEXT, LIMIT)[:3]]
    ids, text = cut_sentences(lm, TEXT, LIMIT)[3].ids, (5, 6, *itertools.chain(*before))
    recipe = replace(QUICK, steps=20)
    found = evaluate.measure(lm, model, before, text, ids, recipe, 2)
    assert {*found.bits} | {"alone", "own"} == {*evaluate.WAYS}

    def bits(inputs):
        whole = torch.cat([inputs, lm.embed(torch.tensor(ids))])[None]
        logits = lm.model(inputs_embeds=whole).logits[:, -len(ids) - 1 : -1]
        return float(metrics.surprisal(logits, torch.tensor([ids])).sum())

    known = latents.encode(lm, before, K)
    bos = torch.tensor([lm.bos_id])
    by_hand = {
        "nothing": model.predict(known[None, :0])[0],
        "latents": known.flatten(0, 1),
        "predicted": model.predict(known[None])[0],
        "crammed": model.predict(latents.crammed(lm, before, K, recipe).vectors[None])[0],
        "discretised": latents.encode(lm, [found.written], K)[0],
        "encoded": latents.encode(lm, [ids], K)[0],
        "text": lm.embed(torch.tensor([*bos, *itertools.chain(*before)])),
        "full": lm.embed(torch.tensor([*bos, *text])),
    }
    for name, inputs in by_hand.items():
        assert found.bits[name] == pytest.approx(bits(inputs), rel=1e-4), name
    # Predictions two steps ahead do not read the last sentence.
    two = model.continuous(known[None, :2], 2)[-1][0]
    assert found.continuous == [pytest.approx(bits(two), rel=1e-4)]
    snapped = model.discretised(lm, [known[:2]], [2])[0][-1].again
    assert found.discretised == [pytest.approx(bits(snapped), rel=1e-4)]


def test_sentences_that_cannot_be_measured_are_refused():
    lm, model = tiny(), untrained(tiny())
    with pytest.raises(MemvecError, match="a sentence of 13 tokens is longer"):
        evaluate.check_lengths(lm, model, [(3,) * 13, (4,)], 1)
    with pytest.raises(MemvecError, match="too few to predict 2 ahead"):
        evaluate.check_lengths(lm, model, [(3,), (4,)], 2)
    with pytest.raises(MemvecError, match="do not fit the context of tiny-llama"):
        evaluate.check_lengths(lm, model, [(3,) * 12] * 12, 1)
    assert evaluate.fitting(lm, tuple(range(500)), 28) == tuple(range(401, 500))


def test_operations_are_counted_from_shapes():
    """The reference counts the products of each linear layer in a forward pass."""
    lm = with_encoder(tiny())
    shape = shape_of(lm)
    counted = 0

    def count(module, inputs, _):
        nonlocal counted
        counted += 2 * module.weight.numel() * inputs[0][0].shape[0]

    linear = [m for m in lm.model.model.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_hook(count) for m in linear]
    n = 7
    lm.model(input_ids=torch.full((1, n), 3))
    for hook in hooks:
        hook.remove()
    norms = sum(p.numel() for name, p in lm.model.named_parameters() if "norm" in name)
    assert shape.parameters * 2 * n == counted + norms * 2 * n
    assert (shape.layers, shape.attention, shape.head) == (2, 4 * 8, 24 * 32)
    pairs = sum(4 + i for i in range(1, n + 1))  # input i attends to 4 earlier ones and to i
    own = Shape(0, shape.layers, shape.attention, 0)
    assert own.reading(n, 4) == 4 * 2 * 32 * pairs
    found = costs(lm, untrained(lm), 5, 20, 60, 3)
    assert found["continuous"] < found["written"] < found["discretised"]
    assert found["recent"] < found["text"]


def test_the_cost_of_an_adapted_encoder_includes_its_adapters():
    """The reference is torch's count of the matrix products of a pass over three parts."""
    lm, T, K = copy(tiny()), 12, 3
    lm.encoder = AdaptedEncoder(fresh(lm, rank=4), K)
    with FlopCounterMode(display=False) as counted:
        lm.encoder.encode(lm, torch.full((1, T), 3), K)
    by_operator = counted.get_flop_counts()["Global"]
    # Attention is added below. Older transformers compute rotary angles by a product (bmm).
    others = ("attention", "bmm")
    products = sum(
        n for name, n in by_operator.items() if not any(word in str(name) for word in others)
    )
    norms = sum(p.numel() for name, p in lm.model.named_parameters() if "norm" in name)
    attention = Shape(0, 2, 4 * 8, 0).reading(T + K)
    assert encoding(lm, T, K) == products + 2 * (T + K) * norms + attention


# ---------------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def home(folder, tmp_path_factory):
    """A folder with a tiny model that has an encoder, a text, and a latent model for it."""
    home = tmp_path_factory.mktemp("sentences")
    shutil.copytree(folder, home / "tiny")
    lm = load_lm(str(home / "tiny"))
    save_encoder(home / "tiny" / "encoder.safetensors", with_encoder(lm).encoder, lm)
    (home / "text.txt").write_text(f"{TEXT} {LONG}", "utf-8")
    lm = load_lm(str(home / "tiny"))
    sentences = cut_sentences(lm, TEXT, LIMIT)
    model = LatentTraining(lm, [sentences], PLAN).run()
    save_latent_model(home / "s.safetensors", model, lm)
    return home


SPEC = """
name = "by-sentence"
batch_size = 4
[[models]]
name = "HOME/tiny"
[[sources]]
name = "text"
kind = "sentences"
path = "text.txt"
before = 3
[[runs]]
protocol = "sentences"
latents = "HOME/s.safetensors"
context = 3
horizon = 2
lengths = [12]
vectors = [2]
passages = 4
recipe = { steps = 12 }
"""


@pytest.fixture(scope="module")
def study(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    text = SPEC.replace("HOME", str(home))
    run_study(
        parse_spec(text, "test"), out, lambda m: LocalPool(load_lm(m.name)), base=home, toml=text
    )
    return out


def test_rows_of_a_study_are_recomputed_and_reported(study, home):
    checked = check_study(study)
    assert checked["wrong"] == []
    (sentence,) = checked["unchecked"]
    assert (
        "the values of continuous, discretised, before_exact, encoded_exact, sizes, bits (crammed "
        "and discretised) were not computed again" in sentence
    )
    assert checked["rows"] == 4
    with Store(study) as store:
        data = read_data(store)
        ways, ahead, flops, exact = protocol_of("sentences").tables(data, compare=False)
        (figure,) = protocol_of("sentences").figures(data, compare=False)
        texts = [store.passage(r.cell, r.number).before for r in data.rows.itertuples()]
    rows, extras = data.rows, [json.loads(extra) for extra in data.rows["extra"]]
    tokens = rows["tokens"].sum()
    table = pd.DataFrame(ways.rows, columns=[*map(str, range(len(ways.columns)))])
    shown = dict(zip(table["1"], table["2"], strict=True))
    alone, text = rows["lm_bits"].sum(), sum(e["bits"]["text"] for e in extras)
    predicted = sum(e["bits"]["predicted"] for e in extras)
    assert shown[evaluate.WAYS["alone"]] == pytest.approx(alone / tokens)
    assert shown[evaluate.WAYS["own"]] == pytest.approx(rows["mem_bits"].sum() / tokens)
    assert shown[evaluate.WAYS["predicted"]] == pytest.approx(predicted / tokens)
    of_text = dict(zip(table["1"], table["9"], strict=True))
    assert of_text[evaluate.WAYS["predicted"]] == pytest.approx(
        (alone - predicted) / (alone - text)
    )
    assert [row[1:3] for row in ahead.rows] == [
        [regime, step] for regime in ("continuous", "discretised") for step in (1, 2)
    ]
    assert flops.rows[0][3] == pytest.approx(1)
    # Earlier sentences count once, although some precede several of the four passages.
    before = {}
    for text_before, extra in zip(texts, extras, strict=True):
        end = len(text_before)
        for size, flags in reversed([*zip(extra["sizes"], extra["before_exact"], strict=True)]):
            before[text_before[end - size : end]] = flags
            end -= size
    assert [row[3] for row in exact.rows] == [4, 4, len(before), len(before)]
    encoded = sum(flags[0] for flags in before.values()) / len(before)
    assert exact.rows[2][2].startswith(f"{100 * encoded:.0f} %")
    assert "counts once" in exact.note
    saves = predicted < alone  # one panel more if predictions save bits
    assert len(figure.panels) == 2 + saves
    assert f"{predicted / tokens:.2f} [" in figure.caption
    write_report(study, study / "report", figures=False)
    assert "Sentence by sentence" in (study / "report" / "index.html").read_text("utf-8")


def test_the_check_of_a_study_names_changed_results(study):
    with Store(study) as store:
        (first, *_) = store.db.execute("SELECT extra FROM rows").fetchone()
    changed = json.loads(first)
    changed["bits"] = {name: value + 5 for name, value in changed["bits"].items()}
    changed["predicted"][0][0] += 1.0
    changed["latent_model"] = "0" * 16
    before = falsify(study, json.dumps(changed), "sentences")
    wrong = str(check_study(study)["wrong"])
    for name in ("bits nothing", "bits text", "bits full", "predicted", "latent_model"):
        assert name in wrong
    with Store(study, write=True) as store:
        for cell, number, extra in before:
            store.db.execute(
                "UPDATE rows SET extra = ? WHERE cell = ? AND number = ?", (extra, cell, number)
            )


@pytest.mark.slow
def test_passages_of_the_source_are_distinct_sentences_with_all_before_them(home):
    lm = load_lm(str(home / "tiny"))
    source = Sentences(path="text.txt", before=2)
    some, more = (list(source.passages(lm, n, LIMIT, home)) for n in (3, 8))
    assert some == more[:3]
    assert len({p.passage.ids for p in more}) == 8
    whole = [s.ids for s in cut_sentences(lm, f"{TEXT} {LONG}", LIMIT)]
    for passage in more:
        i = whole.index(passage.passage.ids)
        assert passage.sizes == tuple(len(ids) for ids in whole[:i])
        assert passage.before == tuple(itertools.chain(*whole[:i]))
    long = copy(lm)
    long.context = 20_000
    (home / "long.txt").write_text(TEXT * 60, "utf-8")
    for model, kept in ((lm, written.MAX_BEFORE), (long, long.context)):
        (last,) = Sentences(path="long.txt", before=1200).passages(model, 1, LIMIT, home)
        assert len(last.before) == max(kept, sum(last.sizes[-1200:]))
        assert len(last.before) > written.MAX_BEFORE  # more tokens than MAX_BEFORE precede it
    parts = cut_sentences(lm, f"{TEXT} {LONG}", LIMIT)[2:]
    after_two = {s.ids for s in parts if s.whole and len(s.ids) >= source.min_tokens}
    every = source.passages(lm, len(after_two), LIMIT, home)
    assert {p.passage.ids for p in every} == after_two
    with pytest.raises(MemvecError, match=f"has {len(after_two)} whole .* passages from 1000"):
        list(source.passages(lm, 1000, LIMIT, home))
    (home / "one.txt").write_text("The cat sat.", "utf-8")
    with pytest.raises(MemvecError, match=r"one has 1 sentence\(s\)"):
        list(Sentences(path="one.txt").passages(lm, 1, LIMIT, home))
    with pytest.raises(MemvecError, match="no file or folder"):
        list(Sentences(path="none.txt").passages(lm, 1, LIMIT, home))
    with pytest.raises(MemvecError, match="needs a path"):
        list(Sentences().passages(lm, 1, LIMIT, home))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("vectors = [2]", "vectors = [1]"), "has 2 vectors per sentence, and the study asks for"),
        (("context = 3", "context = 60"), "fewer than the context of 60"),
        (('kind = "sentences"', 'kind = "files"\nrule = "start"'), "takes a source of the kind"),
        (("before = 3", "min_tokens = 2"), None),
        (("HOME/s.safetensors", "HOME/none.safetensors"), "there is no latent model"),
    ],
)
def test_studies_that_cannot_be_measured_are_refused(home, tmp_path, change, sentence):
    text = SPEC.replace(*change).replace("HOME", str(home)).replace("passages = 4", "passages = 1")
    text = text.replace("before = 3\n", "" if "files" in change[1] else "before = 3\n")
    text = text.replace("steps = 12", "steps = 2").replace("lengths = [12]", "lengths = [10]")
    spec = parse_spec(text, "test")
    run = lambda: run_study(  # noqa: E731
        spec, tmp_path / "out", lambda m: LocalPool(load_lm(m.name)), base=home
    )
    if sentence is None:
        assert run().rows_now == 1
        return
    with pytest.raises(MemvecError, match=sentence):
        run()


def test_the_shipped_spec_is_valid():
    spec = read_spec(Path(__file__).parent.parent / "studies" / "sentences.toml")
    assert {run.protocol for run in spec.runs} == {"sentences"}
    with pytest.raises(MemvecError, match="start_rule is 'vectors'"):
        parse_spec(SPEC.replace("steps = 12", 'start_rule = "bos"'), "test")


# ---------------------------------------------------------------------- the commands


@pytest.mark.slow
def test_the_commands_train_and_inspect_a_latent_model(home, tmp_path, command):
    text, out = home / "text.txt", tmp_path / "s.safetensors"
    train = (
        "lab",
        "sentences",
        "train",
        "-m",
        home / "tiny",
        "--vectors",
        K,
        "--max-tokens",
        LIMIT,
    )
    train += ("--hidden", 16, "--layers", 1, "--heads", 2, "--window", 4, "--steps", 3)
    ran = command(*train, "--text", text, "-o", out)
    assert ran.code == 0, ran.err
    assert "parts of sentences longer than 12 tokens" in ran.err
    assert "step 3 of 3" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    show = ("lab", "sentences", "show")
    ran = command(*show, out, text, "--count", 4, "--json")
    assert ran.code == 0, ran.err
    steps = json.loads(ran.out)
    assert [s["sentence"] for s in steps] == [f"The {a} {b} the {c}." for a, b, c in PAIRS[:12:3]]
    assert steps == [
        step for step in steps if step["exact"] == (step["decoded"] == step["sentence"])
    ]
    ran = command(*show, out, text, "--count", 2)
    assert ran.code == 0
    assert b"its latent:" in ran.out
    (tmp_path / "one.txt").write_text("The cat sat.", "utf-8")
    for words, sentence in (
        ((*show, out, tmp_path / "one.txt"), "has 1 sentence(s) and nothing to predict"),
        ((*show, out, tmp_path / "none.txt"), "there is no file"),
        ((*show, tmp_path / "none.safetensors", text), "there is no latent model"),
        ((*show, text, text), "not a latent model"),
        ((*show, out, text, "--count", 1), "--count must be at least 2"),
        ((*train, "--text", tmp_path / "one.txt", "-o", tmp_path / "b"), "nothing to predict"),
        ((*train, "--text", tmp_path / "no.txt", "-o", tmp_path / "b"), "no file"),
        ((*train, "--text", text, "-o", out), "exists: use --force"),
        ((*train, "--text", text, "-o", tmp_path / "no" / "b"), "there is no folder"),
        ((*train, "--text", text, "-o", tmp_path / "b", "--where", "x"), "--where takes"),
    ):
        ran = command(*words)
        assert (ran.code, ran.err.count("\nTraceback")) == (2, 0), ran.err
        assert sentence in ran.err
    with alone_at(tmp_path / "c.partial"):
        ran = command(*train, "--text", text, "-o", tmp_path / "c")
    assert (ran.code, "another memvec is writing c: wait for it" in ran.err) == (2, True)


@pytest.mark.slow
def test_inspected_sentences_and_bits_are_those_of_decoding():
    lm = with_encoder(reader())
    model = untrained(lm)
    steps = list(look(lm, model, TEXT, count=3))
    narrow = list(look(lm, replace(model, window=2), TEXT, count=3))
    sentences = cut_sentences(lm, TEXT, LIMIT, 3)
    known = latents.encode(lm, [s.ids for s in sentences], K)
    for i, step in enumerate(steps):
        ids = sentences[i].ids
        (decoded,) = decode_ids(lm, known[i : i + 1], [len(ids)])
        assert step.decoded == lm.text(decoded).strip()
        predicted = model.predict(known[None, :i])
        n = len(ids)
        assert step.predicted_bits == pytest.approx(
            evaluate.bits_after(lm, predicted[0], ids) / n, rel=1e-4
        )
        read = [
            s.ids for s in sentences[max(0, i - 1) : i]
        ]  # a window of 2 reads one earlier sentence
        text = evaluate.bits_after_text(lm, [*itertools.chain(*read)], ids)
        assert narrow[i].text == pytest.approx(text / n, rel=1e-4)
    assert steps[0].alone == pytest.approx(steps[0].text)
    made = latents.crammed(lm, [s.ids for s in sentences], K, replace(QUICK, steps=10))
    crammed = [*look(lm, model, TEXT, count=3, recipe=replace(QUICK, steps=10))]
    assert [step.exact for step in crammed] == made.exact
    assert crammed[2].predicted_bits == pytest.approx(
        evaluate.bits_after(lm, model.predict(made.vectors[None, :2])[0], sentences[2].ids)
        / len(sentences[2].ids),
        rel=1e-4,
    )
    assert asdict(steps[0]) == steps[0].record()
    with pytest.raises(MemvecError, match="has no one-pass encoder"):
        next(look(reader(), model, TEXT))
