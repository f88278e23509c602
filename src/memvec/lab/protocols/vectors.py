"""K vectors: does capacity grow along a straight line (paper, Figure 4)?

Lengths of the spec are per vector: K vectors get a passage of K times as many tokens. The measure
is the exact horizon; the straight line is K times the gain of one vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from memvec.lab.protocols.protocol import Protocol
from memvec.statistics import mean_interval

if TYPE_CHECKING:
    from memvec.model.reading import StartRule


class Vectors(Protocol):
    """K sweep."""

    name = "vectors"
    preset = "default"

    def tokens(self, length: int, K: int, start: StartRule) -> int:
        """`length` tokens per vector."""
        return length * K


def scaling(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per K: horizon, gains, gain per vector, and its share of the straight line.

    The line starts at the smallest K measured.
    """
    lines = []
    for K, group in rows.groupby("vectors"):
        group = group[group["length"] == group["length"].max()]
        horizon = mean_interval(group["horizon"].tolist())
        bits = mean_interval(group["horizon_gain"].tolist())
        tokens = mean_interval(group["horizon_token_gain"].tolist())
        lines.append(
            {
                "K": int(str(K)),
                "n": horizon.n,
                "horizon": horizon.mean,
                "horizon_low": horizon.low,
                "horizon_high": horizon.high,
                "token_gain": tokens.mean,
                "bits": bits.mean,
                "bits_low": bits.low,
                "bits_high": bits.high,
                "censored": float((group["exact"] > 0).mean()),
                "cut": float((group["status"] == "budget").mean()),
            }
        )
    table = pd.DataFrame(lines).sort_values("K").reset_index(drop=True)
    first = table.iloc[0]
    table["bits_per_vector"] = table["bits"] / table["K"]
    table["horizon_per_vector"] = table["horizon"] / table["K"]
    table["of_straight_line"] = table["bits_per_vector"] / (first["bits"] / first["K"])
    return table
