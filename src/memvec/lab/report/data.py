"""What a report reads: the rows that the last spec asks for, models' facts, and the store.

Rows of different recipes never share a mean: where a model has several under a protocol, they get
names, which go with the source's. Nor do restarts count as passages: `Data.of` averages them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memvec.errors import MemvecError
from memvec.lab.protocols.threshold import Difference, Fit, compare, fit
from memvec.lab.study.export import read_rows
from memvec.lab.study.store import Store

MOST_SAID = 3  # differences between recipes; more are too long for a name


@dataclass(frozen=True)
class Threshold:
    """Rows of one model and K in the threshold plane, and what was fitted to them."""

    model: str
    K: int
    recipe: str  # '' where there is one
    rows: pd.DataFrame
    all: Fit | None
    natural: Fit | None
    random: Fit | None
    difference: Difference | None


def thresholds(rows: pd.DataFrame) -> list[Threshold]:
    """Fit every plane: all texts, natural and random ones, and their difference."""
    found = []
    for (model, K, recipe), group in rows.groupby(["model", "vectors", "recipe"], sort=False):
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
        found.append(
            Threshold(str(model), int(str(K)), str(recipe), group, whole, one, two, difference)
        )
    return found


def recipe_names(store: Store) -> dict[str, str]:
    """What to call a planned cell's recipe: how it differs from the others, '' where none does.

    Compared are the cells of one model and protocol; 'paper' and 'threshold' share a plane.
    """
    planes: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for cell, text in store.db.execute(
        "SELECT cell, settings FROM cells WHERE planned > 0 ORDER BY position"
    ):
        s = json.loads(text)
        recipe = {**s["recipe"], **s["options"], "storage": s["storage"], "seed": None}
        protocol = "threshold" if s["protocol"] == "paper" else s["protocol"]
        planes.setdefault((protocol, s["model"]), {})[cell] = recipe
    found = {}
    for recipes in planes.values():
        kinds: list[dict[str, Any]] = []
        for recipe in recipes.values():
            if recipe not in kinds:
                kinds.append(recipe)
        differ = [name for name in kinds[0] if any(k[name] != kinds[0][name] for k in kinds)]
        for cell, recipe in recipes.items():
            said = [f"{name} {recipe[name]}" for name in differ]
            long = len(said) > MOST_SAID
            found[cell] = f"recipe {kinds.index(recipe) + 1}" if long else ", ".join(said)
    return found


def averaged(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per passage: the means of its restarts (`exact`: the share of them).

    Steps and status are the worst's, so that a passage counts as cut if one restart was.
    """
    same = ["protocol", "model", "series", "length", "vectors", "number", "tokens", "predicted"]
    if not rows.duplicated(same).any():
        return rows
    how = {n: "mean" if rows[n].dtype.kind in "bif" else "first" for n in rows if n not in same}
    # Of 'budget', 'done' and 'not-finite' the least is 'budget'.
    how |= {"steps": "max", "status": "min", "random_text": "first", "planned": "first"}
    return rows.groupby(same, sort=False, as_index=False).agg(how)


@dataclass(frozen=True)
class Data:
    """A study as tables: every row once. `models`: what each model described itself as.

    Columns beside those of an export: `recipe` (`recipe_names`), `series` (what a line of a table
    or figure is called: the source, and the recipe if it has a name), `passage_group`.
    """

    store: Store
    name: str
    about: str
    rows: pd.DataFrame
    models: dict[str, dict[str, Any]]
    environments: list[dict[str, Any]]
    planned: int
    thresholds: list[Threshold]

    def of(self, *protocols: str) -> pd.DataFrame:
        """Rows of some protocols, restarts averaged: n is the number of passages."""
        return averaged(self.rows[self.rows["protocol"].isin(protocols)])

    def restarts(self) -> pd.DataFrame:
        """Rows of 'geometry', which is about restarts."""
        return self.rows[self.rows["protocol"] == "geometry"]


def read_data(store: Store) -> Data:
    """Read a study. Raises MemvecError if it has no rows."""
    rows = read_rows(store)
    rows = rows[rows["planned"]].reset_index(drop=True)
    if rows.empty:
        raise MemvecError(f"the study in {store.folder} has no rows yet: run it first.")
    rows["recipe"] = rows["cell"].map(recipe_names(store))
    named = rows["recipe"] != ""
    rows["series"] = rows["source"].where(~named, rows["source"] + ", " + rows["recipe"])
    # A source's passage i is the same text at every length: one draw when resampling.
    rows["passage_group"] = rows["source"] + " " + rows["number"].astype(str)
    models: dict[str, dict[str, Any]] = {}
    for model, description in store.db.execute(
        "SELECT model, description FROM cells WHERE planned > 0 AND description IS NOT NULL"
    ):
        models.setdefault(str(model), json.loads(description))
    used = set(rows["environment"])
    records = store.db.execute("SELECT id, record FROM environments")
    environments = [json.loads(record) for key, record in records if key in used]
    name, about = store.meta("name") or "study", store.meta("about") or ""
    planes = thresholds(averaged(rows[rows["protocol"].isin(("threshold", "paper"))]))
    return Data(store, name, about, rows, models, environments, store.counts()[1], planes)


def short(model: str) -> str:
    """A model's name without its owner or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1]
