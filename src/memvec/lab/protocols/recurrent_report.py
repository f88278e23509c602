"""Tables and figures of the protocol 'recurrent': by lag, and by the number of segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from memvec.lab.protocols.protocol import Card, extra_of
from memvec.lab.report.data import short
from memvec.lab.report.plot import Panel, Plot, Series, line_of_means
from memvec.lab.report.table import Table, TableCell
from memvec.statistics import Mean, Share, mean_interval, share_interval

HALF = 0.5  # share of passages that makes a lag count as reached


@dataclass(frozen=True)
class Lag:
    """The segment so many before the newest, over the documents (n) of a chain."""

    lag: int
    exact: Share  # whole by free decoding
    leading: Mean  # tokens
    right: float  # teacher-forced accuracy
    alone: Share  # crammed alone, whole by free decoding


@dataclass(frozen=True)
class Chain:
    """Documents of one model, source, K and number of segments."""

    model: str
    series: str
    K: int
    segment: int  # tokens
    segments: int
    n: int
    lags: tuple[Lag, ...]
    carried: Mean  # tokens of segments that come back whole, a vector
    whole: Mean  # leading tokens of the chain crammed into the same K, a vector
    whole_exact: Share
    alone: Mean  # tokens of segments that come back whole, a vector of K for each segment

    @property
    def reach(self) -> int:
        """How many of the newest segments come back whole in half of the documents, in a row."""
        missed = [lag.lag for lag in self.lags if lag.exact.share < HALF]
        return min(missed, default=len(self.lags))


def chains(rows: pd.DataFrame) -> Iterator[Chain]:
    """One for each number of segments, in the order of the spec."""
    if rows.empty:
        return
    names = ("segment", "back", "right", "alone")
    rows = rows.assign(**{f"_{name}": extra_of(rows, "recurrent", name) for name in names})
    keys = ["model", "series", "vectors", "length", "_segment"]
    for (model, series, K, length, segment), part in rows.groupby(keys, sort=False):
        K, T, n = int(K), int(segment), len(part)
        lags = tuple(_lag(part, lag, T) for lag in range(len(part["_back"].iloc[0])))
        carried = [sum(T for t in back if t == T) / K for back in part["_back"]]
        alone = [T / K if t == T else 0.0 for own in part["_alone"] for t in own]
        yield Chain(
            *(str(model), str(series), K, T, int(length) // T, n, lags),
            mean_interval(carried),
            mean_interval((part["horizon"] / K).tolist()),
            share_interval(int((part["horizon"] == length).sum()), n),
            mean_interval(alone),
        )


def _lag(part: pd.DataFrame, lag: int, T: int) -> Lag:
    n = len(part)
    back, right, alone = ([v[lag] for v in part[name]] for name in ("_back", "_right", "_alone"))
    return Lag(
        lag,
        share_interval(sum(t == T for t in back), n),
        mean_interval(back),
        sum(right) / (n * T),
        share_interval(sum(t == T for t in alone), n),
    )


def cards(rows: pd.DataFrame) -> list[Card]:
    """How far back the memory of the longest chain of each model and source gives back."""
    longest: dict[tuple[str, str], Chain] = {}
    for chain in chains(rows):
        key = (chain.model, chain.series)
        if key not in longest or chain.segments > longest[key].segments:
            longest[key] = chain
    return [
        Card(
            f"{c.reach} of {c.segments} segments",
            f"of {c.segment} tokens come back whole, the newest ones, in at least half of the "
            f"documents, from a memory of {c.K} vectors; {c.series}, {short(c.model)}, n {c.n}. "
            f"The newest: {c.lags[0].exact}; the oldest asked for: {c.lags[-1].exact}",
        )
        for c in longest.values()
    ]


def tables(rows: pd.DataFrame) -> list[Table]:
    """By lag for each chain, and what each chain leaves."""
    found = list(chains(rows))
    by_lag: list[list[TableCell]] = [
        [
            *(short(c.model), c.series, c.K, c.segments, at.lag, str(at.exact)),
            *(at.leading.mean, at.leading.low, at.leading.high, f"{100 * at.right:.0f} %"),
            *(str(at.alone), c.n),
        ]
        for c in found
        for at in c.lags
    ]
    by_chain: list[list[TableCell]] = [
        [
            *(short(c.model), c.series, c.K, c.segments, c.segments * c.segment, c.reach),
            *(c.carried.mean, c.carried.low, c.carried.high),
            *(c.whole.mean, c.whole.low, c.whole.high, str(c.whole_exact)),
            *(c.alone.mean, c.K * c.segments, c.n),
        ]
        for c in found
    ]
    columns = ["model", "source", "K", "segments", "lag", "exact", "leading tokens", "low", "high"]
    kept = ["model", "source", "K", "segments", "tokens", "reach", "carried", "low", "high"]
    kept += ["crammed whole", "low", "high", "whole: exact", "crammed alone", "its vectors", "n"]
    note = (
        "The memory of K vectors after the last segment. Lag: how many segments before the newest. "
        "Exact: every token by free decoding from the memory and the question of the lag (Wilson, "
        "95 %). Leading tokens: mean before the first error, with its 95 % interval. "
        "Teacher-forced: arg-maxes that are right when the true earlier tokens are given. Crammed "
        "alone: the segment in K vectors of its own, exact."
    )
    kept_note = (
        "Tokens per vector with 95 % intervals over documents. Reach: newest segments, in a row, "
        "that come back whole in at least half of the documents. Carried: tokens of the segments "
        "that come back whole from the memory, over all lags asked. Crammed whole: leading tokens "
        "of the chain in the same K vectors, the upper bound. Crammed alone: K vectors for each "
        "segment."
    )
    return [
        Table(
            "recurrent",
            "A memory carried over segments, by lag",
            note,
            [*columns, "teacher-forced", "alone: exact", "n"],
            by_lag,
        ),
        Table("recurrent-chains", "What is left after n segments", kept_note, kept, by_chain),
    ]


def figures(rows: pd.DataFrame) -> list[Plot]:
    """Share exact by lag for each chain, and tokens per vector by the number of segments."""
    found = list(chains(rows))
    panels = []
    for model, series, K in dict.fromkeys((c.model, c.series, c.K) for c in found):
        own = [c for c in found if (c.model, c.series, c.K) == (model, series, K)]
        own.sort(key=lambda c: c.segments)
        title = f"{short(model)}, {series}, K = {K}"
        panels.append(
            Panel(title, "lag, segments", "share of segments exact", [_by_lag(c) for c in own])
        )
        n = [c.segments for c in own]
        lines = [
            line_of_means("carried", n, [c.carried for c in own]),
            line_of_means("crammed whole", n, [c.whole for c in own]),
            line_of_means("crammed alone, K a segment", n, [c.alone for c in own]),
        ]
        panels.append(Panel(title, "segments", "tokens per vector", lines))
    if not panels:
        return []
    counts = ", ".join(dict.fromkeys(str(c.n) for c in found))
    caption = (
        f"Documents of a chain: {counts}. Bars are 95 % intervals over documents. The reach of the "
        f"longest chain is {max(found, key=lambda c: c.segments).reach} segments."
    )
    return [
        Plot("recurrent", "How far back a carried memory gives a document back", caption, panels)
    ]


def _by_lag(chain: Chain) -> Series:
    shares = [at.exact for at in chain.lags]
    return Series(
        f"after {chain.segments}",
        [float(at.lag) for at in chain.lags],
        [s.share for s in shares],
        "line",
        [s.low for s in shares],
        [s.high for s in shares],
        [f"{s}, n {chain.n}" for s in shares],
    )
