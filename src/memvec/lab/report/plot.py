"""A figure as data: panels of series. matplotlib and the page draw from this, so they agree."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from memvec.statistics import Difference, Interval, Mean, Share

Mark = Literal["points", "line", "bars", "dashed", "boxes"]
MAX_POINTS = 1500  # of a cloud: more cannot be told apart and make the page large


@dataclass(frozen=True)
class Series:
    """Points with optional intervals and a text for each.

    For the mark 'boxes', y is the median, low and high are the quartiles, and minimum and maximum
    the ends of the whiskers.
    """

    name: str
    x: list[float]
    y: list[float]
    mark: Mark = "points"
    low: list[float] | None = None
    high: list[float] | None = None
    hover: list[str] | None = None
    minimum: list[float] | None = None
    maximum: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    """Axes with series; `names`: x is an index into these."""

    title: str
    x: str
    y: str
    series: list[Series]
    names: list[str] | None = None
    log: bool = False  # x by powers of two
    log_y: bool = False  # y by powers of two


@dataclass(frozen=True)
class Plot:
    """A figure: key (its file name), title, caption and panels."""

    key: str
    title: str
    caption: str
    panels: list[Panel] = field(default_factory=list)


def cloud(name: str, rows: pd.DataFrame, x: str, y: str) -> Series:
    """One point per row, from two of its columns; at most MAX_POINTS, evenly chosen."""
    if len(rows) > MAX_POINTS:
        rows = rows.iloc[np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)]
    hover = [
        f"passage {n}, {t} tokens, accuracy {a:.3f}"
        for n, t, a in zip(rows["number"], rows["tokens"], rows["accuracy"], strict=True)
    ]
    return Series(name, rows[x].astype(float).tolist(), rows[y].astype(float).tolist(), hover=hover)


def n_of(counts: Iterable[int]) -> str:
    """'n 8', or 'n 4 to 8' if the points of a figure have different numbers of passages."""
    numbers = sorted(counts) or [0]
    fewest, most = numbers[0], numbers[-1]
    return f"n {fewest}" if fewest == most else f"n {fewest} to {most}"


def diagonal(values: pd.Series) -> Series:
    """The line y = x over the range of the values."""
    ends = [float(values.min()), float(values.max())]
    return Series("y = x", ends, ends, "dashed")


def estimates(
    name: str,
    x: Iterable[float | int],
    values: Collection[Mean | Share | Interval | Difference],
    mark: Mark = "line",
    hover: list[str] | None = None,
) -> Series:
    """Estimates with their 95 % intervals."""
    y = [v.mean if isinstance(v, Mean) else v[0] for v in values]
    low, high = [v.low for v in values], [v.high for v in values]
    return Series(name, [float(v) for v in x], y, mark, low, high, hover)


def boxes(name: str, parts: Sequence[pd.Series]) -> Series:
    """One box for each part, side by side."""
    five = [np.percentile(part, [0, 25, 50, 75, 100]).tolist() for part in parts]
    return Series(
        name,
        [float(i) for i in range(len(parts))],
        [f[2] for f in five],
        "boxes",
        [f[1] for f in five],
        [f[3] for f in five],
        [f"n {len(part)}, {f[0]:.4g} to {f[4]:.4g}" for part, f in zip(parts, five, strict=True)],
        [f[0] for f in five],
        [f[4] for f in five],
    )
