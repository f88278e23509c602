"""The journal: a crash-safe list of finished passages, in an SQLite file.

A row is written when a passage is certified, so a run that is killed loses only the passages in its
slots. The key of a row contains everything that decides the vectors of the passage. Rows of other
settings or other texts are neither read nor counted.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memvec.cramming.outcomes import Outcome
from memvec.errors import MemvecError
from memvec.passages.passage import Passage, ids_hash
from memvec.results import Measures, PassageResult
from memvec.storage import STORAGES

FORMAT = 3  # format of a row; it is part of the key, so rows in other formats are never read


class Journal:
    """The finished passages in a file. `settings` are all choices that decide the vectors.

    Only one process can open it. This class and each of its methods raise MemvecError if the file
    is open in another process, is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        described = json.dumps({**settings, "journal": FORMAT}, sort_keys=True, default=str)
        self._settings = hashlib.sha256(described.encode()).hexdigest()
        try:
            self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise MemvecError(f"{path} cannot be written: {error}.") from None
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS finished_passages (settings TEXT NOT NULL, ids TEXT "
                "NOT NULL, vectors BLOB NOT NULL, record TEXT NOT NULL, digest TEXT NOT NULL, "
                "PRIMARY KEY (settings, ids))"
            )
            self._db.execute("BEGIN EXCLUSIVE")  # this process keeps the lock until `close`
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            self._db.close()
            if not isinstance(error, sqlite3.OperationalError):
                raise MemvecError(
                    f"{path} is damaged ({error}): delete it and start again."
                ) from None
            if "locked" in str(error):
                file = path.name.removesuffix(".partial")  # the command's journal is FILE.partial
                raise MemvecError(
                    f"another memvec is writing {file}: wait for it, or name another place to "
                    "write to."
                ) from None
            raise MemvecError(f"{path} cannot be written: {error}.") from None

    def __len__(self) -> int:
        query = "SELECT count(*) FROM finished_passages WHERE settings = ?"
        return int(self._execute(query, self._settings).fetchone()[0])

    def get(self, passage: Passage) -> Outcome | None:
        """The stored outcome of a passage, without `scores`; None if it is not in the journal.

        Raises MemvecError if its row was changed.
        """
        sql = "SELECT vectors, record, digest FROM finished_passages WHERE settings = ? AND ids = ?"
        row = self._execute(sql, self._settings, ids_hash(passage.ids)).fetchone()
        if row is None:
            return None
        if not isinstance(row[0], bytes) or self._digest(*row[:2]) != row[2]:
            raise MemvecError(f"{self.path} is damaged (a row was changed): delete it.")
        try:
            record = json.loads(row[1])
            shape, dtype = record.pop("shape"), STORAGES[record.pop("dtype")].dtype
            numbers = torch.from_numpy(np.frombuffer(row[0], np.float32).copy()).reshape(shape)
            corrections = tuple((p, t) for p, t in record.pop("corrections", []))
            result = PassageResult(**record.pop("result"))
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            raise MemvecError(f"{self.path} is damaged (a row was changed): delete it.") from None
        return Outcome(
            passage=passage,
            corrections=corrections,
            vectors=numbers.to(dtype),
            metrics=Measures(**result.model_dump(include=set(Measures.model_fields))),
            **result.model_dump(exclude=set(Measures.model_fields)),
        )

    def put(self, outcome: Outcome) -> None:
        """Write an outcome to disk before returning. Raises MemvecError if the disk is full."""
        record = {
            "result": outcome.result.model_dump(),
            "corrections": [list(pair) for pair in outcome.corrections],
            "shape": list(outcome.vectors.shape),
            "dtype": str(outcome.vectors.dtype).removeprefix("torch."),
        }
        numbers = outcome.vectors.float().contiguous().numpy().tobytes()
        text, key = json.dumps(record), ids_hash(outcome.passage.ids)
        row = (self._settings, key, numbers, text, self._digest(numbers, text))
        self._execute("INSERT OR REPLACE INTO finished_passages VALUES (?, ?, ?, ?, ?)", *row)

    @staticmethod
    def _digest(numbers: bytes, record: str) -> str:
        return hashlib.sha256(record.encode() + numbers).hexdigest()

    def close(self, *, delete: bool = False) -> None:
        """Close the file; `delete` also removes it."""
        self._db.close()
        if delete:
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _execute(self, query: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._db.execute(query, values)
        except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
            # The disk is full, or the journal is closed or belongs to another thread.
            raise MemvecError(f"{self.path} cannot be written or read: {error}.") from None
        except sqlite3.DatabaseError as error:
            raise MemvecError(f"{self.path} is damaged ({error}): delete it.") from None
