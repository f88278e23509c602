"""What the commands that train beside a frozen model share: their text, and the file they write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memvec.cli.common import check_seed, check_target
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

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

    Raises MemvecError if it exists (unless `force`) or cannot be written.
    """
    target = out or (Path(model) if Path(model).is_dir() else Path()) / name
    check_target(target, force)
    return target


def kept_in(partial: Path) -> str:
    """What an interrupted training has kept, a sentence."""
    if not partial.exists():
        return "Nothing was kept yet."
    return f"The last checkpoint is in {partial}; the same command goes on from there."


def token_stream(
    lm: FrozenLM, text: str, column: str, where: list[str] | None
) -> Int[Tensor, " N"]:
    """Token ids of all the text, one text after the other."""
    import torch

    from memvec.lab.sources.text_readers import read_texts

    ids: list[int] = []
    for _, one in read_texts(text, None, column, pairs_of(where)):
        for start in range(0, len(one), PIECE):
            ids += lm.tokenize(one[start : start + PIECE])
    return torch.tensor(ids)


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

    if (left := len(stream) - count * tokens) < 0:
        raise MemvecError(
            f"{text} has {len(stream)} tokens, too few for {count} passages of {tokens}."
        )
    check_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - tokens + 1, (count,), generator=draw)
    if bool((starts.sort().values.diff() < tokens).any()):
        # Where they begin if each had no length; then each moves those behind it by its own.
        gaps = torch.randint(left + 1, (count,), generator=draw).sort().values
        starts = (gaps + tokens * torch.arange(count))[torch.randperm(count, generator=draw)]
    return stream[starts[:, None] + torch.arange(tokens)]
