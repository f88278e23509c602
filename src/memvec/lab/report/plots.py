"""Figures as data: panels of series. matplotlib and the page both draw from this, so they agree."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from memvec import metrics
from memvec.lab.protocols.exact import exact_result
from memvec.lab.protocols.geometry import POINTS, cosines, principal_components
from memvec.lab.protocols.paper import THRESHOLD, paper_result
from memvec.lab.protocols.vectors import scaling
from memvec.lab.report import published
from memvec.lab.report.data import Data, short
from memvec.lab.report.tables import paths, solutions
from memvec.statistics import mean_interval

Mark = Literal["points", "line", "bars", "dashed", "boxes"]
MOST_POINTS = 1500  # of a cloud; more neither shows nor fits a page


@dataclass(frozen=True)
class Series:
    """Points with optional intervals and a text for each.

    Of boxes, y is the median, low and high the quartiles, least and most the whiskers' ends.
    """

    name: str
    x: list[float]
    y: list[float]
    mark: Mark = "points"
    low: list[float] | None = None
    high: list[float] | None = None
    hover: list[str] | None = None
    least: list[float] | None = None
    most: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    """Axes with series; `names`: x is an index into these."""

    title: str
    x: str
    y: str
    series: list[Series]
    names: list[str] | None = None
    log: bool = False  # x by powers of two


@dataclass(frozen=True)
class Plot:
    """A figure: what the paper calls it, what it shows, how to read it."""

    key: str
    title: str
    caption: str
    panels: list[Panel] = field(default_factory=list)


def all_plots(data: Data, *, beside: bool) -> list[Plot]:
    """Every figure the study has rows for."""
    from memvec.lab.report.entropy import boxes, per_token, predictors

    made = (
        lengths(data, beside=beside),
        planes(data),
        survival(data),
        over_vectors(data, beside=beside),
        utilisation(data, beside=beside),
        accuracy(data, beside=beside),
        per_token(data, beside=beside),
        boxes(data),
        predictors(data),
        context(data),
        copied(data),
        upper_bound(data),
        geometry(data),
    )
    return [p for p in made if p.panels]


def lengths(data: Data, *, beside: bool) -> Plot:
    """Figure 1: decoding capacity by model."""
    rows = data.of("paper", "exact")
    rows = rows[rows["vectors"] == rows["vectors"].min()] if len(rows) else rows
    models = list(dict.fromkeys(rows["model"]))
    series = []
    for source in dict.fromkeys(rows["series"]):
        here = rows[rows["series"] == source]
        one = here[here["protocol"] == "exact"]
        found = [(i, exact_result(one[one["model"] == m])) for i, m in enumerate(models)]
        found = [(i, r) for i, r in found if r.horizon.n]
        if found:
            series.append(
                Series(
                    f"{source}, exact",
                    [float(i) for i, _ in found],
                    [r.horizon.mean for _, r in found],
                    low=[r.horizon.low for _, r in found],
                    high=[r.horizon.high for _, r in found],
                    hover=[f"{r.horizon}, {100 * r.censored[0]:.0f} % censored" for _, r in found],
                )
            )
        two = here[here["protocol"] == "paper"]
        maxima = [
            (i, paper_result(two[two["model"] == m]).longest)
            for i, m in enumerate(models)
            if (two["model"] == m).any()
        ]
        kept = [(float(i), float(v)) for i, v in maxima if v is not None]
        if kept:
            series.append(Series(f"{source}, paper", [i for i, _ in kept], [v for _, v in kept]))
        if beside:
            text = str(here["source"].iloc[0])
            theirs = [(i, published.table1(m, text)) for i, m in enumerate(models)]
            known = [(float(i), float(t["longest"])) for i, t in theirs if t]
            name = f"{text}, published"
            if known and name not in [s.name for s in series]:  # once for all recipes
                series.append(Series(name, [i for i, _ in known], [v for _, v in known]))
    panels = [Panel("", "model", "tokens", series, [short(m) for m in models])]
    return Plot(
        "lengths",
        "Decoding capacity by model (Figure 1)",
        "Exact: mean horizon that decodes freely, 95 % interval. Paper: longest length whose mean "
        "teacher-forced accuracy is at least 0.99.",
        panels if series else [],
    )


def planes(data: Data) -> Plot:
    """Figures 3 and 6: bits without and with vectors."""
    panels = []
    for t in data.thresholds:
        model, K, group, f = t.model, t.K, t.rows, t.all
        series = [
            _cloud(str(source), part, "lm_bits", "mem_bits")
            for source, part in group.groupby("series", sort=False)
        ]
        top = float(group["lm_bits"].max())
        if f is not None:
            C = f.capacity
            name = f"max(0, H − C), C = {C:.0f} bits"
            series.append(Series(name, [0.0, C, top], [0.0, 0.0, max(0.0, top - C)], "line"))
            for label, edge in (("95 % of C", f.low), ("", f.high)):
                ends = [0.0, 0.0, max(0.0, top - edge)]
                series.append(Series(label, [0.0, edge, top], ends, "dashed"))
        passed = group[group["accuracy"] >= THRESHOLD]
        if len(passed):
            level = float(passed["mem_bits"].max())
            name = "most bits left at accuracy ≥ 0.99"
            series.append(Series(name, [0.0, top], [level, level], "dashed"))
        title = _title(model, K, t.recipe)
        x, y = "bits without vectors, H", "bits left with vectors"
        panels.append(Panel(title, x, y, series))
    return Plot(
        "planes",
        "The threshold plane (Figures 3 and 6)",
        "One point per passage. Below C a passage comes back and little is left, above it stands a "
        "line of slope 1; points at accuracy of at least 0.99 count as nothing left.",
        panels,
    )


def survival(data: Data) -> Plot:
    """Share of passages whose horizon is at least so long."""
    panels = []
    for model, group in data.of("exact").groupby("model", sort=False):
        series = []
        for (source, K), part in group.groupby(["series", "vectors"], sort=False):
            values = np.sort(part["horizon"].to_numpy())
            grid = np.unique(np.concatenate([[0], values]))
            share = [float((values >= g).mean()) for g in grid]
            name = f"{source}" + (f", K = {K}" if group["vectors"].nunique() > 1 else "")
            series.append(Series(name, [float(g) for g in grid], share, "line"))
        panels.append(Panel(short(str(model)), "tokens", "share of passages", series))
    return Plot(
        "survival",
        "How many passages decode at least so far",
        "Exact horizons; a line that ends above 0 at the passages' length is censored there.",
        panels,
    )


def over_vectors(data: Data, *, beside: bool) -> Plot:
    """Figure 4: three panels over K."""
    what = (
        ("horizon", "exact tokens", "longest"),
        ("token_gain", "token gain", "token_gain"),
        ("bits", "information gain, bits", "gain_nats"),
    )
    panels = []
    rows = data.of("vectors")
    for column, label, theirs in what:
        series = []
        for (model, source), group in rows.groupby(["model", "series"], sort=False):
            table = scaling(group)
            K, y = [float(k) for k in table["K"]], [float(v) for v in table[column]]
            edges = f"{column}_low" in table
            name = f"{short(str(model))}, {source}"
            series.append(
                Series(
                    name,
                    K,
                    y,
                    "line",
                    [float(v) for v in table[f"{column}_low"]] if edges else None,
                    [float(v) for v in table[f"{column}_high"]] if edges else None,
                    [
                        f"K {k:.0f}: {v:.1f} (n {n})"
                        for k, v, n in zip(K, y, table["n"], strict=True)
                    ],
                )
            )
            series.append(Series("straight line", K, [y[0] / K[0] * k for k in K], "dashed"))
            entry = published.published()["vectors"]["values"].get(str(model))
            if beside and entry:
                values = [float(v) for v in entry[theirs]]
                values = [published.bits(v) for v in values] if theirs == "gain_nats" else values
                ks = [float(k) for k in entry["K"][: len(values)]]
                series.append(Series("published (PG-19)", ks, values, "line"))
        panels.append(Panel(label, "K, vectors", label, series, log=True))
    return Plot(
        "vectors",
        "More vectors (Figure 4)",
        "Against the straight line from the smallest K.",
        panels if len(rows) else [],
    )


def utilisation(data: Data, *, beside: bool) -> Plot:
    """Figure 5: theoretical capacity against what is reached."""
    rows = data.of("exact")
    models = [m for m in dict.fromkeys(rows["model"]) if m in data.models]
    reached, share = [], []
    limit = 1.0
    for source, here in rows.groupby("series", sort=False):
        xs, ys, tokens, bits = [], [], [], []
        for i, model in enumerate(models):
            part = here[(here["model"] == model) & (here["vectors"] == here["vectors"].min())]
            if part.empty:
                continue
            part = part[part["length"] == part["length"].max()]
            facts, K = data.models[model], int(part["vectors"].iloc[0])
            D, V = int(facts["width"]), int(facts["vocabulary"])
            gain = mean_interval(part["horizon_token_gain"].tolist()).mean
            xs.append(metrics.theoretical_capacity(D, K, 16, V))
            ys.append(gain)
            information = mean_interval(part["horizon_gain"].tolist()).mean
            tokens.append((i, 100 * metrics.token_utilisation(gain, D, K, 16, V)))
            bits.append((i, 100 * metrics.bit_utilisation(information, D, K, 16)))
        limit = max([limit, *xs])
        reached.append(Series(str(source), xs, ys, hover=[short(models[i]) for i, _ in tokens]))
        for name, values in (("tokens", tokens), ("bits", bits)):
            share.append(
                Series(
                    f"{source}, {name}",
                    [float(i) for i, _ in values],
                    [v for _, v in values],
                    "bars",
                )
            )
    if not reached:
        return Plot("utilisation", "", "")
    if beside:
        values = published.published()["utilisation"]["values"]
        known = [
            (float(i), values[m]["utilisation_pg19"]) for i, m in enumerate(models) if m in values
        ]
        if known:
            xs, ys = [i for i, _ in known], [v for _, v in known]
            share.append(Series("PG-19, tokens, published", xs, ys, "bars"))
    reached.append(Series("all of it", [0.0, limit], [0.0, limit], "dashed"))
    names = [short(m) for m in models]
    return Plot(
        "utilisation",
        "Theoretical capacity and utilisation (Figure 5)",
        "16-bit numbers. Tokens as the paper counts them, bits as they are.",
        [
            Panel("reached", "theoretical tokens", "token gain", reached),
            Panel("utilisation", "model", "%", share, names),
        ],
    )


def accuracy(data: Data, *, beside: bool) -> Plot:
    """Teacher-forced accuracy over length; drawn lengths get a rolling mean of 11."""
    panels = []
    for model, group in data.of("paper").groupby("model", sort=False):
        series = []
        for (source, K), part in group.groupby(["series", "vectors"], sort=False):
            name = f"{source}" + (f", K = {K}" if group["vectors"].nunique() > 1 else "")
            if part.groupby("length")["tokens"].nunique().max() > 1:
                ordered = part.sort_values("tokens")
                rolling = ordered["accuracy"].rolling(11, center=True, min_periods=1)
                mean, sd = rolling.mean(), rolling.std().fillna(0.0)
                x = ordered["tokens"].astype(float).tolist()
                series.append(Series(f"{name}, rolling 11", x, mean.tolist(), "line"))
                for label, edge in ((f"{name}, ± sd", mean - sd), ("", (mean + sd).clip(upper=1))):
                    series.append(Series(label, x, edge.tolist(), "dashed"))
                continue
            x, y, low, high, hover = [], [], [], [], []
            for length, cell in part.groupby("length"):
                m = mean_interval(cell["accuracy"].tolist())
                x.append(float(str(length)))
                y.append(m.mean)
                low.append(m.low)
                high.append(min(m.high, 1.0))
                hover.append(f"{length} tokens: {m.mean:.4f} (n {m.n})")
            series.append(Series(name, x, y, "line", low, high, hover))
        theirs = published.published()["curves"]["values"].get(str(model))
        if beside and theirs:
            curve = {float(k): float(v) for k, v in theirs["accuracy"].items()}
            series.append(Series("PG-19, published", list(curve), list(curve.values()), "line"))
        xs = [v for s in series for v in s.x]
        series.append(Series("0.99", [min(xs), max(xs)], [THRESHOLD] * 2, "dashed"))
        panels.append(
            Panel(short(str(model)), "tokens", "teacher-forced accuracy", series, log=True)
        )
    return Plot("accuracy", "Accuracy against length", "Mean over passages, 95 % interval.", panels)


def context(data: Data) -> Plot:
    """Bits left after real context, and with a vector."""
    panels = []
    for (model, source, length), group in data.of("context").groupby(
        ["model", "series", "length"], sort=False
    ):
        by_K = group.groupby("vectors", sort=False)
        _, same = next(iter(by_K))  # without vectors, K makes no difference
        left: dict[int, list[float]] = {0: same["lm_bits"].tolist()}
        for extra in same["extra"]:
            for n, (b, _) in json.loads(extra)["context"].items():
                left.setdefault(int(n), []).append(float(b))
        means = {n: mean_interval(v) for n, v in sorted(left.items())}
        xs = [float(n) for n in means]
        series = [
            Series(
                "real preceding tokens",
                xs,
                [m.mean for m in means.values()],
                "line",
                [m.low for m in means.values()],
                [m.high for m in means.values()],
            ),
        ]
        for K, part in by_K:
            ends = [mean_interval(part["mem_bits"].tolist()).mean] * 2
            series.append(Series(f"K = {K}", [xs[0], xs[-1]], ends, "dashed"))
        title = f"{short(str(model))}, {source}, {length} tokens"
        panels.append(Panel(title, "real tokens given", "bits left", series))
    caption = "A vector is worth more than any amount of ordinary context."
    return Plot("context", "A vector against real context (Table 2)", caption, panels)


def copied(data: Data) -> Plot:
    """Bits removed by a vector and by the text itself."""
    panels = []
    for (model, K, recipe), group in data.of("copy").groupby(
        ["model", "vectors", "recipe"], sort=False
    ):
        copies = [json.loads(e)["copy"] for e in group["extra"]]
        kept = [c is not None for c in copies]
        part = group[kept].copy()
        if part.empty:
            continue
        part["copy_gain"] = part["lm_bits"] - [c[0] for c in copies if c is not None]
        series = [
            _cloud("vector", part, "lm_bits", "information_gain"),
            _cloud("copy in context", part, "lm_bits", "copy_gain"),
            _diagonal(part["lm_bits"]),
        ]
        title = _title(str(model), int(str(K)), str(recipe))
        panels.append(Panel(title, "bits without either, H", "bits removed", series))
    caption = "On the dashed line nothing is left to guess."
    return Plot("copy", "A vector against the text itself in context", caption, panels)


def upper_bound(data: Data) -> Plot:
    """Bits needed and removed, with straight fits."""
    panels = []
    for (model, K, recipe), group in data.of("upper-bound").groupby(
        ["model", "vectors", "recipe"], sort=False
    ):
        part = group.copy()
        part["needed"] = [json.loads(e)["needed_bits"] for e in part["extra"]]
        series = []
        for name, column in (("removed", "information_gain"), ("needed for the arg-max", "needed")):
            series.append(_cloud(name, part, "lm_bits", column))
            if part["lm_bits"].nunique() > 2:
                slope, level = np.polyfit(part["lm_bits"], part[column], 1)
                ends = [float(part["lm_bits"].min()), float(part["lm_bits"].max())]
                label = f"{slope:.2f} H {level:+.0f}"
                series.append(Series(label, ends, [slope * x + level for x in ends], "dashed"))
        title = _title(str(model), int(str(K)), str(recipe))
        panels.append(Panel(title, "bits without vectors, H", "bits", series))
    return Plot(
        "upper-bound",
        "What the arg-max needs and what vectors remove",
        "Published for Sheared-LLaMA-1.3B: needed 0.50 H, removed 0.95 H.",
        panels,
    )


def geometry(data: Data) -> Plot:
    """Figures 7 and 8, and PCA."""
    panels = []
    for (model, source, length, K), group in data.restarts().groupby(
        ["model", "series", "length", "vectors"], sort=False
    ):
        vectors, labels = solutions(data, group)
        if len(vectors) < 3:
            continue
        within, between = cosines(vectors, labels)
        series = []
        edges = np.linspace(-0.2, 1.0, 49)
        for name, values in (("same passage", within), ("different passages", between)):
            if len(values):
                density, _ = np.histogram(values, edges, density=True)
                middle = ((edges[1:] + edges[:-1]) / 2).tolist()
                label = f"{name} (n {len(values)})"
                series.append(Series(label, middle, density.tolist(), "line"))
        title = f"{short(str(model))}, {source}, {length} tokens, K = {K}"
        panels.append(Panel(title, "cosine", "density", series))
        where, share = principal_components(vectors)
        numbers = list(dict.fromkeys(labels.tolist()))[:10]
        for i, j in itertools.combinations(range(where.shape[1]), 2):
            clouds = [
                Series(
                    f"passage {number}",
                    where[labels == number, i].tolist(),
                    where[labels == number, j].tolist(),
                )
                for number in numbers
            ]
            x, y = (f"component {k + 1} ({100 * share[k]:.0f} %)" for k in (i, j))
            panels.append(Panel(f"PCA, components {i + 1} and {j + 1}", x, y, clouds))
        lines = np.array(list(paths(data, group)))
        if len(lines):
            t = np.linspace(0, 1, POINTS).tolist()
            mean, low = lines.mean(0).tolist(), lines.min(0).tolist()
            walk = [Series(f"mean of {len(lines)}", t, mean, "line")]
            walk.append(Series("lowest", t, low, "dashed"))
            panels.append(Panel("between two solutions", "from one to the other", "accuracy", walk))
    return Plot(
        "geometry",
        "Restarts of one passage (Figures 7 and 8)",
        "Solutions of one passage are alike without being near; between them accuracy dips.",
        panels,
    )


def _title(model: str, K: int, recipe: str) -> str:
    return f"{short(model)}, K = {K}" + (f", {recipe}" if recipe else "")


def _cloud(name: str, rows: pd.DataFrame, x: str, y: str) -> Series:
    if len(rows) > MOST_POINTS:
        rows = rows.iloc[np.linspace(0, len(rows) - 1, MOST_POINTS).astype(int)]
    hover = [
        f"passage {n}, {t} tokens, accuracy {a:.3f}"
        for n, t, a in zip(rows["number"], rows["tokens"], rows["accuracy"], strict=True)
    ]
    return Series(name, rows[x].astype(float).tolist(), rows[y].astype(float).tolist(), hover=hover)


def _diagonal(values: pd.Series) -> Series:
    ends = [float(values.min()), float(values.max())]
    return Series("all of it", ends, ends, "dashed")
