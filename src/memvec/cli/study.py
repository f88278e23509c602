"""`memvec study`: run, validate, ls, resume, export, report, check."""

from __future__ import annotations

import importlib.util
import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.lab.study.pool import Pool
    from memvec.lab.study.run import Status
    from memvec.lab.study.spec import ModelSpec, Spec

app = typer.Typer(
    name="study",
    help="Capacity studies: measure a model the paper's way and the exact way, and see it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

NEEDED = ("matplotlib", "pandas")

SpecArgument = Annotated[Path, typer.Argument(help="A spec: a TOML file.")]
FolderArgument = Annotated[Path, typer.Argument(help="Folder of a study.")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Run the spec with this model instead.")
]
OutOption = Annotated[
    Path | None, typer.Option("-o", "--out", help="Folder of the study; default: <name>.study.")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda:0; default: the spec's.")]
WorkersOption = Annotated[
    int, typer.Option(help="Ray workers on this machine (memvec[ray]); 0: this process alone.")
]
OnOption = Annotated[
    str | None, typer.Option("--on", help="A Ray cluster, ray://host:port; one worker per device.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


@app.callback()
def _needs() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MemvecError(
            f"studies need {', '.join(missing)}: pip install 'memvec[study]' brings them."
        )


@app.command(
    epilog=_examples(
        "memvec study validate studies/pocket-quick.toml",
        "memvec study validate studies/paper-table1.toml --json",
    )
)
def validate(spec: SpecArgument, model: ModelOption = None, json: JsonOption = False) -> None:
    """Say what would run, how many passages, time and memory at most, and what is missing."""
    from memvec.lab.study.cells import expand
    from memvec.lab.study.price import CPU_FLOPS, GPU_FLOPS, price, problems
    from memvec.lab.study.spec import read_spec

    checked = read_spec(spec, model)
    planned = expand(checked, spec.parent)
    prices, missing = price(planned), problems(checked, planned, spec.parent)
    if json:
        found = {
            "name": checked.name,
            "cells": len(planned),
            "passages": sum(p.passages for p in planned),
            "models": [vars(p) for p in prices],
            "missing": missing,
        }
        typer.echo(jsonlib.dumps(found, indent=2))
    else:
        from rich.markup import escape
        from rich.table import Table

        from memvec.display import out

        title = escape(f"{checked.name}: {checked.about}")
        table = Table(title=title, title_justify="left")
        for column in ("model", "cells", "passages", "GPU-hours ≤", "CPU-hours ≤", "memory"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for p in prices:
            cost = [
                "?" if v is None else f"{v:,.2f}" for v in (p.gpu_hours, p.cpu_hours, p.memory_gib)
            ]
            table.add_row(
                escape(p.model), str(p.cells), str(p.passages), *cost[:2], f"{cost[2]} GiB"
            )
        out.print(table)
        out.print(
            f"At most, if every passage used all its steps; assumes {GPU_FLOPS / 1e12:.0f} TFLOP/s "
            f"on a GPU, {CPU_FLOPS / 1e9:.0f} GFLOP/s on a CPU, 4 operations per parameter and "
            "token."
        )
        for sentence in missing:
            out.print(f"[red]missing:[/red] {escape(sentence)}")
    if missing:
        raise typer.Exit(2)


@app.command(
    epilog=_examples(
        "memvec study run studies/pocket-quick.toml",
        "memvec study run studies/paper-table1.toml --on ray://head:10001 -o table1.study",
    )
)
def run(
    spec: SpecArgument,
    out: OutOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
    on: OnOption = None,
    json: JsonOption = False,
) -> None:
    """Run what is left of a study; the same command goes on after any end."""
    from memvec.lab.study.spec import read_spec

    checked = read_spec(spec, model)
    folder = out or Path(f"{checked.name}.study")
    # The override belongs to the study: resume must find it again.
    text = jsonlib.dumps({"toml": spec.read_text("utf-8"), "model": model})
    _run(checked, folder, spec.parent.resolve(), text, device, workers, on, json)


@app.command(
    epilog=_examples(
        "memvec study resume pocket-quick.study",
        "memvec study resume pocket-full.study --workers 2",
    )
)
def resume(
    folder: FolderArgument,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
    on: OnOption = None,
    json: JsonOption = False,
) -> None:
    """Go on with a study from its own copy of the spec."""
    from memvec.lab.study.spec import parse_spec
    from memvec.lab.study.store import Store

    with Store(folder) as store:
        text, base = store.meta("spec"), store.meta("base")
    if not text:
        raise MemvecError(f"{folder} has no spec in it: use study run.")
    kept = jsonlib.loads(text)
    checked = parse_spec(kept["toml"], str(folder), kept["model"])
    _run(checked, folder, Path(base or "."), text, device, workers, on, json)


def _run(
    spec: Spec,
    folder: Path,
    base: Path,
    text: str,
    device: str | None,
    workers: int,
    on: str | None,
    json: bool,
) -> None:
    from memvec.display import say
    from memvec.lab.study.run import run_study
    from memvec.lab.study.show import study_progress

    if workers < 0:
        raise MemvecError(f"--workers must be at least 0, not {workers}.")
    where = device or spec.device
    with study_progress(spec.name) as show:
        status: Status = run_study(
            spec,
            folder,
            _pool_maker(where, workers, on),
            base=base,
            text=text,
            on_status=show,
        )
    if json:
        typer.echo(jsonlib.dumps(vars(status)))
        return
    say(
        f"{spec.name}: {status.rows} of {status.planned} passages in {folder}, {status.rows_now} "
        f"of them now in {status.seconds:.0f} s. See them: memvec study report {folder}"
    )


def _pool_maker(device: str, workers: int, on: str | None) -> Callable[[ModelSpec], Pool]:
    def make(model: ModelSpec) -> Pool:
        if workers or on:
            from memvec.lab.study.remote import Remote

            return Remote(model, workers=workers, address=on, device=device)
        from memvec.display import say
        from memvec.lab.study.pool import Here
        from memvec.loading import load_lm

        lm = load_lm(model.name, revision=model.revision, device=device, dtype=model.dtype)
        d = lm.description()
        say(
            f"{d['name']}: D {lm.width}, V {lm.vocab_size}, {d['dtype']} on {d['device']}, "
            f"{d['attention']} attention"
        )
        return Here(lm)

    return make


@app.command(epilog=_examples("memvec study ls", "memvec study ls pocket-quick.study --json"))
def ls(
    folder: Annotated[Path, typer.Argument(help="A study, or a folder of studies.")] = Path(),
    json: JsonOption = False,
) -> None:
    """List studies, or the cells of one."""
    from rich.markup import escape
    from rich.table import Table

    from memvec.display import out, say
    from memvec.lab.study.store import Store

    if not folder.is_dir():
        raise MemvecError(f"there is no folder {folder}.")
    rows: list[dict[str, Any]] = []
    if (folder / "study.sqlite").is_file():
        with Store(folder) as store:
            query = (
                "SELECT protocol, model, source, length, vectors AS K, seed, planned, "
                "(SELECT count(*) FROM rows WHERE rows.cell = cells.cell) AS done "
                "FROM cells ORDER BY planned = 0, position"
            )
            cursor = store.db.execute(query)
            names = [d[0] for d in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor]
    else:
        for file in sorted(folder.glob("*/study.sqlite")):
            try:
                with Store(file.parent) as store:
                    done, planned = store.counts()
                    rows.append(
                        {
                            "study": str(file.parent),
                            "name": store.meta("name"),
                            "done": done,
                            "planned": planned,
                        }
                    )
            except MemvecError as error:  # the other studies can be listed all the same
                say(str(error))
    if json:
        typer.echo(jsonlib.dumps(rows, indent=2))
        return
    if not rows:
        out.print(f"No studies in {folder}.", markup=False)
        return
    table = Table()
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*[escape(str(v)) for v in row.values()])
    out.print(table)


@app.command(
    epilog=_examples(
        "memvec study export pocket-quick.study --csv rows.csv",
        "memvec study export pocket-quick.study --parquet rows.parquet",
    )
)
def export(
    folder: FolderArgument,
    parquet: Annotated[Path | None, typer.Option(help="Write a Parquet file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file.")] = None,
) -> None:
    """Write all rows with their cells' settings, and a sentence about each column."""
    from memvec.display import say
    from memvec.lab.study.export import export_rows

    if parquet is None and csv is None:
        raise MemvecError("name a file: --csv rows.csv or --parquet rows.parquet.")
    targets = ((parquet, ".parquet"), (csv, ".csv"))
    for target, ending in targets:  # before anything is written
        if target is not None and target.suffix != ending:
            raise MemvecError(f"--{ending[1:]} {target}: its name must end in {ending}.")
    for target, _ in targets:
        if target is not None:
            n = export_rows(folder, target)
            say(f"{n} rows in {target}, columns explained in {target}.columns.json")


@app.command(
    epilog=_examples(
        "memvec study report pocket-quick.study",
        "memvec study report table1.study --compare paper --format latex",
    )
)
def report(
    folder: FolderArgument,
    out: OutOption = None,
    compare: Annotated[
        str | None, typer.Option(help="'paper': published values beside ours.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="Tables on the terminal: text, markdown, latex, csv.")
    ] = "text",
    figures: Annotated[bool, typer.Option(help="Draw PDF, SVG and PNG figures.")] = True,
) -> None:
    """Tables, figures with their data, and one self-contained page."""
    from memvec.lab.report.report import FORMATS, write_report

    if compare not in (None, "paper"):
        raise MemvecError(f"--compare knows 'paper', not '{compare}'.")
    if format_ not in FORMATS:
        from memvec.errors import did_you_mean

        raise MemvecError(f"unknown --format '{format_}': {did_you_mean(format_, FORMATS)}")
    write_report(
        folder,
        out or folder / "report",
        compare=compare == "paper",
        shown=format_,
        figures=figures,
    )


@app.command(
    epilog=_examples(
        "memvec study check pocket-quick.study", "memvec study check DIR --sample 20 --json"
    )
)
def check(
    folder: FolderArgument,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the study's model is now.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Rows to recompute; 0: all.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Recompute every column from the stored vectors, slowly and independently."""
    from rich.markup import escape

    from memvec.display import out
    from memvec.lab.study.check import check_study

    found = check_study(folder, model=model, sample=sample, device=device)
    if json:
        typer.echo(jsonlib.dumps(found, indent=2))
    else:
        out.print(f"{found['rows']} rows recomputed; largest differences:")
        for name, worst in found["worst"].items():
            out.print(f"  {name:20} {worst:.3g}")
        for sentence in found["wrong"][:20]:
            out.print(f"[red]{escape(sentence)}[/red]")
        verdict = "[green]agree[/green]" if not found["wrong"] else "[red]DISAGREE[/red]"
        out.print(f"Stored and recomputed columns {verdict}.")
    if found["wrong"]:
        raise typer.Exit(3)
