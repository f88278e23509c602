"""The benchmarks' parts that could be wrong without looking it; none is run at size here."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import passages, tiny
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe

FOLDER = Path(__file__).parent.parent / "benchmarks"
PROGRAMS = [
    "batch",
    "bits",
    "book",
    "exact",
    "horizon",
    "margins",
    "peak",
    "step",
    "usable",
    "vectors",
]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_says_what_it_does_and_takes_the_common_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in ("--quick", "--json", "--out", "RESULT"):
        assert word in said


@pytest.mark.parametrize("longest", range(12))
def test_the_search_finds_the_longest_length_and_ends(longest):
    from horizon import Search

    search, tried = Search(), []
    while (length := search.next_length(11)) is not None:
        assert length not in tried
        tried.append(length)
        if length <= longest:
            search.completed = length
        else:
            search.failed = length
    assert search.completed == longest
    assert len(tried) <= 7


def test_horizons_at_a_cost_are_those_of_a_run_with_that_budget():
    """For a growing recipe; one passage at a time, because another batch rounds differently."""
    from horizon import growing

    lm, recipe, costs = tiny(), Recipe(steps=10**6, patience=10**6), [60, 240]
    recipe = recipe.in_logits(lm.logit_spread)
    (passage,) = passages(24, seed=33)
    found = growing(lm, recipe, [passage], costs, staged=False)[0]
    dearer = growing(lm, recipe, [passage], costs, staged=True)[0]
    assert found == sorted(found)
    assert all(a <= b for a, b in zip(dearer, found, strict=True))
    assert 0 < found[-1] < 24
    for cost, horizon in zip(costs, found, strict=True):
        engine = Engine(lm, Recipe(steps=10**6, patience=10**6, budget=cost), batch_size=1)
        (outcome,) = engine.run([passage])
        # The run may take the step that goes past its budget, the benchmark may not.
        assert horizon <= outcome.metrics.horizon


@pytest.mark.slow
def test_the_papers_horizon_is_paid_for_by_its_search():
    from horizon import fixed

    lm, recipe = tiny(), Recipe.of("paper", lr=0.1)
    asked = passages(9, 9, seed=34)
    asked = [type(p)(p.ids, i) for i, p in enumerate(asked)]
    early, late = 30, 1500
    found = fixed(lm, recipe, asked, [early, late])
    for row in found:
        assert 0 <= row[0] <= row[1] <= 8
    assert any(row[1] > 0 for row in found)
    assert any(row[1] > row[0] for row in found)


def test_ratios_and_intervals():
    from common import ratio_of_means, ratio_of_separate_means, summary

    ours, theirs = [4.0, 6.0, 5.0, 5.0], [2.0, 3.0, 2.5, 2.5]
    assert ratio_of_means(ours, theirs) == pytest.approx((2, 2, 2))  # passage by passage
    ratio, low, high = ratio_of_separate_means(ours, theirs)
    assert ratio == pytest.approx(2)
    assert 1.6 < low < 2 < high < 2.5
    assert ratio_of_means(ours, [0.0] * 4)[0] == np.inf
    found = summary(ours)
    assert (found["n"], found["mean"], found["median"]) == (4, 5.0, 5.0)
    assert 4 <= found["low"] < 5 < found["high"] <= 6


def test_peak_memory_is_what_the_work_held_at_once():
    from memory import peak_memory

    def hold():
        return torch.ones(32, 2**20).sum()  # 128 MiB

    found = [peak_memory(hold), peak_memory(hold)]  # again: the allocator has kept what it freed
    for peak in found:
        assert 120 * 2**20 < peak < 170 * 2**20
