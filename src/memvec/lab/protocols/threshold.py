"""The threshold plane (paper, Figures 3 and 6): bits without vectors against bits left with them.

All lengths and sources of one model and K share one plane, with the rows of the protocol 'paper'.
`plane.py` fits C and tests the claim that C does not depend on the kind of text.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pandas as pd

from memvec.lab.protocols.plane import ACCURATE, MIN_ABOVE, Difference, Fit, compare, fit
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_recipe, panel_title
from memvec.lab.report.plot import Panel, Plot, Series, cloud, estimates, n_of
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import Interval, mean_interval, rank_correlation

MIN_RANKED = 3  # a rank correlation needs more models than this
MAX_SENTENCES = 6  # planes that a caption describes
NOTE = (
    "C by least squares, with 95 % intervals from a bootstrap over passages; a passage with an "
    "accuracy of at least 0.99 counts with 0 bits left. n: rows of all protocols that share this "
    "plane. Cut: share of rows that ended at their step limit; more steps might leave fewer bits, "
    "so C is then a lower bound, and kinds of text that need more steps get a smaller C."
)


class Threshold(Protocol):
    """Bits with and without vectors of all lengths and sources, and the threshold C."""

    plane = "threshold"

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines = [line for plane in planes(data) for line in _lines(plane)]
        title = "Threshold: bits left with vectors = max(0, H − C)"
        return [Table.of("threshold", title, NOTE, lines)]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        return [
            plane_figure(planes(data)),
            per_token(data, data.in_plane(self.plane), compare),
            predictors(data, planes(data)),
        ]


@dataclass(frozen=True)
class Plane:
    """Rows of one model, K and recipe in the threshold plane, and what was fitted to them."""

    model: str
    K: int
    recipe: str  # its name; '' where all rows have one recipe
    rows: pd.DataFrame
    all: Fit | None
    natural: Fit | None
    random: Fit | None
    difference: Difference | None


@functools.lru_cache(maxsize=1)  # a table and two figures need the same bootstrap
def planes(data: Data) -> list[Plane]:
    """Fit C in every plane to all texts, to natural and to random ones, and test the difference."""
    fitted = []
    for (model, K, recipe), group in by_recipe(data.in_plane(Threshold.plane)):
        natural, drawn = group[~group["random_text"]], group[group["random_text"]]
        enough = [part["passage_group"].nunique() > 1 for part in (group, natural, drawn)]
        difference = compare(natural, drawn) if enough[1] and enough[2] else None
        if difference is not None:
            fits: list[Fit | None] = [difference.natural, difference.random]
        else:
            fits = [fit(natural) if enough[1] else None, fit(drawn) if enough[2] else None]
        whole = fit(group) if enough[0] else None
        fitted.append(Plane(model, K, recipe, group, whole, fits[0], fits[1], difference))
    return fitted


def _lines(plane: Plane) -> list[TableLine]:
    """Lines of C for all, natural and random text, and for the difference of the last two."""
    drawn, recipe = plane.rows["random_text"], f", {plane.recipe}" if plane.recipe else ""
    parts = (
        ("all", plane.all, plane.rows),
        ("natural", plane.natural, plane.rows[~drawn]),
        ("random", plane.random, plane.rows[drawn]),
    )
    lines: list[TableLine] = []
    for name, f, part in parts:
        if f is not None:
            cut = float((part["steps"] >= part["step_limit"]).mean())
            conclusion = "" if f.reached else f"not reached: fewer than {MIN_ABOVE} above"
            lines.append(
                [
                    ("model", plane.model),
                    ("K", plane.K),
                    ("text", f"{name}{recipe}"),
                    *interval("C, bits", (f.capacity, f.low, f.high)),
                    ("rms, bits", f.rms),
                    ("n", f.n),
                    ("passages", f.passages),
                    ("cut", f"{100 * cut:.0f} %"),
                    ("conclusion", conclusion),
                ]
            )
    if plane.difference is not None:
        d = plane.difference
        lines.append(
            [
                ("model", plane.model),
                ("K", plane.K),
                ("text", f"natural − random{recipe}"),
                *interval("C, bits", (d.difference, d.low, d.high)),
                ("rms, bits", None),
                ("n", len(plane.rows)),
                ("passages", None),
                ("cut", None),
                ("conclusion", f"{d.p_value}; {d.verdict}" if d.decided else d.verdict),
            ]
        )
    return lines


def plane_figure(fitted: list[Plane]) -> Plot:
    """Figures 3 and 6: bits without and with vectors."""
    panels = []
    for plane in fitted:
        rows = plane.rows
        series = [
            cloud(str(source), part, "lm_bits", "mem_bits")
            for source, part in rows.groupby("series", sort=False)
        ]
        top = float(rows["lm_bits"].max())
        series += [] if plane.all is None else _fit_lines(plane.all, top)
        passed = rows[rows["accuracy"] >= ACCURATE]
        if len(passed):
            level = float(passed["mem_bits"].max())
            name = f"maximum of bits left at accuracy ≥ {ACCURATE}"
            series.append(Series(name, [0.0, top], [level, level], "dashed"))
        title = panel_title(plane.model, plane.K, plane.recipe)
        panels.append(Panel(title, "bits without vectors, H", "bits left with vectors", series))
    caption = (
        "One point per passage. The line is the least-squares fit of max(0, H − C), in which a "
        f"passage with an accuracy of at least {ACCURATE} counts with 0 bits left."
    )
    caption = " ".join([caption, *map(_sentence, fitted[:MAX_SENTENCES])])
    return Plot("planes", "The threshold plane (Figures 3 and 6)", caption, panels)


def _sentence(plane: Plane) -> str:
    """C of a plane, and whether natural and random text agree in it."""
    name = panel_title(plane.model, plane.K, plane.recipe)
    if plane.all is None:
        return f"{name}: too few passages for a fit."
    f = plane.all
    symbol = "C" if f.reached else "C at least (the vectors were never filled)"
    sentence = f"{name}: {symbol} {f.capacity:.0f} bits [{f.low:.0f}, {f.high:.0f}], n {f.n}"
    d = plane.difference
    if d is None:
        return f"{sentence}."
    gap = f"natural − random text {d.difference:+.0f} bits [{d.low:.0f}, {d.high:.0f}]"
    decided = f", {d.p_value}" if d.decided else ""
    return f"{sentence}; {gap}{decided}: {d.verdict}."


def _fit_lines(f: Fit, top: float) -> list[Series]:
    C = f.capacity
    name = f"max(0, H − C), C = {C:.0f} bits"
    lines = [Series(name, [0.0, C, top], [0.0, 0.0, max(0.0, top - C)], "line")]
    for label, edge in (("95 % interval of C", f.low), ("", f.high)):
        ends = [0.0, 0.0, max(0.0, top - edge)]
        lines.append(Series(label, [0.0, edge, top], ends, "dashed"))
    return lines


def per_token(data: Data, rows: pd.DataFrame, compare: bool) -> Plot:
    """Bits per token against length (`text_ppl_vs_compression*.ipynb`)."""
    panels = []
    for model, group in rows.groupby("model", sort=False):
        group = group[group["vectors"] == group["vectors"].min()]
        series = []
        for source, part in group.groupby("series", sort=False):
            for name, column in (("without", "lm_bits"), ("with", "mem_bits")):
                means = {
                    float(str(length)): mean_interval((cell[column] / cell["predicted"]).tolist())
                    for length, cell in part.groupby("length")
                }
                series.append(estimates(f"{source}, {name}", means, means.values()))
        series += _published_per_token(data.published_as(str(model))) if compare else []
        panels.append(Panel(str(model), "tokens", "bits per token", series, log=True))
    smallest_K = rows.groupby("model")["vectors"].transform("min")
    drawn = rows[rows["vectors"] == smallest_K]
    n = n_of(drawn.groupby(["model", "series", "length"]).size())
    caption = (
        "Bits per token without and with vectors, for the smallest K: means over passages with "
        f"95 % intervals; {n} for each length. {_removed(rows)}"
    )
    return Plot("per-token", "Bits per token against length", caption, panels)


def _removed(rows: pd.DataFrame) -> str:
    """The range of the share of bits that vectors remove, at the shortest and longest lengths."""
    ends: list[list[float]] = [[], []]
    for _, group in rows.groupby(["model", "series"], sort=False):
        group = group[group["vectors"] == group["vectors"].min()]
        both = (group["length"].min(), group["length"].max())
        for shares, length in zip(ends, both, strict=True):
            cell = group[group["length"] == length]
            shares.append(100 * (1 - float(cell["mem_bits"].sum() / cell["lm_bits"].sum())))
    if not ends[0]:
        return ""
    short_, long_ = (f"{min(v):.0f} to {max(v):.0f} %" for v in ends)
    return (
        f"The vectors remove {short_} of the bits at the shortest length of a text and {long_} at "
        "its longest."
    )


def _published_per_token(model: str) -> list[Series]:
    known = published.published()["curves"]["values"].get(model, {})
    series = []
    keys = (("without", "nats_per_token"), ("with", "nats_per_token_with_vector"))
    for name, key in keys:
        curve = {float(k): published.bits(float(v)) for k, v in known.get(key, {}).items()}
        if curve:
            label = f"PG-19, {name}, published"
            series.append(Series(label, list(curve), list(curve.values()), "dashed"))
    return series


def predictors(data: Data, fitted: list[Plane]) -> Plot:
    """C against the width of the vectors, and against the bits of a token.

    One point for each model, way to load it and recipe; correlations take the first of each model.
    """
    points, first = [], dict[str, tuple[tuple[float, float], float]]()
    for plane in fitted:
        facts = data.models.get(plane.model)
        if plane.K == 1 and plane.all is not None and plane.all.reached and facts is not None:
            per = float((plane.rows["lm_bits"] / plane.rows["predicted"]).mean())
            name = plane.model + (f", {plane.recipe}" if plane.recipe else "")
            points.append((name, (float(facts["width"]), per), plane.all))
            first.setdefault(data.keys[plane.model].name, (points[-1][1], plane.all.capacity))
    panels = []
    for i, label in enumerate(("width D", "bits per token without vectors")):
        if len(points) > 1:
            series = [
                estimates(name, [at[i]], [Interval(f.capacity, f.low, f.high)], "points")
                for name, at, f in points
            ]
            panels.append(Panel("", label, "C, bits", series))
    caption = "C of one vector, with its 95 % interval, for each model whose threshold was reached."
    caption += _correlations(list(first.values()))
    return Plot("predictors", "Capacity against properties of the models", caption, panels)


def _correlations(points: list[tuple[tuple[float, float], float]]) -> str:
    """A sentence on the rank correlations of C with both properties; '' for too few models."""
    if len(points) <= MIN_RANKED:
        return ""
    C = [capacity for _, capacity in points]
    ranks = [rank_correlation([at[i] for at, _ in points], C) for i in range(2)]
    both = zip(("D", "the bits of a token"), ranks, strict=True)
    known = [f"with {what} {rank:+.2f}" for what, rank in both if not math.isnan(rank)]
    return f" Rank correlation of C {', '.join(known)} (n {len(C)} models)." if known else ""
