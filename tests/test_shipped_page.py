"""The report in docs/pocket-full is of the current model, the current spec and current columns."""

import csv
import json
import re
import runpy
from pathlib import Path

import memvec

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "docs/pocket-full"
AGAIN = "run: make page"


def shipped() -> dict:
    """The data in the page."""
    page = (SHIPPED / "index.html").read_text("utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data[1])


def test_the_page_is_of_the_current_model():
    made_by, lm = shipped()["reproduce"]["models"]["pocket"], memvec.load_lm("pocket")
    assert lm.encoder is not None
    assert made_by["weights"] == lm.fingerprint.weights, AGAIN
    assert made_by["width"] == lm.width


def test_the_page_is_of_the_current_spec():
    assert shipped()["reproduce"]["spec"] == (ROOT / "studies/pocket-full.toml").read_text("utf-8")


def test_the_rows_of_the_page_have_the_current_columns():
    columns = [name for name, *_ in runpy.run_path(str(ROOT / "docs/study_page.py"))["columns"]()]
    with (SHIPPED / "rows.csv").open(newline="") as file:
        header = next(csv.reader(file))
    assert set(header) - {"extra"} == {c for c in columns if not c.startswith("extra: ")}, AGAIN


def test_the_page_has_the_hash_of_its_model():
    """Without the hashes, the first test would compare nothing."""
    assert re.fullmatch("[0-9a-f]{64}", shipped()["reproduce"]["models"]["pocket"]["weights"])
    assert memvec.load_lm("pocket").fingerprint.weights
