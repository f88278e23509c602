"""Growth of capacity with K, against the straight line (paper, Figure 4), by two rules.

The straight line is K times the value per vector at the smallest measured K. The published rule
uses rows of the paper protocol: the longest length whose mean accuracy is at least 0.99, and the
gains of passages that filled their vectors. The exact rule uses horizons of free decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from memvec.lab.protocols.paper import paper_result, unsaturated
from memvec.statistics import Mean, clustered_mean, mean_interval

MEASURES = ("longest", "token_gain", "bits")  # tokens, tokens, bits: each with _low and _high


def exact_scaling(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per K from horizons: `longest` is their mean over passages of the longest length.

    Columns: K, n, MEASURES with their intervals, `censored` and `cut` (shares of passages),
    `<measure>_share`: the value divided by the straight line.
    """
    lines = []
    for K, group in rows.groupby("vectors"):
        group = group[group["length"] == group["length"].max()]
        names = ("horizon", "horizon_token_gain", "horizon_gain")
        means = [mean_interval(group[name].tolist()) for name in names]
        line = _line(int(str(K)), means)
        line["censored"] = float((group["exact"] > 0).mean())
        line["cut"] = float((group["status"] == "budget").mean())
        lines.append(line)
    return _with_shares(lines)


def published_scaling(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per K from rows of the paper protocol: `longest` has no interval.

    Columns as in `exact_scaling`, but `tried` (the longest length of the grid) instead of
    `censored` and `cut`. NaN: no length passed, or no passage filled its vectors.
    """
    lines = []
    for K, group in rows.groupby("vectors"):
        best, full = paper_result(group).longest, unsaturated(group)
        passages = full["number"].tolist()  # each at several lengths
        names = ("token_gain", "information_gain")
        gains = [clustered_mean(full[name].tolist(), passages) for name in names]
        longest = math.nan if best is None else float(best)
        fixed = Mean(longest, math.nan, math.nan, math.nan, gains[0].n)
        line = _line(int(str(K)), [fixed, *gains])
        line["tried"] = float(group["length"].max())
        lines.append(line)
    return _with_shares(lines)


def _line(K: int, means: Sequence[Mean]) -> dict[str, float | int]:
    line: dict[str, float | int] = {"K": K, "n": means[0].n}
    for name, m in zip(MEASURES, means, strict=True):
        line |= {name: m.mean, f"{name}_low": m.low, f"{name}_high": m.high}
    return line


def _with_shares(lines: list[dict[str, float | int]]) -> pd.DataFrame:
    table = pd.DataFrame(lines).sort_values("K").reset_index(drop=True)
    for name in MEASURES:
        known = table[table[name].notna()]
        per_vector = table[name] / table["K"]
        first = per_vector[known.index[0]] if len(known) else math.nan
        table[f"{name}_share"] = per_vector / (first or math.nan)
    return table


def scaling_sentence(name: str, table: pd.DataFrame) -> str:
    """The bits per vector at the smallest and largest K; '' for fewer than two K."""
    known = table[table["bits"].notna()]
    if len(known) < 2:
        return ""
    first, last = known.iloc[0], known.iloc[-1]
    a, b = (float(line["bits"] / line["K"]) for line in (first, last))
    change = "the same" if math.isclose(a, b, rel_tol=0.005) else "fewer" if b < a else "more"
    share = f"{change}: {100 * b / a:.0f} % of the line" if a > 0 else change
    return (
        f"{name}: {a:.1f} bits per vector at K = {int(first['K'])}, {b:.1f} at "
        f"K = {int(last['K'])} ({share})."
    )
