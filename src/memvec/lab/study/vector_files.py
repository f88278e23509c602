"""The vectors of a study as files: one for each cell, with all of its passages, certified."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from memvec.assembly import assembled, passage_record
from memvec.certificate import verify
from memvec.cramming.starts import resolve_start_rule, view_for
from memvec.errors import MemvecError
from memvec.header import DocumentRecord
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.study.cells import Cell
from memvec.lab.study.export import read_rows
from memvec.lab.study.passages import Kept
from memvec.lab.study.store import Store
from memvec.lab.study.stored_model import by_model, cell_of, model_of
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.model.reading import reading_named
from memvec.passages.passage import Passage
from memvec.results import PassageResult
from memvec.storage import storage_of
from memvec.vectors import MemVectors
from memvec.writing import make_folder, path_of

SHOWN = (  # of a cell, beside its file
    "protocol",
    "model",
    "revision",
    "dtype",
    "quantize",
    "source",
    "length",
    "vectors",
    "seed",
)


@plain_torch()
def export_vectors(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    moved: Mapping[str, str] | None = None,
    device: str = "auto",
    load: Mapping[str, Any] | None = None,
    on_file: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write the vectors of every cell of the last spec as TARGET/<cell>.mem.safetensors.

    A file has the passages of its cell by their numbers, each as a text of its own, and opens with
    `MemVectors.load`. All of them are decoded again for its certificate. Returns what the files
    are, one dictionary for each, and a sentence about each cell that no file can hold. `moved`:
    where models of the study are now, by their names. `load`: further arguments of `load_lm`.
    `on_file` is called after each file with the number of cells done and of all cells. Raises
    MemvecError if a model has other weights, or for a folder that has something else in it.
    """
    target = path_of(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MemvecError(f"{target} exists and is not empty: name a new folder for the vectors.")
    written: list[dict[str, Any]] = []
    left_out: list[str] = []
    with Store(folder) as store:
        frame = read_rows(store)
        frame = frame[frame["planned"]]
        for of, rows in by_model(store, frame):
            lm: FrozenLM | None = None
            for key, group in rows.groupby("cell", sort=False):
                description, cell = cell_of(store, str(key))
                if why := _unfit(cell):
                    left_out.append(f"cell {key} ({cell.protocol}, {cell.source}): {why}.")
                    continue
                lm = lm or model_of(description, of.name, moved=moved, device=device, load=load)
                mem = vectors_of_cell(lm, store, cell, group.to_dict("records"))
                make_folder(target)
                path = mem.save(target / f"{key}.mem.safetensors")
                exact = f"{sum(p.exact for p in mem.passages)} of {len(mem.passages)}"
                of_cell = {name: getattr(cell, name) for name in SHOWN}
                written.append({"cell": key, **of_cell, "exact": exact, "file": path.name})
                if on_file is not None:
                    on_file(len(written) + len(left_out), frame["cell"].nunique())
    return written, left_out


def vectors_of_cell(
    lm: FrozenLM, store: Store, cell: Cell, rows: list[dict[str, Any]]
) -> MemVectors:
    """The vectors of these rows of a cell, certified by decoding them again."""
    recipe = cell.to_recipe()
    lm = lm.read_as(protocol_of(cell.protocol).layout)
    view, rule = view_for(lm, recipe), resolve_start_rule(lm, recipe)
    documents, passages, vectors = [], [], []
    for row in rows:
        kept = store.passage(cell.key, row["number"])
        if not store.sealed(cell.key, row["number"]):
            raise MemvecError(
                f"passage {row['number']} of cell {cell.key} was changed after it was written: "
                "'memvec study check' says how; restore the study from a copy."
            )
        vectors.append(store.tensors(cell.key, row["number"])[0])
        result = PassageResult(**{name: row[name] for name in PassageResult.model_fields})
        passages.append(passage_record(Passage(kept.ids), result, rule))
        documents.append(_document(lm, kept))
    mem = assembled(
        view,
        vectors,
        storage_of(cell.storage),
        documents=documents,
        passages=passages,
        recipe=recipe.record(),
        start_rule=rule,
    )
    return mem.with_certificate(*verify(lm, mem))


def _document(lm: FrozenLM, kept: Kept) -> DocumentRecord:
    """The record of a passage as a text of its own: what its tokens say, in UTF-8."""
    data = lm.text(kept.ids).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(data).hexdigest()
    return DocumentRecord(name=kept.name, sha256=digest, size=len(data), passages=1)


def _unfit(cell: Cell) -> str | None:
    """Why no file can hold the vectors of a cell, as the end of a sentence; None if one can."""
    protocol = protocol_of(cell.protocol)
    if protocol.group_size(cell.options):
        return "its passages share a vector in groups, and a file has one group"
    reading = protocol.reading(cell.length, cell.options)
    if type(reading) is not type(reading_named(protocol.layout)):
        return "its vectors are arranged in a way that has no name in a file"
    return None
