"""Means, intervals and spreads against scipy and other computations."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from scipy import stats

from memvec.statistics import (
    Difference,
    bootstrap_mean,
    clustered_mean,
    mean_interval,
    median_and_spread,
    paired_difference,
    rank_correlation,
    ratio_of_means,
    ratio_of_separate_means,
    separate_difference,
    share_interval,
)


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [0, 0, 7, -3], [5.0, 0.0]])
def test_the_interval_of_a_mean_is_that_of_scipy_and_0_is_a_value(values):
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval()
    found = mean_interval(values)
    assert (found.n, found.mean) == (len(values), pytest.approx(np.mean(values)))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.sd == pytest.approx(np.std(values, ddof=1))


def test_the_interval_of_a_share_is_that_of_scipy_and_ends_at_0_and_1():
    for n in range(1, 60):
        for hits in {0, 1, n // 2, n}:
            theirs = stats.binomtest(hits, n).proportion_ci(method="wilson")
            assert share_interval(hits, n) == pytest.approx((hits / n, theirs.low, theirs.high))
        assert share_interval(0, n).low == 0
        assert share_interval(n, n).high == 1


@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 19, 20, 35])
def test_the_spread_is_the_same_from_both_ends(n):
    """The 10th percentile is the 90th of the negated values; below ten, both are extremes."""
    values = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double().tolist()
    median, low, high = median_and_spread(values)
    assert median_and_spread([-v for v in values]) == (-median, -high, -low)
    assert (low, high) == ((0, n - 1) if n < 10 else (n // 10, n - 1 - n // 10))


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("n", [5, 30])
def test_a_bootstrap_interval_is_that_of_scipy(n, spread):
    values = np.random.default_rng(n).gamma(1.0, spread, n)
    found = bootstrap_mean(values.tolist())
    options = {"n_resamples": 20_000, "method": "percentile", "random_state": 1}
    theirs = stats.bootstrap((values,), np.mean, **options).confidence_interval
    assert found.value == pytest.approx(values.mean())
    close = 0.03 * (theirs.high - theirs.low)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=close)


@pytest.mark.parametrize("at_once", [1, 70, 10**9])
def test_resamples_are_the_same_however_many_are_drawn_at_once(at_once, monkeypatch):
    values = np.random.default_rng(3).gamma(1.0, 1.0, 7).tolist()
    expected = bootstrap_mean(values), ratio_of_means(values, values[::-1])
    monkeypatch.setattr("memvec.statistics.AT_ONCE", at_once)
    assert (bootstrap_mean(values), ratio_of_means(values, values[::-1])) == expected


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_a_resample_with_two_means_of_0_counts_as_a_ratio_of_1(scale):
    """Such resamples do not move the interval to 0."""
    zeros = [0.0, 0.0, 0.0]
    assert ratio_of_means([*zeros, 2.0], [*zeros, 2.0]) == (1.0, 1.0, 1.0)
    value, low, high = ratio_of_means([*zeros, 2.0 * scale], [*zeros, 2.0])
    assert (value, low, high) == (scale, min(scale, 1.0), max(scale, 1.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_ratio_over_a_mean_that_may_be_0_has_an_infinite_end(sign):
    """One resample of three values in 27 takes the first three times, which is more than 2.5 %."""
    first, second = [sign, sign, sign], [0.0, 1.0, 1.0]
    value, *ends = ratio_of_means(first, second)
    assert value == pytest.approx(sign * 1.5)
    assert sorted(ends) == ends
    assert ends == ([1.0, np.inf] if sign > 0 else [-np.inf, -1.0])


def test_one_value_on_either_side_gives_no_interval():
    several = [1.0, 2.0, 3.0]
    for first, second in (([4.0], several), (several, [4.0])):
        value, *ends = ratio_of_separate_means(first, second)
        assert value == pytest.approx(np.mean(first) / np.mean(second))
        assert np.isnan(ends).all()


def test_means_of_different_passages_are_resampled_independently():
    """With the same values on both sides, a paired ratio is 1 in every resample; a separate one
    varies as much as two means do."""
    values = np.random.default_rng(1).gamma(4.0, 1.0, 30)
    both = (values.tolist(), values.tolist())
    assert ratio_of_means(*both) == pytest.approx((1.0, 1.0, 1.0))
    _, low, high = ratio_of_separate_means(*both)
    error = values.std(ddof=1) / np.sqrt(len(values)) / values.mean()
    assert np.log(high / low) == pytest.approx(2 * 1.96 * error * np.sqrt(2), rel=0.1)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_text_with_several_rows_is_one_passage_of_an_interval(copies):
    values = [3.0, 7.0, 4.5, 9.0, 1.0]
    alone = mean_interval(values)
    clusters = [i for i in range(len(values)) for _ in range(copies)]
    found = clustered_mean([values[i] for i in clusters], clusters)
    assert astuple(found) == pytest.approx(astuple(alone))
    pooled = mean_interval([values[i] for i in clusters])
    assert (copies == 1) == (found.high - found.low == pytest.approx(pooled.high - pooled.low))


def test_an_interval_over_clusters_of_unequal_size_covers_the_mean():
    """About 95 % of 1000 intervals do, for 12 texts with one to six rows each."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        sizes = generator.integers(1, 7, 12)
        clusters = np.repeat(np.arange(12), sizes)
        values = generator.normal(size=12)[clusters] + 0.3 * generator.normal(size=len(clusters))
        found = clustered_mean(values.tolist(), clusters.tolist())
        held += found.low <= 0 <= found.high
    assert 920 <= held <= 975


