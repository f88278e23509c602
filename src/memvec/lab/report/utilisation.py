"""Figure 5: theoretical capacity and utilisation, by each protocol's rule of gains.

The published figure uses passages that filled their vectors (paper protocol); protocols that
measure horizons use the exact horizons of the longest length.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from memvec import metrics
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.protocols.protocol import Gains
from memvec.lab.report import published
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Panel, Plot, Series, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import Mean, clustered_mean

BITS = 16  # bits of a number, as in the paper's Figure 5


@dataclass(frozen=True)
class Utilisation:
    """Utilisation of one model, source, protocol and K; `rule` says over which passages."""

    model: str
    series: str
    protocol: str
    K: int
    theoretical: float  # tokens
    token_gain: Mean  # tokens
    tokens: Mean  # % of the theoretical tokens
    bits: Mean  # % of the vectors' bits
    bits_per_dimension: float
    n: int  # passages
    rule: str


def utilisations(data: Data) -> list[Utilisation]:
    """A utilisation for each model, series, protocol, K and storage that has gains."""
    keys = ["model", "series", "protocol", "vectors", "storage"]
    results = []
    for (model, *_), group in data.of(*data.protocols()).groupby(keys, sort=False):
        if str(model) in data.models:
            gains = protocol_of(str(group["protocol"].iloc[0])).gains(group)
            if gains is not None:
                results.append(_utilisation(data, group, gains))
    return results


def _utilisation(data: Data, group: pd.DataFrame, gains: Gains) -> Utilisation:
    first = group.iloc[0]
    facts = data.models[str(first["model"])]
    D, V, K = data.width(first), int(facts["vocabulary"]), int(first["vectors"])
    passages = range(len(gains.bits)) if gains.passages is None else gains.passages
    bits, tokens = (clustered_mean(values, passages) for values in (gains.bits, gains.tokens))
    share_of_tokens = [100 * metrics.token_utilisation(g, D, K, BITS, V) for g in gains.tokens]
    share_of_bits = [100 * metrics.bit_utilisation(g, D, K, BITS) for g in gains.bits]
    return Utilisation(
        str(first["model"]),
        str(first["series"]),
        str(first["protocol"]),
        K,
        metrics.theoretical_capacity(D, K, BITS, V),
        tokens,
        clustered_mean(share_of_tokens, passages),
        clustered_mean(share_of_bits, passages),
        metrics.bits_per_dimension(bits.mean, D, K),
        bits.n,
        gains.rule,
    )


def utilisation_table(data: Data) -> Table:
    """Figure 5 in numbers."""
    lines: list[TableLine] = [
        [
            ("model", u.model),
            ("source", u.series),
            ("protocol", u.protocol),
            ("K", u.K),
            ("theoretical tokens", u.theoretical),
            ("token gain", u.token_gain.mean),
            *interval("% of tokens", u.tokens),
            *interval("% of bits", u.bits),
            ("bits / dimension", u.bits_per_dimension),
            ("n", u.n),
        ]
        for u in utilisations(data)
    ]
    return Table.of(
        "utilisation",
        "Theoretical capacity and what is reached of it",
        f"{BITS}-bit numbers, as in the paper's Figure 5. {_rules(data)} Means over the rows "
        "of n passages (one may have several lengths and restarts); the shares have their 95 % "
        "intervals over passages (Student's t), and the gains are proportional to them. The share "
        "of bits is the stricter one where a token costs fewer than log2 V bits.",
        lines,
    )


def _rules(data: Data) -> str:
    """A sentence on the passages that each protocol's gains are averaged over."""
    rules = dict.fromkeys((u.protocol, u.rule) for u in utilisations(data))
    return "Gains: " + "; ".join(f"'{name}': {rule}" for name, rule in rules) + "."


def utilisation_figure(data: Data, *, compare: bool) -> Plot:
    """Figure 5, for the smallest K and the first protocol of each series."""
    selected: dict[tuple[str, str], Utilisation] = {}
    for u in utilisations(data):
        known = selected.setdefault((u.model, u.series), u)
        if u.protocol == known.protocol and u.K < known.K:
            selected[u.model, u.series] = u
    models = list(dict.fromkeys(u.model for u in selected.values()))
    reached, share = [], []
    for name in dict.fromkeys(u.series for u in selected.values()):
        of_series = [u for u in selected.values() if u.series == name]
        x = [float(models.index(u.model)) for u in of_series]
        hover = [u.model for u in of_series]
        theoretical = [u.theoretical for u in of_series]
        gains = [u.token_gain for u in of_series]
        reached.append(estimates(name, theoretical, gains, "points", hover))
        share.append(estimates(f"{name}, tokens", x, [u.tokens for u in of_series], "bars"))
        share.append(estimates(f"{name}, bits", x, [u.bits for u in of_series], "bars"))
    if compare:
        share += _published(data, models, list(selected.values()))
    limit = max([1.0, *(u.theoretical for u in selected.values())])
    reached.append(Series("y = x", [0.0, limit], [0.0, limit], "dashed"))
    panels = [
        Panel("reached", "theoretical tokens", "token gain", reached),
        Panel("utilisation", "model", "%", share, models),
    ]
    return Plot(
        "utilisation",
        "Theoretical capacity and utilisation (Figure 5)",
        f"{BITS}-bit numbers; tokens by token gain, bits by information gain. Means over passages "
        "with their 95 % intervals. " + _sentence([*selected.values()]),
        panels if selected else [],
    )


def _published(data: Data, models: list[str], measured: list[Utilisation]) -> list[Series]:
    """The paper's shares of tokens, which are those of one vector, beside measured ones of one."""
    values = published.published()["utilisation"]["values"]
    texts, series = {u.series for u in measured}, []
    single = {u.model for u in measured if u.K == 1}
    names = [(float(i), data.published_as(m)) for i, m in enumerate(models) if m in single]
    for key, text in (("pg19", "PG-19"), ("random", "random words")):
        known = [(i, values[name]) for i, name in names if name in values]
        wanted = key == "pg19" or any(name.startswith("random-words") for name in texts)
        if known and wanted:
            xs, ys = [x for x, _ in known], [v[f"utilisation_{key}"] for _, v in known]
            series.append(Series(f"{text}, tokens, published", xs, ys, "bars"))
    return series


def _sentence(selected: list[Utilisation]) -> str:
    """A sentence on the ranges of both shares, and on which of them is smaller."""
    if not selected:
        return ""
    ends = [
        f"{min(v):.1f} to {max(v):.1f} %" if max(v) - min(v) > 0.05 else f"{min(v):.1f} %"
        for v in ([u.tokens.mean for u in selected], [u.bits.mean for u in selected])
    ]
    stricter = sum(u.bits.mean < u.tokens.mean for u in selected)
    return (
        f"The vectors reach {ends[0]} of the tokens and {ends[1]} of the bits; the share of bits "
        f"is the smaller one in {stricter} of {len(selected)} cases (a model and a source)."
    )
