"""Errors by position in the passage, and by the bits of the token.

They are computed from the stored teacher-forced bits and margins of every predicted position: an
error is a position whose margin with the vectors is not above 0. The longest length of each model,
source, protocol and K is used, with at most MAX_PASSAGES rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from memvec.errors import MemvecError
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Panel, Plot, Series, n_of
from memvec.lab.report.table import Table, TableLine
from memvec.statistics import Mean, mean_interval

PARTS = 5  # of a passage
MAX_PASSAGES = 64
MIN_POSITIONS = PARTS  # of a passage, or its parts are empty
MAX_SERIES = 6  # of a panel
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Margins (logits) and bits of the predicted positions of passages, an array (N,) for each.

    The passages are those of one model, series, protocol and K.
    """

    model: str
    series: str
    protocol: str
    K: int
    margins: list[Floats]
    lm_bits: list[Floats]

    def parts(self) -> Floats:
        """Share of wrong positions in each fifth of each passage, (passages, PARTS)."""
        return np.array([[float((part <= 0).mean()) for part in _split(m)] for m in self.margins])


def _split(values: Floats) -> list[Floats]:
    return list(np.array_split(values, PARTS))


def errors(data: Data) -> Iterator[Errors]:
    """Every group whose passages are long enough, in the order of the spec."""
    keys = ["model", "series", "protocol", "vectors"]
    for (model, series, protocol, K), group in data.rows.groupby(keys, sort=False):
        longest = group[group["length"] == group["length"].max()]
        longest = longest.drop_duplicates("number").head(MAX_PASSAGES)  # of restarts the first
        margins, bits = [], []
        for row in longest.to_dict("records"):
            try:
                _, positions = data.store.tensors(row["cell"], row["number"])
            except MemvecError:
                continue  # the row's numbers are valid; its vectors file is gone
            if positions.shape[1] >= MIN_POSITIONS:
                margins.append(positions[2].double().numpy())
                bits.append(positions[0].double().numpy())
        if margins:
            yield Errors(str(model), str(series), str(protocol), int(str(K)), margins, bits)


def positions_table(data: Data) -> Table:
    """Shares of wrong positions by fifth of the passage, and the bits of wrong and right tokens."""
    lines: list[TableLine] = []
    for e in errors(data):
        margin, bits = np.concatenate(e.margins), np.concatenate(e.lm_bits)
        wrong = margin <= 0
        overall = mean_interval([float((m <= 0).mean()) for m in e.margins])
        lines.append(
            [
                ("model", e.model),
                ("source", e.series),
                ("protocol", e.protocol),
                ("K", e.K),
                ("positions", round(_length(e))),
                ("% wrong", 100 * overall.mean),
                ("sd over passages", 100 * overall.sd),
                *(
                    (f"{100 * i // PARTS}–{100 * (i + 1) // PARTS} %", 100 * float(share))
                    for i, share in enumerate(e.parts().mean(0))
                ),
                ("bits, wrong", _mean(bits[wrong])),
                ("bits, right", _mean(bits[~wrong])),
                ("rows", len(e.margins)),
            ]
        )
    return Table.of(
        "positions",
        "Errors by position",
        "Share of positions whose arg-max is wrong with teacher forcing, in %: over the whole "
        "passage, and in each fifth of it, at the longest length; means over rows. Bits: mean "
        "bits, without vectors, of the tokens that are wrong with the vectors, and of those that "
        "are right.",
        lines,
    )


def positions_figure(data: Data) -> Plot:
    """Shares of wrong positions over the passage, for the smallest K of each protocol."""
    frame = pd.DataFrame(
        [(e.model, e.series, e.protocol, e.K, e) for e in errors(data)],
        columns=["model", "series", "protocol", "K", "errors"],
    )
    panels: list[Panel] = []
    counts: list[int] = []
    later = cases = 0
    for (model, protocol), group in frame.groupby(["model", "protocol"], sort=False):
        group = group[group["K"] == group["K"].min()]
        series = []
        for e in group["errors"].head(MAX_SERIES):
            means = [mean_interval(part.tolist()) for part in e.parts().T]
            x = [100 * (i + 0.5) / PARTS for i in range(PARTS)]
            name = f"{e.series}, {round(_length(e))} positions"
            low, high = ([max(0.0, 100 * v) for v in _edges(means, side)] for side in (0, 1))
            y = [100 * m.mean for m in means]
            series.append(Series(name, x, y, "line", low, high))
            counts.append(len(e.margins))
            if y[0] != y[-1]:
                cases, later = cases + 1, later + (y[-1] > y[0])
        if not any(v for s in series for v in s.y):
            continue  # no errors to show; the table says so
        title = f"{model}, {protocol}"
        panels.append(Panel(title, "place in the passage, %", "% wrong", series))
    caption = (
        "Share of wrong arg-maxes in each fifth of the passage at the longest length, mean over "
        f"passages with its 95 % interval; {n_of(counts)} for each line. The last fifth has more "
        f"errors than the first in {later} of {cases} lines that differ."
    )
    return Plot("positions", "Errors by position", caption, panels)


def _edges(means: list[Mean], side: int) -> list[float]:
    """Lower (0) or upper (1) ends; the mean itself where there is no interval."""
    edges = [(m.low, m.high)[side] for m in means]
    return [m.mean if np.isnan(e) else e for m, e in zip(means, edges, strict=True)]


def _length(e: Errors) -> float:
    return float(np.mean([len(m) for m in e.margins]))


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None
