"""A recipe's parts from another package: one file each, without a change to ours."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import memvec
from conftest import passages, tiny
from memvec import metrics, registry
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe, choices
from memvec.cramming.schedules import Schedule
from memvec.errors import MemvecError


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
    """The page's example, as it stands there."""
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
def test_coordinates_need_not_reach_every_vector(plugins, storage):
    """A true subspace: vectors are W z, and W has no inverse. What is kept is in the subspace."""

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


def test_an_optimizer_and_a_start_have_names_too(plugins):
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
    """As pip leaves it: a module, and metadata that names the entry point."""
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
