"""Means, shares, differences and ratios with their 95 % intervals and their n.

Intervals are by Student's t for means, by Wilson for shares, and by the percentile bootstrap for
ratios of means.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

from memvec.metrics import mean_and_error

Floats = NDArray[np.float64]
LEVEL = 0.975  # the upper end of a two-sided 95 % interval
DRAWS = 10_000  # resamples of a bootstrap
AT_ONCE = 2**20  # numbers that are drawn at once


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


class Share(NamedTuple):
    """A share with its 95 % interval (Wilson)."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.share:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


class Difference(NamedTuple):
    """A difference of two means with its 95 % interval and two-sided p (Student's t).

    NaN where there are too few values; p is NaN where the values do not vary.
    """

    value: float
    low: float
    high: float
    p: float

    def p_value(self) -> str:
        """p with its relation: 'p = 0.030', or 'p < 0.001'."""
        if math.isnan(self.p):
            return "p –"
        return "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"


class Interval(NamedTuple):
    """An estimate with its 95 % interval (percentile bootstrap)."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float | int]) -> Mean:
    """The mean of values with its 95 % interval; NaN where n is too small to give one."""
    n = len(values)
    mean, error = mean_and_error(values)
    if n < 2:
        return Mean(mean, math.nan, math.nan, math.nan, n)
    half = float(stdtrit(n - 1, LEVEL)) * error
    return Mean(mean, mean - half, mean + half, error * math.sqrt(n), n)


def clustered_mean(values: Sequence[float | int], clusters: Sequence[Hashable]) -> Mean:
    """The mean of values that are not independent, with a 95 % interval over their clusters.

    A cluster is, for example, the values of one text at several lengths; `n` is the number of
    clusters. The interval is Student's t with the cluster-robust variance (that of the clusters'
    sums of deviations). It equals `mean_interval` if each value is its own cluster.
    """
    m, sums = mean_interval(values), dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - m.mean
    n, N = len(sums), len(values)
    if n < 2:
        return Mean(m.mean, math.nan, math.nan, math.nan, n)
    error = math.sqrt(math.fsum(s**2 for s in sums.values()) * n / (n - 1)) / N
    half = float(stdtrit(n - 1, LEVEL)) * error
    return Mean(m.mean, m.mean - half, m.mean + half, error * math.sqrt(n), n)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The mean of first minus second over the same passages, by the paired t test."""
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    m = mean_interval(gaps.tolist())
    if m.n < 2:
        return Difference(m.mean, math.nan, math.nan, math.nan)
    return _difference(m.mean, m.sd / math.sqrt(m.n), float(m.n - 1))


def separate_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The mean of first minus the mean of second, over different passages, by Welch's t test."""
    a, b = mean_interval(first), mean_interval(second)
    value = a.mean - b.mean
    if min(a.n, b.n) < 2:
        return Difference(value, math.nan, math.nan, math.nan)
    u, v = a.sd**2 / a.n, b.sd**2 / b.n
    spread = u**2 / (a.n - 1) + v**2 / (b.n - 1)
    freedom = (u + v) ** 2 / spread if spread else float(a.n + b.n - 2)
    return _difference(value, math.sqrt(u + v), freedom)


def _difference(value: float, error: float, freedom: float) -> Difference:
    """A Difference from its value, its standard error and the degrees of freedom."""
    half = float(stdtrit(freedom, LEVEL)) * error
    p = 2 * float(stdtr(freedom, -abs(value) / error)) if error else math.nan
    return Difference(value, value - half, value + half, p)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, with mean ranks for ties; NaN if a side is constant."""
    a, b = (_ranks(np.asarray(side, dtype=float)) for side in (first, second))
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Floats) -> Floats:
    below = (values[:, None] > values).sum(1)
    ranks: Floats = below + ((values[:, None] == values).sum(1) - 1) / 2
    return ranks


def share_interval(hits: int, n: int) -> Share:
    """The share of `hits` in `n` with its 95 % Wilson interval; NaN for n = 0."""
    if n == 0:
        return Share(math.nan, math.nan, math.nan)
    share, z = hits / n, float(ndtri(LEVEL))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low = 0.0 if hits == 0 else middle - half
    return Share(share, low, 1.0 if hits == n else middle + half)


def median_and_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the 10th and 90th percentile (the extremes below ten values).

    Raises statistics.StatisticsError without a value.
    """
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return statistics.median(ordered), ordered[tenth], ordered[-1 - tenth]


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """The mean with its percentile bootstrap interval, for values far from normal.

    The interval is NaN for one value. Without values, the mean is NaN, too.
    """
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return Interval(float(data.mean()), math.nan, math.nan)
    low, high = np.percentile(_resampled_means(data)[0], [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))


def ratio_of_means(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The ratio of two means over the same passages, with its paired bootstrap interval.

    The ratio is infinite if the second mean is 0, and NaN if both are 0 (in a resample, this counts
    as 1). The interval is NaN for one passage. Without passages, the ratio is NaN, too.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    return _ratio(a, b, *_resampled_means(a, b))


def ratio_of_separate_means(first: Sequence[float], second: Sequence[float]) -> Interval:
    """`ratio_of_means` for means over different passages, which are resampled independently."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    (means_a,), (means_b,) = _resampled_means(a), _resampled_means(b, seed=1)
    return _ratio(a, b, means_a, means_b)


def _ratio(a: Floats, b: Floats, means_a: Floats, means_b: Floats) -> Interval:
    with np.errstate(divide="ignore", invalid="ignore"):
        if min(len(a), len(b)) < 2:  # one value gives no interval
            return Interval(float(a.mean() / b.mean()), math.nan, math.nan)
        ratios = np.nan_to_num(means_a / means_b, nan=1.0, posinf=np.inf, neginf=-np.inf)
        low, high = np.percentile(ratios, [2.5, 97.5], method="nearest")
        return Interval(float(a.mean() / b.mean()), float(low), float(high))


def _resampled_means(*arrays: Floats, seed: int = 0) -> list[Floats]:
    """The means of DRAWS resamples of each array; all arrays are of one length and share draws."""
    n, random = len(arrays[0]), np.random.default_rng(seed)
    means: list[list[Floats]] = [[] for _ in arrays]
    rows = max(1, AT_ONCE // max(n, 1))
    for begin in range(0, DRAWS, rows):
        picks = random.integers(n, size=(min(rows, DRAWS - begin), n))
        for values, of in zip(arrays, means, strict=True):
            of.append(values[picks].mean(1))
    return [np.concatenate(of) for of in means]