def test_a_mean_over_one_text_has_no_interval():
    found = clustered_mean([1.0, 2.0], ["a", "a"])
    assert (found.mean, found.n) == (1.5, 1)
    assert math.isnan(found.low)


def test_differences_are_those_of_scipy() -> None:
    draw = np.random.default_rng(3)
    a, b = draw.normal(1, 2, 9), draw.normal(0, 1, 14)
    ours = separate_difference(a.tolist(), b.tolist())
    theirs = stats.ttest_ind(a, b, equal_var=False)
    edges = theirs.confidence_interval()
    assert ours == pytest.approx((a.mean() - b.mean(), edges.low, edges.high, theirs.pvalue))
    ours = paired_difference(a.tolist(), b[:9].tolist())
    theirs = stats.ttest_rel(a, b[:9])
    edges = theirs.confidence_interval()
    assert ours == pytest.approx(((a - b[:9]).mean(), edges.low, edges.high, theirs.pvalue))
    assert math.isnan(paired_difference([1.0, 1.0], [0.0, 0.0]).p)
    assert paired_difference([1.0, 1.0], [0.0, 0.0]).p_value() == "p –"
    assert math.isnan(separate_difference([1.0], [1.0, 2.0]).low)
    assert separate_difference([0.0, 1.0, 2.0], [90.0, 91.0, 92.0]).p_value() == "p < 0.001"
    ties = ([1.0, 2.0, 2.0, 4.0, 7.0], [3.0, 1.0, 1.0, 5.0, 4.0])
    assert rank_correlation(*ties) == pytest.approx(stats.spearmanr(*ties).statistic)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))


def test_figures_are_written_with_their_interval_and_their_n():
    assert str(mean_interval([1.0, 2.0, 3.0])) == "2.0 ± 2.5 (n 3)"
    assert [str(mean_interval(values)) for values in ([], [4.0])] == ["–", "4.0 (n 1)"]
    assert str(share_interval(3, 4)) == "75 % [30, 95]"
    for p, written in ((0.03, "p = 0.030"), (0.0014, "p = 0.001"), (0.0009, "p < 0.001")):
        assert Difference(1.0, 0.0, 2.0, p).p_value() == written
