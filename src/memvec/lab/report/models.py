"""The models of a study, as they were loaded: what 'auto' in a spec was on that machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memvec.lab.report.data import Data, short
from memvec.lab.report.table import Table, TableLine

DIGITS = 12  # of a commit or a hash, enough to compare


def models_table(data: Data) -> Table:
    """One line for each model of the rows."""
    passages = data.rows["model"].value_counts()
    lines: list[TableLine] = []
    for name, loaded in data.loaded.items():
        if name not in passages.index:
            continue  # an interrupted run has described the model, and crammed nothing
        path = data.keys[name].name
        lines.append(
            [
                ("model", name),
                ("Hub id or folder", short(path) if Path(path).is_absolute() else path),
                ("revision", _all(loaded, "revision")),
                ("embeddings", _all(loaded, "weights")),
                ("dtype", _all(loaded, "dtype")),
                ("quantized", _all(loaded, "quantize")),
                ("attention", _all(loaded, "attention")),
                ("device", _all(loaded, "device")),
                ("D", int(loaded[0]["width"])),
                ("V", int(loaded[0]["vocabulary"])),
                ("one-pass encoder", "yes" if any(d.get("encoder") for d in loaded) else "no"),
                ("rows", int(passages[name])),
            ]
        )
    return Table.of(
        "models",
        "Models, as they were loaded",
        "Two values in a column: cells of this model were made in two ways. Revision: that of the "
        "spec, or the commit on the Hub; '–' for a folder. Embeddings: the beginning of the "
        "SHA-256 of the embedding matrix in bfloat16, which tells other weights of one name apart. "
        "Attention memvec_float32: computed in float32. D: numbers of an input vector. V: tokens "
        "of the vocabulary. A model with a one-pass encoder starts from its vectors, unless the "
        "recipe has another start.",
        lines,
    )


def _all(loaded: list[dict[str, Any]], name: str) -> str | None:
    """Every value of a field of descriptions, once; None where there is none."""
    values = dict.fromkeys(str(d[name]) for d in loaded if d.get(name) is not None)
    return ", ".join(value[:DIGITS] if _is_hash(value) else value for value in values) or None


def _is_hash(value: str) -> bool:
    return len(value) >= 40 and set(value) <= set("0123456789abcdef")
