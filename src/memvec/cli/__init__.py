"""The command `memvec`: verbs, options, tables and exit codes.

Exit codes: 0 done and exact; 2 invalid input (one sentence on stderr); 3 not exact; 130
interrupted. Nothing heavy is imported before a verb runs, so `--help` is instant. Each verb is a
file of this package; `options` has the options that they share, `common` what they do with them.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
import typer.core

from memvec import __version__
from memvec.cli import (
    cram,
    decode,
    doctor,
    encoder,
    evaluate,
    export,
    inspect,
    plan,
    sentences,
    study,
    trigger,
    use,
    verify,
)
from memvec.errors import MemvecError, SlowPathWarning, UntestedVersionWarning


class _Verbs(typer.core.TyperGroup):
    """The verbs. Ctrl-C prints one line, unless a verb that keeps its work has printed one."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("memvec: interrupted.", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="memvec",
    cls=_Verbs,
    help="Cram text into a few input vectors of a frozen language model, and get it back exactly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command(epilog=cram.EXAMPLES)(cram.cram)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=decode.EXAMPLES)(decode.decode)
app.command(epilog=verify.EXAMPLES)(verify.verify)
app.command(epilog=use.EXAMPLES)(use.use)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
app.add_typer(study.app, name="study")
app.add_typer(encoder.app, name="encoder")
app.add_typer(trigger.app, name="trigger")
app.add_typer(sentences.lab, name="lab")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"memvec {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one sentence and an exit code; Ctrl-C becomes 130."""
    warnings.showwarning = _one_line
    try:
        app()
    except MemvecError as error:
        typer.echo(f"memvec: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a name that is too long, a disk that went away
        typer.echo(
            f"memvec: {error.filename or 'a file or standard output'}: {error.strerror or error}.",
            err=True,
        )
        sys.exit(2)


def _one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line on standard error, without the place in the code."""
    ours = issubclass(category, SlowPathWarning | UntestedVersionWarning)
    typer.echo(f"memvec: {'' if ours else category.__name__ + ': '}{message}", err=True)
