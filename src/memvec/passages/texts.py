"""Texts from anywhere a person keeps them: a folder, txt, jsonl, parquet, csv, standard input."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from memvec.errors import MemvecError

KINDS = (".txt", ".md", ".jsonl", ".parquet", ".csv")


def read_texts(
    path: str, base: Path | None = None, column: str = "text", where: dict[str, str] | None = None
) -> list[tuple[str, str]]:
    """(name, text) of every text, in a fixed order; '-' is standard input.

    `base` is the folder relative paths start from (a spec's own folder). `where` keeps only the
    table rows whose columns have these values, e.g. {'split': 'valid'}.
    Raises MemvecError: nothing there, no such column, not a kind of file we read.
    """
    if path == "-":
        found = [("standard input", _all_of(sys.stdin))]
    else:
        file = Path(path).expanduser()
        file = file if file.is_absolute() or base is None else base / file
        if not file.exists():
            raise MemvecError(f"source missing: there is no file or folder {file}.")
        files = sorted(p for p in file.rglob("*") if p.suffix in KINDS) if file.is_dir() else [file]
        found = [item for one in files for item in _read(one, column, where or {})]
    found = [(name, text) for name, text in found if text.strip()]
    if not found:
        raise MemvecError(f"source empty: no texts in {path} (kinds read: {', '.join(KINDS)}).")
    return found


@functools.lru_cache(maxsize=1)
def _all_of(stream: Any) -> str:
    """All of a text stream, remembered: it can be read once, and every cell of a study asks."""
    try:
        return str(stream.read())
    except UnicodeDecodeError as error:
        raise MemvecError(f"standard input is not UTF-8 text (byte {error.start}).") from None


def _read(file: Path, column: str, where: dict[str, str]) -> list[tuple[str, str]]:
    if file.suffix == ".jsonl":
        return _rows(_json_lines(file), file, column, where)
    if file.suffix in (".parquet", ".csv"):
        try:
            import pandas as pd
        except ImportError:
            raise MemvecError(f"reading {file.name} needs pip install 'memvec[study]'.") from None
        try:
            frame = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
        except ValueError as error:  # empty, not UTF-8, cut off: all of pandas' kinds are one
            first = str(error).splitlines()[0]
            raise MemvecError(f"{file} is not a {file.suffix[1:]} table: {first}.") from None
        return _rows(frame.to_dict("records"), file, column, where)
    return [(file.stem, _utf8(file))]


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MemvecError(f"{file} is not UTF-8 text (byte {error.start}).") from None


def _json_lines(file: Path) -> list[dict[str, object]]:
    rows = []
    # Not splitlines: JSON may have U+2028 and others of its line ends inside a string.
    for number, line in enumerate(_utf8(file).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise MemvecError(f"{file} line {number} is not JSON: {error.msg}.") from None
            if not isinstance(rows[-1], dict):
                raise MemvecError(f"{file} line {number} is not an object with columns.")
    return rows


def _rows(
    rows: list[dict[str, object]], file: Path, column: str, where: dict[str, str]
) -> list[tuple[str, str]]:
    if rows and column not in rows[0]:
        raise MemvecError(
            f"{file} has no column '{column}'; it has {', '.join(map(str, rows[0]))}."
        )
    kept = [row for row in rows if all(str(row.get(k)) == v for k, v in where.items())]
    # A row without a text (None, NaN) is not the text "None".
    texts = [row.get(column) for row in kept]
    return [(f"{file.stem} row {i}", t) for i, t in enumerate(texts) if isinstance(t, str)]
