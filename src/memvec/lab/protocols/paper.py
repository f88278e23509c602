"""The paper's protocol: a grid of lengths, mean teacher-forced accuracy of at least 0.99.

Kuratov et al. 2025, section 3 and `ablations_analyze_results.ipynb`, kept as published, warts
named:
- nothing is decoded: a length counts when the *mean* accuracy with true earlier tokens is >= 0.99;
- shorter lengths need not pass, and the grid limits the answer;
- the first token (or BOS) is given, and counts in the length: L tokens have L - 1 predictions;
- gains are averaged over passages with accuracy <= 0.99, all lengths together;
- with drawn lengths (random text) the answer is the longest single passage, not a mean.
Two warts are not kept: bits are bits, and gain and accuracy come from the same stored vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from memvec.lab.protocols.protocol import Protocol
from memvec.statistics import Mean, mean_interval

if TYPE_CHECKING:
    from memvec.model.reading import StartRule

THRESHOLD = 0.99


class Paper(Protocol):
    """Published rule."""

    name = "paper"

    def tokens(self, length: int, K: int, start: StartRule) -> int:
        """BOS is the first of the paper's L tokens where the tokenizer adds it."""
        return max(length - (start == "bos"), 1)


@dataclass(frozen=True)
class PaperResult:
    """What Table 1 says about one model, source and K."""

    longest: int | None  # "Max"; None: no length passed
    drawn: bool  # longest single passage rather than a mean
    token_gain: Mean
    information_gain: Mean  # bits


def decoding_capacity(rows: pd.DataFrame, threshold: float = THRESHOLD) -> int | None:
    """Longest length of the grid whose mean accuracy reaches the threshold."""
    accuracy = rows.groupby("length")["accuracy"].mean()
    passed = accuracy[accuracy >= threshold]
    return int(passed.index.max()) if len(passed) else None


def paper_result(rows: pd.DataFrame, threshold: float = THRESHOLD) -> PaperResult:
    """Summary of the rows of one model, source and K, all lengths together."""
    # A grid length stands for all its passages unless every passage drew its own length.
    drawn = bool((rows.groupby("length")["tokens"].nunique() > 1).any())
    if drawn:
        passed = rows[rows["accuracy"] >= threshold]
        longest = int(passed["tokens"].max()) if len(passed) else None
    else:
        longest = decoding_capacity(rows, threshold)
    unsaturated = rows[rows["accuracy"] <= threshold]
    return PaperResult(
        longest,
        drawn,
        mean_interval(unsaturated["token_gain"].tolist()),
        mean_interval(unsaturated["information_gain"].tolist()),
    )
