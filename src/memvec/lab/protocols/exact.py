"""The exact protocol: per passage, the longest horizon that decodes freely within a budget.

The horizon grows token by token (the engine's 'growing' schedule) until the passage ends or the
stated budget of forward-backward tokens is spent; the vectors of the best horizon are reloaded as
stored and decoded freely, and the tokens before the first error are the result. A passage that
came back whole is censored: it might have been longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from memvec.lab.protocols.protocol import Protocol
from memvec.statistics import Mean, mean_interval, share_interval


class Exact(Protocol):
    """Longest horizon that decodes."""

    name = "exact"
    preset = "default"


@dataclass(frozen=True)
class ExactResult:
    """Exact horizons of one model, source and K."""

    horizon: Mean  # tokens
    bits: Mean  # information gain over the horizon
    token_gain: Mean  # over the horizon
    censored: tuple[float, float, float]  # share that reached the end of its passage, 95 %
    spent: Mean  # forward-backward tokens


def exact_result(rows: pd.DataFrame) -> ExactResult:
    """Summary of the rows of one model, source and K (the longest length where there are several).

    One row per passage; where it is the mean of restarts, `exact` is the share of them, and one
    that came back whole makes the mean a bound. Shorter lengths are dropped: the same passage cut
    shorter is more censored, not more data.
    """
    rows = rows[rows["length"] == rows["length"].max()]
    return ExactResult(
        mean_interval(rows["horizon"].tolist()),
        mean_interval(rows["horizon_gain"].tolist()),
        mean_interval(rows["horizon_token_gain"].tolist()),
        share_interval(int((rows["exact"] > 0).sum()), len(rows)),
        mean_interval(rows["spent"].tolist()),
    )
