"""What is finished already: a crash-safe list of passages beside the file that is being made.

SQLite does the hard part. A row is written the moment a passage is certified, so a run that is
killed loses only the passages in its slots. Rows are keyed by everything that decides a passage's
vectors; a row from other settings or another text is simply never asked for, nor counted.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memvec.cramming.certify import Outcome
from memvec.errors import MemvecError
from memvec.passages.passage import Passage, ids_hash
from memvec.results import Measures, PassageResult
from memvec.storage import STORAGES

FORMAT = 3  # of a row; rows in another format belong to other settings and are never asked for


class Journal:
    """Finished passages of one output file. `settings` is what else decides the vectors.

    Only one process may have it open. Raises MemvecError if another has, or if the file is damaged
    or cannot be read or written; this holds for each method, too.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        described = json.dumps({**settings, "journal": FORMAT}, sort_keys=True, default=str)
        self._settings = hashlib.sha256(described.encode()).hexdigest()
        try:
            self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS finished_passages (settings TEXT NOT NULL, ids TEXT "
                "NOT NULL, vectors BLOB NOT NULL, record TEXT NOT NULL, digest TEXT NOT NULL, "
                "PRIMARY KEY (settings, ids))"
            )
            self._db.execute("BEGIN EXCLUSIVE")  # the lock stays with this process until it closes
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                file = path.name.removesuffix(".partial")  # of a command: the file that it makes
                raise MemvecError(
                    f"another memvec is writing {file}: wait for it, or name another place to "
                    "write to."
                ) from None
            raise MemvecError(f"{path} cannot be written: {error}.") from None
        except sqlite3.DatabaseError as error:
            raise MemvecError(f"{path} is damaged ({error}): delete it and start again.") from None

    def __len__(self) -> int:
        query = "SELECT count(*) FROM finished_passages WHERE settings = ?"
        return int(self._execute(query, self._settings).fetchone()[0])

    def get(self, passage: Passage) -> Outcome | None:
        """The outcome of this passage under these settings, without `scores`; None if unknown.

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
            numbers = torch.from_numpy(np.frombuffer(row[0], dtype=np.float32).copy()).reshape(
                shape
            )
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
        """Write an outcome; it is on disk when this returns. MemvecError on a full disk."""
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
        """Close; `delete` removes the file, once what it holds is safe elsewhere."""
        self._db.close()
        if delete:
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _execute(self, query: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._db.execute(query, values)
        except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
            # A full disk, above all; or the journal is closed, or of another thread.
            raise MemvecError(f"{self.path} cannot be written or read: {error}.") from None
        except sqlite3.DatabaseError as error:
            raise MemvecError(f"{self.path} is damaged ({error}): delete it.") from None
