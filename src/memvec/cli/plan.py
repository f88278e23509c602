"""`memvec plan`: what a text will take, from cramming a sample of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from memvec.cli import options
from memvec.cli.common import ModelChoice, check_seed, preset_of, recipe_of, renamed_seats
from memvec.cli.expected import duration, number_of
from memvec.errors import MemvecError, check_minimum
from memvec.writing import pretty_json

if TYPE_CHECKING:
    from memvec.lab.plan import Plan
    from memvec.statistics import Mean

EXAMPLES = options.examples("memvec plan book.txt", "memvec plan book.txt --vectors 4 --json")

Sample = Annotated[int, typer.Option(help="Passages to cram, spread over the text.")]
Seed = Annotated[int, typer.Option(help="Seed of the places where passages are taken.")]


def plan(
    file: options.TextFile,
    model: options.Model = "pocket",
    vectors: options.Vectors = 1,
    tokens: options.Tokens = None,
    sample: Sample = 32,
    space: options.Space = None,
    preset: options.Preset = "default",
    steps: options.Steps = None,
    set_: options.Set = None,
    storage: options.StorageFormat = options.Storage.float32,
    batch_size: options.BatchSize = None,
    seats: options.Seats = None,
    seed: Seed = 0,
    encoding: options.Encoding = "utf-8",
    max_bytes: options.MaxBytes = 4_000_000,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    load: options.Load = None,
    json: options.Json = False,
) -> None:
    """Estimate the vectors, bytes and minutes that a text will take, from a sample of it."""
    recipe = recipe_of(preset_of(preset, space), set_, space=space, steps=steps)
    if preset == "one-step":
        raise MemvecError("plan is for vectors that decode token by token, not for one step.")
    batch_size = renamed_seats(batch_size, seats)
    check_minimum(1, vectors=vectors, tokens=tokens, batch_size=batch_size, max_bytes=max_bytes)
    check_minimum(2, sample=sample)
    check_seed(seed)
    choice = ModelChoice.of(model, revision, device, dtype, load)

    from memvec.cli.progress import cram_progress
    from memvec.lab.plan import plan as plan_document
    from memvec.passages.documents import peek, read_document

    peek(file, max_bytes)
    lm = choice.load()
    document = read_document(lm, file, encoding=encoding, largest=max_bytes)
    with cram_progress(f"a sample of {file} with {lm.name}") as show:
        planned = plan_document(
            lm,
            document,
            vectors=vectors,
            tokens=tokens,
            recipe=recipe,
            batch_size=batch_size,
            storage=storage.value,
            sample=sample,
            seed=seed,
            on_status=show,
        )
    if json:
        typer.echo(pretty_json({"file": file, "model": lm.name, **planned.record()}))
    else:
        _print_plan(planned, file, storage.value)


def _print_plan(plan: Plan, file: str, storage: str) -> None:
    """Print the table of `memvec plan`: every total with its 95 % interval."""
    from memvec.cli.display import facts_table, out

    table = facts_table(f"{file}: what cramming all of it will take")
    table.add_row("text", f"{plan.text_bytes} bytes, {plan.tokens} tokens")
    inexact = f"; {plan.inexact} of their pieces did not become exact" if plan.inexact else ""
    table.add_row(
        "sample",
        f"{number_of(plan.sampled, 'passage')}, {plan.sampled_tokens} tokens, crammed in "
        f"{duration(plan.sampled_seconds)}{inexact}",
    )
    table.add_row("tokens per vector", _interval(plan.tokens_per_vector, 1))
    table.add_row("bits per vector", _interval(plan.bits_per_vector, 0))
    table.add_row("vectors", _interval(plan.vectors, 0))
    table.add_row("bytes of vectors", f"{_interval(plan.vector_bytes, 0)} in {storage}")
    t = plan.seconds
    low, high = (duration(max(0.0, s)) for s in (t.low, t.high))
    table.add_row("time", f"{duration(t.mean)}, {low} to {high}")
    out.print(table)


def _interval(mean: Mean, digits: int) -> str:
    if math.isnan(mean.low):
        return f"{mean.mean:.{digits}f}"
    low = max(0.0, mean.low)  # a symmetric interval of few passages may begin below 0
    return f"{mean.mean:.{digits}f}, {low:.{digits}f} to {mean.high:.{digits}f}"
