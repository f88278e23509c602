"""Texts from files (txt, md, jsonl, parquet, csv, folders), standard input, or a Hub data set."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

from memvec.errors import MemvecError, first_line
from memvec.writing import path_of, read_json

TABLES = (".jsonl", ".parquet", ".csv")
SUFFIXES = (".txt", ".md", *TABLES)
EMPTY = f"source empty: no texts in {{}} (kinds read: {', '.join(SUFFIXES)})."
_COMMIT = re.compile(r"[0-9a-f]{40}")

NamedText = tuple[str, str]  # name of a text, the text


def resolve(path: str, base: Path | None) -> Path:
    """A path a person wrote; `base` is the folder that a relative one starts from."""
    file = path_of(path)
    return file if file.is_absolute() or base is None else base / file


def files_of(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that can be read, in a fixed order."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def missing_texts(path: str, base: Path | None) -> str | None:
    """A sentence if there is no such file or folder, or if it is empty; reads no text."""
    file = resolve(path, base)
    if not file.exists():
        return f"source missing: there is no file or folder {file}."
    return None if any(one.stat().st_size for one in files_of(file)) else EMPTY.format(path)


def read_texts(
    path: str, base: Path | None = None, column: str = "text", where: dict[str, str] | None = None
) -> list[NamedText]:
    """(name, text) of every text, in a fixed order; '-' is standard input.

    `base` is the folder relative paths start from (a spec's own folder). `where` keeps only the
    table rows whose columns have these values, e.g. {'split': 'valid'}.
    Raises MemvecError: no such file or column, no text left, or one that is not UTF-8.
    """
    if path == "-":
        if sys.stdin is None:
            raise MemvecError("standard input is closed: name a file.")
        texts = [("standard input", _read_stream(sys.stdin))]
    else:
        if sentence := missing_texts(path, base):
            raise MemvecError(sentence)
        file = resolve(path, base)
        texts = [text for one in files_of(file) for text in _read_file(one, column, where or {})]
    texts = [(name, text) for name, text in texts if text.strip()]
    if not texts and where:
        raise MemvecError(f"source empty: no row of {path} has a text where {_conditions(where)}.")
    if not texts:
        raise MemvecError(EMPTY.format(path))
    for name, text in texts:
        _refuse_surrogates(name, text)
    return texts


def _conditions(where: dict[str, str]) -> str:
    return " and ".join(f"{column} is '{value}'" for column, value in where.items())


def _refuse_surrogates(name: str, text: str) -> None:
    """Raise MemvecError for half a character (JSON can escape one), which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MemvecError(f"{name} has characters that are not utf-8: {error.reason}.") from None


def read_hub_texts(
    dataset: str,
    split: str = "train",
    column: str = "text",
    revision: str | None = None,
    where: dict[str, str] | None = None,
) -> list[NamedText]:
    """(name, text) of every row of a split that has a text, in order.

    `where` keeps only the rows with these values in these columns.

    `dataset` is a Hub id, or a folder with the files of a data set. The name of a row has the
    commit it came from, so that a record made with 'main' can be repeated. Raises MemvecError if
    the rows cannot be read.
    """
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise MemvecError(
            f"source '{dataset}' needs the datasets library: pip install '.[hub]' in the "
            "repository."
        ) from None
    if revision is not None and Path(dataset).is_dir():
        raise MemvecError(f"{dataset} is a folder here and has no revision '{revision}'.")
    try:
        builder = load_dataset_builder(dataset, revision=revision)
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
    except Exception as error:  # the library raises a dozen kinds for "not there" and "no network"
        raise MemvecError(
            f"source missing: {dataset} could not be read from the Hub ({first_line(error)}); "
            "give a local copy with path."
        ) from error
    for needed in (column, *(where or {})):
        if needed not in table.column_names:
            names = ", ".join(table.column_names)
            raise MemvecError(f"{dataset} has no column '{needed}'; it has {names}.")
    # The builder's hash is the commit for a Hub data set, and something shorter for a folder.
    commit = f"@{builder.hash[:12]}" if _COMMIT.fullmatch(str(builder.hash)) else ""
    kept = [True] * len(table)
    for name, value in (where or {}).items():
        kept = [k and str(cell) == value for k, cell in zip(kept, table[name], strict=True)]
    rows = zip(table[column], kept, strict=True)
    return [(f"{dataset}{commit} row {i}", str(t)) for i, (t, k) in enumerate(rows) if t and k]


@functools.lru_cache(maxsize=1)
def _read_stream(stream: Any) -> str:
    """All of a text stream, cached: it can be read once, and every cell of a study asks for it."""
    try:
        return str(stream.read()).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise MemvecError(f"standard input is not UTF-8 text (byte {error.start}).") from None


def _read_file(file: Path, column: str, where: dict[str, str]) -> list[NamedText]:
    if file.suffix == ".jsonl":
        return _texts_of_rows(_json_lines(file), file, column, where)
    if file.suffix in (".parquet", ".csv"):
        try:
            import pandas as pd
        except ImportError:
            raise MemvecError(
                f"reading {file.name} needs pandas: pip install '.[study]' in the repository."
            ) from None
        try:
            # As they are in the file: no number, truth value or missing value is made of a text,
            # and a column with missing values keeps its whole numbers.
            if file.suffix == ".parquet":
                frame = pd.read_parquet(file, dtype_backend="pyarrow")
            else:
                frame = pd.read_csv(file, dtype=str, keep_default_na=False)
        except ImportError:
            raise MemvecError(
                f"reading {file.name} needs pyarrow: pip install '.[study]' in the repository."
            ) from None
        except ValueError as error:  # empty, not UTF-8, cut off: all of pandas' kinds are one
            kind, reason = file.suffix[1:], first_line(error)
            raise MemvecError(f"{file} is not a {kind} table: {reason}.") from None
        return _texts_of_rows(frame.to_dict("records"), file, column, where)
    return [(file.stem, read_utf8(file))]


def read_utf8(file: Path) -> str:
    """A file's text, without a byte order mark in front. Raises MemvecError for another coding."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MemvecError(
            f"{file} is not UTF-8 text (byte {error.start}): convert it, as with iconv."
        ) from None


def _json_lines(file: Path) -> list[dict[str, object]]:
    rows = []
    # Not splitlines: JSON may have U+2028 and others of its line ends inside a string.
    for number, line in enumerate(read_utf8(file).split("\n"), 1):
        if line.strip():
            try:
                rows.append(read_json(line))
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise MemvecError(f"{file} line {number} is not JSON: {reason}.") from None
            if not isinstance(rows[-1], dict):
                raise MemvecError(f"{file} line {number} is not an object with columns.")
    return rows


def _texts_of_rows(
    rows: list[dict[str, object]], file: Path, column: str, where: dict[str, str]
) -> list[NamedText]:
    names = dict.fromkeys(str(name) for row in rows for name in row)  # JSON may leave some out
    for needed in (column, *where):
        if rows and needed not in names:
            raise MemvecError(f"{file} has no column '{needed}'; it has {', '.join(names)}.")
    kept = [row for row in rows if all(str(row.get(k)) == v for k, v in where.items())]
    # A row without a text (None, NaN) is not the text "None".
    texts = [row.get(column) for row in kept]
    return [(f"{file.stem} row {i}", t) for i, t in enumerate(texts) if isinstance(t, str)]
