"""The exact protocol: per passage, the longest horizon that decodes freely within a budget.

The horizon grows token by token (the engine's 'growing' schedule) until the passage ends or the
budget of forward-backward tokens is spent. The vectors of the best horizon are reloaded in their
storage dtype and decoded freely; the tokens before the first error are the result. A passage that
decodes whole is censored: a longer one might have been exact too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memvec.lab.protocols.protocol import Capacity, Card, Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_series
from memvec.lab.report.plot import Panel, Plot, Series, n_of
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import Mean, Share, mean_interval, share_interval

PUBLISHED = (
    "Published: progressive cramming of one vector (Tarasov et al., ICML 2026), with the recipe "
    "named, of other passages of PG-19: the longest prefix whose teacher-forced accuracy is 1, "
    "which was not decoded, and its information gain without the first token; means with the "
    "printed spread, whose kind is not named."
)


class Exact(Protocol):
    """Longest horizon that decodes."""

    preset = "default"
    measures_horizon = True

    def capacity(self, rows: pd.DataFrame) -> Capacity | None:
        r = exact_result(rows)
        hover = f"{r.horizon}, {100 * r.censored.share:.0f} % censored"
        return Capacity(r.horizon.mean, r.horizon.low, r.horizon.high, hover)

    def cards(self, data: Data) -> list[Card]:
        cards = []
        for (model, source, K), group in by_series(data.of(self.name)):
            r = exact_result(group)
            n = f"n {r.horizon.n}"
            if r.horizon.n > 1:
                n = f"95 % [{r.horizon.low:.1f}, {r.horizon.high:.1f}], {n}"
            cards.append(
                Card(
                    f"{r.horizon.mean:.1f} tokens",
                    f"exact in K = {K}: {source}, {model}; {n}, {r.bits.mean:.0f} bits, "
                    f"{100 * r.censored.share:.0f} % censored",
                )
            )
        return cards

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        groups = list(by_series(data.of(self.name)))
        theirs = [_published(data, group) if compare else None for _, group in groups]
        lines: list[TableLine] = []
        for ((model, source, K), group), known in zip(groups, theirs, strict=True):
            r = exact_result(group)
            line: TableLine = [
                ("model", model),
                ("source", source),
                ("K", K),
                *interval("exact tokens", r.horizon),
                ("n", r.horizon.n),
                *interval("bits", r.bits),
                ("censored", str(r.censored)),
                ("spent", r.spent.mean),
            ]
            lines.append(line + _published_columns(known) if any(theirs) else line)
        note = (
            "Means over n passages with 95 % intervals. Bits: information gain over the exact "
            "horizon. Censored: share of passages that decode whole, where a longer one might "
            "have been exact too. Spent: forward-backward tokens per passage."
        )
        title = "Exact horizon: leading tokens that free-running decoding gives back"
        return [Table.of("exact", title, f"{note} {PUBLISHED}" if any(theirs) else note, lines)]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels: list[Panel] = []
        counts: list[int] = []
        for model, group in data.of(self.name).groupby("model", sort=False):
            series = []
            for (source, K), part in group.groupby(["series", "vectors"], sort=False):
                # The beginning of a passage that is there at full length adds no observation.
                longest = part[part["length"] == part["length"].max()]
                values = np.sort(longest["horizon"].to_numpy())
                counts.append(len(values))
                grid = np.unique(np.concatenate([[0], values]))
                if not (longest["exact"] > 0).any():  # no passage has more: the line reaches 0
                    grid = np.append(grid, values.max() + 1)
                share = [float((values >= g).mean()) for g in grid]
                name = f"{source}" + (f", K = {K}" if group["vectors"].nunique() > 1 else "")
                series.append(Series(name, [float(g) for g in grid], share, "line"))
            panels.append(Panel(str(model), "tokens", "share of passages", series))
        caption = (
            "Share of passages with at least x exact tokens, at the longest length; "
            f"{n_of(counts)} for each line. A line that ends above 0 is censored there: passages "
            "decode whole, and longer ones might have been exact too."
        )
        return [Plot("survival", "Share of passages by exact horizon", caption, panels)]


def _published(data: Data, rows: pd.DataFrame) -> dict[str, Any] | None:
    """The published horizon of these rows' model, for one vector and PG-19."""
    first = rows.iloc[0]
    if (str(first["source"]), int(first["vectors"])) != ("pg19", 1):
        return None
    return published.progressive(
        data.published_as(str(first["model"])), data.recipe_of(str(first["cell"]))
    )


def _published_columns(known: dict[str, Any] | None) -> TableLine:
    """The columns of a published horizon, empty where there is none."""
    names = ("published recipe", "published tokens", "published bits", "published n")
    if known is None:
        return [(name, None) for name in names]
    (tokens, spread), (bits, bits_spread) = known["tokens"], known["gain_bits"]
    cells = (known["arm"], f"{tokens} ± {spread}", f"{bits:.0f} ± {bits_spread:.0f}", known["n"])
    return list(zip(names, cells, strict=True))


@dataclass(frozen=True)
class ExactResult:
    """Exact horizons of one model, source and K."""

    horizon: Mean  # tokens
    bits: Mean  # information gain over the horizon, bits
    token_gain: Mean  # over the horizon, tokens
    censored: Share  # share that reached the end of its passage, 95 %
    spent: Mean  # forward-backward tokens


def exact_result(rows: pd.DataFrame) -> ExactResult:
    """Summary of the rows of one model, source and K, at their longest length.

    There is one row per passage. Where it is the mean of restarts, `exact` is the share of exact
    restarts, and a single exact restart makes the passage censored. Shorter lengths are dropped,
    because the beginning of a passage that is already there adds no observation.
    """
    rows = rows[rows["length"] == rows["length"].max()]
    return ExactResult(
        mean_interval(rows["horizon"].tolist()),
        mean_interval(rows["horizon_gain"].tolist()),
        mean_interval(rows["horizon_token_gain"].tolist()),
        share_interval(int((rows["exact"] > 0).sum()), len(rows)),
        mean_interval(rows["spent"].tolist()),
    )
