"""The protocol `checkpoints`: capacity over training, its table, figure and fitted exponents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit
from scipy.stats import t

from conftest import reader
from memvec.errors import MemvecError
from memvec.lab import slow
from memvec.lab.protocols.checkpoints import _exponents_table, exponents, training_of
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report.data import read_data
from memvec.lab.study.check import check_study
from memvec.lab.study.pool import LocalPool
from memvec.lab.study.run import run_study
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM

SPEC = """
name = "over-training"
batch_size = 4
[[models]]
name = "FOLDER/*-step-*"
[[sources]]
kind = "random-tokens"
[[runs]]
protocol = "checkpoints"
lengths = [6]
passages = 3
recipe = { steps = 10 }
"""
# (layers, seed, tokens read) of the checkpoints; the weights' seed stands for the training.
KEPT = [(2, 0, 0), (2, 0, 64), (2, 0, 128), (2, 1, 0), (2, 1, 128), (1, 0, 0), (1, 0, 128)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as recipes/checkpoints.py writes them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for layers, seed, tokens in KEPT:
        lm = reader(seed=100 * seed + tokens, num_hidden_layers=layers, hidden_size=32)
        path = folder / f"tiny-{layers}-{seed}-step-{tokens:05d}"
        lm.model.save_pretrained(path)
        lm.tokenizer.save_pretrained(path)
        record = {"run": f"tiny-{layers}-{seed}", "family": "llama", "seed": seed}
        record |= {"step": tokens // 8, "tokens": tokens, "valid": 5.0 - tokens / 128}
        (path / "memvec.json").write_text(json.dumps({"training": record}))
    return folder


@pytest.fixture(scope="module")
def study(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "out"
    text = SPEC.replace("FOLDER", str(checkpoints))
    spec = parse_spec(text, "test")
    run_study(spec, out, lambda model: LocalPool(load_lm(model.name)), base=checkpoints, toml=text)
    return out


def test_a_pattern_names_every_folder_that_matches(checkpoints):
    spec = parse_spec(SPEC.replace("FOLDER", str(checkpoints)), "test")
    names = [model.name for model in spec.models]
    assert names == sorted(str(path) for path in checkpoints.iterdir())
    assert len(names) == len(KEPT)


def test_a_pattern_that_matches_no_model_is_refused(tmp_path):
    (tmp_path / "a-step-1").mkdir()  # no config.json: not a model
    with pytest.raises(MemvecError, match=r"test: no folder with a model fits '.*-step-\*'\.$"):
        parse_spec(SPEC.replace("FOLDER", str(tmp_path)), "test")


def test_every_column_is_recomputed(study):
    found = check_study(study)
    assert found["wrong"] == []
    assert {"tokens", "width", "layers", "valid", "run"} <= found["worst"].keys()


def test_the_check_of_a_study_notices_a_changed_checkpoint(study, checkpoints):
    record = checkpoints / "tiny-1-0-step-00128" / "memvec.json"
    before = record.read_text()
    record.write_text(before.replace('"tokens": 128', '"tokens": 256'))
    try:
        wrong = check_study(study)["wrong"]
    finally:
        record.write_text(before)
    assert len(wrong) == 3  # its passages
    assert all("tokens" in str(row) for row in wrong)


def bits_of(lm: FrozenLM, ids: tuple[int, ...], horizon: int) -> float:
    """H_LM in bits of the first `horizon` tokens, by the model's own forward pass after BOS."""
    table = slow.logits(lm, None, [lm.bos_id, *ids])[:-1]
    bits, _ = slow.bits_and_margins(table, ids)
    return float(bits[:horizon].sum())


