"""The threshold claim: what is left with vectors is max(0, H - C), whatever the text.

Paper, Figures 3 and 6: plot the bits of a text without vectors (H) against those with (H_mem);
below C nothing is left, above it a line of slope 1. C would then be the model's capacity,
"independent of the kind of text", which the paper shows to the eye; here C is fitted for natural
and for random text and the difference gets an interval.

C minimises squared residuals. Intervals resample passages (a passage at several lengths is one
draw), percentile method. Where no passage is left with more than a tenth of its bits the line was
never reached and C is only bounded from below: `reached` is false.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize

from memvec.capacity.protocol import Protocol

REACHED = 0.1  # share of bits left that says a passage is above the threshold
LEAST_ABOVE = 3  # passages above the threshold before C is called measured
DRAWS = 400


class Threshold(Protocol):
    """All lengths and sources in one plane."""

    name = "threshold"


@dataclass(frozen=True)
class Fit:
    """C in bits with its 95 % interval, and how far points lie from the line (rms, bits)."""

    capacity: float
    low: float
    high: float
    rms: float
    n: int
    passages: int
    reached: bool


@dataclass(frozen=True)
class Difference:
    """C of natural minus C of random text, bits, 95 % interval, two-sided bootstrap p."""

    natural: Fit
    random: Fit
    difference: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """What the interval says, in a sentence."""
        if not (self.natural.reached and self.random.reached):
            return "undecided: one kind of text never filled the vectors"
        if self.low <= 0 <= self.high:
            return "no difference between natural and random text at 95 %"
        more = "natural" if self.difference > 0 else "random"
        return f"differs: {more} text holds more at 95 %"


def fit_capacity(lm_bits: NDArray[np.float64], mem_bits: NDArray[np.float64]) -> float:
    """C that minimises the squared residuals of mem_bits = max(0, lm_bits - C)."""

    def loss(capacity: float) -> float:
        return float(((mem_bits - np.maximum(0.0, lm_bits - capacity)) ** 2).sum())

    top = float(lm_bits.max())
    # Not convex in general: a grid finds the valley, a bounded search its floor.
    grid = np.linspace(0.0, top, 129)
    best = grid[int(np.argmin([loss(c) for c in grid]))]
    step = top / 128
    found = optimize.minimize_scalar(
        loss, bounds=(max(0.0, best - step), min(top, best + step)), method="bounded"
    )
    return float(found.x)


def fit(rows: pd.DataFrame, seed: int = 0, draws: int = DRAWS) -> Fit:
    """Fit C to rows (columns lm_bits, mem_bits, passage_group)."""
    bootstrap = _bootstrap(rows, seed, draws)
    return _fit(rows, bootstrap)


def compare(natural: pd.DataFrame, random: pd.DataFrame, draws: int = DRAWS) -> Difference:
    """Is C the same for natural and random text?"""
    first, second = _bootstrap(natural, 1, draws), _bootstrap(random, 2, draws)
    a, b = _fit(natural, first), _fit(random, second)
    gaps = first - second
    low, high = np.percentile(gaps, [2.5, 97.5])
    tail = min(float((gaps <= 0).mean()), float((gaps >= 0).mean()))
    p = min(1.0, max(2 * tail, 2 / draws))
    return Difference(a, b, a.capacity - b.capacity, float(low), float(high), p)


def split_kinds(
    rows: pd.DataFrame, random_sources: Sequence[str] | Mapping[str, bool]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(natural rows, random rows)."""
    names = (
        [n for n, yes in random_sources.items() if yes]
        if isinstance(random_sources, Mapping)
        else list(random_sources)
    )
    drawn = rows["source"].isin(names)
    return rows[~drawn], rows[drawn]


def _fit(rows: pd.DataFrame, bootstrap: NDArray[np.float64]) -> Fit:
    x, y = rows["lm_bits"].to_numpy(float), rows["mem_bits"].to_numpy(float)
    capacity = fit_capacity(x, y)
    residual = y - np.maximum(0.0, x - capacity)
    above = int((y > REACHED * x).sum())
    low, high = np.percentile(bootstrap, [2.5, 97.5])
    return Fit(
        capacity,
        float(low),
        float(high),
        math.sqrt(float((residual**2).mean())),
        len(rows),
        rows["passage_group"].nunique(),
        above >= LEAST_ABOVE,
    )


def _bootstrap(rows: pd.DataFrame, seed: int, draws: int) -> NDArray[np.float64]:
    groups = [
        (g["lm_bits"].to_numpy(float), g["mem_bits"].to_numpy(float))
        for _, g in rows.groupby("passage_group")
    ]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = rng.integers(0, len(groups), len(groups))
        x = np.concatenate([groups[i][0] for i in chosen])
        y = np.concatenate([groups[i][1] for i in chosen])
        found.append(fit_capacity(x, y))
    return np.asarray(found)
