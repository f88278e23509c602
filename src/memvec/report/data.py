"""What a report reads: all rows as one frame, models' facts, and the store for single rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memvec.errors import MemvecError
from memvec.study.export import read_rows
from memvec.study.store import Store


@dataclass(frozen=True)
class Data:
    """A study as tables. `models`: what each model described itself as."""

    store: Store
    name: str
    about: str
    rows: pd.DataFrame
    models: dict[str, dict[str, Any]]
    environments: list[dict[str, Any]]
    planned: int

    def of(self, *protocols: str) -> pd.DataFrame:
        """Rows of some protocols."""
        return self.rows[self.rows["protocol"].isin(protocols)]

    @property
    def random_sources(self) -> list[str]:
        """Sources whose text is drawn by a program."""
        drawn = self.rows[self.rows["random_text"]]
        return sorted(drawn["source"].unique())


def read_data(store: Store) -> Data:
    """Read a study. Raises MemvecError if it has no rows."""
    rows = read_rows(store)
    if rows.empty:
        raise MemvecError(f"the study in {store.folder} has no rows yet: run it first.")
    # A source's passage i is the same text at every length: one draw when resampling.
    rows["passage_group"] = rows["source"] + " " + rows["number"].astype(str)
    models: dict[str, dict[str, Any]] = {}
    for model, description in store.db.execute(
        "SELECT model, description FROM cells WHERE description IS NOT NULL"
    ):
        models.setdefault(str(model), json.loads(description))
    environments = [json.loads(r[0]) for r in store.db.execute("SELECT record FROM environments")]
    name, about = store.meta("name") or "study", store.meta("about") or ""
    return Data(store, name, about, rows, models, environments, store.counts()[1])


def short(model: str) -> str:
    """A model's name without its owner or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1]
