"""The cells of a store and the models that crammed them, as they are loaded again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from memvec.errors import MemvecError, did_you_mean
from memvec.lab.study.cells import Cell
from memvec.lab.study.model_names import distinct_names
from memvec.lab.study.spec import ModelKey
from memvec.lab.study.store import Store
from memvec.loading import load_lm
from memvec.model.fingerprint import Fingerprint
from memvec.model.lm import FrozenLM


def cell_of(store: Store, key: str) -> tuple[dict[str, Any], Cell]:
    """(description of the model that crammed the cell, the cell)."""
    description, settings = store.db.execute(
        "SELECT description, settings FROM cells WHERE cell=?", (key,)
    ).fetchone()
    return json.loads(description), Cell(**json.loads(settings))


def by_model(store: Store, rows: pd.DataFrame) -> Iterator[tuple[ModelKey, pd.DataFrame]]:
    """(key, rows) of each model of the spec, in the order of the rows."""
    keys = {cell: cell_of(store, cell)[1].model_key for cell in dict.fromkeys(rows["cell"])}
    for key in dict.fromkeys(keys.values()):
        yield key, rows[[keys[cell] == key for cell in rows["cell"]]]


def moved_models(folder: str | os.PathLike[str], texts: Sequence[str]) -> dict[str, str]:
    """Where models of a study are now: place by name in the spec, from texts 'NAME=PLACE'.

    NAME may be the short name of reports. In a study of one model, 'PLACE' is enough. Raises
    MemvecError for a name that the study does not have, for a place without a name if the study has
    several models, and for a study that was not run.
    """
    if not texts:
        return {}
    with Store(folder) as store:
        settings = store.db.execute("SELECT settings FROM cells WHERE planned > 0").fetchall()
    if not settings:
        raise MemvecError(f"the study in {store.folder} has no rows yet: run it first.")
    short = distinct_names(Cell(**json.loads(text)).model for (text,) in settings)
    names = {name: name for name in short} | {last: name for name, last in short.items()}
    places: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if name not in names and len(short) == 1:  # a place may contain '='
            (name,), place = short, text
        elif not equals:
            raise MemvecError(
                f"the study has {len(short)} models: name the one that is at {text}, as "
                f"'{next(iter(short.values()))}={text}'."
            )
        if name not in names:
            raise MemvecError(f"the study has no model '{name}': {did_you_mean(name, names)}")
        places[names[name]] = place
    return places


def model_of(
    description: dict[str, Any],
    name: str,
    *,
    moved: Mapping[str, str] | None = None,
    device: str = "auto",
    load: Mapping[str, Any] | None = None,
) -> FrozenLM:
    """The study's model `name` with this description.

    `moved`: where models are now, by name (`moved_models`). `load`: further arguments of `load_lm`,
    such as `device_map`.
    Raises MemvecError as `load_lm`, and if its weights are others than the study's.
    """
    place = (moved or {}).get(name)
    lm = load_lm(
        place or name,
        revision=description["revision"] if place is None else None,
        device=device,
        dtype=description["dtype"],
        quantize=description.get("quantize"),
        **(load or {}),
    )
    if not Fingerprint.of_record(description).matches(lm.fingerprint):
        raise MemvecError(f"{lm.name} has other weights than the study's {name}.")
    return lm
