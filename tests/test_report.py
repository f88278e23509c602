"""Reports of studies: tables, figures and the page, and their numbers from the store."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import reader
from memvec.cli import display
from memvec.cli.study_results import report
from memvec.cli.study_tables import FORMATS, print_report_table
from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report.contents import all_plots, all_tables
from memvec.lab.report.data import read_data, recipe_names
from memvec.lab.report.figures import draw
from memvec.lab.report.page import overview, write_page
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.report import delete_others, write_report
from memvec.lab.report.table import Table, interval, show, with_sd
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.cells import Cell, expand
from memvec.lab.study.export import read_rows
from memvec.lab.study.pool import text_of
from memvec.lab.study.row import Row, StoreEntry, Text
from memvec.lab.study.spec import parse_spec
from memvec.lab.study.store import Store
from memvec.passages.passage import Passage
from memvec.statistics import Difference, Interval, mean_interval
from studies import EVERYTHING, HEAD, run, spec_in

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
BOTH = {"vectors", "utilisation", "context", "copy", "upper-bound", "geometry"}
BOTH |= {"positions", "one-step-speed"}
TABLES = {"exact", "table1", "one-step", "threshold", "bytes", "cost"} | BOTH | {"models"}
FIGURES = {"lengths", "planes", "survival", "accuracy", "per-token", "boxes"} | BOTH


@pytest.fixture(scope="module")
def study(every_protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with every protocol and its report."""
    base = shutil.copytree(every_protocol, tmp_path_factory.mktemp("report") / "study")
    write_report(base / "out", base / "report", compare=True)
    return base


@pytest.mark.slow
def test_a_report_writes_every_table_and_figure(study: Path) -> None:
    tables = {p.stem for p in (study / "report/tables").glob("*.csv")}
    assert tables == TABLES
    figures = {p.stem for p in (study / "report/figures").glob("*.csv")}
    assert figures == FIGURES
    for name in figures:
        for kind in ("pdf", "svg", "png"):
            assert (study / f"report/figures/{name}.{kind}").stat().st_size > 1000


def test_only_what_an_earlier_report_wrote_is_deleted(tmp_path: Path) -> None:
    out = tmp_path / "report"
    kept = [out / "tables/exact.csv", out / "tables/mine.csv", out / "figures/gone.notes.txt"]
    kept += [tmp_path / "exact.csv"]
    gone = [out / "tables/gone.csv", out / "tables/gone.tex", out / "figures/gone.svg"]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    names = ["tables/exact", "tables/gone", "figures/gone", "../exact", "tables/../../exact"]
    (out / "files.json").write_text(json.dumps([*names, "figures/*"]))
    delete_others(out, ["tables/exact", "figures/new"])
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert json.loads((out / "files.json").read_text()) == ["tables/exact", "figures/new"]


@pytest.mark.slow
def test_a_report_records_its_tables_and_figures(study: Path) -> None:
    names = json.loads((study / "report/files.json").read_text())
    assert set(names) == {f"tables/{t}" for t in TABLES} | {f"figures/{f}" for f in FIGURES}


def test_every_pair_of_restarts_is_compared(study: Path) -> None:
    with (study / "report/tables/geometry.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["lines"], row["solutions"]) == (
        "6",
        "6",
    )  # three pairs of restarts for each of two passages
    with Store(study / "out") as store:
        pairs = store.db.execute("SELECT first, second, number FROM paths").fetchall()
    assert len({(frozenset(pair[:2]), pair[2]) for pair in pairs}) == 6


@pytest.mark.parametrize("lowest", [1.0, 0.5])
def test_the_caption_on_restarts_counts_lines_with_a_dip(study: Path, lowest: float) -> None:
    with Store(study / "out") as store:
        data = read_data(store)
        geometry = protocol_of("geometry")
        line = [1.0, lowest, 1.0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("memvec.lab.protocols.geometry.paths", lambda *_: iter([line, line]))
            (plot,) = geometry.figures(data, compare=False)
    dips = 0 if lowest == 1 else 2
    assert f"On {dips} of 2 straight lines" in plot.caption


def test_the_table_of_exact_horizons_has_the_means_of_the_store(study: Path) -> None:
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


ONE_CELL = """
[[runs]]
protocol = "exact"
sources = ["random-tokens"]
lengths = [4]
passages = 3
"""


def tables_of(folder: Path) -> dict[str, Table]:
    """Every table of a study, by key."""
    with Store(folder) as store:
        return {t.key: t for t in all_tables(read_data(store), compare=False)}


@pytest.mark.slow
def test_a_report_has_only_the_rows_of_the_last_spec(tmp_path: Path) -> None:
    for steps, passages in ((1, 3), (4, 3), (4, 2)):
        text = HEAD + ONE_CELL.replace("= 3", f"= {passages}") + f"recipe = {{ steps = {steps} }}"
        run(spec_in(tmp_path, text), tmp_path, tmp_path / "out", text)
        (row,) = tables_of(tmp_path / "out")["exact"].rows
        assert (row[1], row[6]) == ("random-tokens", passages)
        with Store(tmp_path / "out") as store:
            assert store.counts() == (passages, passages)
            (cell,) = set(read_data(store).rows["cell"])
            assert (
                f'"steps": {steps},'
                in store.db.execute("SELECT settings FROM cells WHERE cell=?", (cell,)).fetchone()[
                    0
                ]
            )
            planned = read_rows(store)["planned"].tolist()
    assert planned == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]  # rows of earlier specs stay in the store


