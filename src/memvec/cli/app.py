"""The verbs of the command, and how errors become one sentence and an exit code.

Nothing heavy is imported before a verb runs, so `--help` is instant. Each verb is a file of this
package; `options` has the options that they share, `common` what they do with them.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any, NoReturn

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
from memvec.cli.arguments import as_options, options_of
from memvec.errors import MemvecError, SlowPathWarning, UntestedVersionWarning, printable


class _Verbs(typer.core.TyperGroup):
    """The verbs. Ctrl-C prints one line, unless a verb that keeps its work has printed one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not isinstance(command, typer.core.TyperGroup):
            _refuse_repeated(command, typer.Context(command, parent=ctx), rest)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("memvec: interrupted.", err=True)
            raise typer.Exit(130) from None


def _refuse_repeated(command: Any, ctx: Any, args: list[str]) -> None:
    """Raise MemvecError for an option of one value that is given twice: one would be lost."""
    try:
        _, _, order = command.make_parser(ctx).parse_args(list(args))
    except Exception:  # whatever is wrong, the command itself says it
        return
    for option in order:
        one = option.param_type_name == "option" and not (option.multiple or option.is_flag)
        if one and order.count(option) > 1:
            raise MemvecError(f"{max(option.opts, key=len)} is given twice: give it once.")


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
app.add_typer(study.app, name="study", cls=_Verbs)
app.add_typer(encoder.app, name="encoder", cls=_Verbs)
app.add_typer(trigger.app, name="trigger", cls=_Verbs)
sentences.lab.add_typer(sentences.app, name="sentences", cls=_Verbs)
app.add_typer(sentences.lab, name="lab", cls=_Verbs)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"memvec {__version__}")
        raise typer.Exit


def run() -> None:
    """Run the command line: errors become one sentence and an exit code; Ctrl-C becomes 130."""
    warnings.showwarning = _one_line
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a sign shows its code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except MemvecError as error:
        known = set(options_of(typer.main.get_command(app)))
        _end(as_options(str(error), known), error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OverflowError:
        _end("a number is too large: whole numbers have at most 64 bits.")
    except OSError as error:  # a name that is too long, a disk that went away
        name = error.filename or "a file or standard output"
        _end(f"{name} cannot be read or written: {error.strerror or error}.")


def _end(sentence: str, code: int = 2) -> NoReturn:
    """Print one sentence on standard error and exit."""
    typer.echo(f"memvec: {printable(sentence)}", err=True)
    sys.exit(code)


def _one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """A warning as one line on standard error, without the place in the code."""
    ours = issubclass(category, SlowPathWarning | UntestedVersionWarning)
    typer.echo(
        f"memvec: {'' if ours else category.__name__ + ': '}{printable(str(message))}", err=True
    )
