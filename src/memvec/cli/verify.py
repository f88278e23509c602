"""`memvec verify`: decode a file freely, and compare every passage with its hash."""

from __future__ import annotations

import typer

from memvec.cli import options
from memvec.cli.common import ModelChoice, open_file

EXAMPLES = options.examples("memvec verify letter.mem", "memvec verify letter.mem --dtype bfloat16")


def verify(
    file: options.VectorFile,
    model: options.ModelOfFile = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOfFile = None,
    load: options.Load = None,
    force: options.ForceWeights = False,
    json: options.Json = False,
) -> None:
    """Reload, decode freely, compare every passage with its hash. Exit 0 only if all are exact."""
    from memvec.certificate import certificate_of
    from memvec.cli import display

    mem, lm = open_file(file, ModelChoice.of(model, revision, device, dtype, load))
    decoded = mem.decode_passages(lm, force=force)
    certificate, exact = certificate_of(lm, mem, decoded)
    if certificate["exact"]:
        mem.restored(lm, decoded)  # the bytes too, not only the tokens
    if json:
        typer.echo(display.to_json({**certificate, "each": exact}))
    else:
        display.certificate(mem, certificate, exact)
    if not certificate["exact"]:
        raise typer.Exit(3)
