"""What the commands that train beside a frozen model share: their text, and the file they write."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memvec.cli.common import check_seed, check_target, reporting_interrupt
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from memvec.lab.sources.text_readers import NamedText
    from memvec.model.lm import FrozenLM

PIECE = 100_000  # characters tokenised at once: tokens of a novel take 100 times its memory

Texts = Annotated[
    str, typer.Option("--text", help="txt, jsonl, parquet, csv, a folder of them, or -.")
]
Where = Annotated[
    list[str] | None, typer.Option(help="Keep table rows with COLUMN=VALUE, e.g. split=train.")
]
Column = Annotated[str, typer.Option(help="Column of a table that holds the text.")]


def target_of(model: str, name: str, out: Path | None, force: bool) -> Path:
    """The file to write, by default `name` in the model's folder, or here if it has none.

    Raises MemvecError if it exists (unless `force`), is no earlier encoder or trigger, or cannot be
    written.
    """
    target = out or (Path(model) if Path(model).is_dir() else Path()) / name
    check_target(target, force)
    if target.exists() and not was_trained(target, "memvec-encoder", "memvec-trigger"):
        raise MemvecError(f"{target} is no earlier encoder or trigger: name another file with -o.")
    return target


def was_trained(file: Path, *formats: str) -> bool:
    """True for a file that such a training wrote: --force replaces nothing else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return False
    return metadata.get("format") in formats


@contextlib.contextmanager
def alone_at(partial: Path) -> Iterator[None]:
    """Hold a training's checkpoint against another process.

    Raises MemvecError if there is another.
    """
    lock = partial.with_name(partial.name + ".lock")
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(held.fileno()), lock.stat()):
                raise OSError  # the one that held it has just taken it away
        except OSError:
            raise MemvecError(
                f"another memvec is writing {partial.stem}: wait for it, or name another file with "
                "-o."
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def kept_in(partial: Path) -> str:
    """What an interrupted training has kept, a sentence."""
    if not partial.exists():
        return "Nothing was kept yet."
    return f"The last checkpoint is in {partial}; the same command goes on from there."


@contextlib.contextmanager
def checkpointed(partial: Path) -> Iterator[None]:
    """A training with this checkpoint: locked, with a line for resuming and for what is kept.

    Raises MemvecError if another process trains there.
    """
    from memvec.cli.display import say

    with reporting_interrupt(lambda: kept_in(partial)), alone_at(partial):
        if partial.exists():
            say(f"There is a checkpoint, {partial}: checking that it is of this training.")
        yield


def token_stream(
    lm: FrozenLM, text: str, column: str, where: list[str] | None
) -> Int[Tensor, " N"]:
    """Token ids of all the text, one text after the other. Raises MemvecError as `texts_of`."""
    import torch

    ids: list[int] = []
    for _, content in texts_of(text, column, where):
        for start in range(0, len(content), PIECE):
            ids += lm.tokenize(content[start : start + PIECE])
    return torch.tensor(ids)


def texts_of(text: str, column: str, where: list[str] | None) -> list[NamedText]:
    """Name and content of each text of --text.

    Raises MemvecError for --column or --where without a table, and as `read_texts`.
    """
    from memvec.lab.sources.text_readers import TABLES, files_of, read_texts, resolve

    values = pairs_of(where)
    files = [] if text == "-" else files_of(resolve(text, None))
    for option, given in (("--where", bool(where)), ("--column", column != "text")):
        if given and not any(file.suffix in TABLES for file in files):
            raise MemvecError(f"{option} is of tables, and {text} has none: leave it out.")
    return read_texts(text, None, column, values)


def pairs_of(where: list[str] | None) -> dict[str, str]:
    """Columns and values from --where. Raises MemvecError for one without an equals sign."""
    values = {}
    for pair in where or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise MemvecError(f"--where takes COLUMN=VALUE, not '{pair}'.")
        values[name] = value
    return values


def drawn(
    stream: Int[Tensor, " N"], text: str, tokens: int, count: int, seed: int
) -> Int[Tensor, "count tokens"]:
    """Passages from random places of a text that do not overlap, so that each counts as one.

    Raises MemvecError if it is too short.
    """
    import torch

    if (spare := len(stream) - count * tokens) < 0:
        raise MemvecError(
            f"{text} has {len(stream)} tokens, too few for {count} passages of {tokens}."
        )
    check_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - tokens + 1, (count,), generator=draw)
    if bool((starts.sort().values.diff() < tokens).any()):
        # Where they begin if each had no length; then each moves those after it by its own.
        gaps = torch.randint(spare + 1, (count,), generator=draw).sort().values
        starts = (gaps + tokens * torch.arange(count))[torch.randperm(count, generator=draw)]
    return stream[starts[:, None] + torch.arange(tokens)]
