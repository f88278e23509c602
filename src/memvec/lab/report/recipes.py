"""Two recipes on the same passages: paired differences of exact horizons.

Separate intervals of two means hide a difference that every passage shows, since passages differ
more than recipes do.
"""

from __future__ import annotations

import itertools

from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.report.data import Data
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import paired_difference

KEYS = ["protocol", "model", "source", "vectors", "length", "storage"]
MEASURES = (("horizon", "exact tokens"), ("horizon_gain", "bits"))


def recipes_table(data: Data) -> Table:
    """Two lines for each pair of recipes of a protocol that measures horizons, on one source.

    Only passages that both recipes have count; restarts are averaged.
    """
    names = [name for name in data.protocols() if protocol_of(name).measures_horizon]
    lines: list[TableLine] = []
    for (protocol, model, source, K, length, _), group in data.of(*names).groupby(KEYS, sort=False):
        sides = [
            (name, part.set_index("number")) for name, part in group.groupby("recipe", sort=False)
        ]
        for (name, first), (other, second) in itertools.combinations(sides, 2):
            common = first.index.intersection(second.index)
            for column, measure in MEASURES:
                a, b = (side.loc[common, column].astype(float).tolist() for side in (first, second))
                if not a:
                    continue
                difference = paired_difference(a, b)
                lines.append(
                    [
                        ("protocol", protocol),
                        ("model", str(model)),
                        ("source", source),
                        ("K", int(K)),
                        ("length", int(length)),
                        ("recipes", f"{name} − {other}"),
                        ("measure", measure),
                        ("first", sum(a) / len(a)),
                        ("second", sum(b) / len(b)),
                        *interval("difference", difference),
                        ("p", difference.p_value()),
                        ("n", len(a)),
                    ]
                )
    return Table.of(
        "recipes",
        "One recipe against another",
        "Means over the n passages that both recipes crammed, their difference with its 95 % "
        "interval, and a two-sided p by the paired t test (not corrected for the number of lines). "
        "Bits: information gain over the exact horizon. A passage that comes back whole counts "
        "with its length, so give passages that no recipe gives back whole.",
        lines,
    )
