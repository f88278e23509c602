"""The fit of the threshold claim: with vectors max(0, H - C) bits of any text are left.

Paper, Figures 3 and 6: they plot the bits of a text with vectors (H_mem) against those without
(H). Below C no bits are left, and above it the points follow a line of slope 1. C would then be the
model's capacity, "independent of the kind of text", which the paper shows by a plot. Here C is
fitted for natural and for random text, and the difference gets an interval.

A passage whose accuracy is at least 0.99 counts with 0 bits left. Cramming stops at the first step
at which every token is right, so the few bits that are left depend on when it stopped and not on
what the vectors can hold; if they counted, C would fall to the longest text that was tried.
C minimises squared residuals. Intervals are percentiles of a bootstrap over passages, where a
passage at several lengths is drawn as one. If fewer than MIN_ABOVE passages are beyond the
threshold, C is only a lower bound, and `reached` is false.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

ACCURATE = 0.99  # teacher-forced accuracy from which 0 bits count as left
MIN_ABOVE = 3  # passages beyond the threshold that a measured C needs
DRAWS = 400

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """C in bits with its 95 % interval, and how far points lie from the line (rms, bits)."""

    capacity: float
    low: float
    high: float
    rms: float
    n: int  # rows, each of which is a point
    passages: int  # of the rows; one at several lengths counts once
    reached: bool  # False: too few points are above the threshold, and C is a lower bound


@dataclass(frozen=True)
class Difference:
    """C of natural minus C of random text, bits, 95 % interval, two-sided bootstrap p."""

    natural: Fit
    random: Fit
    difference: float
    low: float
    high: float
    p: float
    floor: bool  # p is the smallest value that the resamples can give; the true p may be smaller

    @property
    def p_value(self) -> str:
        """p with its relation: 'p = 0.030', or 'p ≤ 0.005' at the floor of the bootstrap."""
        return f"p {'≤' if self.floor else '='} {self.p:.3f}"

    @property
    def decided(self) -> bool:
        """True if both kinds of text went beyond the threshold: else a C is a bound only."""
        return self.natural.reached and self.random.reached

    @property
    def verdict(self) -> str:
        """The conclusion from the interval, in a sentence."""
        if not self.decided:
            return "undecided: one kind of text never filled the vectors"
        if self.low <= 0 <= self.high:
            return "no difference between natural and random text at 95 %"
        more = "natural" if self.difference > 0 else "random"
        return f"differs: {more} text holds more at 95 %"


def fit_capacity(lm_bits: Floats, mem_bits: Floats) -> float:
    """C that minimises the squared residuals of mem_bits = max(0, lm_bits - C).

    `lm_bits` and `mem_bits` have one entry per passage. The result is exact: between two
    neighbouring lm_bits the loss is a parabola in C, whose minimum follows from running sums.
    """
    order = np.argsort(lm_bits, kind="stable")
    return _lowest(lm_bits[order], mem_bits[order], np.ones(len(order)))


def _lowest(x: Floats, y: Floats, w: Floats) -> float:
    """`fit_capacity` for x in ascending order, with a weight for each passage."""
    d = x - y  # the C that would put a point on the line
    below = np.concatenate([[0.0], np.cumsum(w * y**2)])  # of the first k points
    above = [np.concatenate([np.cumsum((w * d**p)[::-1])[::-1], [0.0]]) for p in range(3)]
    edges = np.concatenate([[0.0], x, x[-1:]])
    best = above[1] / np.maximum(above[0], 1e-300)
    C = np.clip(best, edges[:-1], edges[1:])
    loss = below + above[2] - 2 * C * above[1] + C**2 * above[0]
    return float(C[int(np.argmin(loss))])


def fit(rows: pd.DataFrame, seed: int = 0, draws: int = DRAWS) -> Fit:
    """Fit C to rows (columns lm_bits, mem_bits, accuracy, passage_group)."""
    return _fit(rows, _bootstrap(rows, seed, draws))


def compare(natural: pd.DataFrame, random: pd.DataFrame, draws: int = DRAWS) -> Difference:
    """Fit C to natural and to random text, and test the difference by bootstrap."""
    first, second = _bootstrap(natural, 1, draws), _bootstrap(random, 2, draws)
    a, b = _fit(natural, first), _fit(random, second)
    gaps = first - second
    low, high = np.percentile(gaps, [2.5, 97.5])
    tail = min(float((gaps <= 0).mean()), float((gaps >= 0).mean()))
    floor = 2 / draws
    p = min(1.0, max(2 * tail, floor))
    difference = a.capacity - b.capacity
    return Difference(a, b, difference, float(low), float(high), p, 2 * tail <= floor)


def bits_left(rows: pd.DataFrame) -> Floats:
    """Bits left with vectors, 0 for passages with an accuracy of at least ACCURATE."""
    left: Floats = rows["mem_bits"].where(rows["accuracy"] < ACCURATE, 0.0).to_numpy(float)
    return left


def _fit(rows: pd.DataFrame, bootstrap: Floats) -> Fit:
    x, y = rows["lm_bits"].to_numpy(float), bits_left(rows)
    capacity = fit_capacity(x, y)
    residual = y - np.maximum(0.0, x - capacity)
    above = int((rows["accuracy"] < ACCURATE).sum())
    low, high = np.percentile(bootstrap, [2.5, 97.5])
    return Fit(
        capacity,
        float(low),
        float(high),
        math.sqrt(float((residual**2).mean())),
        len(rows),
        rows["passage_group"].nunique(),
        above >= MIN_ABOVE,
    )


def _bootstrap(rows: pd.DataFrame, seed: int, draws: int) -> Floats:
    """C for each resample of passages; a passage's weight is the times that it was drawn."""
    rows = rows.sort_values("lm_bits", kind="stable")
    x, y = rows["lm_bits"].to_numpy(float), bits_left(rows)
    group, names = pd.factorize(rows["passage_group"])
    n = len(names)
    rng = np.random.default_rng(seed)
    capacities = []
    for _ in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
        capacities.append(_lowest(x, y, times[group]))
    return np.asarray(capacities)