@pytest.mark.slow
def test_every_recipe_has_its_own_rows(tmp_path: Path) -> None:
    one = ONE_CELL + "recipe = { steps = 1 }"
    text = HEAD + one + one.replace("1", "4") + one.replace('exact"', 'paper"')
    text += one.replace('exact"', 'threshold"').replace("1", "4")
    run(spec_in(tmp_path, text), tmp_path, tmp_path / "out", text)
    tables = tables_of(tmp_path / "out")
    assert [row[1] for row in tables["exact"].rows] == [f"random-tokens, steps {n}" for n in (1, 4)]
    assert [row[6] for row in tables["exact"].rows] == [3, 3]
    # The protocols 'paper' and 'threshold' share a table; their recipes differ in the steps.
    rows = tables["threshold"].rows
    assert [row[2] for row in rows] == [
        f"{t}, steps {n}" for n in (1, 4) for t in ("all", "random")
    ]
    assert {row[7] for row in rows} == {3}


def made_up(folder: Path, text: str, **columns: Callable[[Cell, int], object]) -> dict[str, Table]:
    """Tables of a study with the rows of `alike`, in which `columns` replace values."""
    planned = expand(parse_spec(text, "test"))
    with Store(folder, write=True) as store:
        store.plan(planned, {"random-tokens"}, {"name": "made up"})
        store.set_environment({})
        for p in planned:
            store.describe(p.cell.key, reader().description())
            for number in range(p.passages):
                name = f"{p.cell.length} {number}"
                found = SourcedPassage(number, Passage((2, 3, 4 + number)), name)
                store.put_passages(p.cell.key, [(name, found, Text(name.encode() * 9, ["x"] * 3))])
                made = alike(p.cell.key, number, p.cell.vectors, p.cell.protocol)
                changes = {key: value(p.cell, number) for key, value in columns.items()}
                row = made.row.model_copy(update={"passage": name, **changes})
                store.put(replace(made, row=row))
    return tables_of(folder)


def block(protocol: str, more: str) -> str:
    head = f'[[runs]]\nprotocol = "{protocol}"\nsources = ["random-tokens"]\npassages = 2\n'
    return head + more


@pytest.mark.parametrize("protocol", ["context", "copy", "upper-bound", "geometry"])
def test_every_length_and_number_of_vectors_has_its_own_rows(tmp_path: Path, protocol: str) -> None:
    more = "lengths = [3, 5]\nvectors = [1, 2]\nseeds = [0, 1]\n"
    table = made_up(tmp_path, HEAD + block(protocol, more))[protocol]
    at = [table.columns.index(name) for name in ("length", "K")]
    found = [tuple(row[i] for i in at) for row in table.rows]
    assert list(dict.fromkeys(found)) == [(3, 1), (3, 2), (5, 1), (5, 2)]
    assert {row[table.columns.index("n")] for row in table.rows if "n" in table.columns} <= {2}


def test_the_row_of_a_context_is_of_the_passages_that_have_it(tmp_path: Path) -> None:
    """Only the passage of 100 bits has 64 tokens before it, and they leave half of its bits."""
    table = made_up(
        tmp_path,
        HEAD + block("context", "lengths = [3]\nvectors = [1, 2]\n"),
        lm_bits=lambda _, number: 100.0 if number else 10.0,
        mem_bits=lambda cell, _: float(cell.vectors),
        extra=lambda _, number: {"after_context": {"64": [50.0, 1]} if number else {}},
    )["context"]
    found = {(row[3], row[4]): (row[5], row[8], row[9]) for row in table.rows}
    for K in (1, 2):
        assert found[K, "none"] == (55, 0, 2)
        assert found[K, "64 tokens"] == (50, 50, 1)
        assert found[K, f"{K} vector{'s' * (K > 1)}"] == (K, pytest.approx(100 - 100 * K / 55), 2)


