"""Texts from a data set of the Hugging Face Hub, at any revision."""

from __future__ import annotations

from memvec.errors import MemvecError


def hub_texts(
    dataset: str, split: str = "train", column: str = "text", revision: str | None = None
) -> list[tuple[str, str]]:
    """(name, text) of every row of a split. Raises MemvecError if it cannot be had."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise MemvecError(
            f"source '{dataset}' needs the datasets library: pip install 'memvec[hub]'."
        ) from None
    try:
        table = load_dataset(dataset, split=split, revision=revision)
    except Exception as error:  # the library raises a dozen kinds for "not there" and "no network"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MemvecError(
            f"source missing: {dataset} could not be read from the Hub ({first}); "
            "give a local copy with path."
        ) from error
    if column not in table.column_names:
        names = ", ".join(table.column_names)
        raise MemvecError(f"{dataset} has no column '{column}'; it has {names}.")
    return [(f"{dataset} row {i}", str(text)) for i, text in enumerate(table[column])]
