"""What a report reads: all rows as one frame, models' facts, and the store for single rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memvec.capacity.threshold import Difference, Fit, compare, fit
from memvec.errors import MemvecError
from memvec.study.export import read_rows
from memvec.study.store import Store


@dataclass(frozen=True)
class Threshold:
    """Rows of one model and K in the threshold plane, and what was fitted to them."""

    model: str
    K: int
    rows: pd.DataFrame
    all: Fit | None
    natural: Fit | None
    random: Fit | None
    difference: Difference | None


def thresholds(rows: pd.DataFrame) -> list[Threshold]:
    """Fit every plane: all texts, natural and random ones, and their difference."""
    found = []
    for (model, K), group in rows.groupby(["model", "vectors"], sort=False):
        natural, drawn = group[~group["random_text"]], group[group["random_text"]]
        enough = [part["passage_group"].nunique() > 1 for part in (group, natural, drawn)]
        difference = compare(natural, drawn) if enough[1] and enough[2] else None
        one: Fit | None
        two: Fit | None
        if difference is not None:
            one, two = difference.natural, difference.random
        else:
            one, two = (
                fit(part) if yes else None
                for part, yes in zip((natural, drawn), enough[1:], strict=True)
            )
        whole = fit(group) if enough[0] else None
        found.append(Threshold(str(model), int(str(K)), group, whole, one, two, difference))
    return found


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
    thresholds: list[Threshold]

    def of(self, *protocols: str) -> pd.DataFrame:
        """Rows of some protocols."""
        return self.rows[self.rows["protocol"].isin(protocols)]


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
    planes = thresholds(rows[rows["protocol"].isin(("threshold", "paper"))])
    return Data(store, name, about, rows, models, environments, store.counts()[1], planes)


def short(model: str) -> str:
    """A model's name without its owner or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1]