def test_the_table_is_the_mean_over_seeds_of_means_over_passages(study):
    with Store(study) as store:
        data = read_data(store)
        (table, fits) = protocol_of("checkpoints").tables(data, compare=False)
        (figure,) = protocol_of("checkpoints").figures(data, compare=False)
        models = {name: load_lm(key.name) for name, key in data.keys.items()}
        alone = []
        for row in data.rows.to_dict("records"):
            ids = store.passage(row["cell"], row["number"]).ids
            alone.append(bits_of(models[row["model"]], ids, row["horizon"]))
    rows = data.rows.assign(alone=alone)
    assert [(row[0], row[1]) for row in table.rows] == [
        *(("llama, D 32, L 1", tokens) for tokens in (0, 128)),
        *(("llama, D 32, L 2", tokens) for tokens in (0, 64, 128)),
    ]
    for name, tokens, valid, bits, *_, held, per_vector, seeds, passages in table.rows:
        layers = int(str(name)[-1])
        means, lengths = [], []
        for depth, seed, read in KEPT:
            if (depth, read) == (layers, tokens):
                own = rows["model"].str.endswith(f"tiny-{layers}-{seed}-step-{tokens:05d}")
                means.append(rows[own]["alone"].mean())
                lengths.append(rows[own]["horizon"].mean())
        assert (seeds, passages) == (len(means), 3)  # the same passages for every seed
        assert valid == 5.0 - tokens / 128
        assert per_vector == pytest.approx(np.mean(means), rel=1e-4)
        assert held == pytest.approx(np.mean(lengths))
        assert bits == pytest.approx(np.mean(means) / 32, rel=1e-4)
    assert fits.rows == []  # one width gives no exponent
    lines = {series.name: series for series in figure.panels[0].series}
    assert list(lines) == ["llama, D 32, L 2"]  # the other run has only its first and last stage
    assert lines["llama, D 32, L 2"].x == [32.0, 64.0, 128.0]
    assert "before training" in figure.caption


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", 'dtype = "bfloat16"'])
def test_each_length_number_of_vectors_and_way_of_loading_has_rows_of_its_own(
    way, checkpoints, tmp_path
):
    name = f'name = "{checkpoints}/tiny-1-*"\n'
    others = f"[[models]]\n{name}{way}\n" if way else ""
    text = SPEC.replace('name = "FOLDER/*-step-*"\n', name + others)
    text = text.replace("lengths = [6]", "lengths = [3, 6]\nvectors = [1, 2]")
    out = tmp_path / "out"
    load = lambda model: LocalPool(load_lm(model.name, dtype=model.dtype))  # noqa: E731
    run_study(parse_spec(text, "test"), out, load, toml=text)
    with Store(out) as store:
        data = read_data(store)
        table, _ = protocol_of("checkpoints").tables(data, compare=False)
    assert len(table.rows) == 2 * 4 * (1 + bool(way))  # two stages of each
    assert all(("bfloat16" in str(row[0])) == (i >= 8) for i, row in enumerate(table.rows))
    held = [row[6] for row in table.rows]
    cells = data.rows.groupby("cell")["horizon"].mean()
    assert sorted(held) == pytest.approx(sorted(cells))
    for name, _, _, bits, *_, per_vector, _, _ in table.rows:
        K = int(str(name).split("K ")[1][0])
        assert bits == pytest.approx(per_vector / 32 / K)


def test_a_model_without_a_record_is_refused(folder):
    with pytest.raises(MemvecError, match="has no record of its training"):
        training_of(load_lm(str(folder)))


def test_the_fit_finds_the_exponents_that_made_the_numbers():
    width, depth = (a.ravel().astype(float) for a in np.meshgrid([32, 64, 128], [2, 4, 8]))
    bits = 3 * width**0.8 * depth**-0.25
    fit = exponents(width, depth, bits)
    assert fit is not None
    assert fit.width == pytest.approx((0.8, 0.8, 0.8))
    assert fit.depth == pytest.approx((-0.25, -0.25, -0.25))
    assert (fit.r_squared, fit.n) == (pytest.approx(1.0), 9)


def test_the_intervals_of_the_fit_cover_the_true_exponent():
    """About 95 % of the intervals do."""
    width, depth = (a.ravel().astype(float) for a in np.meshgrid([32, 64, 128], [2, 4, 8]))
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        noisy = 3 * width**0.8 * depth**-0.25 * np.exp(0.2 * rng.standard_normal(9))
        fit = exponents(width, depth, noisy)
        assert fit is not None
        hits += fit.width[1] < 0.8 < fit.width[2]
    assert 365 < hits < 395


def test_the_intervals_of_the_fit_are_those_of_a_regression():
    """The covariance is scipy's; Student's t has 3 degrees of freedom."""
    width, depth = (a.ravel().astype(float) for a in np.meshgrid([32, 64, 128], [2, 4]))
    bits = 3 * width**0.8 * np.exp(0.2 * np.random.default_rng(1).standard_normal(6))

    def line(x, level, a, b):
        return level + a * x[0] + b * x[1]

    logs = np.log(np.stack([width, depth]))
    best, covariance = curve_fit(line, logs, np.log(bits), p0=[0.0, 0.0, 0.0])
    half = t.ppf(0.975, 6 - 3) * np.sqrt(np.diag(covariance))
    fit = exponents(width, depth, bits)
    for (value, low, high), i in ((fit.width, 1), (fit.depth, 2)):
        assert (value, low, high) == pytest.approx(
            (best[i], best[i] - half[i], best[i] + half[i]), rel=1e-4
        )


def test_the_table_has_exponents_before_training_and_at_its_end():
    stages = [
        pd.DataFrame([{"family": "x", "width": D, "layers": L, "tokens": n, "bits": D**a / L}])
        for D in (32, 64)
        for L in (2, 4)
        for n, a in ((0, 1.0), (9, 0.5), (99, 2.0))
    ]
    rows = {row[1]: row[2] for row in _exponents_table(stages).rows}
    assert rows == {"before training": pytest.approx(1), "at the end": pytest.approx(2)}


@pytest.mark.parametrize(
    ("width", "depth", "bits"),
    [
        ([32, 64, 128], [2, 4, 8], [10, 20, 30]),  # three models
        ([32, 32, 32, 32], [2, 4, 8, 16], [10, 20, 30, 40]),  # one width
        ([32, 64, 32, 64], [2, 2, 4, 4], [10, 20, 0, 40]),  # one holds nothing
    ],
)
def test_too_few_models_have_no_fit(width, depth, bits):
    assert exponents(*(np.array(v, dtype=float) for v in (width, depth, bits))) is None
