"""`memvec inspect`: what a file of vectors holds, without a model."""

from __future__ import annotations

import typer

from memvec.cli import options
from memvec.writing import pretty_json

EXAMPLES = options.examples("memvec inspect letter.mem", "memvec inspect letter.mem --json")


def inspect(file: options.VectorFile, json: options.Json = False) -> None:
    """Show what a file holds: model, passages, tokens per vector, bits, margins, certificate."""
    from memvec.cli import display
    from memvec.cli.use_tables import show_use, stored_use
    from memvec.vectors import MemVectors

    mem = MemVectors.load(file)
    if json:
        typer.echo(pretty_json({**mem.summary(), **mem.header.model_dump(mode="json")}))
    else:
        display.inspect(mem, file)
        if (use := stored_use(mem, file)) is not None:
            show_use(use)
