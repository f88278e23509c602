"""Parts of a recipe that another package or file registers, and errors of wrong ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import memvec
from conftest import passages, reader, tiny
from memvec import metrics, registry
from memvec.cramming import objectives
from memvec.cramming.engine import Engine
from memvec.cramming.optimizers import NAdam
from memvec.cramming.recipe import Recipe, choices
from memvec.cramming.schedules import Schedule
from memvec.errors import MemvecError
from memvec.usable.queries import queries_of
from memvec.usable.recipe_files import named_files


@pytest.fixture
def plugins(monkeypatch):
    """Registered choices that are gone after the test."""
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})


def crammed(recipe: Recipe, **options):
    engine = Engine(tiny(), recipe, vectors=2, batch_size=3, **options)
    return list(engine.run(passages(3, 2, 4, seed=31)))


def test_an_objective_is_one_function(plugins):
    seen = []

    @memvec.register("objective", "hinge")
    def hinge(logits, ids, temperature, recipe):
        seen.append(len(ids))
        margin = metrics.margins(logits[None], ids[None])[0]
        return (2 * recipe.margin + temperature - margin).clamp_min(0)

    assert "hinge" in choices("objective")
    outcomes = crammed(Recipe.of(objective="hinge", steps=600, patience=600))
    assert seen
    assert [o.exact for o in outcomes] == [True] * 3


def test_the_schedule_of_the_documentation_crams(plugins):
    """The schedule is the example of docs/howto/add-schedule.md."""
    page = Path(__file__).parent.parent / "docs" / "howto" / "add-schedule.md"
    code = re.search(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)[1]
    exec(compile(code, str(page), "exec"), {})
    schedule = registry.get("schedule", "halves")(Recipe(), 2)
    length = torch.tensor([5, 5, 4])
    state = schedule.fresh(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    schedule.record(state, schedule.reached(torch.tensor([2, 3, 0]), torch.tensor([4, 4, 4])))
    assert schedule.counted(state, length).tolist() == [3, 5, 2]
    outcomes = crammed(Recipe.of(schedule="halves", steps=600, patience=600))
    assert [o.exact for o in outcomes] == [True] * 3


def test_a_schedule_is_one_class(plugins):
    counted_lengths = set()

    @memvec.register("schedule", "halves")
    class Halves(Schedule):
        """The first half counts until it is right, then all of it."""

        def counted(self, state, length):
            half = (length + 1) // 2
            counted = torch.where(state.best >= half, length, half)
            counted_lengths.update(counted.tolist())
            return counted

    outcomes = crammed(Recipe.of(schedule="halves", steps=600, patience=600))
    assert {1, 2, 3, 4} <= counted_lengths
    assert [o.exact for o in outcomes] == [True] * 3


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_coordinates_may_be_of_a_subspace(plugins, storage):
    """Vectors are W z, and W has no inverse. The stored vectors are in the subspace."""

    @memvec.register("coordinates", "subspace")
    class Subspace:
        def __init__(self, recipe, K, lm):
            D, generator = lm.width, torch.Generator().manual_seed(0)
            self.basis = torch.linalg.qr(torch.randn(D, D // 2, generator=generator)).Q.T

        def parameters(self, vectors):
            return vectors @ self.basis.T

        def vectors(self, parameters):
            return parameters @ self.basis

    recipe = Recipe.of(coordinates="subspace", steps=800, patience=800)
    outcomes = crammed(recipe, storage=storage)
    assert sum(o.exact for o in outcomes) >= 2
    basis = Subspace(recipe, 2, tiny()).basis
    for outcome in outcomes:
        vectors = outcome.vectors.float()
        rest = vectors - vectors @ basis.T @ basis
        allowed = 1e-4 if storage == "float32" else 0.02 * float(vectors.abs().max())
        assert float(rest.abs().max()) < allowed


def test_an_optimizer_and_a_start_can_be_registered(plugins):
    from memvec.cramming.optimizers import Adam

    @memvec.register("optimizer", "halved")
    class Halved(Adam):
        def step(self, parameters, gradient, state, moving, lr_scale=None):
            super().step(parameters, gradient / 2, state, moving, lr_scale)

    @memvec.register("start", "ones")
    def ones(lm, ids, K, recipe):
        return torch.ones(K, lm.width)

    recipe = Recipe.of(optimizer="halved", start="ones", steps=600, patience=600)
    assert all(o.exact for o in crammed(recipe))
    plain = crammed(Recipe.of(start="ones", steps=0, lr_large=0.0))
    assert all(torch.equal(o.vectors, torch.ones(2, tiny().width)) for o in plain)


def test_a_preset_is_a_function_that_returns_a_recipe(plugins):
    @memvec.register("preset", "gentle")
    def gentle():
        return Recipe(lr=0.02, start="noise")

    assert Recipe.of("gentle", steps="7") == Recipe(lr=0.02, start="noise", steps=7)
    with pytest.raises(MemvecError, match="unknown preset 'gentel': did you mean 'gentle'"):
        Recipe.of("gentel")


def test_a_part_may_have_arguments_in_its_name(plugins):
    """The part is a function, a class made with the recipe, or one made with its arguments only."""
    seen = {}

    @memvec.register("objective", "hinge")
    def hinge(logits, ids, temperature, recipe, *, factor=2.0, soft=False):
        seen["hinge"] = (factor, soft)
        margin = metrics.margins(logits[None], ids[None])[0]
        return (factor * recipe.margin + temperature - margin).clamp_min(0)

    @memvec.register("objective", "scaled")
    class Scaled(objectives.Objective):
        def __init__(self, *, factor=1.0):
            self.factor = factor

        def loss(self, logits, ids, temperature, recipe):
            return self.factor * torch.nn.functional.cross_entropy(logits, ids, reduction="none")

    @memvec.register("optimizer", "slow")
    class Slow(NAdam):
        def __init__(self, recipe, *, by=1.0):
            super().__init__(replace(recipe, lr=recipe.lr * by, lr_large=recipe.lr_large * by))
            seen["slow"] = by

    @memvec.register("objective", "frozen")
    @dataclass(frozen=True)
    class Frozen(Scaled):
        factor: float = 1.0

    recipe = Recipe.of(objective="hinge(soft=True,factor = 3.0)", optimizer="slow(by=.5)", steps=2)
    assert recipe.objective == "hinge(factor=3.0, soft=True)"  # one spelling
    assert recipe.record()["optimizer"] == "slow(by=0.5)"
    assert Recipe(**recipe.record()) == recipe
    crammed(recipe)
    assert seen == {"hinge": (3.0, True), "slow": 0.5}
    assert Recipe.of(objective="hinge()").objective == "hinge"
    for name, factor in (("scaled", 1.0), ("scaled(factor=4)", 4), ("frozen", 1.0)):
        made = objectives.objective_named(name)
        assert isinstance(made, Scaled)
        assert made.factor == factor
    moved = [crammed(Recipe.of(optimizer=o, steps=3)) for o in ("nadam", "slow", "slow(by=0.25)")]
    for plain, same, slower in zip(*moved, strict=True):
        assert torch.equal(plain.vectors, same.vectors)
        assert not torch.equal(plain.vectors, slower.vectors)


@pytest.mark.slow
def test_the_objectives_of_the_documentation_give_their_losses(plugins):
    """The objectives are the examples of docs/howto/add-objective.md."""
    page = Path(__file__).parent.parent / "docs" / "howto" / "add-objective.md"
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
    names: dict = {"__name__": "page"}
    exec(compile(code, str(page), "exec"), names)
    recipe = replace(names["recipe"], unit="logits", margin=0.5)
    logits, ids = torch.tensor([[0.0, 1.0, 3.0]] * 3), torch.tensor([0, 1, 2])
    for name, factor in (("hinge", 2), ("hinge-by", 2), (recipe.objective, 3)):
        loss = registry.get("objective", name)(logits, ids, torch.ones(3), recipe)
        assert loss.tolist() == [factor / 2 + 3, factor / 2 + 2, max(0, factor / 2 - 2)]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("hinge(fator=1)", "the objective 'hinge' has no 'fator': did you mean 'factor'?"),
        ("hinge(recipe=1)", "the objective 'hinge' has no 'recipe': known: factor."),
        ("margin(x=1)", "the objective 'margin' has no arguments of its own: leave out 'x'."),
        ("hinge(2)", "NAME=VALUE, with text in quotes, as in hinge(factor=3.0, kind='soft')."),
        ("hinge(factor=[1])", "'hinge(factor=[1])' cannot be read"),
        ("hinge(factor=__import__('os'))", "cannot be read"),
        ("hinge(**{'factor': 1})", "cannot be read"),
        ("hinge(factor=1", "'hinge(factor=1' cannot be read"),
        ("hinge(factor=1).x()", "cannot be read"),
        ("hinge(factor=1, factor=2)", "cannot be read"),
        ("hinge(factor=1e999)", "'hinge(factor=1e999)' cannot be read"),
        (f"hinge(factor={9999 * '-'}1)", "cannot be read"),
        ("hing(factor=1)", "the recipe's objective cannot be 'hing(factor=1)': it is one of"),
        ("(factor=1)", "the recipe's objective cannot be '(factor=1)': it is one of"),
    ],
)
def test_wrong_arguments_of_a_part_are_one_sentence(plugins, value, sentence):
    @memvec.register("objective", "hinge")
    def hinge(logits, ids, temperature, recipe, *, factor=2.0):
        raise AssertionError

    with pytest.raises(MemvecError, match=re.escape(sentence)):
        Recipe.of(objective=value)


def test_queries_with_arguments_are_not_taken_for_files(plugins, tmp_path, monkeypatch):
    @memvec.register("queries", "endings")
    def endings(lm, ids, recipe, *, of=""):
        raise AssertionError

    monkeypatch.chdir(tmp_path)
    name = f"endings(of='{300 * 'x'}')"  # too long for a file
    recipe = Recipe.of("usable", queries=name.replace("=", " = "))
    assert recipe.queries == name
    assert named_files(recipe) == {}
    with pytest.raises(MemvecError, match="the queries 'endings' has no 'off': did you mean 'of'"):
        Recipe.of("usable", queries="endings(off=1)")
    Path("endings(1).txt").write_text("why?")  # a browser's name for a second download
    recipe = Recipe.of("usable", queries="endings(1).txt")
    assert list(named_files(recipe)) == ["questions"]
    assert len(queries_of(reader(), (2, 3), replace(recipe, query_count=1)).ids) == 1
    Path("endings").touch()
    assert named_files(Recipe.of("usable", queries="endings")) == {}


def test_a_space_may_not_have_arguments(plugins):
    memvec.register("space", "mine")(lambda lm, options, *, by=2: None)
    with pytest.raises(MemvecError, match="the space 'mine' has no arguments of its own: leave"):
        Recipe.of(space="mine(by=3)")


@pytest.mark.parametrize("name", ["a(b", "a)", "(", " ", ""])
def test_a_name_that_no_recipe_could_choose_is_refused(plugins, name):
    with pytest.raises(MemvecError, match="no objective can be called"):
        memvec.register("objective", name)


@pytest.mark.parametrize("name", ["auto", "encoder"])
def test_a_start_may_not_have_a_reserved_name(plugins, name):
    with pytest.raises(MemvecError, match=f"the name '{name}' is taken by another start"):
        memvec.register("start", name)


def test_an_unknown_name_lists_the_registered_ones(plugins):
    memvec.register("objective", "mine")(lambda *_: None)
    with pytest.raises(MemvecError, match="one of cross-entropy, margin, deficit, mine"):
        Recipe(objective="theirs")


PLUGIN = """
import memvec
from memvec import metrics

