"""The cells of a store and the models that crammed them, as they are loaded again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from memvec.errors import MemvecError
from memvec.lab.study.cells import Cell
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


def model_of(
    description: dict[str, Any],
    name: str,
    *,
    model: str | None = None,
    device: str = "auto",
    load: Mapping[str, Any] | None = None,
) -> FrozenLM:
    """The study's model `name` with this description, from `model` if it is elsewhere now.

    `load`: further arguments of `load_lm`, such as `device_map`.
    Raises MemvecError as `load_lm`, and if its weights are others than the study's.
    """
    lm = load_lm(
        model or name,
        revision=description["revision"] if model is None else None,
        device=device,
        dtype=description["dtype"],
        quantize=description.get("quantize"),
        **(load or {}),
    )
    if not Fingerprint.of_record(description).matches(lm.fingerprint):
        raise MemvecError(f"{lm.name} has other weights than the study's {name}.")
    return lm
