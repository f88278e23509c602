"""The data of a report: the rows that the last spec plans, facts about the models, and the store.

Rows of different recipes never share a mean: where a protocol has several recipes for a model, each
gets a name, which is appended to the source's name. A model gets the shortest name that no other
model of the study has. Restarts of a passage do not count as passages: `Data.of` averages them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import plane_of
from memvec.lab.report.table import TableLine
from memvec.lab.study.cells import Cell
from memvec.lab.study.export import read_rows
from memvec.lab.study.model_names import model_names
from memvec.lab.study.spec import ModelKey
from memvec.lab.study.store import Store
from memvec.storage import STORAGES

MAX_DIFFERENCES = 3  # between recipes, in a name; more are too long
MAX_NAME = 80  # characters of such a name


@dataclass(frozen=True, eq=False)
class Data:
    """The rows of a study as a table.

    The column `model` is the model's name in reports (from `model_names`). By this name, `keys` has
    what the spec says of each model, and `loaded` a description of what was loaded for each of its
    cells, in their order. Columns beside those of an export: `recipe` (from `recipe_names`),
    `series` (the source, with the recipe's name if it has one: a line of a table or figure), and
    `passage_group` (a text that is one draw when passages are resampled). `planned`: number of rows
    that the last spec plans.
    """

    store: Store
    name: str
    about: str
    rows: pd.DataFrame
    loaded: dict[str, list[dict[str, Any]]]
    keys: dict[str, ModelKey]
    environments: list[dict[str, Any]]
    planned: int

    @functools.cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """For each model, the description of what was loaded for its first cell."""
        return {name: descriptions[0] for name, descriptions in self.loaded.items()}

    def of(self, *protocols: str) -> pd.DataFrame:
        """Rows of some protocols, one per passage: restarts are averaged."""
        return averaged(self.rows[self.rows["protocol"].isin(protocols)])

    def restarts(self, protocol: str) -> pd.DataFrame:
        """Rows of a protocol, one per restart."""
        return self.rows[self.rows["protocol"] == protocol]

    def protocols(self) -> list[str]:
        """Names of the protocols that have rows."""
        return [str(name) for name in dict.fromkeys(self.rows["protocol"])]

    def option(self, rows: pd.DataFrame, name: str) -> pd.Series:
        """An option of the protocol for each row, from its cell; None where the cell lacks it."""
        return self.options(rows).map(lambda options: options.get(name))

    def series_without(self, rows: pd.DataFrame, *options: str) -> pd.Series:
        """The series of each row, named without options that have a column or line of their own."""
        return series_names(rows, recipe_names(self.store, without=options))

    def options(self, rows: pd.DataFrame) -> pd.Series:
        """All options of the protocol for each row, a dictionary, from its cell."""
        settings = dict(self.store.db.execute("SELECT cell, settings FROM cells").fetchall())
        values = {c: json.loads(settings[c])["options"] for c in set(rows["cell"])}
        return rows["cell"].map(values)

    def recipe_of(self, cell: str) -> dict[str, Any]:
        """All fields of the recipe of a cell."""
        (settings,) = self.store.db.execute(
            "SELECT settings FROM cells WHERE cell=?", (cell,)
        ).fetchone()
        recipe: dict[str, Any] = json.loads(settings)["recipe"]
        return recipe

    def published_as(self, model: str) -> str:
        """The name under which values of a model are published; '' if its weights are quantized."""
        key = self.keys[model]
        return "" if key.quantize else key.name

    def width(self, row: pd.Series) -> int:
        """Numbers of a vector of a row: the model's D, or those of the recipe's space."""
        cell = str(row["cell"])
        size, predicted, storage, settings = self.store.db.execute(
            "SELECT size, predicted, storage, settings FROM rows JOIN cells USING (cell) "
            "WHERE cell=? LIMIT 1",
            (cell,),
        ).fetchone()
        if json.loads(settings)["recipe"].get("space", "inputs") == "inputs":
            return int(self.models[str(row["model"])]["width"])
        numbers = (int(size) - 16 * int(predicted)) // STORAGES[storage].dtype.itemsize
        return numbers // int(row["vectors"])

    def in_plane(self, plane: str) -> pd.DataFrame:
        """Rows of all protocols that are compared in one plane (`Protocol.plane`)."""
        return self.of(*(name for name in self.protocols() if plane_of(name) == plane))


def by_series(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, int], pd.DataFrame]]:
    """((model, series, K), rows) in the order of the spec."""
    for (model, series, K), group in rows.groupby(["model", "series", "vectors"], sort=False):
        yield (str(model), str(series), int(str(K))), group


def by_length(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, int, int], pd.DataFrame]]:
    """((model, series, length, K), rows) in the order of the spec."""
    keys = ["model", "series", "length", "vectors"]
    for (model, series, length, K), group in rows.groupby(keys, sort=False):
        yield (str(model), str(series), int(str(length)), int(str(K))), group


def place(model: str, source: str, length: int, K: int) -> TableLine:
    """The columns with which a table's line begins, from a key of `by_length`."""
    return [("model", model), ("source", source), ("length", length), ("K", K)]


def by_recipe(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, int, str], pd.DataFrame]]:
    """((model, K, recipe), rows): all sources together, in the order of the spec."""
    for (model, K, recipe), group in rows.groupby(["model", "vectors", "recipe"], sort=False):
        yield (str(model), int(str(K)), str(recipe)), group


