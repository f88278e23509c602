"""`memvec study`: validate, run, resume, ls; what is made of a study is in `study_results`."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec.cli import options
from memvec.cli.common import reporting_interrupt, study_loading
from memvec.cli.study_results import StudyFolder
from memvec.cli.study_results import app as results
from memvec.cli.study_tables import LOADING, print_prices, print_rows, without_defaults
from memvec.errors import MemvecError, check_minimum

if TYPE_CHECKING:
    from memvec.lab.study.pool import Pool
    from memvec.lab.study.run import StudyStatus
    from memvec.lab.study.spec import ModelSpec, Spec
    from memvec.lab.study.store import Store

app = typer.Typer(
    name="study",
    help="Measure how much the input vectors of a model hold, in many cells, and report it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

NEEDED = ("matplotlib", "pandas")

SpecFile = Annotated[Path, typer.Argument(help="A spec: a TOML file.")]
SpecModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Run the spec with this model instead.")
]
SpecDevice = Annotated[str | None, typer.Option(help="auto, cpu, cuda:0; default: the spec's.")]


@app.callback()
def _check_extras() -> None:
    if "--help" in sys.argv:  # of a verb: it needs no extra
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MemvecError(
            f"studies need {', '.join(missing)}: pip install '.[study]' in the repository."
        )


# ---------------------------------------------------------------------- validate


@app.command(
    epilog=options.examples(
        "memvec study validate studies/pocket-quick.toml",
        "memvec study validate studies/paper-table1.toml --json",
    )
)
def validate(spec: SpecFile, model: SpecModel = None, json: options.Json = False) -> None:
    """Show what a spec would run, its maximum of passages, time and memory, and its errors."""
    from memvec.lab.study.cells import expand
    from memvec.lab.study.price import price, problems
    from memvec.lab.study.spec import read_spec

    checked = read_spec(spec, model)
    planned = expand(checked, spec.parent)
    prices, missing = price(planned), problems(checked, planned, spec.parent)
    if json:
        summary = {
            "name": checked.name,
            "cells": len(planned),
            "passages": sum(p.passages for p in planned),
            "models": [vars(p) for p in prices],
            "missing": missing,
        }
        typer.echo(jsonlib.dumps(summary, indent=2))
    else:
        print_prices(f"{checked.name}: {checked.about}", prices, missing)
    if missing:
        raise typer.Exit(2)


# ---------------------------------------------------------------------- run, resume


@app.command(
    epilog=options.examples(
        "memvec study run studies/pocket-quick.toml",
        "memvec study run studies/paper-table1.toml --on ray://head:10001 -o table1.study",
    )
)
def run(
    spec: SpecFile,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", help="Folder of the study; default: NAME.study, with the spec's name."
        ),
    ] = None,
    model: SpecModel = None,
    device: SpecDevice = None,
    load: options.StudyLoad = None,
    workers: options.WorkerCount = 0,
    on: options.Cluster = None,
    json: options.Json = False,
) -> None:
    """Run a study. After an interruption, the same command continues it."""
    from memvec.lab.study.spec import read_spec

    checked = read_spec(spec, model)
    folder = out or Path(f"{checked.name}.study")
    # The override belongs to the study: resume must find it again.
    kept = {"toml": spec.read_text("utf-8-sig"), "model": model}
    make_pool = _pool_maker(device or checked.device, workers, on, load)
    _run(checked, folder, spec.parent.resolve(), kept, make_pool, json)


@app.command(
    epilog=options.examples(
        "memvec study resume pocket-quick.study",
        "memvec study resume pocket-full.study --workers 2",
    )
)
def resume(
    folder: StudyFolder,
    device: SpecDevice = None,
    load: options.StudyLoad = None,
    workers: options.WorkerCount = 0,
    on: options.Cluster = None,
    json: options.Json = False,
) -> None:
    """Continue a study from the copy of the spec in its folder."""
    from memvec.lab.study.spec import parse_spec
    from memvec.lab.study.store import Store

    with Store(folder) as store:
        text, base = store.meta("spec"), store.meta("base")
    if not text:
        raise MemvecError(f"{folder} has no spec in it: use study run.")
    stored = jsonlib.loads(text)
    checked = parse_spec(stored["toml"], str(folder), stored["model"])
    make_pool = _pool_maker(device or checked.device, workers, on, load)
    _run(checked, folder, Path(base or "."), stored, make_pool, json)


def _run(
    spec: Spec,
    folder: Path,
    base: Path,
    kept: dict[str, Any],
    make_pool: Callable[[ModelSpec], Pool],
    json: bool,
) -> None:
    """Run `spec`, whose files are relative to `base`, into `folder`, which keeps `kept` of it."""
    from memvec.cli.display import say
    from memvec.cli.progress import study_progress
    from memvec.lab.study.run import run_study

    sentence = f"What is finished is in {folder}; the same command goes on from there."
    with reporting_interrupt(lambda: sentence), study_progress(spec.name) as show:
        status: StudyStatus = run_study(spec, folder, make_pool, base=base, on_status=show, **kept)
    if json:
        typer.echo(jsonlib.dumps(vars(status)))
        return
    say(
        f"{spec.name}: {status.rows} of {status.planned} passages are in {folder}; this run added "
        f"{status.rows_now} in {status.seconds:.0f} s. Next: memvec study report "
        f"{shlex.quote(str(folder))}"
    )


def _pool_maker(
    device: str, workers: int, on: str | None, load: list[str] | None
) -> Callable[[ModelSpec], Pool]:
    check_minimum(0, workers=workers)
    given = study_loading(load)

    def make(model: ModelSpec) -> Pool:
        from memvec.cli import display

        pool = _pool(model)
        display.model(pool.description())
        return pool

    def _pool(model: ModelSpec) -> Pool:
        if workers or on:
            from memvec.lab.study.remote import Remote

            return Remote(model, workers=workers, address=on, device=device, options=given)
        from memvec.lab.study.pool import LocalPool
        from memvec.loading import load_lm

        lm = load_lm(
            model.name,
            revision=model.revision,
            device=device,
            dtype=model.dtype,
            quantize=model.quantize,
            **given,
        )
        return LocalPool(lm)

    return make


# ---------------------------------------------------------------------- ls


@app.command(
    epilog=options.examples("memvec study ls", "memvec study ls pocket-quick.study --json")
)
def ls(
    folder: Annotated[Path, typer.Argument(help="A study, or a folder of studies.")] = Path(),
    json: options.Json = False,
) -> None:
    """List studies, or the cells of one."""
    from memvec.lab.study.store import Store

    if not folder.is_dir():
        raise MemvecError(f"there is no folder {folder}.")
    if (folder / "study.sqlite").is_file():
        with Store(folder) as store:
            rows = _cells(store)
    else:
        rows = _studies(folder)
    if json:
        typer.echo(jsonlib.dumps(rows, indent=2))
    else:
        print_rows(rows, folder)


def _cells(store: Store) -> list[dict[str, Any]]:
    loaded = ", ".join(f"json_extract(settings, '$.{name}') AS {name}" for name in LOADING)
    cursor = store.db.execute(
        f"SELECT protocol, model, {loaded}, source, length, vectors AS K, seed, planned, "
        "(SELECT count(*) FROM rows WHERE rows.cell = cells.cell) AS done "
        "FROM cells ORDER BY planned = 0, position"
    )
    names = [description[0] for description in cursor.description]
    return without_defaults([dict(zip(names, row, strict=True)) for row in cursor])


def _studies(folder: Path) -> list[dict[str, Any]]:
    from memvec.cli.display import say
    from memvec.lab.study.store import Store

    rows = []
    for file in sorted(folder.glob("*/study.sqlite")):
        try:
            with Store(file.parent) as store:
                done, planned = store.counts()
                row = {"study": str(file.parent), "name": store.meta("name")}
                rows.append({**row, "done": done, "planned": planned})
        except MemvecError as error:  # the other studies can be listed all the same
            say(str(error))
    return rows


app.add_typer(results)