def test_the_table_of_bytes_counts_the_texts_of_exact_passages(tmp_path: Path) -> None:
    text = block("exact", "lengths = [3, 5]\nvectors = [1, 4]\n")
    text = HEAD + text + block("paper", "lengths = [3]\n")
    table = made_up(
        tmp_path,
        text,
        exact=lambda cell, number: cell.protocol == "exact" and number == 0,
        horizon=lambda *_: 2,
    )["bytes"]
    found = {(row[2], row[3]): row for row in table.rows}
    assert set(found) == {("exact", 1), ("exact", 4), ("paper", 1)}
    size = len("5 0" * 9)
    for K in (1, 4):
        row = found["exact", K]
        assert row[4:7] == [2, "50 % [9, 91]", size]
        assert row[-1] == pytest.approx(size / (K * reader().width * 4))
        assert row[7] == pytest.approx(size / len(zlib.compress(b"5 0" * 9, 9)))
        assert row[-2] == pytest.approx(size / (24 / 8))  # the rows of `alike` have 24 lm_bits
    assert found["paper", 1][4:] == [2, "0 % [0, 66]", 0, *[None] * 6]


def test_recipes_that_differ_in_many_fields_are_numbered(tmp_path: Path) -> None:
    text = HEAD + ONE_CELL + ONE_CELL + 'recipe = { preset = "paper" }'
    with Store(tmp_path, write=True) as store:
        store.plan(expand(parse_spec(text, "test")), set(), {})
        assert [*recipe_names(store).values()] == ["recipe 1", "recipe 2"]


@pytest.mark.slow
def test_restarts_are_averaged_so_that_n_is_the_number_of_passages(tmp_path: Path) -> None:
    text = EVERYTHING.replace("seeds = [0, 1, 2]\n", "")
    tables = made_up(
        tmp_path,
        text.replace("passages = ", "seeds = [0, 1, 2]\npassages = "),
        horizon=lambda cell, number: 1 + cell.seed + number,
        exact=lambda cell, _: cell.seed == 0,
    )
    exact, _ = tables["exact"].rows
    assert exact[6] == 4
    expected = mean_interval([2, 3, 4, 5])  # 1 + number + the mean seed
    assert exact[3:6] == pytest.approx([expected.mean, expected.low, expected.high])
    assert exact[10].startswith("100 %")  # one restart of each passage is exact
    assert [row[3] for row in tables["one-step"].rows] == ["0 % [0, 66]"] * 4
    for key, n in (("vectors", {2}), ("copy", {2}), ("upper-bound", {2}), ("utilisation", {2, 4})):
        assert {row[-1] for row in tables[key].rows} == n, key
    assert [row[-1] for row in tables["geometry"].rows] == [6]  # the lines between restarts


def test_means_in_tables_are_inside_their_intervals(study: Path) -> None:
    for key, names in (
        ("copy", ("removed by vectors", "removed by copy", "accuracy, copy")),
        ("upper-bound", ("least moved", "removed", "raised logit / removed, %")),
        ("utilisation", ("% of tokens", "% of bits")),
        ("vectors", ("exact tokens", "bits")),
    ):
        with (study / f"report/tables/{key}.csv").open() as file:
            head, *rows = csv.reader(file)
        for at in map(head.index, names):
            assert head[at + 1 : at + 3] == ["low", "high"]
            for row in rows:
                low, mean, high = (float(row[at + i] or "nan") for i in (1, 0, 2))
                assert low <= mean <= high or math.isnan(low)
        assert any(row[head.index(names[0]) + 1] for row in rows), key


