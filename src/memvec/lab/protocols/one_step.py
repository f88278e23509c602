"""The one-step protocol: two vectors, one forward pass, a grid of lengths.

Mezentsev & Oseledets (arXiv 2505.21189), Table 2: lengths grow by a factor of the square root of 2
from 4, a passage counts as given back from an accuracy of 0.99, and the published figure is the
*longest* one that any passage reached, a maximum over passages and not a mean. Both are here: the
published rule, and beside it the share of passages that came back to the last token, per length.
Accuracy needs no teacher: no input depends on an earlier token.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from memvec.lab.protocols.protocol import Protocol
from memvec.statistics import Mean, mean_interval, share_interval

THRESHOLD = 0.99


class OneStep(Protocol):
    """Published rule and ours, from [e, m, ..., m]."""

    name = "one-step"
    preset = "one-step"
    layout = "one-step"


@dataclass(frozen=True)
class Length:
    """What happened at one length of the grid."""

    length: int
    exact: tuple[float, float, float]  # share of passages given back to the last token, 95 %
    accuracy: Mean


@dataclass(frozen=True)
class OneStepResult:
    """One-step capacity of one model and source."""

    longest: int | None  # published rule: longest passage with accuracy >= 0.99; None: none
    always: int | None  # longest length up to which every passage of every length came back exactly
    lengths: tuple[Length, ...]


def one_step_result(rows: pd.DataFrame, threshold: float = THRESHOLD) -> OneStepResult:
    """Summary of the rows of one model and source, all lengths together."""
    passed = rows[rows["accuracy"] >= threshold]
    lengths, always, unbroken = [], None, True
    for length, group in rows.groupby("length"):
        exact = int((group["exact"] == 1).sum())  # of restarts: all of them
        unbroken = unbroken and exact == len(group)
        if unbroken:
            always = int(str(length))
        lengths.append(
            Length(
                int(str(length)),
                share_interval(exact, len(group)),
                mean_interval(group["accuracy"].tolist()),
            )
        )
    longest = int(passed["tokens"].max()) if len(passed) else None
    return OneStepResult(longest, always, tuple(lengths))
