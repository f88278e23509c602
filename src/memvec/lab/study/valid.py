"""What a store must hold before anything is computed from it: values of their columns' kinds.

SQLite takes any value in any column, and a study's folder may come from anybody. That a value is
right is for `check`; here are refused those that nothing could compute with.
"""

from __future__ import annotations

import contextlib
import sqlite3
from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from memvec.errors import first_problem
from memvec.lab.study.cells import Cell
from memvec.writing import read_json

TABLES = "SELECT name FROM sqlite_master WHERE type = 'table'"
CELL = TypeAdapter(Cell)
ENVIRONMENT = TypeAdapter(dict[str, Any])


class _Description(BaseModel):
    """What reports and checks read of a model's description; the rest is free."""

    name: str
    revision: str | None
    config: str
    weights: str
    probe: list[float]
    dtype: str
    width: int = Field(ge=1)
    vocabulary: int = Field(ge=2)


class _Sizes(BaseModel):
    """What is computed with of a cell's columns."""

    length: int = Field(ge=1)
    vectors: int = Field(ge=1)
    storage: Literal["float32", "bfloat16", "float16"]


def problem(db: sqlite3.Connection, tables: str) -> str | None:
    """What is wrong with the values of a store, a phrase; `tables` is the SQL of its tables.

    Columns and tables that the store has not are left out.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.executescript(tables)
        names = [name for (name,) in made.execute(TABLES)]
        wanted = {name: made.execute(f"PRAGMA table_info({name})").fetchall() for name in names}
    there = {name for (name,) in db.execute(TABLES)}
    for table in [name for name in names if name in there]:
        held = {column[0] for column in db.execute(f"SELECT * FROM {table} LIMIT 0").description}
        columns = [column for column in wanted[table] if column[1] in held]
        tests = ", ".join(_wrong_kind(*column[1:4]) for column in columns)
        totals = db.execute(f"SELECT {tests} FROM {table}").fetchone()
        for (_, name, kind, *_rest), total in zip(columns, totals, strict=True):
            if total:
                return f"the column {name} of {table} has values that are no {kind}"
    return _wrong_cell(db) or _wrong_environment(db)


def _wrong_kind(name: str, kind: str, required: int) -> str:
    """SQL of the number of values that are not of a column's kind."""
    kinds = f"'{kind.lower()}'" + ("" if required else ", 'null'")
    return f"total(typeof({name}) NOT IN ({kinds}))"


def _wrong_cell(db: sqlite3.Connection) -> str | None:
    """A phrase about a cell whose sizes, settings or description cannot be read."""
    names = "cell, length, vectors, storage, settings, description"
    query = f"SELECT {names}, cell IN (SELECT cell FROM rows) FROM cells"
    for cell, length, vectors, storage, settings, description, used in db.execute(query):
        try:
            _Sizes(length=length, vectors=vectors, storage=storage)
            CELL.validate_python(read_json(settings))
            if used or description is not None:
                _Description.model_validate(read_json(description or "null"))
        except ValidationError as error:
            return f"cell {cell} has {first_problem(error)}"
        except ValueError as error:
            return f"cell {cell} has settings that are not JSON, {error}"
    return None


def _wrong_environment(db: sqlite3.Connection) -> str | None:
    """A phrase about the record of an environment that cannot be read."""
    for key, record in db.execute("SELECT id, record FROM environments"):
        try:
            ENVIRONMENT.validate_python(read_json(record))
        except ValueError:
            return f"the environment {key} has no record"
    return None
