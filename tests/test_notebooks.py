"""The notebooks run from the first cell to the last without Jupyter, and hold their outputs."""

import functools
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

import memvec
from memvec import registry

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
POCKET = ROOT / "src/memvec/pocket/model.safetensors"
# What the test makes smaller: the calls and the kinds of outputs do not depend on it.
SMALLER = {
    "measure-your-model": {"passages = 6": "passages = 2", "budget = 1500": "budget = 90"},
    "new-objective": {"at + 24": "at + 6"},
}

loaded = functools.cache(memvec.load_lm)  # the notebooks use one model


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.skipif(not POCKET.exists(), reason="the built-in model is not made yet")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, python):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(registry, "_ADDED", {kind: {} for kind in registry.KINDS})
    monkeypatch.setattr(memvec, "load_lm", loaded)
    monkeypatch.setattr("sys.executable", python)  # for the commands that a cell starts
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    letter = tmp_path / "examples/letter.txt"
    letter.write_text(letter.read_text("utf-8")[:80], "utf-8")
    text = path.read_text("utf-8")
    for shown, smaller in SMALLER.get(path.stem, {}).items():
        assert text.count(shown) == 1
        text = text.replace(shown, smaller)
    (tmp_path / path.name).write_text(text, "utf-8")
    run = runpy.run_path(str(ROOT / "examples/notebooks.py"))["run"]
    fresh = run(tmp_path / path.name, tmp_path / "examples")
    stored = json.loads(path.read_text("utf-8"))
    for now, then in zip(code_cells(fresh), code_cells(stored), strict=True):
        kinds = [[output["output_type"] for output in cell["outputs"]] for cell in (now, then)]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_with_its_outputs(path):
    text = path.read_text("utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) // 2
    assert not re.search(r"[\"'( ]/(home|root|tmp|work|usr|Users)/", text)


def test_there_are_three_notebooks():
    assert len(NOTEBOOKS) == 3
