"""`memvec verify`: decode a file freely, and compare every passage with its hash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from memvec.cli import options
from memvec.cli.common import ModelChoice, open_file

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM
    from memvec.vectors import MemVectors

EXAMPLES = options.examples("memvec verify letter.mem", "memvec verify letter.mem --dtype bfloat16")

Use = Annotated[
    bool,
    typer.Option("--use", help="Also measure what the vectors are worth as context."),
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
    json: options.Json = False,
) -> None:
    """Reload, decode freely, compare every passage with its hash. Exit 0 only if all are exact."""
    from memvec.certificate import certificate_of
    from memvec.cli import display
    from memvec.cli.use_tables import show_worth

    mem, lm = open_file(file, ModelChoice.of(model, revision, device, dtype, load))
    decoded = mem.decode_passages(lm, force=force)
    certificate, exact = certificate_of(lm, mem, decoded)
    if certificate["exact"]:
        mem.restored(lm, decoded)  # the bytes too, not only the tokens
    worth = _worth(lm, mem, decoded) if use and certificate["exact"] else None
    if json:
        found = {} if worth is None else {"use": worth}
        typer.echo(display.to_json({**certificate, "each": exact, **found}))
    else:
        display.certificate(mem, certificate, exact)
        if worth is not None:
            show_worth(worth)
    if not certificate["exact"]:
        raise typer.Exit(3)


def _worth(lm: FrozenLM, mem: MemVectors, decoded: list[list[int]]) -> dict[str, Any]:
    """The certificate of use. Raises MemvecError for vectors without a trigger."""
    from memvec.usable.certificate import certify_use

    return certify_use(lm, mem, decoded).model_dump(mode="json")