def test_tables_are_written_in_every_format(
    capsys: pytest.CaptureFixture[str], study: Path
) -> None:
    for form in FORMATS:
        report(study / "out", study / "again", format_=form, figures=False)
        assert "exact" in capsys.readouterr().out.lower()
    for taken in (study / "out", study / "out" / "study.sqlite"):
        with pytest.raises(MemvecError, match="holds something else than a report"):
            report(study / "out", taken, figures=False)
    table = Table("k", "T & t", "100 %", ["a_b", "c"], [["x", 0.5], [None, 12.34]])
    assert re.search(r"\| –\s+\| 12.3\s+\|", table.markdown())
    assert r"a\_b" in table.latex()
    assert r"T \& t" in table.latex()
    assert r"\begin{table}" + "\n\\centering\n" in table.latex()
    assert r"\toprule" in table.latex()
    assert r"\begin{tabular}{lr}" in table.latex()
    below = Table("k", "T", "", ["a-b", "c"], [["x-y", -0.5], ["-1", 2]])
    assert r"x-y & $-$0.500 \\" in below.latex()
    assert r"-1 & 2 \\" in below.latex()
    signs = Table("k", "T", "", ["low", "low"], [["x|y", "1 ± 2 \\ {~} #$^"]])
    assert re.search(r"\| x\\\|y\s+\| 1 ± 2", signs.markdown())
    tex = r"1 $\pm$ 2 \textbackslash{} \{\textasciitilde{}\} \#\$\textasciicircum{}"
    assert tex in signs.latex()
    assert table.csv() == "a_b,c\nx,0.5\n,12.34\n"
    gain = with_sd("c", mean_interval([2, 4]))
    line = [("a", "x"), *interval("b", Interval(1.0, 0.5, 1.5)), *gain]
    pairs = Table.of("k", "T", "", [line, [("a", "y"), *line[1:]]])
    assert pairs.columns == ["a", "b", "low", "high", "c", "sd"]
    assert pairs.rows == [[name, 1.0, 0.5, 1.5, 3.0, 2**0.5] for name in "xy"]
    assert [cell for _, cell in interval("d", Difference(1.0, 0.0, 2.0, 0.5))] == [1.0, 0.0, 2.0]
    assert with_sd("e", None, "± sd") == [("e", None), ("± sd", None)]
    with pytest.raises(MemvecError, match=r"the lines of table 'k' differ: the first has .*'sd'"):
        Table.of("k", "T", "", [line, line[:-1]])
    assert (show(float("nan")), show(3), show(0.25)) == ("–", "3", "0.250")
    other = study / "other"
    other.mkdir()
    shutil.copy(study / "out" / "study.sqlite", other)
    with pytest.raises(MemvecError, match="is in the folder of another study"):
        report(study / "out", other / "report", figures=False)
    assert [path.name for path in other.iterdir()] == ["study.sqlite"]


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
    assert 'data-ready="yes"' in dom  # the last line of the script sets it
    with Store(study / "out") as store:
        data = read_data(store)
        tables, plots = all_tables(data, compare=True), all_plots(data, compare=True)
    assert dom.count("<svg") == sum(len(p.panels) for p in plots) + 1
    for table in tables:
        assert table.title.replace("&", "&amp;") in dom
    exact = next(t for t in tables if t.key == "exact")
    assert f">{show(exact.rows[0][3])}<" in dom
    assert "<option" in dom


def test_text_in_the_data_of_the_page_cannot_end_its_script(study: Path) -> None:
    with Store(study / "out") as store:
        data = read_data(store)
        for about in ("</script><script>alert(1)</script>", "<!-- a <script>", "<ScRiPt <!--"):
            object.__setattr__(data, "about", about)
            html = write_page(data, [], [], study / "evil.html").read_text("utf-8")
            embedded = re.search(r'id="data">(.*?)</script>', html, re.S)[1]  # type: ignore[index]
            assert "<" not in embedded
            assert json.loads(embedded)["about"] == about


def test_brackets_in_a_table_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("memvec.cli.display.out", Console(width=300))
    text = HEAD + block("exact", "lengths = [3]\n")
    made_up(
        tmp_path,
        text.replace("random-tokens", "random-tokens [/b]").replace(
            'kind = "random-tokens [/b]"', 'kind = "random-tokens"\nname = "random-tokens [/b]"'
        ),
    )
    report(tmp_path, figures=False)
    assert "random-tokens [/b]" in capsys.readouterr().out


def test_a_study_without_rows_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, write=True).close()
    with pytest.raises(MemvecError, match="has no rows yet"):
        write_report(tmp_path, tmp_path / "report")


