"""Figure 5: theoretical capacity and what is reached of it, by protocols that measure horizons."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from memvec import metrics
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report import published
from memvec.lab.report.data import Data, short
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table, TableCell
from memvec.lab.statistics import mean_interval

BITS = 16  # of a number, as in the paper's Figure 5


@dataclass(frozen=True)
class Utilisation:
    """Of one model, source, protocol and K, over the exact horizons of the longest length."""

    model: str
    series: str
    protocol: str
    K: int
    theoretical: float  # tokens
    token_gain: float  # tokens, mean
    tokens: float  # % of the theoretical tokens
    bits: float  # % of the vectors' bits
    bits_per_dimension: float
    n: int


def utilisations(data: Data) -> list[Utilisation]:
    """One for each model, series, protocol, K and storage, in the order of the spec."""
    names = [name for name in data.protocols() if protocol_of(name).measures_horizon]
    keys = ["model", "series", "protocol", "vectors", "storage"]
    return [
        _utilisation(data, group)
        for (model, *_), group in data.of(*names).groupby(keys, sort=False)
        if str(model) in data.models
    ]


def _utilisation(data: Data, group: pd.DataFrame) -> Utilisation:
    group = group[group["length"] == group["length"].max()]
    first = group.iloc[0]
    facts = data.models[str(first["model"])]
    D, V, K = int(facts["width"]), int(facts["vocabulary"]), int(first["vectors"])
    gain, tokens = (
        mean_interval(group[c].tolist()).mean for c in ("horizon_gain", "horizon_token_gain")
    )
    return Utilisation(
        str(first["model"]),
        str(first["series"]),
        str(first["protocol"]),
        K,
        metrics.theoretical_capacity(D, K, BITS, V),
        tokens,
        100 * metrics.token_utilisation(tokens, D, K, BITS, V),
        100 * metrics.bit_utilisation(gain, D, K, BITS),
        metrics.bits_per_dimension(gain, D, K),
        len(group),
    )


def utilisation_table(data: Data) -> Table:
    """Figure 5 in numbers."""
    rows: list[list[TableCell]] = []
    for u in utilisations(data):
        row: list[TableCell] = [short(u.model), u.series, u.protocol, u.K, u.theoretical]
        rows.append([*row, u.token_gain, u.tokens, u.bits, u.bits_per_dimension, u.n])
    columns = ["model", "source", "protocol", "K", "theoretical tokens", "token gain"]
    return Table(
        "utilisation",
        "Theoretical capacity and what is reached of it",
        f"{BITS}-bit numbers, as in the paper's Figure 5; gains over the exact horizon. The share "
        "of bits is the stricter one where a token costs fewer than log2 V bits.",
        [*columns, "% of tokens", "% of bits", "bits / dimension", "n"],
        rows,
    )


def utilisation_figure(data: Data, *, compare: bool) -> Plot:
    """Figure 5, of each series' smallest K and first protocol."""
    shown: dict[tuple[str, str], Utilisation] = {}
    for u in utilisations(data):
        known = shown.setdefault((u.model, u.series), u)
        if u.protocol == known.protocol and u.K < known.K:
            shown[u.model, u.series] = u
    models = list(dict.fromkeys(u.model for u in shown.values()))
    reached, share = [], []
    for name in dict.fromkeys(u.series for u in shown.values()):
        here = [u for u in shown.values() if u.series == name]
        x = [float(models.index(u.model)) for u in here]
        hover = [short(u.model) for u in here]
        theoretical = [u.theoretical for u in here]
        reached.append(Series(name, theoretical, [u.token_gain for u in here], hover=hover))
        share.append(Series(f"{name}, tokens", x, [u.tokens for u in here], "bars"))
        share.append(Series(f"{name}, bits", x, [u.bits for u in here], "bars"))
    if compare:
        values = published.published()["utilisation"]["values"]
        known_models = [(float(i), values[m]) for i, m in enumerate(models) if m in values]
        if known_models:
            ys = [v["utilisation_pg19"] for _, v in known_models]
            xs = [x for x, _ in known_models]
            share.append(Series("PG-19, tokens, published", xs, ys, "bars"))
    limit = max([1.0, *(u.theoretical for u in shown.values())])
    reached.append(Series("y = x", [0.0, limit], [0.0, limit], "dashed"))
    panels = [
        Panel("reached", "theoretical tokens", "token gain", reached),
        Panel("utilisation", "model", "%", share, [short(m) for m in models]),
    ]
    return Plot(
        "utilisation",
        "Theoretical capacity and utilisation (Figure 5)",
        f"{BITS}-bit numbers; tokens by token gain, bits by information gain.",
        panels if shown else [],
    )
