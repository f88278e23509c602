"""`memvec doctor`: can this model be crammed here, and how fast?"""

from __future__ import annotations

import typer

from memvec.cli import options
from memvec.cli.common import loading_options
from memvec.writing import pretty_json

EXAMPLES = options.examples("memvec doctor", "memvec doctor --model EleutherAI/pythia-160m")


def doctor(
    model: options.Model = "pocket",
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    load: options.Load = None,
    json: options.Json = False,
) -> None:
    """Check in seconds that a model can be crammed here, and how fast."""
    from memvec.cli import display
    from memvec.lab.doctor import examine

    report = examine(model, revision=revision, device=device, dtype=dtype, **loading_options(load))
    if json:
        typer.echo(pretty_json(report))
    else:
        display.doctor(report)
    if not report["can_be_crammed"]:
        raise typer.Exit(2)