def recipe_names(store: Store, without: Sequence[str] = ()) -> dict[str, str]:
    """For each planned cell, how its recipe differs from the others; '' where there is only one.

    The recipes of cells of one model whose protocols share a plane are compared, without the
    protocols' options in `without`.
    """
    planes: dict[tuple[str, ModelKey], dict[str, dict[str, Any]]] = {}
    for cell, text in store.db.execute(
        "SELECT cell, settings FROM cells WHERE planned > 0 ORDER BY position"
    ):
        s = json.loads(text)
        options = {name: value for name, value in s["options"].items() if name not in without}
        recipe = {**s["recipe"], **options, "storage": s["storage"], "seed": None}
        planes.setdefault((plane_of(s["protocol"]), Cell(**s).model_key), {})[cell] = recipe
    names = {}
    for recipes in planes.values():
        kinds: list[dict[str, Any]] = []
        for recipe in recipes.values():
            if recipe not in kinds:
                kinds.append(recipe)
        keys = dict.fromkeys(key for kind in kinds for key in kind)
        differ = [key for key in keys if any(k.get(key) != kinds[0].get(key) for k in kinds)]
        for cell, recipe in recipes.items():
            differences = [f"{key} {recipe.get(key)}" for key in differ]
            long = len(differences) > MAX_DIFFERENCES or len(", ".join(differences)) > MAX_NAME
            number = f"recipe {kinds.index(recipe) + 1}"
            names[cell] = number if long else ", ".join(differences)
    return names


def series_names(rows: pd.DataFrame, recipes: Mapping[str, str]) -> pd.Series:
    """The series of each row: its source, with the name of its cell's recipe if it has one."""
    recipe = rows["cell"].map(recipes)
    return rows["source"].where(recipe == "", rows["source"] + ", " + recipe)


def averaged(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per passage: the means of its restarts; `exact` is the share of exact restarts.

    Steps are the maximum, and the status is 'budget' if one restart has it, so that a passage
    counts as cut if one restart was cut.
    """
    keys = ["protocol", "model", "series", "length", "vectors", "number", "tokens", "predicted"]
    if not rows.duplicated(keys).any():
        return rows
    how = {n: "mean" if rows[n].dtype.kind in "bif" else "first" for n in rows if n not in keys}
    # Of 'budget', 'done' and 'not-finite' the first by alphabet is 'budget'.
    how |= {"steps": "max", "status": "min", "random_text": "first", "planned": "first"}
    return rows.groupby(keys, sort=False, as_index=False).agg(how)


def read_data(store: Store) -> Data:
    """Read a study. Raises MemvecError if it has no rows."""
    rows = read_rows(store)
    rows = rows[rows["planned"]].reset_index(drop=True)
    if rows.empty:
        raise MemvecError(f"the study in {store.folder} has no rows yet: run it first.")
    names = recipe_names(store)
    rows["recipe"] = rows["cell"].map(names)
    rows["series"] = series_names(rows, names)
    # A source's passage i is the same text at every length: one draw when resampling.
    rows["passage_group"] = rows["source"] + " " + rows["number"].astype(str)
    cells = store.db.execute(
        "SELECT cell, settings, description FROM cells WHERE planned > 0 ORDER BY position"
    ).fetchall()
    keys = {cell: Cell(**json.loads(settings)).model_key for cell, settings, _ in cells}
    shown = model_names(keys.values())
    rows["model"] = [shown[keys[cell]] for cell in rows["cell"]]
    loaded: dict[str, list[dict[str, Any]]] = {}
    for cell, _, description in cells:
        if description is not None:
            loaded.setdefault(shown[keys[cell]], []).append(json.loads(description))
    used = set(rows["environment"])
    records = store.db.execute("SELECT id, record FROM environments")
    environments = [json.loads(record) for key, record in records if key in used]
    name, about = store.meta("name") or "study", store.meta("about") or ""
    planned = store.counts()[1]
    by_name = {name: key for key, name in shown.items()}
    return Data(store, name, about, rows, loaded, by_name, environments, planned)


def short(model: str) -> str:
    """A model's name without its owner or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def panel_title(model: str, K: int, recipe: str = "") -> str:
    """Title of a panel of one model, K and recipe."""
    return f"{model}, K = {K}" + (f", {recipe}" if recipe else "")
