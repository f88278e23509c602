"""A mean never travels alone: its interval, its spread and its n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Mean:
    """Mean, 95 % interval of the mean (Student's t), standard deviation, n."""

    mean: float
    low: float
    high: float
    sd: float
    n: int

    def record(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.n:
            return "–"
        spread = "" if self.n < 2 else f" ± {(self.high - self.low) / 2:.1f}"
        return f"{self.mean:.1f}{spread} (n {self.n})"


def mean_interval(values: Sequence[float | int]) -> Mean:
    """The mean of values with its 95 % interval; NaN where n is too small to say."""
    data = np.asarray([v for v in values if v is not None], dtype=float)
    n = len(data)
    if n == 0:
        return Mean(math.nan, math.nan, math.nan, math.nan, 0)
    mean = float(data.mean())
    if n == 1:
        return Mean(mean, math.nan, math.nan, math.nan, 1)
    from scipy import stats  # takes half a second, which not every command has to wait for

    sd = float(data.std(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Mean(mean, mean - half, mean + half, sd, n)


def share_interval(hits: int, n: int) -> tuple[float, float, float]:
    """A share with its 95 % Wilson interval: (share, low, high)."""
    if n == 0:
        return math.nan, math.nan, math.nan
    from scipy import stats

    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return hits / n, float(interval.low), float(interval.high)
