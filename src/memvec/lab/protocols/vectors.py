"""K vectors: does capacity grow along a straight line (paper, Figure 4)?

Lengths of the spec are per vector: K vectors get a passage of K times as many tokens. The measure
is the exact horizon; the straight line is K times the gain of one vector.
"""

from __future__ import annotations

import pandas as pd

from memvec.lab.protocols.protocol import Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data, short
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table, TableCell
from memvec.lab.statistics import mean_interval
from memvec.model.reading import StartRule

# column of `scaling`, its label, and what the published values call it
SHOWN = (
    ("horizon", "exact tokens", "longest"),
    ("token_gain", "token gain", "token_gain"),
    ("bits", "information gain, bits", "gain_nats"),
)


class Vectors(Protocol):
    """K sweep."""

    preset = "default"
    measures_horizon = True

    def tokens(self, length: int, K: int, start: StartRule) -> int:
        """`length` tokens per vector."""
        return length * K

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        rows: list[list[TableCell]] = []
        measured = data.of(self.name)
        for (model, source), group in measured.groupby(["model", "series"], sort=False):
            for line in scaling(group).to_dict("records"):
                numbers = ("K", "horizon", "horizon_low", "horizon_high", "bits", "bits_per_vector")
                shares = ("of_straight_line", "censored", "cut")
                rows.append(
                    [
                        *(short(str(model)), str(source)),
                        *(line[name] for name in numbers),
                        *(f"{100 * line[name]:.0f} %" for name in shares),
                        line["n"],
                    ]
                )
        columns = ["model", "source", "K", "exact tokens", "low", "high", "bits", "bits / vector"]
        return [
            Table(
                "vectors",
                "K vectors against the straight line",
                "Exact horizon and the information in it; the line is K times the bits per vector "
                "at the smallest K. Censored passages came back whole: their K could have held "
                "more.",
                [*columns, "of the line", "censored", "cut", "n"],
                rows,
            )
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        rows = data.of(self.name)
        panels = []
        for column, label, theirs in SHOWN:
            series = []
            for (model, source), group in rows.groupby(["model", "series"], sort=False):
                table = scaling(group)
                series += _measured(f"{short(str(model))}, {source}", table, column)
                if compare:
                    series += _published(str(model), theirs)
            panels.append(Panel(label, "K, vectors", label, series, log=True))
        caption = "Against the straight line from the smallest K."
        return [Plot("vectors", "More vectors (Figure 4)", caption, panels if len(rows) else [])]


def _measured(name: str, table: pd.DataFrame, column: str) -> list[Series]:
    """A column of `scaling` over K, and the straight line from its first entry."""
    K, y = [float(k) for k in table["K"]], [float(v) for v in table[column]]
    edges = f"{column}_low" in table
    hover = [f"K {k:.0f}: {v:.1f} (n {n})" for k, v, n in zip(K, y, table["n"], strict=True)]
    low, high = (
        [float(v) for v in table[f"{column}_{edge}"]] if edges else None for edge in ("low", "high")
    )
    line = Series("straight line", K, [y[0] / K[0] * k for k in K], "dashed")
    return [Series(name, K, y, "line", low, high, hover), line]


def _published(model: str, name: str) -> list[Series]:
    entry = published.published()["vectors"]["values"].get(model)
    if not entry:
        return []
    values = [float(v) for v in entry[name]]
    if name.endswith("_nats"):
        values = [published.bits(v) for v in values]
    return [
        Series("published (PG-19)", [float(k) for k in entry["K"][: len(values)]], values, "line")
    ]


def scaling(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per K: horizon, gains, gain per vector, and its share of the straight line.

    The line starts at the smallest K measured.
    """
    lines = []
    for K, group in rows.groupby("vectors"):
        group = group[group["length"] == group["length"].max()]
        horizon = mean_interval(group["horizon"].tolist())
        bits = mean_interval(group["horizon_gain"].tolist())
        tokens = mean_interval(group["horizon_token_gain"].tolist())
        lines.append(
            {
                "K": int(str(K)),
                "n": horizon.n,
                "horizon": horizon.mean,
                "horizon_low": horizon.low,
                "horizon_high": horizon.high,
                "token_gain": tokens.mean,
                "bits": bits.mean,
                "bits_low": bits.low,
                "bits_high": bits.high,
                "censored": float((group["exact"] > 0).mean()),
                "cut": float((group["status"] == "budget").mean()),
            }
        )
    table = pd.DataFrame(lines).sort_values("K").reset_index(drop=True)
    first = table.iloc[0]
    table["bits_per_vector"] = table["bits"] / table["K"]
    table["horizon_per_vector"] = table["horizon"] / table["K"]
    table["of_straight_line"] = table["bits_per_vector"] / (first["bits"] / first["K"])
    return table
