"""Vectors of another model through a linear map: the fit, its encoder, the protocol `transfer`."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import QUICK, reader, tiny
from memvec.cramming.engine import Engine
from memvec.encoders.transfer import Transfer, crammed, fit_linear, fit_transfer
from memvec.errors import MemvecError
from memvec.lab.protocols import transfer as transfer_protocol
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.protocols.transfer import mapped_start
from memvec.lab.report.data import read_data
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.check import check_study
from memvec.lab.study.pool import LocalPool
from memvec.lab.study.run import run_study
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.loading import load_lm
from memvec.passages.passage import Passage
from test_protocols import falsify

SPEC = """
name = "carried-over"
batch_size = 4
[[models]]
name = "FOLDER"
[[sources]]
kind = "random-tokens"
[[runs]]
protocol = "transfer"
origin = "FOLDER"
origin_seed = 1
pairs = 12
lengths = [4]
passages = 3
recipe = { steps = 60 }
"""
RECIPE = replace(QUICK, start="noise")


def pairs(n: int, inputs: int, outputs: int, noise: float, seed: int = 0):
    """Rows of two spaces and the weight between them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, inputs)) + 3.0
    weight = rng.standard_normal((inputs, outputs)) / inputs**0.5
    return x, x @ weight - 1.0 + noise * rng.standard_normal((n, outputs)), weight


@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_the_fitted_map_is_the_one_that_made_the_pairs(noise):
    x, y, weight = pairs(200, 10, 6, noise)
    fit = fit_linear(x, y)
    assert np.abs(fit.weight - weight).max() < 0.3 * noise + 0.01
    new, true, _ = pairs(50, 10, 6, 0.0, seed=1)
    assert fit.pairs == 200
    assert fit.explained == pytest.approx(1 / (1 + noise**2), abs=0.1)
    assert fit(new).shape == true.shape


@pytest.mark.parametrize(("n", "inputs"), [(30, 5), (12, 40)])
def test_the_explained_share_is_that_of_leaving_one_out(n, inputs):
    """A map is fitted again without each row in turn."""
    x, y, _ = pairs(n, inputs, 3, 0.4, seed=2)
    fit = fit_linear(x, y)
    error = about = 0.0
    for i in range(n):
        rest = np.arange(n) != i
        mean_in, mean_out = x.mean(0), y.mean(0)
        a, b = x[rest] - mean_in, y[rest] - mean_out
        # The fit takes the mean as an intercept without penalty.
        a1 = np.column_stack([a, np.ones(n - 1)])
        penalties = np.diag([fit.penalty] * inputs + [0.0])
        weight = np.linalg.solve(a1.T @ a1 + penalties, a1.T @ b)
        predicted = np.append(x[i] - mean_in, 1.0) @ weight + mean_out
        error += float(np.square(y[i] - predicted).sum())
        about += float(np.square(y[i] - y[rest].mean(0)).sum())
    assert fit.explained == pytest.approx(1 - error / about, abs=1e-6)


def test_a_map_between_unrelated_rows_explains_nothing():
    rng = np.random.default_rng(0)
    fit = fit_linear(rng.standard_normal((40, 8)), rng.standard_normal((40, 5)))
    assert abs(fit.explained) < 0.1


