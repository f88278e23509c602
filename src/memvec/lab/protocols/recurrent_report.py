"""Tables and figures of the protocol 'recurrent': by lag, and by the number of segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from memvec.lab.protocols.protocol import Card, extra_of
from memvec.lab.report.plot import Panel, Plot, Series, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import Mean, Share, mean_interval, share_interval

HALF = 0.5  # a lag counts as reached from this share of exact segments


@dataclass(frozen=True)
class Lag:
    """Results for the segment `lag` places before the newest, over the documents of a chain."""

    lag: int
    exact: Share  # documents whose segment decodes exactly
    leading: Mean  # tokens before the first error
    right: float  # teacher-forced accuracy
    alone: Share  # documents whose segment, crammed alone, decodes exactly


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
    carried: Mean  # tokens of exact segments per vector of the memory
    whole: Mean  # leading tokens per vector of the chain crammed into the same K vectors
    whole_exact: Share
    alone: Mean  # tokens of exact segments per vector, with K vectors for each segment

    @property
    def reach(self) -> int:
        """Number of consecutive newest segments that are exact in half of the documents or more."""
        missed = [lag.lag for lag in self.lags if lag.exact.share < HALF]
        return min(missed, default=len(self.lags))


def chains_of(rows: pd.DataFrame) -> Iterator[Chain]:
    """A chain for each model, source, K and number of segments, in the order of the spec."""
    if rows.empty:
        return
    names = ("segment", "back", "right", "alone")
    rows = rows.assign(**{f"_{name}": extra_of(rows, "recurrent", name) for name in names})
    keys = ["model", "series", "vectors", "length", "_segment"]
    for (model, series, K, length, segment), part in rows.groupby(keys, sort=False):
        K, T, n = int(K), int(segment), len(part)
        lags = tuple(_lag(part, lag, T) for lag in range(len(part["_back"].iloc[0])))
        carried = [sum(T for t in back if t == T) / K for back in part["_back"]]
        # Segments of one document are not independent: a mean for each document.
        alone = [sum(T for t in leading if t == T) / len(leading) / K for leading in part["_alone"]]
        yield Chain(
            model=str(model),
            series=str(series),
            K=K,
            segment=T,
            segments=int(length) // T,
            n=n,
            lags=lags,
            carried=mean_interval(carried),
            whole=mean_interval((part["horizon"] / K).tolist()),
            whole_exact=share_interval(int((part["horizon"] == length).sum()), n),
            alone=mean_interval(alone),
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
    """The reach of the longest chain of each model and source."""
    longest: dict[tuple[str, str], Chain] = {}
    for chain in chains_of(rows):
        key = (chain.model, chain.series)
        if key not in longest or chain.segments > longest[key].segments:
            longest[key] = chain
    return [
        Card(
            f"{c.reach} of {c.segments} segments",
            f"of {c.segment} tokens come back whole, the newest ones, in at least half of the "
            f"documents, from a memory of {c.K} vectors; {c.series}, {c.model}, n {c.n}. "
            f"The newest: {c.lags[0].exact}; the oldest asked for: {c.lags[-1].exact}",
        )
        for c in longest.values()
    ]


def tables(rows: pd.DataFrame) -> list[Table]:
    """A table of the lags of each chain, and a table of the chains."""
    chains = list(chains_of(rows))
    by_lag: list[TableLine] = [
        [
            ("model", c.model),
            ("source", c.series),
            ("K", c.K),
            ("segments", c.segments),
            ("lag", at.lag),
            ("exact", str(at.exact)),
            *interval("leading tokens", at.leading),
            ("teacher-forced", f"{100 * at.right:.0f} %"),
            ("alone: exact", str(at.alone)),
            ("n", c.n),
        ]
        for c in chains
        for at in c.lags
    ]
    by_chain: list[TableLine] = [
        [
            ("model", c.model),
            ("source", c.series),
            ("K", c.K),
            ("segments", c.segments),
            ("tokens", c.segments * c.segment),
            ("reach", c.reach),
            *interval("carried", c.carried),
            *interval("crammed whole", c.whole),
            ("whole: exact", str(c.whole_exact)),
            ("crammed alone", c.alone.mean),
            ("its vectors", c.K * c.segments),
            ("n", c.n),
        ]
        for c in chains
    ]
    note = (
        "Decoding from the memory of K vectors after the last segment. Lag: number of segments "
        "before the newest. Exact: share of the n documents whose segment decodes to the last "
        "token from the memory and the question of the lag (Wilson, 95 %). Leading tokens: mean "
        "before the first error, with its 95 % interval. Teacher-forced: share of right arg-maxes "
        "when the true earlier tokens are given. Alone: the segment is crammed into K vectors of "
        "its own."
    )
    kept_note = (
        "Tokens per vector with 95 % intervals over n documents. Reach: consecutive newest "
        "segments that are exact in at least half of the documents. Carried: tokens of the "
        "segments that decode exactly from the memory, over all lags that were decoded. Crammed "
        "whole: leading tokens of the chain crammed into K vectors, the upper bound. Crammed "
        "alone: tokens of exact segments with K vectors for each segment."
    )
    return [
        Table.of("recurrent", "A memory carried over segments, by lag", note, by_lag),
        Table.of("recurrent-chains", "What is left after n segments", kept_note, by_chain),
    ]


def figures(rows: pd.DataFrame) -> list[Plot]:
    """Share exact by lag for each chain, and tokens per vector by the number of segments."""
    chains = list(chains_of(rows))
    panels = []
    for model, series, K in dict.fromkeys((c.model, c.series, c.K) for c in chains):
        same_memory = [c for c in chains if (c.model, c.series, c.K) == (model, series, K)]
        same_memory.sort(key=lambda c: c.segments)
        title = f"{model}, {series}, K = {K}"
        panels.append(
            Panel(
                title, "lag, segments", "share of segments exact", [_by_lag(c) for c in same_memory]
            )
        )
        n = [c.segments for c in same_memory]
        lines = [
            estimates("carried", n, [c.carried for c in same_memory]),
            estimates("crammed whole", n, [c.whole for c in same_memory]),
            estimates("crammed alone, K a segment", n, [c.alone for c in same_memory]),
        ]
        panels.append(Panel(title, "segments", "tokens per vector", lines))
    if not panels:
        return []
    counts = ", ".join(dict.fromkeys(str(c.n) for c in chains))
    caption = (
        f"Documents per chain (n): {counts}. Bars are 95 % intervals over documents. The reach of "
        f"the longest chain is {max(chains, key=lambda c: c.segments).reach} segments."
    )
    return [
        Plot("recurrent", "How far back a carried memory gives a document back", caption, panels)
    ]


def _by_lag(chain: Chain) -> Series:
    shares = [at.exact for at in chain.lags]
    hover = [f"{share}, n {chain.n}" for share in shares]
    return estimates(f"after {chain.segments}", range(len(shares)), shares, hover=hover)
