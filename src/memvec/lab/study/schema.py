"""The store's tables, its columns, and how stores of an earlier memvec are read."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from typing import Any, Literal, get_origin

from memvec.lab.study import passages
from memvec.lab.study.row import Row

SCHEMA = "2"  # raised when tables or the vectors' files change so that old ones cannot be read
RENAMED = {"seats": "batch_size"}  # columns of `rows`: name in an earlier memvec -> today's

# Columns that older stores lack: they are read as missing, NULL in every row.
ADDED = {"least_loss_gain"}

COLUMNS = {name: str(field.description) for name, field in Row.model_fields.items()}
_KINDS = {
    name: str if get_origin(field.annotation) is Literal else field.annotation
    for name, field in Row.model_fields.items()
}
_TYPES: dict[Any, str] = {int: "INTEGER", float: "REAL", bool: "INTEGER"}

# SQLite keeps NaN as NULL, so numbers may be missing and nothing else may.
_ROWS = ", ".join(
    f"{name} {_TYPES.get(kind, 'TEXT')}{'' if kind is float else ' NOT NULL'}"
    for name, kind in _KINDS.items()
)
TABLES = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS environments (id TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
  cell TEXT PRIMARY KEY, position INTEGER NOT NULL, planned INTEGER NOT NULL,
  protocol TEXT NOT NULL, model TEXT NOT NULL, source TEXT NOT NULL,
  length INTEGER NOT NULL, vectors INTEGER NOT NULL, seed INTEGER NOT NULL,
  storage TEXT NOT NULL, random_text INTEGER NOT NULL, settings TEXT NOT NULL,
  description TEXT);
{passages.TABLES}
CREATE TABLE IF NOT EXISTS rows (
  {_ROWS},
  offset INTEGER NOT NULL, size INTEGER NOT NULL, digest TEXT NOT NULL,
  environment TEXT NOT NULL, finished TEXT NOT NULL, seal TEXT NOT NULL,
  PRIMARY KEY (cell, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS paths (
  first TEXT NOT NULL, second TEXT NOT NULL, number INTEGER NOT NULL, accuracy TEXT NOT NULL,
  PRIMARY KEY (first, second, number)) WITHOUT ROWID;
"""


def columns_of(db: sqlite3.Connection) -> list[str]:
    """The columns of `rows` in the order of this store, the seal among them; none without it."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'rows'").fetchone():
        return []
    return [column[0] for column in db.execute("SELECT * FROM rows LIMIT 0").description]


def use_todays_names(db: sqlite3.Connection, *, write: bool) -> None:
    """Give renamed columns their present names, and add those that older stores lack.

    With `write` the file is changed, otherwise a view of this connection. Seals stay valid, because
    they hash values in the table's order and leave out added columns without a value.
    """
    columns = columns_of(db)
    old = [name for name in columns if name in RENAMED]
    new = [name for name in sorted(ADDED) if columns and name not in columns]
    if write:
        for name in old:
            db.execute(f"ALTER TABLE rows RENAME COLUMN {name} TO {RENAMED[name]}")
        for name in new:
            db.execute(f"ALTER TABLE rows ADD COLUMN {name} {_TYPES[_KINDS[name]]}")
    elif old or new:
        names = [f"{name} AS {RENAMED.get(name, name)}" for name in columns]
        names += [f"NULL AS {name}" for name in new]
        db.execute(f"CREATE TEMP VIEW rows AS SELECT {', '.join(names)} FROM main.rows")


def seal(values: dict[str, Any]) -> str:
    """SHA-256 of a row's values as SQLite gives them back: NaN is NULL, REAL columns are floats.

    `values` are in the order of the store's columns, without the seal. Added columns without a
    value do not count: a row that was written before them has the same seal.
    """
    plain = [
        float(value) if _KINDS.get(name) is float and value is not None else value
        for name, value in values.items()
        if name not in ADDED or (value is not None and value == value)
    ]
    plain = [None if isinstance(v, float) and v != v else v for v in plain]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def missing_columns(columns: Sequence[str]) -> list[str]:
    """Columns that this memvec needs and a store's table of rows has not."""
    return [name for name in COLUMNS if columns and name not in columns]


def plain(value: Any) -> Any:
    """A row's value as SQLite takes it."""
    if isinstance(value, dict):
        return json.dumps(value)
    return int(value) if isinstance(value, bool) else value
