"""Tables and figures of the protocol 'spaces': one line for each space, K and storage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from memvec.lab.protocols.exact import ExactResult, exact_result
from memvec.lab.protocols.protocol import Card, extra_of
from memvec.lab.report.data import Data, short
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table, TableCell
from memvec.statistics import Interval, Mean, mean_interval, ratio_of_means
from memvec.storage import STORAGES

MEASURES = (
    ("exact tokens", "numbers"),
    ("exact tokens", "stored bits"),
    ("bits / number", "numbers"),
)


@dataclass(frozen=True)
class Line:
    """The passages of one model, source, space, K and storage."""

    model: str
    source: str
    space: str
    K: int
    storage: str
    budget: int  # forward-backward tokens a passage; 0: no limit
    numbers: int  # of all K vectors
    stored_bits: int
    exact: ExactResult
    kl: Interval  # of the vectors / of no context
    per_number: Mean  # bits that the vectors add over the horizon, a number
    per_bit: Mean  # the same, a stored bit


SHOWN: dict[str, Callable[[Line], Any]] = {
    "numbers": lambda line: line.numbers,
    "stored bits": lambda line: line.stored_bits,
    "exact tokens": lambda line: line.exact.horizon,
    "bits / number": lambda line: line.per_number,
}


def lines(data: Data, rows: pd.DataFrame) -> Iterator[Line]:
    """One for each space, in the order of the spec."""
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
    # `series` parts recipes that differ in anything else.
    keys = ["model", "source", "space", "vectors", "storage", "budget", "series"]
    for (model, source, space, K, storage, budget, _), part in rows.groupby(keys, sort=False):
        numbers = int(part["numbers"].iloc[0])
        stored = 8 * STORAGES[str(storage)].size(int(K), numbers // int(K))
        kept = part[part["length"] == part["length"].max()]
        gain = kept["horizon_gain"]
        yield Line(
            *(str(model), str(source), str(space), int(K), str(storage), int(budget)),
            *(numbers, stored),
            exact_result(part),
            ratio_of_means([k[0] for k in kept["kl"]], [k[1] for k in kept["kl"]]),
            mean_interval((gain / numbers).tolist()),
            mean_interval((gain / stored).tolist()),
        )


def cards(data: Data, rows: pd.DataFrame) -> list[Card]:
    """The space with the longest mean horizon of each model and source."""
    best: dict[tuple[str, str], Line] = {}
    for line in lines(data, rows):
        key = (line.model, line.source)
        if key not in best or line.exact.horizon.mean > best[key].exact.horizon.mean:
            best[key] = line
    return [
        Card(
            f"{line.exact.horizon.mean:.1f} tokens",
            f"exact in the space {line.space}, K = {line.K}, {line.numbers} numbers: the longest "
            f"of the spaces compared; {line.source}, {short(line.model)}; "
            f"{line.exact.horizon}, {line.exact.censored} censored",
        )
        for line in best.values()
    ]


def tables(data: Data, rows: pd.DataFrame) -> list[Table]:
    """Every line in the order of its numbers; then the same by stored bits."""
    columns = ["model", "source", "space", "K", "numbers", "storage", "stored bits"]
    columns += ["exact tokens", "low", "high", "n", "censored", "bits / number", "low", "high"]
    columns += ["bits / stored bit", "budget", "spent", "KL / nothing", "low", "high"]
    found = sorted(lines(data, rows), key=lambda line: (line.model, line.source, line.numbers))
    by_bits = sorted(found, key=lambda line: (line.model, line.source, line.stored_bits))
    note = (
        "Mean over passages with its 95 % interval (Student's t). Bits are the information gain "
        "over the exact horizon. Censored passages came back whole: their space may hold more. "
        "Spent: forward-backward tokens a passage. KL / nothing: KL from the model behind the text "
        "on words that it writes behind it, the first given, over that of no context (bootstrap); "
        "lines 'for use' were crammed to stand for the text as well, all others to be exact only."
    )
    return [
        Table(key, title, note, columns, [_row(line) for line in ordered])
        for key, title, ordered in (
            ("spaces", "Where the numbers stand, by how many there are", found),
            ("spaces-bits", "Where the numbers stand, by stored bits", by_bits),
        )
    ]


def _row(line: Line) -> list[TableCell]:
    r = line.exact
    return [
        *(short(line.model), line.source, line.space, line.K, line.numbers, line.storage),
        *(line.stored_bits, r.horizon.mean, r.horizon.low, r.horizon.high, r.horizon.n),
        *(str(r.censored), line.per_number.mean, line.per_number.low, line.per_number.high),
        *(line.per_bit.mean, line.budget or "none", r.spent.mean),
        *(line.kl.value, line.kl.low, line.kl.high),
    ]


def figures(data: Data, rows: pd.DataFrame) -> list[Plot]:
    """Exact tokens, and bits a number, over the count of numbers."""
    found = list(lines(data, rows))
    panels = []
    for model in dict.fromkeys(line.model for line in found):
        own = [line for line in found if line.model == model]
        several = len({line.budget for line in own})
        for y, x in MEASURES:
            series = []
            for space, budget in dict.fromkeys((line.space, line.budget) for line in own):
                mine = [line for line in own if (line.space, line.budget) == (space, budget)]
                name = space if several < 2 else f"{space}, budget {budget}"
                series.append(_series(name, sorted(mine, key=SHOWN[x]), x, y))
            panels.append(Panel(f"{short(model)}: {y} by {x}", x, y, series, log=True))
    compared = len({line.numbers for line in found})
    caption = (
        f"{len(found)} combinations of space, K and storage, {compared} counts of numbers; the "
        "bars are 95 % intervals over passages. Each has the budget of its run."
    )
    return [Plot("spaces", "Where the numbers stand", caption, panels)]


def _series(space: str, own: list[Line], x: str, y: str) -> Series:
    means: list[Mean] = [SHOWN[y](line) for line in own]
    hover = [
        f"K {line.K}, {line.storage}: {mean.mean:.3g} (n {mean.n})"
        for line, mean in zip(own, means, strict=True)
    ]
    at = [float(SHOWN[x](line)) for line in own]
    low, high = [m.low for m in means], [m.high for m in means]
    return Series(space, at, [m.mean for m in means], "points", low, high, hover)
