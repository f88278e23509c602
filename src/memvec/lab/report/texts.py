"""A test of whether two kinds of written text fill vectors equally (PG-19, fan fictions).

The paper compares two columns of Table 1; here the difference gets an interval and a p. The test
uses rows of the paper protocol whose passages filled their vectors, at the longest length at which
both sides have some: a mean over several lengths would compare the lengths at which each side
failed. Different texts are compared by Welch's t test; two recipes on the same text by the paired t
test, over the passages that both have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from memvec.lab.protocols.paper import unsaturated
from memvec.lab.report.data import Data
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import Difference, paired_difference, separate_difference

MEASURES = (("token_gain", "token gain"), ("information_gain", "bits"))
ALPHA = 0.05
NOTE = (
    "Means of the first and the second text, their difference with its 95 % interval, and a "
    "two-sided p (not corrected for the number of lines), over n passages with accuracy of at most "
    "0.99 at the longest length at which both have some. Unpaired: Welch's t test; paired: t test "
    "on the same passages by two recipes."
)


@dataclass(frozen=True)
class Comparison:
    """Two series of one model and K by one measure; n: passages of either side."""

    model: str
    K: int
    first: str
    second: str
    measure: str
    paired: bool
    means: tuple[float, float]
    difference: Difference
    n: tuple[int, int]

    @property
    def conclusion(self) -> str:
        """The conclusion from p, in a sentence."""
        if math.isnan(self.difference.p):
            return "undecided: too few passages filled their vectors, or all alike"
        if self.difference.p >= ALPHA:
            return "no difference at 95 %"
        return f"differs: {self.first if self.difference.value > 0 else self.second} gains more"


def comparisons(data: Data) -> list[Comparison]:
    """All pairs of written texts, and of recipes on the same text, in the order of the spec."""
    results = []
    rows = data.of("paper")
    for (model, K), group in rows.groupby(["model", "vectors"], sort=False):
        for first, second in itertools.combinations(_sides(group), 2):
            one, other = first.iloc[0], second.iloc[0]
            paired = bool(one["source"] == other["source"])
            written = not (one["random_text"] or other["random_text"])
            if not paired and not (written and one["recipe"] == other["recipe"]):
                continue
            parts = _at_longest(unsaturated(first), unsaturated(second))
            if paired:
                common = parts[0].index.intersection(parts[1].index)
                parts = [part.loc[common] for part in parts]
            test = paired_difference if paired else separate_difference
            for column, label in MEASURES:
                a, b = (part[column].tolist() for part in parts)
                if a and b:
                    means = (sum(a) / len(a), sum(b) / len(b))
                    head = (str(model), int(str(K)), str(one["series"]), str(other["series"]))
                    n = (len(a), len(b))
                    results.append(Comparison(*head, label, paired, means, test(a, b), n))
    return results


def _sides(group: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Rows of each series that has a grid of lengths: drawn lengths have nothing in common."""
    for _, rows in group.groupby("series", sort=False):
        if rows.groupby("length")["tokens"].nunique().max() == 1:
            yield rows


def _at_longest(*sides: pd.DataFrame) -> list[pd.DataFrame]:
    """The gains of each side's passages, by number, at the longest length that both have."""
    lengths = set.intersection(*(set(side["length"]) for side in sides))
    at = max(lengths, default=0)
    names = [column for column, _ in MEASURES]
    return [side[side["length"] == at].set_index("number")[names].astype(float) for side in sides]


def texts_table(data: Data) -> Table:
    """The comparisons, one line each."""
    lines: list[TableLine] = [
        [
            ("model", c.model),
            ("K", c.K),
            ("texts", f"{c.first} − {c.second}"),
            ("measure", c.measure),
            ("first", c.means[0]),
            ("second", c.means[1]),
            *interval("difference", c.difference),
            ("p", c.difference.p_value()),
            ("test", "paired" if c.paired else "unpaired"),
            ("n", f"{c.n[0]}, {c.n[1]}"),
            ("conclusion", c.conclusion),
        ]
        for c in comparisons(data)
    ]
    return Table.of("texts", "One kind of text against another", NOTE, lines)


def texts_sentence(data: Data) -> str:
    """The differences of information gain between written texts, for a caption; '' without any."""
    between = [c for c in comparisons(data) if c.measure == "bits" and not c.paired]
    return " ".join(
        f"{c.first} − {c.second}, {c.model}, K = {c.K}: {c.difference.value:+.0f} bits "
        f"[{c.difference.low:.0f}, {c.difference.high:.0f}], {c.difference.p_value()}; "
        f"{c.conclusion}."
        for c in between[:4]
    )
