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
from memvec.lab.report.data import Data, by_series, short
from memvec.lab.report.table import Table, TableCell
from memvec.lab.statistics import Mean, Share, mean_interval, share_interval
from memvec.lab.study.spec import RunSpec

THRESHOLD = 0.99


class OneStep(Protocol):
    """Published rule and ours, from [e, m, ..., m]."""

    preset = "one-step"
    layout = "one-step"

    def problem(self, run: RunSpec) -> str | None:
        if run.vectors != (2,):
            return "has two vectors, e and m: write vectors = [2]"
        return None

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        rows: list[list[TableCell]] = []
        for (model, source, _), group in by_series(data.of(self.name)):
            result = one_step_result(group)
            for at in result.lengths:
                row: list[TableCell] = [
                    short(model),
                    source,
                    at.length,
                    str(at.exact),
                    at.accuracy.mean,
                ]
                rows.append([*row, at.accuracy.n, result.always, result.longest])
        columns = ["model", "source", "length", "exact", "accuracy", "n", "always exact", "longest"]
        return [
            Table(
                "one-step",
                "One-step decoding: two vectors, one forward pass",
                "Exact: share of passages given back to the last token, with its 95 % interval. "
                "Always exact: the length up to which all were. Longest: the published figure, the "
                "longest single passage with an accuracy of at least 0.99, a maximum over "
                "passages.",
                columns,
                rows,
            )
        ]


@dataclass(frozen=True)
class Length:
    """What happened at one length of the grid."""

    length: int
    exact: Share  # share of passages given back to the last token, 95 %
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
