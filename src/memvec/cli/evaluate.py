r"""`memvec eval`: tasks of lm-evaluation-harness with something else in the context's place."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec.cli import options
from memvec.cli.common import ModelChoice, recipe_of, reporting_interrupt
from memvec.errors import MemvecError, printable
from memvec.writing import pretty_json

if TYPE_CHECKING:
    from memvec.cram_job import CramStatus
    from memvec.usable.receipts import Figure

EXAMPLES = options.examples(
    "memvec eval cloze --include-path examples/cloze --limit 8 --receipts receipts",
    "memvec eval --rescore receipts",
)

Tasks = Annotated[list[str] | None, typer.Argument(help="Tasks of lm-evaluation-harness, by name.")]
Columns = Annotated[
    str, typer.Option(help="What stands for the context: full, none, truncated, crammed.")
]
Tokens = Annotated[
    int, typer.Option(help="A context is cut into equal passages of at most so many tokens.")
]
Fewshot = Annotated[
    int | None, typer.Option(help="Worked examples before a question; default: the task's.")
]
Split = Annotated[
    str,
    typer.Option(help=r"The question begins where this text occurs last; \n: a new line."),
]
Limit = Annotated[int | None, typer.Option(help="Maximum documents of each task; default: all.")]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps crammed contexts.")]
Receipts = Annotated[Path | None, typer.Option(help="Folder for the receipts.")]
Rescore = Annotated[
    Path | None, typer.Option(help="Compute the scores of a folder of receipts again.")
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with task files of your own.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of worked examples.")]


def evaluate(
    tasks: Tasks = None,
    columns: Columns = "full,none,truncated,crammed",
    model: options.Model = "pocket",
    vectors: options.Vectors = 8,
    tokens: Tokens = 48,
    fewshot: Fewshot = None,
    split: Split = r"\n\n",
    limit: Limit = None,
    cache: Cache = None,
    receipts: Receipts = None,
    rescore: Rescore = None,
    include_path: IncludePath = None,
    seed: Seed = 0,
    preset: options.Preset = "usable",
    set_: options.Set = None,
    batch_size: options.BatchSize = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    load: options.Load = None,
    json: options.Json = False,
) -> None:
    """Score tasks with the context, without it, and with its vectors in its place."""
    options_given = dict(locals())
    if rescore is not None:
        _refuse_beside_rescore(options_given)
        _rescored(rescore, json)
        return
    from memvec.usable.columns import column_named
    from memvec.usable.evaluate import Evaluation
    from memvec.usable.evaluate import evaluate as run

    chosen = tuple(column_named(name.strip()) for name in columns.split(",") if name.strip())
    recipe = recipe_of(preset, set_)
    what = Evaluation(
        tasks=tuple(tasks or ()),
        columns=chosen,
        vectors=vectors,
        tokens=tokens,
        recipe=recipe,
        split=split.replace("\\n", "\n"),
        cache=cache,
        receipts=receipts,
        tasks_folder=include_path,
        limit=limit,
        examples=fewshot,
        batch_size=batch_size,
        seed=seed,
    )
    what.check()
    lm = ModelChoice.of(model, revision, device, dtype, load).load()
    kept = "Nothing was kept: --cache keeps crammed contexts."
    if cache is not None:
        kept = f"Crammed contexts are kept in {cache}: the same command takes them from there."
    with reporting_interrupt(lambda: kept), _progress(lm.name) as show:
        figures = run(lm, what, lambda column: typer.echo(f"Column {column} ...", err=True), show)
    _show(figures, json)


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[CramStatus], None]]:
    """The progress of cramming, from the moment that it begins: other columns have none."""
    from memvec.cli.progress import cram_progress

    with contextlib.ExitStack() as stack:
        bars: list[Callable[[CramStatus], None]] = []

        def show(status: CramStatus) -> None:
            if not bars:
                bars.append(stack.enter_context(cram_progress(f"contexts with {name}")))
            bars[0](status)

        yield show


def _refuse_beside_rescore(options: dict[str, Any]) -> None:
    """Raise MemvecError for anything but --json beside --rescore: it would do nothing."""
    defaults = inspect.signature(evaluate).parameters
    for name, value in options.items():
        if name not in ("rescore", "json") and value != defaults[name].default:
            what = "the tasks" if name == "tasks" else "--" + name.strip("_").replace("_", "-")
            raise MemvecError(f"--rescore reads receipts only: leave out {what}.")


def _rescored(folder: Path, json: bool) -> None:
    """The table of a folder of receipts."""
    from memvec.usable import receipts

    _show(receipts.score_figures(receipts.read(folder)), json)


def _show(figures: Sequence[Figure], json: bool) -> None:

    if json:
        typer.echo(pretty_json([figure.model_dump() for figure in figures]))
    else:
        typer.echo("\n".join(_lines(figures)))


def _lines(figures: Sequence[Figure]) -> list[str]:
    """The table as text: a line for each task, score and column."""
    head = ("task", "score", "column", "value", "95 % interval", "n", "kept", "inputs", "exact")
    rows = [head, *(_row(figure) for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _row(f: Figure) -> tuple[str, ...]:
    share = ""
    if f.kept is not None and f.kept_interval is not None:
        low, high = f.kept_interval
        share = f"{f.kept:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")
    return (
        f.task,
        f.score,
        f.column,
        f"{f.value:.3f}",
        "" if math.isnan(f.low) else f"[{f.low:.3f}, {f.high:.3f}]",
        str(f.documents),
        share,
        f"{f.slots:.1f} of {f.context_tokens:.1f}",
        f"{f.exact} of {f.documents}" if f.column == "crammed" else "",
    )
