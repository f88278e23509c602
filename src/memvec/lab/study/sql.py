"""Writing a line of an SQLite table by the names of its columns."""

from __future__ import annotations

import sqlite3
from typing import Any


def insert(
    db: sqlite3.Connection,
    table: str,
    values: dict[str, Any],
    *,
    verb: str = "INSERT",
    end: str = "",
) -> None:
    """Insert a line, {column: value}; columns that are left out get their default.

    `verb`, such as INSERT OR IGNORE, and `end`, such as ON CONFLICT ..., are SQL.
    """
    columns, places = ", ".join(values), ", ".join(f":{name}" for name in values)
    db.execute(f"{verb} INTO {table} ({columns}) VALUES ({places}) {end}", values)
