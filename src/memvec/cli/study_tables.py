"""Tables of `memvec study` on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memvec.cli.expected import number_of

if TYPE_CHECKING:
    from memvec.lab.report.table import Table as ReportTable
    from memvec.lab.study.price import Price

FORMATS = ("text", "markdown", "latex", "csv")  # of a report's tables
WIDEST = 1000  # characters of a line where there is no terminal
LOADING = ("revision", "dtype", "quantize")  # fields of a spec's model, beside its name
MAX_SENTENCES = 20  # disagreements that `check` lists


def print_prices(title: str, prices: Sequence[Price], missing: Sequence[str]) -> None:
    """The table of `study validate`: hours and memory of each model; then what prevents a run."""
    from memvec.cli.display import columns_table, out, safe
    from memvec.lab.study.price import CPU_FLOPS, GPU_FLOPS

    columns = ("model", "cells", "passages", "GPU-hours", "CPU-hours", "memory")
    table = columns_table(title, columns, left="model")
    for p in prices:
        gpu, cpu, memory = (
            "?" if v is None else _amount(v) for v in (p.gpu_hours, p.cpu_hours, p.memory_gib)
        )
        model = safe(", ".join(filter(None, [p.model, p.loaded])))
        table.add_row(model, str(p.cells), str(p.passages), gpu, cpu, f"{memory} GiB")
    out.print(table)
    out.print(
        "Hours are those of all steps of every passage and of what protocols cram besides, with 4 "
        "operations per parameter and token, "
        f"at {GPU_FLOPS / 1e12:.0f} TFLOP/s on a GPU and {CPU_FLOPS / 1e9:.0f} GFLOP/s on a CPU. "
        "Small models reach a fraction of these rates."
    )
    if unknown := dict.fromkeys(p.model for p in prices if p.gpu_hours is None):
        names = safe(", ".join(unknown))
        out.print(f"?: no folder is called {names}; the run looks for it on the Hub.")
    for sentence in missing:
        out.print(f"[red]problem:[/red] {safe(sentence)}")


def _amount(number: float) -> str:
    """With two decimals; what they would show as 0 is below 0.01."""
    return f"{number:,.2f}" if number == 0 or number >= 0.005 else "< 0.01"


def without_defaults(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of cells without the columns in which every row has the default of loading a model."""
    from memvec.lab.study.spec import ModelSpec

    defaults = {name: ModelSpec.model_fields[name].default for name in LOADING}
    same = {name for name in LOADING if all(row[name] == defaults[name] for row in rows)}
    return [{name: v for name, v in row.items() if name not in same} for row in rows]


def print_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table of `study ls` and `study vectors`: a row for each study, cell or file."""
    from memvec.cli.display import out

    if not rows:
        out.print(f"No studies in the folder {folder.resolve()}.", markup=False)
        return
    texts = [["" if v is None else str(v) for v in row.values()] for row in rows]
    _print_fitting(list(rows[0]), texts)


def print_check(checked: dict[str, Any]) -> None:
    """What `study check` compared: the largest difference of each column, and what disagrees."""

    from memvec.cli.display import out, safe

    out.print(f"{number_of(checked['rows'], 'row')} recomputed; largest differences:")
    for name, difference in checked["worst"].items():
        out.print(f"  {name:20} {difference:.3g}")
    for sentence in checked["unchecked"]:
        out.print(sentence, markup=False, soft_wrap=True)
    for sentence in checked["wrong"][:MAX_SENTENCES]:
        out.print(f"[red]{safe(sentence)}[/red]")
    verdict = "[green]agree[/green]" if not checked["wrong"] else "[red]DISAGREE[/red]"
    out.print(f"Stored and recomputed columns {verdict}.")


def print_report_table(table: ReportTable, form: str) -> None:
    """One table of a report, in one of FORMATS."""
    if form != "text":
        forms = {"markdown": table.markdown, "latex": table.latex, "csv": table.csv}
        typer.echo(forms[form]())
        return
    _print_fitting(table.columns, table.shown(), title=table.title, note=table.note)


def _print_fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", note: str = ""
) -> None:
    """A table; on a narrow terminal, columns that say the same of all rows stand above it.

    A file or a pipe is as wide as the table.
    """
    from rich.console import Console
    from rich.table import Table

    from memvec.cli.display import out, safe

    console = out if out.is_terminal else Console(highlight=False, file=out.file, width=WIDEST)
    same = set[int]()
    if len(rows) > 1 and _width(columns, rows) > console.width:
        same = {i for i in range(len(columns)) if len({row[i] for row in rows}) == 1}
    above = ", ".join(f"{columns[i]} {rows[0][i]}" for i in sorted(same) if rows[0][i])
    # Title and note are not the table's own, which would be as narrow as the table.
    if heading := f"{title} ({above})" if title and above else title or above:
        console.print(safe(heading), style="italic")
    shown = Table()
    kept = [i for i in range(len(columns)) if i not in same]
    for i in kept:
        # The key of a cell is of no use if it is cut off.
        shown.add_column(safe(columns[i]), overflow="fold")
    for row in rows:
        shown.add_row(*(safe(row[i]) for i in kept))
    console.print(shown)
    if note:
        console.print(safe(note), style="dim italic")
        console.print()


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters of a line of a table, with its borders."""
    widest = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    return sum(widest) + 3 * len(widest) + 1
