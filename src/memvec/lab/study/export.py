"""Rows with their cells as a flat table, for other tools."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pandas as pd

from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.study.schema import ADDED, COLUMNS
from memvec.lab.study.store import Store
from memvec.writing import path_of, write_atomically

CELL_COLUMNS = {
    "protocol": "protocol by which capacity was measured",
    "model": "Hub id, folder or built-in name",
    "source": "where the passage came from",
    "length": "length of the spec, tokens (per vector for 'vectors')",
    "vectors": "K, [mem] vectors of the passage",
    "seed": "seed of the restart",
    "storage": "dtype of the stored vectors",
    "random_text": "true if a program drew the source's text",
}
SETTING_COLUMNS = {  # of the cell's settings, under the same names
    "revision": "revision of a Hub model, as in the spec; empty: the default",
    "dtype": "dtype of the model, as in the spec",
    "quantize": "8bit or 4bit, as in the spec; empty if no weights are quantized",
    "recipe": "all fields of the recipe, as JSON",
    "options": "options of the protocol, as JSON",
}
STORE_COLUMNS = {
    "step_limit": "steps after which a passage is given up",
    "environment": "id of the environment record",
    "finished": "when the row was written, UTC",
    "planned": "true for rows of the last spec, false for those of earlier ones",
}

_STEP_LIMIT = "json_extract(cells.settings, '$.recipe.steps')"


def read_rows(store: Store) -> pd.DataFrame:
    """All rows with their cells' columns, in the order of the spec, those of no spec last."""
    cell = ", ".join(f"cells.{name}" for name in CELL_COLUMNS)
    row_columns = ", ".join(f"rows.{name}" for name in COLUMNS)
    extracted = "json_extract(cells.settings, '$.{0}') AS {0}"
    settings = ", ".join(extracted.format(name) for name in SETTING_COLUMNS)
    query = (
        f"SELECT {cell}, {settings}, {_STEP_LIMIT} AS step_limit, {row_columns}, "
        "rows.environment, rows.finished, rows.number < cells.planned AS planned "
        "FROM rows JOIN cells USING (cell) "
        "ORDER BY cells.planned = 0, cells.position, rows.number"
    )
    frame = pd.read_sql_query(query, store.db)
    for name in ("exact", "random_text", "planned"):
        frame[name] = frame[name].astype(bool)
    for name in ADDED:  # where all are missing, pandas makes objects of them
        frame[name] = frame[name].astype(float)
    return frame


def export_rows(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Write rows as CSV or Parquet by the file's ending; returns how many.

    `TARGET.columns.json` beside it says what each column is. Raises MemvecError for another ending,
    Parquet without pyarrow, or a file that cannot be written; an earlier export is then unchanged.
    """
    target, data = path_of(target), io.BytesIO()
    with Store(folder) as store:
        frame = read_rows(store)
    if target.suffix == ".parquet":
        try:
            frame.to_parquet(data, index=False)
        except ImportError:
            raise MemvecError(
                "Parquet needs pyarrow: pip install '.[study]' in the repository."
            ) from None
    elif target.suffix == ".csv":
        frame.to_csv(data, index=False)
    else:
        raise MemvecError(f"{target} must end in .csv or .parquet.")
    sentences = {**CELL_COLUMNS, **SETTING_COLUMNS, **COLUMNS}
    for name in dict.fromkeys(frame["protocol"]):
        for key, sentence in protocol_of(str(name)).extras.items():
            sentences["extra"] += f"; '{key}' of protocol '{name}': {sentence}"
    sentences |= STORE_COLUMNS
    # The rows last: a file of rows always has its columns beside it, and may then be replaced.
    write_atomically(Path(f"{target}.columns.json"), json.dumps(sentences, indent=2).encode())
    write_atomically(target, data.getvalue())
    return len(frame)
