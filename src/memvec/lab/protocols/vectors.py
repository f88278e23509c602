"""Capacity of K vectors against the straight line (paper, Figure 4).

Lengths of the spec are per vector: K vectors get a passage of K times as many tokens. The measure
is the exact horizon; the straight line is K times the value per vector at the smallest K. Rows of
the paper protocol with several K are reported beside it by the published rule (`scaling.py`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import pandas as pd

from memvec.lab.protocols.protocol import Protocol
from memvec.lab.protocols.scaling import exact_scaling, published_scaling, scaling_sentence
from memvec.lab.report import published
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table, TableLine, interval, mean_and_sd
from memvec.model.reading import StartRule

# (measure of `scaling`, its label by the exact rule, its label by the published rule, its name in
# published.json)
MEASURES = (
    ("longest", "exact tokens", "Max tokens", "longest"),
    ("token_gain", "token gain, exact horizon", "token gain", "token_gain"),
    ("bits", "information gain, bits, exact horizon", "information gain, bits", "gain_nats"),
)


class Vectors(Protocol):
    """Exact horizons and gains for several K."""

    preset = "default"
    measures_horizon = True

    def tokens(self, length: int, K: int, start_rule: StartRule) -> int:
        """`length` tokens per vector."""
        return length * K

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        return [_exact_table(data.of(self.name)), _published_table(data, compare)]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels, sentences = [], []
        by_text = _by_text(data.of(self.name))
        exact = [(model, source, exact_scaling(rows)) for model, source, rows in by_text]
        paper = [(model, source, published_scaling(rows)) for model, source, rows in _sweeps(data)]
        for rule, tables in enumerate((exact, paper)):
            by = ("exact horizons", "the published rule")[rule]
            for measure, *labels, published_name in MEASURES:
                series = []
                for model, source, table in tables:
                    series += _measured(f"{model}, {source}", table, measure)
                # The published values are by the published rule.
                for model in dict.fromkeys(model for model, *_ in tables if rule and compare):
                    series += _published(data, model, published_name)
                if series:
                    panels.append(Panel(labels[rule], "K, vectors", labels[rule], series, log=True))
            for model, source, table in tables:
                sentences.append(scaling_sentence(f"{model}, {source}, by {by}", table))
        caption = ["Dashed: the straight line from the smallest K.", *filter(None, sentences)]
        return [Plot("vectors", "More vectors (Figure 4)", " ".join(caption), panels)]


def _by_text(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(model, series, rows), all K together."""
    for (model, source), group in rows.groupby(["model", "series"], sort=False):
        yield str(model), str(source), group


def _sweeps(data: Data) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The same of the paper protocol, where it has several K."""
    for model, source, group in _by_text(data.of("paper")):
        if group["vectors"].nunique() > 1:
            yield model, source, group


def _exact_table(measured: pd.DataFrame) -> Table:
    lines: list[TableLine] = [
        [
            ("model", model),
            ("source", source),
            ("K", int(at["K"])),
            *interval("exact tokens", _mean(at, "longest")),
            *interval("bits", _mean(at, "bits")),
            ("bits / vector", at["bits"] / at["K"]),
            ("of the line", f"{100 * at['bits_share']:.0f} %"),
            ("censored", f"{100 * at['censored']:.0f} %"),
            ("cut", f"{100 * at['cut']:.0f} %"),
            ("n", int(at["n"])),
        ]
        for model, source, group in _by_text(measured)
        for at in exact_scaling(group).to_dict("records")
    ]
    return Table.of(
        "vectors",
        "K vectors against the straight line",
        "Means over n passages with their 95 % intervals: exact horizon, and information gain over "
        "it. Of the line: bits divided by K times the bits per vector at the smallest K. Censored: "
        "share of passages that decode whole, where K vectors might hold more. Cut: share of "
        "passages that ended at their budget.",
        lines,
    )


def _published_table(data: Data, compare: bool) -> Table:
    """Figure 4 in numbers, by the published rule."""
    lines: list[TableLine] = []
    for model, source, group in _sweeps(data):
        for at in published_scaling(group).to_dict("records"):
            longest = at["longest"]
            line: TableLine = [
                ("model", model),
                ("source", source),
                ("K", int(at["K"])),
                ("Max", None if math.isnan(longest) else int(longest)),
                ("longest tried", int(at["tried"])),
                ("of the line", _percent(at["longest_share"])),
                *interval("token gain", _mean(at, "token_gain")),
                ("of the line", _percent(at["token_gain_share"])),
                *interval("bits", _mean(at, "bits")),
                ("of the line", _percent(at["bits_share"])),
                ("n", int(at["n"])),
            ]
            if compare:
                source_name, name = str(group["source"].iloc[0]), data.published_as(model)
                known = published.table1(name, source_name, int(at["K"])) or {}
                line += [
                    ("paper Max", known.get("longest")),
                    ("paper gain", mean_and_sd(known.get("token_gain"))),
                    ("paper bits (nats / ln 2)", mean_and_sd(known.get("gain_bits"))),
                ]
            lines.append(line)
    return Table.of(
        "vectors-paper",
        "K vectors by the paper's protocol (Figure 4)",
        "Max: longest length of the grid whose mean teacher-forced accuracy is at least 0.99; "
        "where it is the longest tried, a longer grid might give more. Gains: means over the n "
        "passages with accuracy of at most 0.99, each at all such lengths, with their 95 % "
        "intervals over passages. The line is K times the value per vector at the smallest K.",
        lines,
    )


def _mean(at: Mapping[Hashable, Any], measure: str) -> tuple[float, float, float]:
    """A measure of one K with the ends of its interval."""
    return float(at[measure]), float(at[f"{measure}_low"]), float(at[f"{measure}_high"])


def _percent(share: float) -> str | None:
    return None if math.isnan(share) else f"{100 * share:.0f} %"


def _measured(name: str, table: pd.DataFrame, measure: str) -> list[Series]:
    """A measure over K, and the straight line through the origin and its first point."""
    table = table[table[measure].notna()]
    if table.empty:
        return []
    K, y = [float(k) for k in table["K"]], [float(v) for v in table[measure]]
    # Max has no interval and no n of its own: n is that of the gains.
    ns = table["n"].where(table[f"{measure}_low"].notna())
    counts = ["" if math.isnan(n) else f" (n {n:.0f})" for n in ns]
    hover = [f"K {k:.0f}: {v:.1f}{n}" for k, v, n in zip(K, y, counts, strict=True)]
    low, high = (
        [v if math.isnan(edge) else float(edge) for v, edge in zip(y, table[column], strict=True)]
        for column in (f"{measure}_low", f"{measure}_high")
    )
    line = Series("", K, [y[0] / K[0] * k for k in K], "dashed")
    if low == high == y:
        return [Series(name, K, y, "line", hover=hover), line]
    return [Series(name, K, y, "line", low, high, hover), line]


def _published(data: Data, model: str, name: str) -> list[Series]:
    entry = published.published()["vectors"]["values"].get(data.published_as(model))
    if not entry:
        return []
    values = [float(v) for v in entry[name]]
    if name.endswith("_nats"):
        values = [published.bits(v) for v in values]
    K = [float(k) for k in entry["K"][: len(values)]]
    return [Series(f"{model}, PG-19, published", K, values, "line")]