@pytest.mark.slow
def test_a_study_of_one_passage_makes_a_report(tmp_path: Path) -> None:
    """Its means have no intervals, and its figures no spread."""
    spec = spec_in(tmp_path, EVERYTHING.replace("passages = 2", "passages = 1"))
    planned = expand(spec, tmp_path)
    with Store(tmp_path / "out", write=True) as store:
        store.plan(planned, {"random-tokens"}, {"name": "alike"})
        store.set_environment({})
        for p in planned:
            store.describe(p.cell.key, reader().description())
            found = SourcedPassage(0, Passage((2, 3, 4)), "x")
            store.put_passages(p.cell.key, [("h", found, text_of(reader(), found))])
            store.put(alike(p.cell.key, 0, p.cell.vectors, p.cell.protocol))
        data = read_data(store)
        tables, plots = all_tables(data, compare=False), all_plots(data, compare=False)
        for plot in plots:
            draw(plot).savefig(io.BytesIO(), dpi=20)
        assert write_page(data, tables, plots, tmp_path / "index.html").stat().st_size > 10_000
        cards = [card["label"] for card in overview(data) if card["label"].startswith("exact")]
    assert len(cards) == 2
    assert all("; n 1, 23 bits" in card and "nan" not in card for card in cards)


def test_axes_have_ticks_at_whole_tokens_and_shares_up_to_1():
    panels = [
        Panel(
            "whole", "tokens", "share of passages", [Series("a", [0.0, 12.0], [1.0, 1.0], "line")]
        ),
        Panel(
            "few", "tokens", "share of passages", [Series("a", [0.0, 1.0, 2.0], [1.0, 1.0, 0.25])]
        ),
    ]
    whole, few = draw(Plot("key", "title", "caption", panels)).axes
    assert all(tick <= 1 for tick in whole.get_yticks() if tick <= whole.get_ylim()[1])
    assert whole.get_ylim()[0] == 0
    assert whole.get_ylim()[1] > 1
    assert all(float(tick).is_integer() for tick in few.get_xticks())


def alike(cell: str, number: int, K: int, protocol: str) -> StoreEntry:
    """A made-up row of three tokens."""
    extra = {
        "context": {"after_context": {"4": [20.0, 1]}},
        "copy": {"after_copy": [3.0, 3]},
        "upper-bound": {"least_moved_bits": 6.0, "needed_bits": 9.0},
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
        batch_size=3,
        worker="here",
        extra=extra,
    )
    return StoreEntry(row, torch.ones(K, reader().width), torch.zeros(4, 3))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("terminal", [None, 40, 200])
def test_a_printed_table_has_every_cell_at_any_width(terminal, number, monkeypatch, capsys):
    """A row is one line, except on a narrow terminal; there, equal values are above the table."""
    rows = [[f"model {i}", "novels", f"{i}.25", "always the same words"] for i in range(number)]
    columns = ["model", "source", "bits", "note"]
    table = Table("do", "How they do", "What they are.", columns, rows)
    if terminal is not None:
        monkeypatch.setenv("TERM", "xterm")  # rich gives a dumb terminal 80 columns
        plain = Console(force_terminal=True, color_system=None, width=terminal)
        monkeypatch.setattr(display, "out", plain)
    print_report_table(table, "text")
    said = capsys.readouterr().out
    lines = said.splitlines()
    for row in rows:
        if terminal != 40:
            assert any(all(cell in line for cell in row) for line in lines)
        assert any(row[0] in line and row[2] in line for line in lines)
    above = "source novels, note always the same words"
    assert (above in " ".join(said.split())) == (terminal == 40 and number > 1)


@pytest.mark.parametrize(
    ("series", "name"),
    [
        *(pytest.param(n, "words", marks=pytest.mark.slow) for n in (2, 6)),
        pytest.param(2, "w" * 40, marks=pytest.mark.slow),
        (14, "x"),
    ],
)
def test_a_legend_with_many_or_long_names_is_below_the_panels(series, name):
    """Inside, it would cover the curves and leave no width to the panels (matplotlib warns)."""
    names = [f"{name} {i}" for i in range(series)]
    curves = [
        Series(name=own, x=[0.0, 1.0], y=[float(i), i + 1.0], mark="line")
        for i, own in enumerate(names)
    ]
    panels = [
        Panel(title=title, x="x", y="y", series=order)
        for title, order in (("a", curves), ("b", curves[::-1]))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(Plot(key="key", title="title", caption="caption", panels=panels))
        figure.savefig(io.BytesIO())
    below = series > 4 or len(name) > 28
    assert [len(figure.legends), *(ax.get_legend() is None for ax in figure.axes)] == (
        [1, True, True] if below else [0, False, False]
    )
    for ax in figure.axes:
        box = ax.get_position()
        assert box.width > 0.35
        assert box.height * figure.get_figheight() > 2  # inches
    if below:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names
        colours = [{line.get_label(): line.get_color() for line in ax.lines} for ax in figure.axes]
        assert colours[0] == colours[1]
        assert len(set(colours[0].values())) == min(series, 12)
