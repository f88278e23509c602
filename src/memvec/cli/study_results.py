"""`memvec study export, vectors, report, check`: what is made of a study that has rows."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from memvec.cli import options
from memvec.cli.common import study_loading
from memvec.cli.expected import number_of
from memvec.cli.study_tables import (
    FORMATS,
    print_check,
    print_report_table,
    print_rows,
    without_defaults,
)
from memvec.errors import MemvecError, check_minimum, did_you_mean

app = typer.Typer(rich_markup_mode="rich")

StudyFolder = Annotated[Path, typer.Argument(help="Folder of a study.")]
Moved = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Where the study's model is now. Of several: NAME=PLACE, once for each that moved.",
    ),
]


@app.command(
    epilog=options.examples(
        "memvec study export pocket-quick.study --csv rows.csv",
        "memvec study export pocket-quick.study --parquet rows.parquet",
    )
)
def export(
    folder: StudyFolder,
    parquet: Annotated[Path | None, typer.Option(help="Write a Parquet file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file.")] = None,
) -> None:
    """Write all rows with their cells' settings, and a sentence about each column."""
    from memvec.cli.display import say
    from memvec.lab.study.export import export_rows

    given = {"parquet": parquet, "csv": csv}
    targets = {kind: file for kind, file in given.items() if file is not None}
    if not targets:
        raise MemvecError("name a file: --csv rows.csv or --parquet rows.parquet.")
    for kind, target in targets.items():  # before anything is written
        if not target.parent.is_dir():
            raise MemvecError(f"there is no folder {target.parent} to write {target.name} in.")
        if target.suffix != f".{kind}":
            raise MemvecError(f"--{kind} {target}: its name must end in .{kind}.")
        if target.exists() and not Path(f"{target}.columns.json").exists():
            raise MemvecError(f"{target} exists and is no export of rows: name another file.")
    for target in targets.values():
        n = export_rows(folder, target)
        say(f"{target} has {number_of(n, 'row')}; {target}.columns.json explains its columns.")


@app.command(
    epilog=options.examples(
        "memvec study vectors pocket-quick.study -o vectors",
        "memvec decode vectors/CELL.mem.safetensors",
    )
)
def vectors(
    folder: StudyFolder,
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder for the files.")],
    model: Moved = None,
    device: options.Device = "auto",
    load: options.StudyLoad = None,
) -> None:
    """Write the vectors of each cell as a file, decoded again for its certificate."""
    from memvec.cli.display import say
    from memvec.cli.progress import timer
    from memvec.lab.study.stored_model import moved_models
    from memvec.lab.study.vector_files import export_vectors

    due, given, moved = timer(), study_loading(load), moved_models(folder, model or [])

    def show(done: int, cells: int) -> None:
        if due():
            say(f"{done} of {cells} cells decoded")

    written, left_out = export_vectors(
        folder, out, moved=moved, device=device, load=given, on_file=show
    )
    for sentence in left_out:
        say(f"left out: {sentence}")
    if not written:
        say(f"Nothing was written: {folder} has no finished cell whose vectors a file can hold.")
        return
    shown = [{k: v for k, v in row.items() if k != "file"} for row in written]
    print_rows(without_defaults(shown), out)
    say(
        f"{out} has {number_of(len(written), 'file')}, CELL.mem.safetensors. The column 'cell' of "
        "memvec study export names the same cells."
    )


@app.command(
    epilog=options.examples(
        "memvec study report pocket-quick.study",
        "memvec study report table1.study --compare paper --format latex",
    )
)
def report(
    folder: StudyFolder,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; default: FOLDER/report.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="'paper': published values beside ours.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="Tables on the terminal: text, markdown, latex, csv.")
    ] = "text",
    figures: Annotated[bool, typer.Option(help="Draw PDF, SVG and PNG figures.")] = True,
) -> None:
    """Write tables, figures with their data, and one self-contained page."""
    from memvec.cli.display import say
    from memvec.lab.report.report import write_report

    if compare not in (None, "paper"):
        raise MemvecError(f"--compare knows 'paper', not '{compare}'.")
    if format_ not in FORMATS:
        raise MemvecError(f"unknown --format '{format_}': {did_you_mean(format_, FORMATS)}")
    target = out or folder / "report"
    others = target.is_dir() and any(target.iterdir()) and not (target / "tables").is_dir()
    if others or (target.exists() and not target.is_dir()):
        raise MemvecError(f"{target} holds something else than a report: name a new folder.")
    if (target.parent / "study.sqlite").is_file() and target.parent.resolve() != folder.resolve():
        raise MemvecError(f"{target} is in the folder of another study: name another with -o.")
    written = write_report(folder, target, compare=compare == "paper", figures=figures)
    for table in written.tables:
        print_report_table(table, format_)
    if written.rows < written.planned:
        counts = f"{written.rows} of {written.planned}"
        say(f"Only {counts} passages are crammed: memvec study resume goes on.")
    say(f"page: {written.page}; tables and figures beside it")


@app.command(
    epilog=options.examples(
        "memvec study check pocket-quick.study", "memvec study check DIR --sample 20 --json"
    )
)
def check(
    folder: StudyFolder,
    model: Moved = None,
    sample: Annotated[int, typer.Option(help="Rows to recompute; 0: all.")] = 0,
    device: options.Device = "auto",
    load: options.StudyLoad = None,
    json: options.Json = False,
) -> None:
    """Compute every column again from the stored vectors, by slower and independent code."""
    from memvec.lab.study.check import check_study
    from memvec.lab.study.stored_model import moved_models

    check_minimum(0, sample=sample)
    given, moved = study_loading(load), moved_models(folder, model or [])
    checked = check_study(folder, moved=moved, sample=sample, device=device, load=given)
    if json:
        typer.echo(jsonlib.dumps(checked, indent=2))
    else:
        print_check(checked)
    if checked["wrong"]:
        raise typer.Exit(3)
