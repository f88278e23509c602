"""The passages of a study: name, token ids, the tokens before them, and their text.

A passage is stored once under the hash of its token ids, and all cells share it. If the same tokens
occur elsewhere too, after other text or with the text of another tokenizer, the table `elsewhere`
keeps the name, the tokens before and the text for that row.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from memvec.lab.sources import SourcedPassage
from memvec.lab.study.row import Text
from memvec.lab.study.sql import insert
from memvec.writing import read_json

TABLES = """
CREATE TABLE IF NOT EXISTS passages (
  passage TEXT PRIMARY KEY, name TEXT NOT NULL, ids BLOB NOT NULL, before BLOB NOT NULL,
  text BLOB, pieces TEXT);
CREATE TABLE IF NOT EXISTS elsewhere (
  cell TEXT NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL, before BLOB NOT NULL,
  text BLOB, pieces TEXT, PRIMARY KEY (cell, number)) WITHOUT ROWID;
"""

PIECES = TypeAdapter(list[str])


class Kept(NamedTuple):
    """The stored passage of a row; `text` and `pieces` are None without a tokenizer."""

    name: str
    ids: tuple[int, ...]
    before: tuple[int, ...]
    text: bytes | None
    pieces: list[str] | None


def put(
    db: sqlite3.Connection, cell: str, key: str, sourced: SourcedPassage, text: Text | None
) -> None:
    """Store a passage of a cell under the hash of its ids."""
    here = {
        "name": sourced.name,
        "before": to_bytes(sourced.before),
        "text": None if text is None else text.data,
        "pieces": None if text is None else json.dumps(text.pieces),
    }
    ids = to_bytes(sourced.passage.ids)
    insert(db, "passages", {"passage": key, "ids": ids, **here}, verb="INSERT OR IGNORE")
    query = f"SELECT {', '.join(here)} FROM passages WHERE passage=?"
    if db.execute(query, (key,)).fetchone() != (*here.values(),):
        place = {"cell": cell, "number": sourced.number}
        insert(db, "elsewhere", {**place, **here}, verb="INSERT OR REPLACE")


def find(db: sqlite3.Connection, cell: str, number: int) -> Kept | None:
    """The passage of a row; None if the row or its passage is not there, or cannot be read."""
    query = (
        "SELECT name, ids, before, text, pieces FROM rows JOIN passages USING (passage) "
        "WHERE cell=? AND number=?"
    )
    row = db.execute(query, (cell, number)).fetchone()
    if row is None:
        return None
    name, ids, before, text, pieces = row
    # A store of an earlier memvec that is only read has no such table.
    if db.execute("SELECT 1 FROM sqlite_master WHERE name='elsewhere'").fetchone():
        query = "SELECT name, before, text, pieces FROM elsewhere WHERE cell=? AND number=?"
        elsewhere = db.execute(query, (cell, number)).fetchone()
        if elsewhere is not None:
            name, before, text, pieces = elsewhere
    try:
        token_texts = None if pieces is None else PIECES.validate_python(read_json(pieces))
        return Kept(name, from_bytes(ids), from_bytes(before), text, token_texts) if ids else None
    except ValueError:
        return None


def to_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as the store keeps them."""
    return np.asarray(ids, dtype="<i4").tobytes()


def from_bytes(data: bytes) -> tuple[int, ...]:
    """Token ids that the store kept."""
    return tuple(int(i) for i in np.frombuffer(data, dtype="<i4"))
