"""The arithmetic of the protocols, against values by hand or a second, slow computation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from memvec.lab.protocols import plane as plane_module
from memvec.lab.protocols.exact import exact_result
from memvec.lab.protocols.geometry import cosines, principal_components
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.protocols.one_step import one_step_result
from memvec.lab.protocols.paper import paper_result
from memvec.lab.protocols.plane import bits_left, compare, fit, fit_capacity
from memvec.lab.protocols.scaling import exact_scaling
from memvec.lab.protocols.threshold import _removed
from memvec.lab.protocols.upper_bound import least_moved_bits, raised_logit_bits
from memvec.lab.report.published import bits, progressive, published, table1
from memvec.metrics import margins, surprisal
from memvec.statistics import mean_interval, share_interval


def plane(C: float, n: int, seed: int, noise: float = 2.0) -> pd.DataFrame:
    """Rows of n passages with H_LM of 20 to 300 bits, of which the vectors remove up to C."""
    rng = np.random.default_rng(seed)
    H = rng.uniform(20, 300, n)
    left = np.maximum(0, H - C) + np.abs(rng.normal(0, noise, n))
    names = [f"{seed} {i}" for i in range(n)]
    accuracy = np.where(H > C, 0.7, 1.0)
    return pd.DataFrame(
        {"lm_bits": H, "mem_bits": left, "accuracy": accuracy, "passage_group": names}
    )


def test_the_fitted_capacity_is_the_true_one() -> None:
    found = fit(plane(120, 60, 0), draws=100)
    assert found.capacity == pytest.approx(120, abs=4)
    assert found.low <= found.capacity <= found.high
    assert found.high - found.low < 6
    assert found.reached
    rows = plane(120, 40, 1)
    x, y = rows["lm_bits"].to_numpy(), rows["mem_bits"].to_numpy()
    grid = np.arange(0, 300, 0.05)  # the second computation
    slow = grid[np.argmin([((y - np.maximum(0, x - c)) ** 2).sum() for c in grid])]
    assert fit_capacity(x, y) == pytest.approx(slow, abs=0.1)


def test_a_capacity_that_no_passage_reached_is_not_claimed() -> None:
    assert not fit(plane(1000, 30, 0), draws=20).reached
    assert "undecided" in compare(plane(1000, 20, 0), plane(80, 20, 1), draws=20).verdict


def test_bits_left_by_an_early_stop_do_not_lower_the_capacity() -> None:
    """Every passage comes back, and 15 % of its bits are left: the capacity was not reached."""
    rows = plane(1000, 40, 3)
    rows["mem_bits"] = 0.15 * rows["lm_bits"]
    found = fit(rows, draws=20)
    assert not found.reached
    assert found.capacity == pytest.approx(rows["lm_bits"].max())  # a lower bound
    # Such passages among others that did not come back do not change C either.
    mixed = plane(150, 60, 3, noise=0.5)
    mixed.loc[mixed["accuracy"] == 1, "mem_bits"] = 0.15 * mixed["lm_bits"]
    assert fit(mixed, draws=20).capacity == pytest.approx(150, abs=3)


def test_a_difference_between_two_capacities_has_an_interval_and_a_p_value() -> None:
    same = compare(plane(100, 50, 4), plane(100, 50, 5), draws=200)
    assert same.low < 0 < same.high
    assert "no difference" in same.verdict
    other = compare(plane(130, 50, 0), plane(100, 50, 1), draws=200)
    assert other.difference == pytest.approx(30, abs=5)
    assert other.p <= 0.01
    assert other.p_value == "p ≤ 0.010"  # the smallest that 200 resamples can give
    assert same.p_value.startswith("p = ")
    assert "natural text holds more" in other.verdict


@pytest.mark.parametrize("below", [1, 3, 6, 97])
def test_p_is_twice_the_share_of_resamples_beyond_no_difference(
    below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = np.arange(100.0) - below + 0.5
    monkeypatch.setattr(plane_module, "_bootstrap", lambda _, seed, __: gaps * (seed == 1))
    found = compare(plane(100, 20, 0), plane(100, 20, 1), draws=100)
    assert found.p == pytest.approx(2 * min(below, 100 - below) / 100)
    assert (found.low <= 0 <= found.high) == (found.p > 0.05)


@pytest.mark.parametrize("above", [2, 3])
def test_three_passages_beyond_the_threshold_reach_the_capacity(above: int) -> None:
    """A passage of which 99 % of the tokens are right is not beyond it."""
    rows = plane(100, 20, 0).sort_values("lm_bits")
    rows["accuracy"] = [*[0.99] * (20 - above), *[0.989] * above]
    assert fit(rows, draws=20).reached == (above == 3)
    assert (bits_left(rows) > 0).sum() == above


def test_a_passage_at_several_lengths_is_resampled_as_one() -> None:
    """Repeated rows of the same passages do not make the interval narrower."""
    rows = plane(120, 20, 6)
    once, twice = fit(rows, draws=50), fit(pd.concat([rows, rows]), draws=50)
    assert (twice.n, twice.passages) == (40, 20)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_two_texts_are_resampled_independently_and_either_may_hold_more() -> None:
    alike = compare(plane(100, 30, 7), plane(100, 30, 7), draws=50)
    assert alike.low < 0 < alike.high
    less = compare(plane(80, 30, 7), plane(120, 30, 8), draws=50)
    assert less.high < 0
    assert "random text holds more" in less.verdict


def test_a_raised_logit_just_reaches_the_best_other_token() -> None:
    logits = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0)).double() * 2
    ids = torch.arange(6)[None]
    bits_, margin = surprisal(logits, ids)[0], margins(logits, ids)[0]
    needed = raised_logit_bits(bits_, margin)
    for t in range(6):
        raised = logits[0, t].clone()
        if margin[t] < 0:
            raised[t] -= margin[t]
        p = float(raised.softmax(-1)[t])
        assert float(needed[t]) == pytest.approx(float(bits_[t]) + math.log2(p), abs=1e-9)


def test_the_least_moved_probability_just_reaches_the_best_other_token() -> None:
    """By the definition, tokens above a common level lose what the true token gains."""
    p = torch.tensor([[0.05, 0.4, 0.35, 0.2], [1e-9, 1e-9, 1e-9, 1.0], [0.05, 0.35, 0.35, 0.25]])
    ids = torch.tensor([3, 3, 3])
    levels = p[:, 3] * torch.exp2(least_moved_bits(p.log(), ids))
    assert levels.tolist() == pytest.approx([0.95 / 3, 1, 0.95 / 3])
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(1)).double() * 2
    ids = torch.arange(40) % 9
    p = logits.softmax(-1)
    needed = least_moved_bits(logits, ids)
    bits_, margin = surprisal(logits[None], ids[None])[0], margins(logits[None], ids[None])[0]
    for t in range(40):
        true = float(p[t, ids[t]])
        level = true * 2 ** float(needed[t])
        others = torch.cat([p[t, : ids[t]], p[t, ids[t] + 1 :]])
        lost = float((others - level).clamp_min(0).sum())
        assert lost == pytest.approx(level - true, abs=1e-9)  # what is gained is what was taken
        assert (level > true + 1e-12) == bool(margin[t] < 0)
    assert bool((needed <= raised_logit_bits(bits_, margin) + 1e-9).all())


def test_the_paper_protocol_counts_as_the_papers_code() -> None:
    rows = pd.DataFrame(
        {
            "length": [8, 8, 16, 16, 32, 32],
            "tokens": [8, 8, 16, 16, 32, 32],
            "accuracy": [1.0, 0.9, 1.0, 0.99, 0.5, 0.7],
            "token_gain": [5, 4, 10, 9, 8, 12],
            "information_gain": [10.0, 9.0, 30.0, 28.0, 31.0, 33.0],
            "start_rule": "vectors",
        }
    )
    found = paper_result(rows)
    assert found.longest == 16  # although 8 does not pass
    assert found.token_gain.n == 4  # 0.99 counts as unsaturated, as in the notebook
    assert found.token_gain.mean == pytest.approx((4 + 9 + 8 + 12) / 4)
    rows["tokens"] = [3, 8, 11, 16, 20, 32]
    assert paper_result(rows).longest == 16
    assert paper_result(rows).drawn


def test_an_accuracy_equal_to_the_threshold_passes_and_counts_as_unsaturated() -> None:
    rows = pd.DataFrame({"length": [8, 16], "accuracy": [1.0, 0.99], "tokens": [8, 16]})
    rows = rows.assign(token_gain=[1, 2], information_gain=[10.0, 20.0], start_rule="bos")
    found = paper_result(rows)
    assert found.longest == 16
    assert (found.token_gain.mean, found.information_gain.mean) == (2, 20)
    drawn = pd.concat([rows, rows.assign(tokens=[5, 9])])
    assert paper_result(drawn).longest == 17  # BOS counts


def test_a_bos_counts_as_a_token_in_the_paper_protocol() -> None:
    tokens = protocol_of("paper").tokens
    assert [tokens(64, 1, start) for start in ("bos", "first-token", "vectors")] == [63, 64, 64]
    assert tokens(1, 1, "bos") == 1


def test_a_length_after_one_that_failed_is_not_always_exact() -> None:
    rows = pd.DataFrame({"length": [2, 4, 4, 8, 8], "exact": [1.0, 1.0, 0.5, 1.0, 1.0]})
    rows = rows.assign(tokens=rows["length"], accuracy=[1.0, 0.5, 0.98, 0.99, 1.0])
    found = one_step_result(rows.assign(lm_bits=[5.0, 6.0, 7.0, 9.0, 8.0]))
    assert (found.always, found.longest, found.longest_bits) == (2, 8, 9)


def test_the_mean_horizon_is_of_the_longest_length_with_its_censored_share() -> None:
    rows = pd.DataFrame(
        {
            "length": [8, 16, 16, 16],
            "horizon": [8, 10, 16, 13],
            "horizon_gain": [1.0, 2.0, 3.0, 4.0],
            "horizon_token_gain": [1, 2, 3, 4],
            "exact": [1.0, 0.0, 1.0, 0.5],  # one of two restarts of the last passage is exact
            "spent": [1, 2, 3, 4],
        }
    )
    found = exact_result(rows)
    assert (found.horizon.mean, found.horizon.n) == (13, 3)
    assert found.censored[0] == pytest.approx(2 / 3)
    assert found.censored[1] > 0


def test_the_share_of_removed_bits_is_that_of_the_sums_for_the_fewest_vectors() -> None:
    rows = pd.DataFrame(
        {
            "vectors": [1, 1, 1, 2],
            "length": [4, 4, 8, 8],
            "lm_bits": [10.0, 20.0, 40.0, 40.0],
            "mem_bits": [0.0, 15.0, 10.0, 0.0],
        }
    ).assign(model="m", series="s")
    said = "remove 50 to 50 % of the bits at the shortest length of a text and 75 to 75 % at"
    assert said in _removed(rows)


def test_scaling_is_relative_to_the_smallest_number_of_vectors() -> None:
    rows = pd.DataFrame(
        {
            "vectors": [1, 1, 4, 4],
            "length": [8] * 4,
            "horizon": [8, 8, 24, 24],
            "horizon_gain": [100.0, 100.0, 300.0, 300.0],
            "horizon_token_gain": [6, 6, 18, 18],
            "exact": [True, False, False, False],
            "status": ["done", "budget", "budget", "budget"],
        }
    )
    table = exact_scaling(rows)
    assert table["bits_share"].tolist() == [1.0, 0.75]
    assert (table["censored"].tolist(), table["cut"].tolist()) == ([0.5, 0.0], [0.5, 1.0])


def test_a_mean_has_students_interval_and_a_share_wilsons() -> None:
    m = mean_interval([1.0, 2.0, 3.0])
    assert m.high - m.mean == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-5)
    assert math.isnan(mean_interval([1.0]).low)
    assert mean_interval([]).n == 0
    share, low, high = share_interval(0, 10)
    assert (share, low) == (0, 0)
    assert high == pytest.approx(0.2775, abs=1e-3)


def test_cosines_and_components() -> None:
    vectors = np.array([[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.2]])
    within, between = cosines(vectors, np.array([0, 0, 1, 1]))
    assert (len(within), len(between)) == (2, 4)
    assert within.min() > between.max()
    where, share = principal_components(vectors)
    covariance = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    assert share == pytest.approx(covariance / covariance.sum())
    assert where.shape == (4, 3)


def test_published_values_of_several_vectors_are_those_of_the_same_number() -> None:
    """Gains are published of fewer numbers than lengths are, and of PG-19 only."""
    for model, entry in published()["vectors"]["values"].items():
        gains = [*entry["token_gain"], *[None] * len(entry["K"])]
        for K, longest, gain in list(zip(entry["K"], entry["longest"], gains, strict=False))[1:]:
            found = table1(model, "pg19", K)
            assert found is not None
            assert found["longest"] == longest
            assert found["token_gain"] == (None if gain is None else (gain, None))
            assert table1(model, "fanfics", K) is None
        assert table1(model, "pg19", 3) is None


@pytest.mark.parametrize("coordinates", ["direct", "low-dim"])
@pytest.mark.parametrize("term", ["none", "alignment"])
def test_the_published_horizon_is_that_of_the_recipes_method_if_there_is_one(
    term: str, coordinates: str
) -> None:
    recipe = {"term": term, "coordinates": coordinates}
    own = " ".join(name for name in (term, coordinates) if name in ("alignment", "low-dim"))
    for model, arm in (
        ("meta-llama/Llama-3.1-8B", own or "progressive"),
        ("meta-llama/Llama-3.2-1B", "progressive"),
    ):
        values = published()["progressive"]["values"][model]
        assert progressive(model, recipe) == {"arm": arm, **values[arm]}
    assert progressive("pocket", recipe) is None


def test_published_bits_are_converted_nats() -> None:
    found = table1("meta-llama/Llama-3.1-8B", "pg19")
    assert found is not None
    assert found["longest"] == 1568
    assert found["gain_bits"][0] == pytest.approx(7019.7, abs=0.5)
    assert bits(math.log(2)) == 1
    assert len(published()["table1"]["values"]) == 14
    assert table1("pocket", "pg19") is None
