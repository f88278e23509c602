"""Tables and figures of the protocol 'spaces': one line for each space, K and storage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memvec.lab.protocols.exact import ExactResult, exact_result
from memvec.lab.protocols.protocol import Card, extra_of
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Panel, Plot, Series, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import Interval, Mean, mean_interval, ratio_of_means
from memvec.storage import STORAGES

MEASURES = (
    ("exact tokens", "numbers"),
    ("exact tokens", "stored bits"),
    ("bits / number", "numbers"),
)


@dataclass(frozen=True)
class Line:
    """The passages of one model, source, space, K and storage.

    `source` has the recipe in its name where lines differ in nothing else.
    """

    model: str
    source: str
    space: str
    K: int
    storage: str
    budget: int  # forward-backward tokens per passage; 0: no limit
    numbers: int  # of all K vectors
    stored_bits: int
    exact: ExactResult
    kl: Interval  # KL of the vectors / KL of no context
    per_number: Mean  # information gain over the horizon per number, bits
    per_bit: Mean  # information gain over the horizon per stored bit


AXES: dict[str, Callable[[Line], Any]] = {
    "numbers": lambda line: line.numbers,
    "stored bits": lambda line: line.stored_bits,
    "exact tokens": lambda line: line.exact.horizon,
    "bits / number": lambda line: line.per_number,
}


def lines_of(data: Data, rows: pd.DataFrame) -> Iterator[Line]:
    """A line for each space, K and storage, in the order of the spec."""
    if rows.empty:
        return
    settings = dict(data.store.db.execute("SELECT cell, settings FROM cells").fetchall())
    rows = rows.assign(
        space=extra_of(rows, "spaces", "space"),
        numbers=extra_of(rows, "spaces", "numbers"),
        kl=extra_of(rows, "spaces", "kl"),
    )
    recipes = {cell: json.loads(settings[cell])["recipe"] for cell in set(rows["cell"])}
    rows["budget"] = rows["cell"].map(lambda cell: recipes[cell]["budget"])
    moved = rows["cell"].map(lambda cell: recipes[cell]["coordinates"])
    rows["space"] = rows["space"].where(moved == "direct", rows["space"] + ", " + moved)
    usable = rows["cell"].map(lambda cell: recipes[cell]["term"] == "use")
    rows["space"] = rows["space"].where(~usable, rows["space"] + ", for use")
    # `series` separates recipes that differ in anything else.
    keys = ["model", "source", "space", "vectors", "storage", "budget"]
    alike = rows.groupby(keys)["series"].transform("nunique") > 1
    apart = set(rows.loc[alike, "source"])
    rows["source"] = rows["source"].where(~rows["source"].isin(apart), rows["series"])
    for (model, source, space, K, storage, budget), part in rows.groupby(keys, sort=False):
        numbers = int(part["numbers"].iloc[0])
        stored = 8 * STORAGES[str(storage)].size(int(K), numbers // int(K))
        kept = part[part["length"] == part["length"].max()]
        gain = kept["horizon_gain"]
        yield Line(
            model=str(model),
            source=str(source),
            space=str(space),
            K=int(K),
            storage=str(storage),
            budget=int(budget),
            numbers=numbers,
            stored_bits=stored,
            exact=exact_result(part),
            kl=ratio_of_means([k[0] for k in kept["kl"]], [k[1] for k in kept["kl"]]),
            per_number=mean_interval((gain / numbers).tolist()),
            per_bit=mean_interval((gain / stored).tolist()),
        )


def cards(data: Data, rows: pd.DataFrame) -> list[Card]:
    """The space with the longest mean horizon of each model and source."""
    best: dict[tuple[str, str], Line] = {}
    for line in lines_of(data, rows):
        key = (line.model, line.source)
        if key not in best or line.exact.horizon.mean > best[key].exact.horizon.mean:
            best[key] = line
    return [
        Card(
            f"{line.exact.horizon.mean:.1f} tokens",
            f"exact in the space {line.space}, K = {line.K}, {line.numbers} numbers: the longest "
            f"of the spaces compared; {line.source}, {line.model}; "
            f"{line.exact.horizon}, {line.exact.censored} censored",
        )
        for line in best.values()
    ]


def tables(data: Data, rows: pd.DataFrame) -> list[Table]:
    """All lines ordered by their count of numbers, and once more by stored bits."""
    lines = sorted(lines_of(data, rows), key=lambda line: (line.model, line.source, line.numbers))
    by_bits = sorted(lines, key=lambda line: (line.model, line.source, line.stored_bits))
    note = (
        "Means over n passages with 95 % intervals (Student's t). Bits are the information gain "
        "over the exact horizon. Censored passages decode whole: their space may hold more. Spent: "
        "forward-backward tokens per passage. KL / nothing: KL divergence of the vectors from the "
        "model that has read the text, on words that it writes after the text after a given first "
        "one, divided by that of no context (bootstrap interval). Lines 'for use' were crammed for "
        "this too, all others for exact decoding only."
    )
    return [
        Table.of(key, title, note, [_table_line(line) for line in ordered])
        for key, title, ordered in (
            ("spaces", "Where the numbers stand, by how many there are", lines),
            ("spaces-bits", "Where the numbers stand, by stored bits", by_bits),
        )
    ]


def _table_line(line: Line) -> TableLine:
    return [
        ("model", line.model),
        ("source", line.source),
        ("space", line.space),
        ("K", line.K),
        ("numbers", line.numbers),
        ("storage", line.storage),
        ("stored bits", line.stored_bits),
        *interval("exact tokens", line.exact.horizon),
        ("n", line.exact.horizon.n),
        ("censored", str(line.exact.censored)),
        *interval("bits / number", line.per_number),
        ("bits / stored bit", line.per_bit.mean),
        ("budget", line.budget or "none"),
        ("spent", line.exact.spent.mean),
        *interval("KL / nothing", line.kl),
    ]


def figures(data: Data, rows: pd.DataFrame) -> list[Plot]:
    """Panels of MEASURES for each model, with a series for each source, space and budget."""
    lines = list(lines_of(data, rows))
    panels = []
    for model in dict.fromkeys(line.model for line in lines):
        of_model = [line for line in lines if line.model == model]
        names = _names(of_model)
        for y, x in MEASURES:
            series = []
            for name in dict.fromkeys(names):
                of_name = [line for line, its in zip(of_model, names, strict=True) if its == name]
                series.append(_series(name, sorted(of_name, key=AXES[x]), x, y))
            panels.append(Panel(f"{model}: {y} by {x}", x, y, series, log=True))
    compared = len({line.numbers for line in lines})
    caption = (
        f"{len(lines)} combinations of space, K and storage with {compared} different counts of "
        "numbers. Bars are 95 % intervals over passages. Each combination has the budget of its "
        "run."
    )
    return [Plot("spaces", "Where the numbers stand", caption, panels)]


def _names(lines: list[Line]) -> list[str]:
    """The name of each line's series: its space, and source and budget where they differ."""
    sources = len({line.source for line in lines}) > 1
    budgets = len({line.budget for line in lines}) > 1
    return [
        (f"{line.source}, " if sources else "")
        + line.space
        + (f", budget {line.budget}" if budgets else "")
        for line in lines
    ]


def _series(space: str, lines: list[Line], x: str, y: str) -> Series:
    means: list[Mean] = [AXES[y](line) for line in lines]
    hover = [
        f"K {line.K}, {line.storage}: {mean.mean:.3g} (n {mean.n})"
        for line, mean in zip(lines, means, strict=True)
    ]
    return estimates(space, [AXES[x](line) for line in lines], means, "points", hover)
