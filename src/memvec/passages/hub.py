"""Texts from a data set of the Hugging Face Hub, at any revision, or from a folder laid out as one.

The paper's chunk sets (`yurakuratov/pg19_valid_1k_chunks` and `.../fanfics_1k_chunks`) have one
split, `train`, of 1000 rows; the chunk is in the column `text`, beside the row number that pandas
wrote. The published runs take the first 50 rows in their order (`train.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

from memvec.errors import MemvecError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_texts(
    dataset: str, split: str = "train", column: str = "text", revision: str | None = None
) -> list[tuple[str, str]]:
    """(name, text) of every row of a split that has a text, in order.

    `dataset` is a Hub id or a folder laid out as a data set. The name of a row says the commit it
    came from, so that a record made with 'main' can be repeated. Raises MemvecError if the rows
    cannot be had.
    """
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise MemvecError(
            f"source '{dataset}' needs the datasets library: pip install 'memvec[hub]'."
        ) from None
    if revision is not None and Path(dataset).is_dir():
        raise MemvecError(f"{dataset} is a folder here and has no revision '{revision}'.")
    try:
        builder = load_dataset_builder(dataset, revision=revision)
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
    except Exception as error:  # the library raises a dozen kinds for "not there" and "no network"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MemvecError(
            f"source missing: {dataset} could not be read from the Hub ({first}); "
            "give a local copy with path."
        ) from error
    if column not in table.column_names:
        names = ", ".join(table.column_names)
        raise MemvecError(f"{dataset} has no column '{column}'; it has {names}.")
    # The builder's hash is the commit for a Hub data set, and something shorter for a folder.
    commit = f"@{builder.hash[:12]}" if _COMMIT.fullmatch(str(builder.hash)) else ""
    return [(f"{dataset}{commit} row {i}", str(t)) for i, t in enumerate(table[column]) if t]
