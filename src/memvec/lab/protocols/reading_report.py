"""Tables and figures of the protocol 'reading': layer by layer, and the optimiser's paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from memvec.lab.protocols.protocol import extra_of
from memvec.lab.report.data import by_length, place
from memvec.lab.report.plot import Panel, Plot, Series, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import Mean, mean_interval

PATHS = 8  # passages whose paths a figure shows


class Group(NamedTuple):
    """The passages of one model, source, length and K, with their extra measurements."""

    name: str
    key: tuple[str, str, int, int]
    rows: pd.DataFrame
    attention: list[list[float]]
    cut: list[dict[str, list[float]]]
    lens: list[list[list[float]]]
    path: list[dict[str, Any]]

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.attention[0])

    def shares(self) -> list[Mean]:
        """Share of attention on the vectors, by layer."""
        return [mean_interval([shares[i] for shares in self.attention]) for i in range(self.layers)]

    def left(self, above: bool) -> list[Mean]:
        """Share of the leading tokens that is left without a layer, or without it and all above."""
        return [
            mean_interval(
                [cut[f"{i}{'+' * above}"][0] / max(1.0, cut["none"][0]) for cut in self.cut]
            )
            for i in range(self.layers)
        ]

    def bits(self) -> list[Mean]:
        """-log2 p of the first token through the lens (bits), by layer."""
        return [mean_interval([lens[i][0] for lens in self.lens]) for i in range(self.layers)]

    def right(self, layer: int) -> int:
        """Passages whose first token is the arg-max of the lens at this layer."""
        return sum(lens[layer][1] == 1 for lens in self.lens)


def groups_of(rows: pd.DataFrame) -> Iterator[Group]:
    """The groups of a study's rows, in the order of the spec."""
    for key, part in by_length(rows):
        model, series, length, K = key
        extras = (extra_of(part, "reading", x) for x in ("attention", "cut", "lens", "path"))
        yield Group(f"{model}, {series}, {length} tokens, K = {K}", key, part, *extras)


def tables(rows: pd.DataFrame) -> list[Table]:
    """One table with a line for each layer."""
    lines: list[TableLine] = []
    for group in groups_of(rows):
        n = len(group.rows)
        shares, bits = group.shares(), group.bits()
        left, left_above = group.left(above=False), group.left(above=True)
        for i in range(group.layers):
            lines.append(
                [
                    *place(*group.key),
                    ("layer", i),
                    *interval("attention share", shares[i]),
                    *interval("left without it", left[i]),
                    *interval("left without it and above", left_above[i]),
                    *interval("first token, bits", bits[i]),
                    ("arg-max right", f"{group.right(i)} of {n}"),
                    ("n", n),
                ]
            )
    note = (
        "Means over n passages with 95 % intervals (Student's t). Attention share: share of "
        "attention on the vectors, mean over the positions after them. Left: leading right tokens "
        "with attention to the vectors knocked out in the layer, or in it and all above, divided "
        "by those with all layers. First token: its -log2 p when the final norm and the head are "
        "applied to the layer's state after BOS (logit lens); for the last layer this is the "
        "model's prediction."
    )
    return [Table.of("reading", "Where the model reads the vectors", note, lines)]


def figures(rows: pd.DataFrame) -> list[Plot]:
    """Four panels over the layers, and the paths of the optimiser."""
    groups = list(groups_of(rows))
    if not groups:
        return []
    layers = max(group.layers for group in groups)
    measures = (
        ("attention on the vectors", "share", Group.shares),
        ("cut in the layer only", "share of leading tokens left", lambda g: g.left(above=False)),
        (
            "cut in the layer and above",
            "share of leading tokens left",
            lambda g: g.left(above=True),
        ),
        ("logit lens, first token", "-log2 p, bits", Group.bits),
    )
    panels = [
        Panel(title, "layer", y, [estimates(g.name, range(g.layers), of(g)) for g in groups])
        for title, y, of in measures
    ]
    n = sum(len(group.rows) for group in groups)
    caption = (
        f"{n} passages, {layers} layers, means with 95 % intervals. Layers are counted from 0. "
        "Where the share of leading tokens left is 0, no token decodes without that layer's "
        "attention to the vectors."
    )
    return [Plot("reading", "Where the model reads the vectors", caption, panels), _paths(groups)]


def _paths(groups: list[Group]) -> Plot:
    panels = []
    explained: list[float] = []
    for group in groups:
        series = []
        for number, path in list(zip(group.rows["number"], group.path, strict=True))[:PATHS]:
            steps = range(len(path["x"]))
            hover = [f"passage {number}, step {s}: {path['leading'][s]} tokens" for s in steps]
            series.append(Series(f"passage {number}", path["x"], path["y"], "line", hover=hover))
        panels.append(Panel(group.name, "first component", "second component", series))
        # Three points always lie in a plane.
        explained += [float(p["explained"]) for p in group.path if len(p["x"]) > 3]
    share = (
        f"The planes explain {100 * float(np.mean(explained)):.0f} % of the variance (mean of "
        f"{len(explained)} passages of more than three steps; {100 * min(explained):.0f} to "
        f"{100 * max(explained):.0f} %). "
        if explained
        else ""
    )
    caption = (
        "The vectors of every step of a passage, in the plane of the first two principal "
        "components of these steps; the passage was crammed once more, alone. A path ends at "
        f"positive values. {share}Point at a step to see how many leading tokens decode by then."
    )
    return Plot("reading-paths", "The optimiser's paths", caption, panels)