def test_the_map_is_the_ridge_solution_of_its_penalty():
    draw = np.random.default_rng(5)
    x, y = draw.normal(2, 1, (12, 6)), draw.normal(0, 3, (12, 4))
    fitted = fit_linear(x, y)
    assert fitted.penalty > 1  # y is noise, so the map is close to its mean
    a, b = x - x.mean(0), y - y.mean(0)
    theirs = np.linalg.solve(a.T @ a + fitted.penalty * np.eye(6), a.T @ b)
    np.testing.assert_allclose(fitted.weight, theirs, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(fitted(x).mean(0), y.mean(0))


def test_the_fit_of_a_map_does_not_depend_on_the_scale_of_its_inputs():
    """Models have embeddings of very different sizes, so penalties are relative to the inputs."""
    x, y, _ = pairs(30, 8, 4, 0.5, seed=3)
    fit, scaled = fit_linear(x, y), fit_linear(1000 * x, y)
    assert fit.penalty > 0
    np.testing.assert_allclose(scaled(1000 * x), fit(x), rtol=1e-8)
    assert scaled.explained == pytest.approx(fit.explained)


def test_too_few_pairs_have_no_map():
    with pytest.raises(MemvecError, match="needs at least 8 pairs, not 7"):
        fit_linear(np.zeros((7, 2)), np.zeros((7, 2)))


@pytest.mark.slow
def test_the_map_of_a_model_to_itself_gives_its_vectors():
    """With the same start, mapped vectors differ from crammed ones by less than 10 %."""
    lm = tiny()
    # The fit needs more pairs than a vector has dimensions (32).
    asked = torch.randint(2, lm.vocab_size, (45, 2), generator=torch.Generator().manual_seed(0))
    transfer = fit_transfer(lm, lm, asked.tolist(), 1, RECIPE)
    assert transfer.mapping.explained > 0.99
    made, exact = crammed(lm, asked[:4].tolist(), 1, RECIPE)
    assert exact.all()
    mapped = transfer.encode(lm, asked[:4], 1)
    assert mapped.shape == (4, 1, lm.width)
    assert np.abs(mapped.flatten(1).double().numpy() - made).max() < 0.1 * np.abs(made).max()


def test_only_pairs_that_are_exact_in_both_models_are_fitted(monkeypatch):
    lm, rows = tiny(), np.random.default_rng(0).standard_normal((12, 4))
    exact = {1: np.arange(12) != 3, 2: np.arange(12) != 7}  # keyed by the number of steps

    def crammed(_lm, _ids, _K, recipe):
        return rows, exact[recipe.steps]

    monkeypatch.setattr("memvec.encoders.transfer.crammed", crammed)
    target, origin = (replace(RECIPE, steps=steps) for steps in (2, 1))
    mapping = fit_transfer(lm, lm, [], 1, target, origin).mapping
    assert mapping.pairs == 10
    assert mapping.mean_in == pytest.approx(np.delete(rows, [3, 7], axis=0).mean(0))


@pytest.mark.slow
def test_the_engine_starts_from_the_map():
    lm = tiny()
    asked = torch.randint(2, lm.vocab_size, (40, 3), generator=torch.Generator().manual_seed(1))
    transfer = fit_transfer(lm, lm, asked.tolist(), 1, RECIPE)
    engine = Engine(mapped_start(lm, transfer), replace(RECIPE, start="encoder"))
    engine.push(Passage(tuple(asked[0].tolist())))
    engine.fill(1)
    assert engine.batch is not None
    torch.testing.assert_close(engine.batch.vectors, transfer.encode(lm, asked[:1], 1))


def test_steps_are_counted_from_the_mapped_vectors(monkeypatch):
    """A map that gives the crammed vectors of the row makes them exact in fewer steps."""
    lm, passage = tiny(), Passage((5, 9, 7))
    (outcome,) = Engine(lm, RECIPE).run([passage])

    class Known(Transfer):
        def read(self, lm, ids, K):
            return outcome.vectors[None].expand(len(ids), -1, -1)

    mapping = fit_linear(*pairs(20, lm.width, lm.width, 0.1)[:2])
    known = Known(lm, RECIPE, 1, mapping)
    monkeypatch.setattr(transfer_protocol, "_fitted", lambda *_: known)
    options = {"origin": "tiny", "origin_seed": 0, "pairs": 20}
    row = protocol_of("transfer").extra_of_cell(
        lm, SourcedPassage(0, passage, "x"), outcome, "vectors", RECIPE, options
    )
    assert outcome.exact
    assert (row["at_once"], row["exact_mapped"], row["cosine"]) == (3, 1, pytest.approx(1))
    assert row["steps_mapped"] < outcome.steps


def test_the_seed_of_the_origin_is_not_that_of_the_target(monkeypatch):
    asked = []
    monkeypatch.setattr(transfer_protocol, "load_lm", lambda *_, **__: tiny())
    monkeypatch.setattr(transfer_protocol, "sampled_passages", lambda *_, **__: iter(()))
    monkeypatch.setattr(transfer_protocol, "check_same_tokens", lambda *_: None)
    mapping = fit_linear(*pairs(20, 32, 32, 0.1)[:2])

    def fit(origin, target, passages, K, recipe, origin_recipe):
        asked.append((recipe.seed, origin_recipe.seed))
        return Transfer(origin, origin_recipe, K, mapping)

    monkeypatch.setattr(transfer_protocol, "fit_transfer", fit)
    transfer_protocol._fitted.__wrapped__(tiny(), RECIPE, 1, 4, "tiny", 5, 8)
    assert asked == [(RECIPE.seed, 5)]


def test_another_number_of_vectors_is_refused():
    fit = fit_linear(*pairs(20, 32, 32, 0.1)[:2])
    with pytest.raises(MemvecError, match="is for K = 1, and 2 vectors are asked for"):
        Transfer(tiny(), RECIPE, 1, fit).read(tiny(), torch.tensor([[3, 4]]), 2)


def test_models_with_other_tokens_are_refused():
    with pytest.raises(MemvecError, match="do not have the same tokens"):
        fit_transfer(reader("words"), reader("bytes"), [[3, 4]] * 9, 1, RECIPE)


@pytest.fixture(scope="module")
def study(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    text = SPEC.replace("FOLDER", str(folder))
    run_study(
        parse_spec(text, "test"), out, lambda m: LocalPool(load_lm(m.name)), base=folder, toml=text
    )
    return out


def test_rows_of_a_study_are_recomputed_and_reported(study):
    found = check_study(study)
    assert found["wrong"] == []
    assert {"at_once", "cosine", "pairs"} <= found["worst"].keys()
    with Store(study) as store:
        data = read_data(store)
        (table,) = protocol_of("transfer").tables(data, compare=False)
        (figure,) = protocol_of("transfer").figures(data, compare=False)
    (row,) = table.rows
    extras = [json.loads(extra) for extra in data.rows["extra"]]
    shown = dict(zip(table.columns, row, strict=True))
    assert shown["from"] == "tiny, seed 1"
    assert shown["steps from the map"] == pytest.approx(
        np.mean([e["steps_mapped"] for e in extras])
    )
    assert shown["steps"] == pytest.approx(data.rows["steps"].mean())
    assert shown["ratio"] == pytest.approx(shown["steps from the map"] / shown["steps"])
    assert (shown["n"], shown["pairs"]) == (3, extras[0]["pairs"])
    assert len(figure.panels) == 1


def test_the_check_notices_changed_results(study):
    changed = {"mapped": [[0.5] * 64], "at_once": 4, "steps_mapped": 1, "exact_mapped": 1}
    changed |= {"cosine": 0.123, "explained": 0.5, "pairs": 99, "origin_weights": "w"}
    before = falsify(study, json.dumps(changed), "transfer")
    wrong = str(check_study(study)["wrong"])
    for name in ("at_once", "cosine", "pairs"):
        assert name in wrong
    with contextlib.closing(sqlite3.connect(study / "study.sqlite")) as db, db:
        for cell, number, extra in before:
            db.execute(
                "UPDATE rows SET extra = ? WHERE cell = ? AND number = ?", (extra, cell, number)
            )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("recipe = { start = 'encoder' }", "start cannot be an encoder's"),
        ("recipe = { start_rule = 'bos' }", "start_rule is 'vectors'"),
        ("pairs = 3", "option pairs must be at least 8, not 3"),
        ("", "needs the option 'origin'"),
    ],
)
def test_a_spec_of_a_wrong_transfer_is_refused(change, sentence):
    text = SPEC.split("[[runs]]")[0] + '[[runs]]\nprotocol = "transfer"\nlengths = [4]\n' + change
    if change:
        text += '\norigin = "pocket"\n'
    with pytest.raises(MemvecError, match=sentence):
        parse_spec(text.replace("FOLDER", "pocket"), "test")
