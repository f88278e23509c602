"""Figure 1: decoding capacity by model, by every protocol that counts one."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.protocols.protocol import Capacity
from memvec.lab.report import published
from memvec.lab.report.data import Data, averaged
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.texts import texts_sentence

PUBLISHED = ", published"  # ends the name of a series
CAPTION = (
    "One point for each model, source and protocol, at the smallest K. A mean exact horizon has "
    "its 95 % interval over passages; a longest length has none. The protocols' tables give their "
    "rules and n."
)


def lengths(data: Data, *, compare: bool) -> Plot:
    """Decoding capacity of the smallest K, for each source and protocol."""
    rows = averaged(data.rows)
    models = list(dict.fromkeys(rows["model"]))
    series: list[Series] = []
    for source in dict.fromkeys(rows["series"]):
        rows_of_source = rows[rows["series"] == source]
        lines = [_capacities(rows_of_source, name, models) for name in data.protocols()]
        series += [line for line in lines if line.x]
        text = str(rows_of_source["source"].iloc[0])
        known = f"{text}{PUBLISHED}"
        if compare and any(line.x for line in lines) and known not in [s.name for s in series]:
            series += _published(data, models, rows_of_source, known)
    kept = sorted({int(x) for s in series for x in s.x})  # models with a capacity
    names = [str(models[i]) for i in kept]
    moved = [replace(s, x=[float(kept.index(int(x))) for x in s.x]) for s in series]
    panels = [Panel("", "model", "tokens", moved, names)] if series else []
    caption = " ".join(filter(None, [CAPTION, _longest(moved, names), texts_sentence(data)]))
    return Plot("lengths", "Decoding capacity by model (Figure 1)", caption, panels)


def _longest(series: list[Series], names: list[str]) -> str:
    """Sentences on the largest measured capacity, and on measured against published ones."""
    measured = [s for s in series if not s.name.endswith(PUBLISHED)]
    points = [(y, s.name, names[int(x)]) for s in measured for x, y in zip(s.x, s.y, strict=True)]
    if not points:
        return ""
    tokens = max(tokens for tokens, *_ in points)
    where = "; ".join(f"{name}, {model}" for y, name, model in points if y == tokens)
    sentence = f"The largest is {tokens:.0f} tokens: {where}."
    paper = [s for s in measured if s.name.endswith(", paper")]
    ratios = [
        y / paper_values.y[paper_values.x.index(x)]
        for paper_values in series
        if paper_values.name.endswith(PUBLISHED)
        for s in paper
        if s.name == paper_values.name.removesuffix(PUBLISHED) + ", paper"
        for x, y in zip(s.x, s.y, strict=True)
        if x in paper_values.x
    ]
    if ratios:
        sentence += (
            f" By the paper's rule, measured over published: {min(ratios):.2f} to "
            f"{max(ratios):.2f} (n {len(ratios)} models and texts)."
        )
    return sentence


def _capacities(rows: pd.DataFrame, protocol: str, models: list[str]) -> Series:
    """One protocol's capacity on one source: a point for each model that has one."""
    measured = rows[rows["protocol"] == protocol]
    smallest_K = measured.groupby("model")["vectors"].transform("min")
    measured = measured[measured["vectors"] == smallest_K]
    points: dict[int, Capacity] = {}
    for i, model in enumerate(models):
        part = measured[measured["model"] == model]
        capacity = None if part.empty else protocol_of(protocol).capacity(part)
        if capacity is not None:
            points[i] = capacity
    values = list(points.values())
    with_interval = bool(values) and all(c.low is not None for c in values)
    return Series(
        f"{rows['series'].iloc[0]}, {protocol}",
        [float(i) for i in points],
        [float(c.tokens) for c in values],
        low=[float(c.low) for c in values if c.low is not None] if with_interval else None,
        high=[float(c.high) for c in values if c.high is not None] if with_interval else None,
        hover=[c.hover for c in values] if with_interval else None,
    )


def _published(data: Data, models: list[str], rows: pd.DataFrame, name: str) -> list[Series]:
    """The published Max on the source of `rows`, for the K that is drawn of each model."""
    by_rule = rows[rows["protocol"] == "paper"]
    smallest_K = (rows if by_rule.empty else by_rule).groupby("model")["vectors"].min().to_dict()
    source = str(rows["source"].iloc[0])
    entries = [
        (float(i), published.table1(data.published_as(model), source, smallest_K.get(model, 1)))
        for i, model in enumerate(models)
    ]
    known = [(i, float(entry["longest"])) for i, entry in entries if entry]
    return [Series(name, [i for i, _ in known], [v for _, v in known])] if known else []