@memvec.register("objective", "plugged-in")
def plugged_in(logits, ids, temperature, recipe):
    margin = metrics.margins(logits[None], ids[None])[0]
    return (2 * recipe.margin + temperature - margin).clamp_min(0)
"""


@pytest.mark.slow
def test_an_installed_package_is_known_to_the_command(folder, tmp_path, python):
    """As pip installs it, the package is a module and metadata with an entry point."""
    place = tmp_path / "site"
    (place / "plugged_in-1.0.dist-info").mkdir(parents=True)
    (place / "plugged_in.py").write_text(PLUGIN)
    about = place / "plugged_in-1.0.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[memvec.plugins]\nmine = plugged_in\n")
    (tmp_path / "a.txt").write_text("the cat")
    source = Path(memvec.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(source)])}
    words = ["cram", "a.txt", "--model", str(folder), "--tokens", "2"]
    words += ["--set", "objective=plugged-in", "--json"]
    ran = subprocess.run(
        [python, "-m", "memvec", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    mem = memvec.MemVectors.load(tmp_path / "a.mem.safetensors")
    assert mem.exact
    assert mem.header.recipe["objective"] == "plugged-in"


@pytest.mark.slow
def test_a_file_is_known_to_the_command_by_its_path(folder, tmp_path, python):
    """The file may have the name of a module. The error of a wrong file names it."""
    (tmp_path / "json.py").write_text(PLUGIN)
    (tmp_path / "other.py").write_text(PLUGIN.replace("plugged-in", "second"))
    (tmp_path / "broken.py").write_text("import nothing_at_all")
    (tmp_path / "a.txt").write_text("the cat")
    source = {**os.environ, "PYTHONPATH": str(Path(memvec.__file__).parent.parent)}

    def cram(objective: str, *files: str) -> subprocess.CompletedProcess[str]:
        words = ["cram", "a.txt", "--model", str(folder), "--tokens", "2", "--force", "--json"]
        return subprocess.run(
            [python, "-m", "memvec", *words, "--set", f"objective={objective}"],
            cwd=tmp_path,
            env={**source, "MEMVEC_PLUGINS": os.pathsep.join(files)},
            capture_output=True,
            text=True,
        )

    for objective in ("plugged-in", "second"):
        ran = cram(objective, "json.py", str(tmp_path / "other.py"))
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["exact"]
    for file, reason in (
        ("broken.py", "No module named 'nothing_at_all'"),
        ("none.py", "No such file"),
        ("a.txt", "it is no Python file"),
    ):
        ran = cram("plugged-in", "json.py", file)
        assert ran.returncode == 2
        assert f"the plug-in '{file}' (MEMVEC_PLUGINS) cannot be imported: " in ran.stderr
        assert reason in ran.stderr


# ---------------------------------------------------------------------- wrong plug-ins

WRONG = """
import json
import types

