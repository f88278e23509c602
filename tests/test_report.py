"""Reports: every table and figure, a page that renders, and numbers that are the store's."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import reader
from memvec.errors import MemvecError
from memvec.passages.found import Found
from memvec.passages.passage import Passage
from memvec.report.data import read_data
from memvec.report.figures import draw_all
from memvec.report.page import write_page
from memvec.report.plots import all_plots
from memvec.report.report import FORMATS, write_report
from memvec.report.tables import Table, all_tables, show
from memvec.study.cells import expand
from memvec.study.pool import text_of
from memvec.study.row import Finished, Row
from memvec.study.store import Store
from studies import EVERYTHING, run, spec_in

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
BOTH = {"vectors", "utilisation", "context", "copy", "upper-bound", "geometry"}
TABLES = {"exact", "table1", "one-step", "threshold", "bytes", "cost"} | BOTH
FIGURES = {"lengths", "planes", "survival", "accuracy", "per-token", "boxes"} | BOTH


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with every protocol and its report."""
    base = tmp_path_factory.mktemp("report")
    run(spec_in(base), base, base / "out", EVERYTHING)
    write_report(base / "out", base / "report", compare=True)
    return base


def test_every_table_and_figure_is_there(study: Path) -> None:
    tables = {p.stem for p in (study / "report/tables").glob("*.csv")}
    assert tables == TABLES
    figures = {p.stem for p in (study / "report/figures").glob("*.csv")}
    assert figures == FIGURES
    for name in figures:
        for kind in ("pdf", "svg", "png"):
            assert (study / f"report/figures/{name}.{kind}").stat().st_size > 1000


def test_the_tables_numbers_are_the_stores(study: Path) -> None:
    with (study / "report/tables/exact.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    with Store(study / "out") as store:
        for row in rows:
            values = store.db.execute(
                "SELECT horizon FROM rows JOIN cells USING (cell) WHERE protocol='exact' AND "
                "source=?",
                (row[1],),
            ).fetchall()
            assert float(row[3]) == pytest.approx(np.mean(values))
            assert int(row[6]) == len(values)


def test_tables_are_written_four_ways(capsys: pytest.CaptureFixture[str], study: Path) -> None:
    for form in FORMATS:
        write_report(study / "out", study / "again", shown=form, figures=False)
        assert "exact" in capsys.readouterr().out.lower()
    table = Table("k", "T & t", "100 %", ["a_b", "c"], [["x", 0.5], [None, 12.34]])
    assert "| – | 12.3 |" in table.markdown()
    assert r"a\_b" in table.latex()
    assert r"T \& t" in table.latex()
    assert table.csv() == "a_b,c\nx,0.5\n,12.34\n"
    assert (show(float("nan")), show(3), show(0.25)) == ("–", "3", "0.250")


def test_the_page_is_self_contained(study: Path) -> None:
    html = (study / "report/index.html").read_text("utf-8")
    assert not re.findall(r'(?:src|href)="(?!#)', html)
    assert "@import" not in html
    assert "fetch(" not in html
    assert "prefers-color-scheme: dark" in html
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    with Store(study / "out") as store:
        assert embedded["overview"][0]["value"] == "{} of {}".format(*store.counts())
        total = sum(cell[6] for cell in embedded["cells"])
        assert total == store.counts()[0]
        for p in embedded["passages"]:
            assert sum(p["before"]) == pytest.approx(p["lmBits"], abs=0.01 * len(p["before"]))
            assert sum(p["after"]) == pytest.approx(p["memBits"], abs=0.01 * len(p["after"]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_renders_in_a_browser(study: Path, tmp_path: Path) -> None:
    dom = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=8000",
            "--dump-dom",
            (study / "report/index.html").resolve().as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"HOME": str(tmp_path)},
    ).stdout
    assert 'data-ready="yes"' in dom  # set by the script's last line
    with Store(study / "out") as store:
        data = read_data(store)
        tables, plots = all_tables(data, beside=True), all_plots(data, beside=True)
    assert dom.count("<svg") == sum(len(p.panels) for p in plots) + 1
    for table in tables:
        assert table.title.replace("&", "&amp;") in dom
    exact = next(t for t in tables if t.key == "exact")
    assert f">{show(exact.rows[0][3])}<" in dom
    assert "<option" in dom


def test_text_in_a_passage_cannot_leave_its_place(study: Path) -> None:
    with Store(study / "out") as store:
        data = read_data(store)
        object.__setattr__(data, "about", "</script><script>alert(1)</script>")
        page = write_page(data, [], [], study / "evil.html")
    assert "</script><script>alert" not in page.read_text("utf-8")


def test_a_study_without_rows_is_told(tmp_path: Path) -> None:
    Store(tmp_path, write=True).close()
    with pytest.raises(MemvecError, match="has no rows yet"):
        write_report(tmp_path, tmp_path / "report")


def test_all_passages_alike_still_make_a_report(tmp_path: Path) -> None:
    """No spread, no interval, one passage: every mean and figure has to cope."""
    spec = spec_in(tmp_path, EVERYTHING.replace("passages = 2", "passages = 1"))
    planned = expand(spec, tmp_path)
    with Store(tmp_path / "out", write=True) as store:
        store.plan(planned, {"random-tokens"}, {"name": "alike"})
        store.set_environment({})
        for p in planned:
            store.describe(p.cell.key, reader().description())
            found = Found(0, Passage((2, 3, 4)), "x")
            store.put_passages([("h", found, text_of(reader(), found))])
            store.put(alike(p.cell.key, 0, p.cell.vectors, p.cell.protocol))
        data = read_data(store)
        tables, plots = all_tables(data, beside=False), all_plots(data, beside=False)
        draw_all(plots, tmp_path / "figures")
        assert write_page(data, tables, plots, tmp_path / "index.html").stat().st_size > 10_000


def alike(cell: str, number: int, K: int, protocol: str) -> Finished:
    """A made-up row of three tokens."""
    extra = {
        "context": {"context": {"4": [20.0, 1]}},
        "copy": {"copy": [3.0, 3]},
        "upper-bound": {"needed_bits": 9.0},
    }.get(protocol, {})
    row = Row(
        cell=cell,
        number=number,
        passage="h",
        tokens=3,
        predicted=3,
        status="done",
        exact=True,
        horizon=3,
        accuracy=1.0,
        margin=0.5,
        margin_asked=0.5,
        lm_bits=24.0,
        mem_bits=1.0,
        information_gain=23.0,
        token_gain=3,
        lm_right=0,
        horizon_gain=23.0,
        horizon_token_gain=3,
        steps=10,
        spent=30,
        seconds=0.1,
        start_rule="vectors",
        seats=3,
        worker="here",
        extra=extra,
    )
    return Finished(row, torch.ones(K, reader().width), torch.zeros(4, 3))
