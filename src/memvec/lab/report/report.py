"""A whole report: tables in four forms, figures with data, one page."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memvec.errors import MemvecError, first_line
from memvec.lab.report.contents import all_plots, all_tables
from memvec.lab.report.data import read_data
from memvec.lab.report.figures import draw_all
from memvec.lab.report.page import write_page
from memvec.lab.report.table import Table
from memvec.lab.study.store import Store
from memvec.writing import make_folder, path_of, read_json, write_atomically

FILES = "files.json"  # names of the tables and figures of a report, beside its page
SUFFIXES = ("csv", "tex", "md", "pdf", "svg", "png")


@dataclass(frozen=True)
class Report:
    """A written report: the file of its page, the tables on it, and how many rows it is of."""

    page: Path
    tables: list[Table]
    rows: int
    planned: int  # rows that the last spec plans


def write_report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    compare: bool = False,
    figures: bool = True,
) -> Report:
    """Write tables/, figures/ and index.html of the study in `folder` under `out`.

    `compare` puts published values beside ours. Tables and figures that an earlier report wrote
    there and this one has not are deleted. Raises MemvecError for a study without rows, for values
    that no study writes, and for a folder that cannot be written.
    """
    out = path_of(out)
    with Store(folder) as store, _computing_with(store), _writing(out):
        data = read_data(store)
        tables = all_tables(data, compare=compare)
        plots = all_plots(data, compare=compare)
        where = make_folder(out / "tables")
        for table in tables:
            (where / f"{table.key}.csv").write_text(table.csv(), "utf-8")
            (where / f"{table.key}.tex").write_text(table.latex(), "utf-8")
            (where / f"{table.key}.md").write_text(table.markdown(), "utf-8")
        if figures:
            draw_all(plots, out / "figures")
        page = write_page(data, tables, plots, out / "index.html")
    names = [f"tables/{table.key}" for table in tables]
    names += [f"figures/{plot.key}" for plot in plots if figures]
    delete_others(out, names)
    return Report(page, tables, len(data.rows), data.planned)


@contextlib.contextmanager
def _computing_with(store: Store) -> Iterator[None]:
    """Raise MemvecError for stored values that nothing can be computed with.

    A protocol knows what its extra measurements are, and a folder may come from anybody.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise MemvecError(
            f"{store.file} has values that no report can be made of ({type(error).__name__}: "
            f"{first_line(error):.200}): 'memvec study check {store.folder}' names rows that were "
            "changed."
        ) from error


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raise MemvecError for a full disk, or a folder that may not be written."""
    try:
        yield
    except OSError as error:
        raise MemvecError(
            f"the report in {out} cannot be written: {error.strerror}; make room for it, or name "
            "another folder."
        ) from None


def delete_others(out: Path, names: list[str]) -> None:
    """Delete what an earlier report wrote and this one has not; record what this one wrote."""
    record = out / FILES
    earlier = []
    with contextlib.suppress(OSError, ValueError, TypeError):  # there is none, or it is damaged
        earlier = list(read_json(record.read_text("utf-8")))
    for name in map(str, earlier):
        folder, _, key = name.partition("/")
        if name in names:
            continue
        if folder in ("tables", "figures") and key == Path(key).name:
            for suffix in SUFFIXES:
                (out / folder / f"{key}.{suffix}").unlink(missing_ok=True)
    write_atomically(record, (json.dumps(names, indent=1) + "\n").encode())