import torch

import memvec
from conftest import passages, tiny
from memvec import metrics
from memvec.cramming.engine import Engine
from memvec.cramming.optimizers import Adam
from memvec.cramming.recipe import Recipe
from memvec.cramming.schedules import Schedule
from memvec.cramming.terms import Term, TermLoss
from memvec.errors import MemvecError
from memvec.model.reading import Reading

def margins(logits, ids):
    return metrics.margins(logits[None], ids[None])[0]

def of(base, **members):
    return type("Wrong", (base,), members)

def counted(self, state, length):
    return length

def returned(self, parameters, gradient, state, moving, lr_scale=None):
    return parameters - gradient

def rebound(self, parameters, gradient, state, moving, lr_scale=None):
    parameters = parameters - gradient

class Uncounted(Schedule):
    counted = counted
    def fresh(self, size, enlarged):
        state = super().fresh(size, enlarged)
        state.mine = torch.zeros(len(size))
        return state

def square(vectors):
    return vectors.square().mean((1, 2))

def measured(loss):
    return of(Term, measure=lambda self, vectors, *_: loss(square(vectors)))

def schedule(**members):
    return of(Schedule, counted=counted, **members)

def space(name, **members):
    given = {m: getattr(Reading, m) if f is None else f for m, f in members.items()}
    given = {m: (lambda *a, f=f: f(*a)) for m, f in given.items()}
    return of(Reading, space=name, __init__=lambda self, lm, options: None,
              numbers=lambda self, lm: 5, **given)

