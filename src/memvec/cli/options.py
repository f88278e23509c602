"""Options of the command line that several verbs share, each defined once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.registry import BUILT_IN


class Storage(StrEnum):
    """Number formats in which vectors can be stored: the names of memvec.storage.STORAGES."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


def examples(*lines: str) -> str:
    """The end of a verb's help: command lines that work as they are printed."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]{line}[/cyan]" for line in lines)


def known_encoding(name: str) -> str:
    """The name of an encoding of texts. Raises MemvecError for an unknown one.

    It is called before a model is loaded.
    """
    try:
        "".encode(name)
    except (LookupError, UnicodeError):
        raise MemvecError(f"unknown encoding '{name}': try utf-8, latin-1 or utf-16.") from None
    return name


def recipe_help(name: str, more: str = "") -> str:
    """The documentation of a field of the recipe, and `more`, as a sentence of a help text."""
    text = str(Recipe.__dataclass_fields__[name].metadata["help"]) + more
    return f"{text[0].upper()}{text[1:]}."


# ---------------------------------------------------------------------- the model

Model = Annotated[
    str, typer.Option("--model", "-m", help="Hub id, local folder, or the built-in 'pocket'.")
]
ModelOfFile = Annotated[
    str | None, typer.Option("--model", "-m", help="Default: the model named in the file.")
]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hub model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype: float32, bfloat16, float16, bfloat16-autocast; auto: float32 on a CPU, "
        "bfloat16 on a GPU."
    ),
]
DtypeOfFile = Annotated[
    str | None, typer.Option(help="Dtype of the model; default: the one it was crammed in.")
]
Load = Annotated[
    list[str] | None,
    typer.Option(
        "--load",
        help="For big models: device_map=auto, quantize=8bit or 4bit, checkpointing, offload. "
        "For GPUs: graphs.",
    ),
]
StudyLoad = Annotated[
    list[str] | None,
    typer.Option(
        "--load",
        help="For big models: device_map=auto, checkpointing, offload. For GPUs: graphs. The spec "
        "says whether weights are quantized.",
    ),
]
Encoder = Annotated[
    Path | None, typer.Option(help="File of a one-pass encoder; default: the model folder's own.")
]

# ---------------------------------------------------------------------- files and texts

TextFile = Annotated[str, typer.Argument(help="A text file, or - for standard input.")]
VectorFile = Annotated[str, typer.Argument(help=r"A file of \[mem] vectors.")]
Encoding = Annotated[str, typer.Option(callback=known_encoding, help="Encoding of the text.")]
MaxBytes = Annotated[int, typer.Option(help="Maximum size of the text, in bytes.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
ForceWeights = Annotated[
    bool, typer.Option("--force", help="Continue even if the model has other weights.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

# ---------------------------------------------------------------------- cramming

Vectors = Annotated[int, typer.Option(help=r"\[mem] vectors per passage (K).")]
Halve = Annotated[
    bool,
    typer.Option(
        help="Cut a passage that is not exact in two and cram the halves; otherwise it stays, with "
        "the tokens that come back."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(help="Tokens per passage; default: chosen by the information in the text."),
]
Preset = Annotated[
    str, typer.Option(help=f"Recipe: {', '.join(BUILT_IN['preset'])}, or one of a plug-in.")
]
Space = Annotated[
    str | None,
    typer.Option(
        "--space", help=recipe_help("space", "; the preset of this name, if there is one")
    ),
]
Steps = Annotated[int | None, typer.Option(help=recipe_help("steps"))]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other field of the recipe, e.g. --set temperature=0.5."),
]
StorageFormat = Annotated[
    Storage,
    typer.Option(
        "--storage", help="Number format of the vectors; integers have one scale per vector."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Passages crammed at once; default: what the memory allows.")
]
Seats = Annotated[int | None, typer.Option("--seats", hidden=True)]

# ---------------------------------------------------------------------- workers

WorkerCount = Annotated[
    int,
    typer.Option(
        "--workers", help="Workers on this machine (they need Ray); 0: only this process."
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--on", help="Address of a Ray cluster, ray://host:port; it gets one worker per device."
    ),
]
