"""`memvec verify`: decode a file freely, and compare every passage with its hash."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from memvec.cli import options
from memvec.cli.common import ModelChoice, open_file
from memvec.errors import MemvecError
from memvec.writing import pretty_json

EXAMPLES = options.examples(
    "memvec verify letter.mem",
    "memvec verify letter.mem --engine vllm --engine-python .engines/vllm/bin/python",
)

Use = Annotated[
    bool,
    typer.Option("--use", help="Also measure how well the vectors stand for the text as context."),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="Let an inference engine decode, in its own environment: transformers, peft, vllm, "
        "vllm-server, llama.cpp or mlx.",
    ),
]
EnginePython = Annotated[
    Path | None,
    typer.Option(help="Python of the engine's environment; default: the one that runs memvec."),
]
EngineModel = Annotated[
    Path | None,
    typer.Option(
        help="Folder that the engine reads the model from, or a GGUF file; default: the model's."
    ),
]


def verify(
    file: options.VectorFile,
    model: options.ModelOfFile = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOfFile = None,
    load: options.Load = None,
    force: options.ForceWeights = False,
    use: Use = False,
    engine: EngineName = None,
    engine_python: EnginePython = None,
    engine_model: EngineModel = None,
    json: options.Json = False,
) -> None:
    """Decode a file freely; compare each passage with its hash. Exit 0 only if all are exact."""
    from memvec.certificate import certificate_of
    from memvec.cli import display
    from memvec.cli.progress import decoding_progress
    from memvec.cli.use_tables import show_use
    from memvec.usable.certificate import certify_use, check_usable
    from memvec.workers import decode_passages

    mem, lm = open_file(file, ModelChoice.of(model, revision, device, dtype, load))
    if use:
        check_usable(mem)  # before minutes of decoding
    if engine is None:
        _refuse_alone(engine_python, engine_model)
        with decoding_progress(str(file)) as show:
            decoded = decode_passages(lm, mem, force=force, on_share=show)
        certificate, exact = certificate_of(lm, mem, decoded)
    else:
        from memvec.engines import decode_with

        if force:
            raise MemvecError(
                "an engine decodes with the weights that the file names: leave out --force."
            )
        python = engine_python or sys.executable
        version, decoded = decode_with(engine, lm, mem, model=engine_model, python=python)
        certificate, exact = certificate_of(lm, mem, decoded)
        # What else a certificate says is of the decoder here, which did not run.
        names = ("exact", "passages", "exact_passages", "decoded_in", "date")
        certificate = {"decoded_by": version, **{name: certificate[name] for name in names}}
    if certificate["exact"]:
        mem.restored(lm, decoded)  # the bytes too, not only the tokens
    measured = None
    if use and certificate["exact"]:
        measured = certify_use(lm, mem, decoded, force=force).model_dump()
    if json:
        of_use = {} if measured is None else {"use": measured}
        typer.echo(pretty_json({**certificate, "each": exact, **of_use}))
    else:
        display.certificate(mem, certificate, exact)
        if measured is not None:
            show_use(measured)
    if not certificate["exact"]:
        raise typer.Exit(3)


def _refuse_alone(python: Path | None, model: Path | None) -> None:
    """Raise MemvecError for options of an engine where there is none."""
    for given, option in ((python, "--engine-python"), (model, "--engine-model")):
        if given is not None:
            raise MemvecError(f"{option} is for an engine: name one with --engine.")
