"""The store: one SQLite file (WAL) and a folder of vectors, the only record of what is done.

    DIR/study.sqlite      tables meta, cells, passages, rows, paths, environments
    DIR/vectors/<cell>.bin  per row, at rows.offset: K·D numbers of the storage dtype, then 4·N
                            float32 (bits without vectors, bits with, margin with, margin without)

A row is written when its passage is certified: tensors first (appended, fsync), then the row, in
one transaction. A process killed between the two leaves bytes that no row names; the next writer
cuts them off. One process writes at a time and holds a lock; any number of processes may read.

`rows.seal` is a hash of everything else in the row, so that a value changed afterwards is detected
even where nothing could recompute it (seconds, worker).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from memvec.errors import MemvecError
from memvec.lab.sources import SourcedPassage
from memvec.lab.study import passages, schema, valid
from memvec.lab.study.cells import Planned
from memvec.lab.study.row import StoreEntry, Text
from memvec.lab.study.schema import COLUMNS, SCHEMA
from memvec.lab.study.sql import insert
from memvec.model.fingerprint import Fingerprint
from memvec.writing import make_folder, path_of

KEPT = "; what is in it is kept, and the same command goes on."  # where a disk is full
# Columns of the table `cells` that are fields of a cell.
OF_CELL = ("protocol", "model", "source", "length", "vectors", "seed", "storage")


class Store:
    """A study's folder; `write=True` locks and may create it. Raises MemvecError if it cannot."""

    def __init__(self, folder: str | os.PathLike[str], *, write: bool = False) -> None:
        self.folder, self.write = (folder := path_of(folder)), write
        self.file, self.vectors = folder / "study.sqlite", folder / "vectors"
        self._lock: IO[str] | None = None
        self._open: dict[str, IO[bytes]] = {}
        self._environment = ""
        if write:
            make_folder(self.vectors)
            self._take_lock()
        elif not self.file.is_file():
            raise MemvecError(f"there is no study in {folder}.")
        try:
            if write:
                self.db = sqlite3.connect(self.file, isolation_level=None, timeout=10)
                self._check_version()
                self.db.execute("PRAGMA journal_mode=WAL")
                self.db.execute("PRAGMA synchronous=FULL")
                self.db.executescript(schema.TABLES)
                self.db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (SCHEMA,))
            else:
                where = self.file.resolve().as_uri() + "?mode=ro"  # a name may hold # or ?
                if not os.access(self.folder, os.W_OK) and not Path(f"{self.file}-wal").exists():
                    where += "&immutable=1"  # readers cannot lock it either
                self.db = sqlite3.connect(where, uri=True, isolation_level=None, timeout=10)
                self._check_version()
            self.columns = schema.columns_of(self.db)  # of `rows`, in this store's order
        except sqlite3.OperationalError as error:
            self.close()
            why = f"{error}; is the disk full, or the folder read-only?"
            raise MemvecError(f"{self.file} cannot be opened: {why}") from None
        except sqlite3.DatabaseError as error:
            self.close()
            raise MemvecError(f"{self.file} is not a study's store, or damaged: {error}.") from None
        except MemvecError:
            self.close()
            raise

    def close(self) -> None:
        """Close files and give the lock back."""
        if hasattr(self, "db"):
            self.db.close()
        for stream in self._open.values():
            stream.close()
        self._open.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what a run writes

    def plan(
        self, planned: Sequence[Planned], random_sources: set[str], spec: dict[str, str]
    ) -> None:
        """Write the cells of a spec; cells of an earlier spec stay, with no passages planned."""
        with self._transaction():
            self.db.execute("UPDATE cells SET planned=0")
            for key, value in spec.items():
                self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
            for position, p in enumerate(planned):
                c = p.cell
                values = {
                    "cell": c.key,
                    "position": position,
                    "planned": p.passages,
                    **{name: getattr(c, name) for name in OF_CELL},
                    "random_text": int(c.source in random_sources),
                    "settings": json.dumps(c.settings(), sort_keys=True),
                }
                again = "DO UPDATE SET position=excluded.position, planned=excluded.planned"
                insert(self.db, "cells", values, end=f"ON CONFLICT (cell) {again}")

    def describe(self, cell: str, description: dict[str, Any]) -> None:
        """Record a cell's model. Raises MemvecError if it differs from that of earlier rows."""
        known = self.db.execute("SELECT description FROM cells WHERE cell=?", (cell,)).fetchone()[0]
        if known is None:
            text = json.dumps(description, sort_keys=True, default=str)
            self.db.execute("UPDATE cells SET description=? WHERE cell=?", (text, cell))
            return
        before = json.loads(known)
        if not Fingerprint.of_record(before).matches(Fingerprint.of_record(description)):
            raise MemvecError(
                f"{description['name']} has other weights than the rows in {self.folder} were made "
                "with: use another folder."
            )
        for name in ("dtype", "quantize", "attention", "encoder", "usable_encoder", "trigger"):
            old, new = before.get(name), description.get(name)
            if old != new:
                raise MemvecError(
                    f"{description['name']} has {name} {new} here, and the rows in {self.folder} "
                    f"were made with {name} {old}: go on where they were made, or use another "
                    "folder."
                )

    def known_passages(self, cell: str) -> dict[int, tuple[int, ...]]:
        """Token ids of the passages of this cell's source that its model crammed, by number.

        Of several lengths the longest; cells of an earlier spec count.
        """
        # A source may have the model's own text, which depends on how the model is loaded.
        settings = ("source_settings", "revision", "dtype", "quantize")
        both = "json_extract(this.settings, '$.{0}') IS json_extract(cells.settings, '$.{0}')"
        alike = " AND ".join(both.format(name) for name in settings)
        query = (
            "SELECT DISTINCT number, ids FROM cells AS this "
            "JOIN cells USING (model, source) JOIN rows ON rows.cell = cells.cell "
            f"JOIN passages USING (passage) WHERE this.cell = ? AND {alike} ORDER BY length(ids)"
        )
        return {int(n): passages.from_bytes(ids) for n, ids in self.db.execute(query, (cell,))}

    def set_environment(self, record: dict[str, Any]) -> None:
        """Set the environment that is recorded with the rows written from now on."""
        text = json.dumps(record, sort_keys=True, default=str)
        self._environment = hashlib.sha256(text.encode()).hexdigest()[:12]
        values = {"id": self._environment, "record": text}
        insert(self.db, "environments", values, verb="INSERT OR IGNORE")

    def put_passages(
        self, cell: str, entries: Sequence[tuple[str, SourcedPassage, Text | None]]
    ) -> None:
        """Store the passages of a cell, each entry (hash, passage, its text)."""
        with self._transaction():
            for key, sourced, text in entries:
                passages.put(self.db, cell, key, sourced, text)

    def put(self, finished: StoreEntry) -> None:
        """Write a row and its tensors to disk before returning; an existing row stays."""
        row = finished.row
        if self.db.execute(
            "SELECT 1 FROM rows WHERE cell=? AND number=?", (row.cell, row.number)
        ).fetchone():
            return
        vectors = _bytes(finished.vectors)
        data = vectors + _bytes(finished.positions)
        try:
            stream = self._stream(row.cell)
            offset = stream.seek(0, os.SEEK_END)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            values = {
                **{name: schema.plain(getattr(row, name)) for name in COLUMNS},
                "offset": offset,
                "size": len(data),
                "digest": hashlib.sha256(vectors).hexdigest(),
                "environment": self._environment,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            values = {name: values[name] for name in self.columns if name != "seal"}
            values["seal"] = schema.seal(values)
            insert(self.db, "rows", values)
        except (OSError, sqlite3.OperationalError) as error:
            raise MemvecError(f"{self.folder} cannot be written: {error}{KEPT}") from None

    def put_path(self, first: str, second: str, number: int, accuracy: list[float]) -> None:
        """Store the accuracies along the straight line between two restarts."""
        values = {"first": first, "second": second, "number": number}
        values["accuracy"] = json.dumps(accuracy)
        insert(self.db, "paths", values, verb="INSERT OR IGNORE")

    # ------------------------------------------------------------------ what all readers use

    def meta(self, key: str) -> str | None:
        """A value of the table meta."""
        row = self.db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def done(self, cell: str) -> dict[int, str]:
        """Numbers of the passages that have a row, with the passages' hashes."""
        rows = self.db.execute("SELECT number, passage FROM rows WHERE cell=?", (cell,))
        return {int(n): str(p) for n, p in rows}

    def counts(self) -> tuple[int, int]:
        """(rows done of those that the last spec plans, rows that it plans)."""
        rows = self.db.execute(
            "SELECT count(*) FROM rows JOIN cells USING (cell) WHERE number < planned"
        ).fetchone()[0]
        planned = self.db.execute("SELECT coalesce(sum(planned), 0) FROM cells").fetchone()[0]
        return int(rows), int(planned)

    def tensors(self, cell: str, number: int) -> tuple[Tensor, Tensor]:
        """(vectors (K, D) in their storage dtype, positions (4, N) float32) of a row.

        Raises MemvecError if the bytes are gone or are not the row's.
        """
        row = self.db.execute(
            "SELECT offset, size, digest, predicted, vectors, storage FROM rows JOIN cells "
            "USING (cell) WHERE cell=? AND number=?",
            (cell, number),
        ).fetchone()
        if row is None:
            raise MemvecError(f"{self.file} has no passage {number} of cell {cell}.")
        offset, size, digest, predicted, K, storage = row
        file = self.vectors / f"{cell}.bin"
        try:
            with file.open("rb") as stream:
                stream.seek(offset)
                data = stream.read(min(size, os.fstat(stream.fileno()).st_size))
        except (OSError, ValueError) as error:  # the latter: an offset below 0
            raise MemvecError(f"{file} cannot be read: {error}.") from None
        end = size - 16 * predicted
        try:
            if len(data) != size or hashlib.sha256(data[:end]).hexdigest() != digest:
                raise ValueError
            vectors = torch.frombuffer(bytearray(data[:end]), dtype=getattr(torch, storage))
            positions = torch.frombuffer(bytearray(data[end:]), dtype=torch.float32)
            return vectors.reshape(K, -1), positions.reshape(4, predicted)
        except (ValueError, RuntimeError):  # the latter: of another shape
            raise MemvecError(
                f"{file} does not hold the vectors of passage {number}: damaged."
            ) from None

    def sealed(self, cell: str, number: int) -> bool:
        """True if a row was not changed after it was written."""
        query = "SELECT * FROM rows WHERE cell=? AND number=?"
        row = self.db.execute(query, (cell, number)).fetchone()
        values = dict(zip(self.columns, row, strict=True))
        return bool(values.pop("seal") == schema.seal(values))

    def passage(self, cell: str, number: int) -> passages.Kept:
        """The passage of a row. Raises MemvecError if it is not there."""
        kept = passages.find(self.db, cell, number)
        if kept is None:
            key = self.done(cell).get(number, f"number {number} of cell {cell}")
            raise MemvecError(f"{self.file} has no passage {key}: damaged.")
        return kept

    # ------------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.OperationalError):
                self.db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):  # a full disk, above all
                raise MemvecError(f"{self.file} cannot be written: {error}{KEPT}") from None
            raise

    def _take_lock(self) -> None:
        self._lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise MemvecError(
                f"another memvec is running the study in {self.folder}: wait for it, or use "
                "workers there."
            ) from None

    def _check_version(self) -> None:
        tables = {r[0] for r in self.db.execute("SELECT name FROM sqlite_master")}
        if not tables and self.write:
            return
        if not tables:
            raise MemvecError(f"{self.file} is empty: no study was begun there; run one.")
        if "meta" not in tables:
            raise MemvecError(f"{self.file} is another program's database, not a study's store.")
        version = self.meta("schema")
        if version != SCHEMA:
            raise MemvecError(
                f"the store in {self.folder} is of version {version} and this memvec writes "
                f"version {SCHEMA}: run it with the memvec that made it, or use another folder."
            )
        schema.use_todays_names(self.db, write=self.write)
        if missing := schema.missing_columns(schema.columns_of(self.db)):
            raise MemvecError(
                f"the store in {self.folder} has no column '{missing[0]}', which this memvec "
                "needs: run it with the memvec that made it, or use another folder."
            )
        if wrong := valid.problem(self.db, schema.TABLES):
            raise MemvecError(f"{self.file} is damaged: {wrong}.")

    def _stream(self, cell: str) -> IO[bytes]:
        """The cell's file of vectors, open for appending, with nothing in it that no row names."""
        if cell not in self._open:
            end = self.db.execute(
                "SELECT coalesce(max(offset + size), 0) FROM rows WHERE cell=?", (cell,)
            ).fetchone()[0]
            file = self.vectors / f"{cell}.bin"
            stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
            stream.truncate(end)
            if len(self._open) >= 64:  # a study may have thousands of cells
                self._open.pop(next(iter(self._open))).close()
            self._open[cell] = stream
        return self._open[cell]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
