"""A whole report: tables in four forms, figures with data, one page."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table as Rich

from memvec import display
from memvec.lab.report.contents import all_plots, all_tables
from memvec.lab.report.data import read_data
from memvec.lab.report.figures import draw_all
from memvec.lab.report.page import write_page
from memvec.lab.report.table import Table
from memvec.lab.study.store import Store

FORMATS = ("text", "markdown", "latex", "csv")


def write_report(
    folder: Path, out: Path, *, compare: bool = False, shown: str = "text", figures: bool = True
) -> Path:
    """Write tables/, figures/ and index.html under `out`; print the tables. Returns the page."""
    with Store(folder) as store:
        data = read_data(store)
        tables = all_tables(data, compare=compare)
        plots = all_plots(data, compare=compare)
        where = out / "tables"
        where.mkdir(parents=True, exist_ok=True)
        for table in tables:
            (where / f"{table.key}.csv").write_text(table.csv(), "utf-8")
            (where / f"{table.key}.tex").write_text(table.latex(), "utf-8")
            (where / f"{table.key}.md").write_text(table.markdown(), "utf-8")
        if figures:
            draw_all(plots, out / "figures")
        page = write_page(data, tables, plots, out / "index.html")
    for table in tables:
        _show(table, shown)
    display.say(f"page: {page}; tables and figures beside it")
    return page


def _show(table: Table, shown: str) -> None:
    if shown != "text":
        kinds = {"markdown": table.markdown, "latex": table.latex, "csv": table.csv}
        typer.echo(kinds[shown]())
        return
    title, note = escape(table.title), escape(table.note)
    rich = Rich(title=title, title_justify="left", caption=note, caption_justify="left")
    for column in table.columns:
        rich.add_column(escape(column), overflow="fold")
    for row in table.shown():
        rich.add_row(*map(escape, row))
    display.out.print(rich)