def halved(logits, ids, temperature, recipe):
    return margins(logits.div_(2), ids)

CrossEntropy = memvec.cramming.objectives.CrossEntropy
Direct = memvec.cramming.coordinates.Direct

CASES = {
    "no-gradient": ("objective", lambda logits, ids, *_: margins(logits.detach(), ids)),
    "in-place": ("objective", halved),
    "own-class": ("objective", type("Own", (), {"loss": margins})),
    "short-loss": ("objective", of(CrossEntropy, loss=lambda self, logits, ids: None)),
    "wide-weights": ("objective", of(CrossEntropy, weights=lambda *_: torch.ones(2, 1))),
    "one-fast-loss": ("objective", of(CrossEntropy, fused=lambda self, logits, ids, temperature:
                                      (margins(logits, ids).mean(), None, logits))),
    "one-for-all": ("schedule", schedule(out_of_patience=lambda self, state: False)),
    "a-temperature": ("schedule", schedule(temperature=lambda self, state, margin: 1.0)),
    "no-progress": ("schedule", schedule(reached=lambda self, leading, hits: hits.sum())),
    "not-enlarged": ("schedule", schedule(advance=lambda self, state, gained: None)),
    "no-state": ("schedule", schedule(fresh=lambda self, size, enlarged: size)),
    "no-length": ("schedule", of(Schedule, counted=lambda self, state: state.best)),
    "no-rate": ("optimizer", of(Adam, step=lambda self, parameters, gradient, state, moving: None)),
    "one-parameter": ("coordinates", of(Direct, parameters=lambda self, vectors: vectors[:1])),
    "whole-numbers": ("coordinates", of(Direct, parameters=lambda self, vectors: vectors.long())),
    "detached": ("coordinates", of(Direct, vectors=lambda self, parameters: parameters.detach())),
    "one-way": ("coordinates", type("Own", (), {"__init__": lambda *_: None,
                                                "parameters": lambda self, vectors: vectors})),
    "moves-nothing": ("term", measured(TermLoss)),
    "no-outputs": ("term", measured(lambda loss: TermLoss(loss.detach(), (loss.detach(),)))),
    "summed-outputs": ("term", measured(lambda loss: TermLoss(loss.detach(), (loss.sum(),)))),
    "no-slopes": ("term", measured(lambda loss: TermLoss(loss.detach(), (loss,)))),
    "one-slope": ("term", measured(lambda loss: TermLoss(loss.detach(), (loss,), (loss[:1],)))),
    "a-function": ("term", lambda lm, module, recipe, K, start_rule: None),
    "too-wide": ("space", space("too-wide", inputs=None, opening=None)),
    "numbers-alone": ("space", space("numbers-alone")),
    "no-opening": ("space", space("no-opening", inputs=lambda self, lm, v, ids, start_rule: ids)),
    "no-reading": ("space", lambda lm, options: object()),
    "rebound": ("optimizer", of(Adam, step=rebound)),
    "below-zero": ("schedule", schedule(temperature=lambda self, state, margin: -margin)),
    "complex": ("start", lambda lm, ids, K, recipe: torch.ones(K, lm.width) * 1j),
    "mean": ("objective", lambda logits, ids, temperature, recipe: margins(logits, ids).mean()),
    "column": ("objective", lambda logits, ids, temperature, recipe: margins(logits, ids)[:, None]),
    "nothing": ("objective", lambda logits, ids, temperature, recipe: None),
    "two-arguments": ("objective", lambda logits, ids: margins(logits, ids)),
    "a-number": ("objective", 3),
    "no-loss": ("objective", of(memvec.cramming.objectives.Objective)),
    "no-counted": ("schedule", of(Schedule)),
    "one-row": ("schedule", of(Schedule, counted=lambda self, state, length: length[:1])),
    "a-count": ("schedule", of(Schedule, counted=lambda self, state, length: 3)),
    "beside-the-fields": ("schedule", Uncounted),
    "returned": ("optimizer", of(Adam, step=returned)),
    "a-dictionary": ("optimizer", of(Adam, fresh=lambda self, parameters: {"count": 0})),
    "narrow": ("coordinates", of(memvec.cramming.coordinates.Direct,
                                 vectors=lambda self, parameters: parameters[..., 1:])),
    "one-more": ("start", lambda lm, ids, K, recipe: torch.ones(K + 1, lm.width)),
    "a-list": ("start", lambda lm, ids, K, recipe: [1.0] * K),
    "no-measure": ("term", of(Term)),
    "one-loss": ("term", of(Term, measure=lambda *_: TermLoss(torch.zeros(())))),
    "no-rows": ("term", of(Term, fresh=lambda self, passages: None)),
    "other-name": ("space", lambda lm, options: Reading()),
    "no-recipe": ("preset", lambda: {}),
}
said = {}
for name, (kind, choice) in CASES.items():
    try:
        memvec.register(kind, name)(choice)
        recipe = Recipe.of(name) if kind == "preset" else Recipe.of(**{kind: name}, steps=30)
        list(Engine(tiny(), recipe, vectors=2, batch_size=2).run(passages(3, 4, seed=1)))
    except MemvecError as error:
        said[name] = str(error)
    except Exception as error:
        said[name] = repr(error)
