"""`memvec export`: vectors for other software, certified as that software reads them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from memvec.cli import options
from memvec.cli.common import ModelChoice, open_file
from memvec.cli.expected import number_of
from memvec.registry import BUILT_IN
from memvec.writing import pretty_json

EXAMPLES = options.examples(
    "memvec export letter.mem --to transformers",
    "memvec export letter.mem --to vllm --dtype bfloat16 -o letter.vllm",
    "memvec export usable.mem --to vllm --context",
)

To = Annotated[
    str, typer.Option("--to", help=f"{', '.join(BUILT_IN['export'])}, or one of a plug-in.")
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder; default: FILE's name + .TO.")
]
Context = Annotated[
    bool,
    typer.Option("--context", help="Usable vectors as one item, to stand in front of any prompt."),
]
TargetDtype = Annotated[
    str | None, typer.Option(help="Dtype the target runs the model in; default: as crammed.")
]


def export(
    file: options.VectorFile,
    to: To,
    output: Output = None,
    context: Context = False,
    model: options.ModelOfFile = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: TargetDtype = None,
    load: options.Load = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write the vectors for other software, certified in the dtype and layout that it reads."""
    from memvec import export as exporting
    from memvec.cli import display
    from memvec.export.folder import check_place

    target = exporting.target(to)
    stem = Path(file).name.removesuffix(".safetensors").removesuffix(".mem")
    folder = output or Path(file).with_name(f"{stem}.{to}{'-context' if context else ''}")
    check_place(folder, force)
    choice = ModelChoice.of(model, revision, device, dtype or target.dtype, load)
    mem, lm = open_file(file, choice)
    write = exporting.export_context if context else exporting.export
    manifest = write(lm, mem, target, folder, force=force)
    if json:
        typer.echo(pretty_json({"folder": str(folder), **manifest}))
    elif context:
        use = manifest["use"]  # the vectors of several passages are read in a row
        kept = (use["in_a_row"] or use["held_out"])["contexts"]["vectors"]["kept"]
        display.say(
            f"{folder}: {manifest['inputs']} inputs for {to}, to put in front of a prompt. On "
            f"held-out continuations the vectors {_kept_gain(kept)}."
        )
    else:
        display.say(
            f"{folder}: {number_of(len(manifest['passages']), 'passage')} for "
            f"{target.description}, exact in {manifest['dtype']}."
        )
        if target.argument:
            program = shlex.quote(str(folder / "decode.py"))
            display.say(f"Decode it there: python {program} {target.argument}")


def _kept_gain(kept: float) -> str:
    """What vectors keep of the text's gain as a context; below 0 they are worse than none."""
    if kept < 0:
        return f"are a worse context than none ({kept:.2f} of the text's gain)"
    return f"keep {kept:.2f} of the text's gain"