print(json.dumps(said))
"""
ROWS = (
    "of its 2 passages: a dataclass derived from Rows is needed, with a row for each in every "
    "field and no more."
)
LOSS = "is called with (logits, ids, temperature, recipe)"
ATTACHED = (
    "gives other outputs than a tuple of tensors that are attached to the vectors, with a row for "
    "each row of these."
)
SAID = {
    "no-gradient": "the objective 'no-gradient' gives losses without a gradient: compute them from "
    r"the logits, without no_grad, detach or a comparison\.",
    "in-place": r"the objective 'in-place' changes its logits: write to a copy of them\.",
    "own-class": "the objective 'own-class' is no class derived from "
    r"memvec\.cramming\.objectives\.Objective\.",
    "short-loss": r"the objective 'short-loss' is called with loss\(logits, ids, temperature, "
    r"recipe\): too many positional arguments\.",
    "wide-weights": r"the objective 'wide-weights' gives \(2, 1\), not a tensor of shape "
    r"\(2, 4\)\.",
    "one-fast-loss": r"the objective 'one-fast-loss' gives \(\), not a tensor of shape \(8,\)\.",
    "one-for-all": r"the schedule 'one-for-all' gives bool, not a tensor of shape \(2,\)\.",
    "a-temperature": r"the schedule 'a-temperature' gives float, not a tensor of shape \(2,\)\.",
    "no-progress": r"the schedule 'no-progress' gives \(\), not a tensor of shape \(2,\)\.",
    "not-enlarged": r"the schedule 'not-enlarged' gives NoneType, not a tensor of shape \(2,\)\.",
    "no-state": "the schedule 'no-state' keeps Tensor: a dataclass derived from "
    r"memvec\.cramming\.schedules\.ScheduleState is needed\.",
    "no-length": r"the schedule 'no-length' is called with counted\(state, length\): .*",
    "no-rate": r"the optimizer 'no-rate' is called with step\(parameters, gradient, state, moving, "
    r"lr_scale\): too many positional arguments\.",
    "one-parameter": r"the coordinates 'one-parameter' gives \(1, 2, 32\), not a tensor of shape "
    r"\(2, 2, 32\)\.",
    "whole-numbers": r"the coordinates 'whole-numbers' gives parameters of torch\.int64\.",
    "detached": "the coordinates 'detached' gives vectors without a gradient: compute them from "
    r"the parameters, without no_grad or detach\.",
    "one-way": r"the coordinates 'one-way' has no method vectors\.",
    "moves-nothing": "the term 'moves-nothing' gives no outputs, so its loss would move nothing: "
    r"TermLoss\(loss\.detach\(\), outputs, gradients\)\.",
    "no-outputs": re.escape(f"the term 'no-outputs' {ATTACHED}"),
    "summed-outputs": re.escape(f"the term 'summed-outputs' {ATTACHED}"),
    "no-slopes": r"the term 'no-slopes' gives gradients of shapes \[\] at outputs of shapes "
    r"\[\(2,\)\]: each output needs a gradient of its shape\.",
    "one-slope": r"the term 'one-slope' gives gradients of shapes \[\(1,\)\] at outputs of shapes "
    r"\[\(2,\)\]: each output needs a gradient of its shape\.",
    "a-function": "the term 'a-function' is no class derived from "
    r"memvec\.cramming\.terms\.Term\.",
    "too-wide": r"the space 'too-wide' gives \(2, 32\), not a tensor of shape \(2, 5\)\.",
    "numbers-alone": "the space 'numbers-alone' has numbers of its own, so it needs the methods "
    r"inputs and opening, too, which make inputs of them\.",
    "no-opening": "the space 'no-opening' has numbers of its own, so it needs the methods inputs "
    r"and opening, too, which make inputs of them\.",
    "no-reading": "the space 'no-reading' is no class derived from "
    r"memvec\.model\.reading\.Reading\.",
    "rebound": r"the optimizer 'rebound' changed no parameters in 20 steps: write into them, as "
    r"parameters\.sub_\(change\) does\.",
    "below-zero": r"the schedule 'below-zero' gives a temperature that is not above 0\.",
    "complex": r"the start 'complex' gives complex numbers: return their real part\.",
    "mean": r"the objective 'mean' gives \(\), not a tensor of shape \(\d+,\)\.",
    "column": r"the objective 'column' gives \((\d+), 1\), not a tensor of shape \(\1,\)\.",
    "nothing": r"the objective 'nothing' gives NoneType, not a tensor of shape \(\d+,\)\.",
    "two-arguments": re.escape(f"the objective 'two-arguments' {LOSS}: too many positional") + ".*",
    "a-number": re.escape(f"the objective 'a-number' {LOSS}: 3 is not a callable object."),
    "no-loss": r"the objective 'no-loss' has no method loss\.",
    "no-counted": r"the schedule 'no-counted' has no method counted\.",
    "one-row": r"the schedule 'one-row' gives \(1,\), not a tensor of shape \(2,\)\.",
    "a-count": r"the schedule 'a-count' gives int, not a tensor of shape \(2,\)\.",
    "beside-the-fields": re.escape(f"the schedule keeps ScheduleState {ROWS}"),
    "returned": "the optimizer 'returned' returns something: its step has to change the "
    r"parameters in place and return nothing\.",
    "a-dictionary": re.escape(f"the optimizer keeps dict {ROWS}"),
    "narrow": r"the coordinates 'narrow' gives \(2, 2, 31\), not a tensor of shape \(2, 2, 32\)\.",
    "one-more": r"the start 'one-more' gives \(3, 32\), not a tensor of shape \(2, 32\)\.",
    "a-list": r"the start 'a-list' gives list, not a tensor of shape \(2, 32\)\.",
    "no-measure": r"the term 'no-measure' has no method measure\.",
    "one-loss": r"the term 'one-loss' gives \(\), not a tensor of shape \(2,\)\.",
    "no-rows": re.escape(f"the term keeps NoneType {ROWS}"),
    "other-name": r"the space 'other-name' gives Reading, not a Reading with this space\.",
    "no-recipe": r"the preset 'no-recipe' gives no Recipe but dict\.",
}


@pytest.fixture(scope="module")
def sentences(python: str) -> dict[str, str]:
    """The error of each wrong plug-in, in a process without the type checks of the tests."""
    here = Path(__file__).parent
    paths = [str(here), str(Path(memvec.__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run([python, "-c", WRONG], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_a_wrong_plugin_is_named_in_one_sentence(sentences, name):
    assert re.fullmatch(SAID[name], sentences[name]), sentences[name]


@dataclass(frozen=True, slots=True)
class Doubled:
    """Coordinates of a frozen dataclass with slots; the numbers are half of the vectors."""

    recipe: Recipe
    K: int
    lm: object
    factor: float = 2.0
    of_inputs = True

    def parameters(self, vectors):
        return vectors / self.factor

    def vectors(self, parameters):
        return parameters * self.factor


def test_a_part_may_have_slots_and_a_copy_of_it_calls_its_own_methods(plugins):
    memvec.register("coordinates", "doubled")(Doubled)
    outcomes = crammed(Recipe.of(coordinates="doubled", steps=600, patience=600))
    assert [o.exact for o in outcomes] == [True] * 3
    made = registry.made("coordinates", "doubled", Recipe(), 2, None)
    other = copy(made)
    object.__setattr__(other, "factor", 3.0)
    assert other.vectors(torch.ones(1, 2, 4)).max() == 3.0
    assert made.vectors(torch.ones(1, 2, 4)).max() == 2.0
    assert isinstance(made, Doubled)
    object.__setattr__(made, "factor", torch.ones(3, 1, 1))
    with pytest.raises(MemvecError, match=r"the coordinates 'doubled' gives \(3, 2, 4\), not a"):
        made.parameters(torch.ones(1, 2, 4))


def test_a_part_may_call_its_own_methods_with_keywords(plugins):
    @memvec.register("schedule", "halved")
    class Halved(Schedule):
        def counted(self, state, length):
            return length

        def temperature(self, state, target_margin):
            return super().temperature(state=state, target_margin=target_margin)

        def out_of_patience(self, state):
            return self.counted(state=state, length=state.best) < 0

    made = registry.made("schedule", "halved", Recipe(), 2)
    state = made.fresh(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    assert made.out_of_patience(state).shape == (3,)


def test_an_optimizer_may_move_at_some_steps_only(plugins):
    @memvec.register("optimizer", "every-fourth")
    class EveryFourth(NAdam):
        calls = 0

        def step(self, parameters, gradient, state, moving, lr_scale=None):
            self.calls += 1
            if self.calls % 4 == 0:
                super().step(parameters, gradient, state, moving, lr_scale)

    recipe = Recipe.of(optimizer="every-fourth", steps=600, patience=600)
    assert [o.exact for o in crammed(recipe)] == [True] * 3


def test_a_schedule_may_count_nothing_in_its_first_steps(plugins):
    """`late` counts nothing of any passage at first; `hurried` returns `length` itself."""

    @memvec.register("schedule", "late")
    class Late(Schedule):
        def counted(self, state, length):
            return torch.where(state.stale + state.best < 2, 0, length)

    @memvec.register("schedule", "hurried")
    class Hurried(Schedule):
        def counted(self, state, length):
            return length

        def may_count(self, steps):
            return 3 * steps

    for schedule in ("late", "hurried"):
        recipe = Recipe.of(schedule=schedule, steps=600, patience=600)
        outcomes = crammed(recipe, poll=3)
        assert [o.exact for o in outcomes] == [True] * 3
        assert sorted(len(o.passage) for o in outcomes) == [2, 3, 4]


def test_a_position_that_does_not_count_has_no_weight(plugins):
    """The position may be padding, whose loss depends on the lengths of other passages."""

    @memvec.register("objective", "all-positions")
    class All(objectives.CrossEntropy):
        def weights(self, counted, margin, target_margin):
            return torch.ones_like(margin)

    counted = torch.tensor([[True, True, False], [True, False, False]])
    weights = objectives.objective_named("all-positions").weights(
        counted, torch.zeros(2, 3), torch.zeros(2)
    )
    assert weights.tolist() == counted.float().tolist()


@pytest.mark.slow
def test_a_plugin_file_that_a_script_imports_runs_once(tmp_path, python):
    """The script may be the file, so that the script's workers know its parts."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "using.py").write_text("import mine, memvec\nmemvec.Recipe(objective='plugged-in')")
    (tmp_path / "itself.py").write_text(PLUGIN + "memvec.Recipe(objective='plugged-in')")
    source = {**os.environ, "PYTHONPATH": str(Path(memvec.__file__).parent.parent)}
    for script, file in (("using.py", "mine.py"), ("itself.py", "itself.py")):
        ran = subprocess.run(
            [python, script],
            cwd=tmp_path,
            env={**source, "MEMVEC_PLUGINS": file},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr


def test_the_error_of_an_unknown_part_mentions_plugins(plugins):
    hint = "; if it is a plug-in's, install it or name its file in MEMVEC_PLUGINS."
    with pytest.raises(MemvecError, match=re.escape(f"vectors{hint}")):
        registry.get("protocol", "zzz")
    with pytest.raises(MemvecError, match=re.escape(f"deficit{hint}")):
        Recipe(objective="zzz")
