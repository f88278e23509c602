"""Tables and figures of the protocol 'reading': layer by layer, and the optimiser's paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from memvec.lab.protocols.protocol import extra_of
from memvec.lab.report.data import by_length, short
from memvec.lab.report.plot import Panel, Plot, Series, line_of_means
from memvec.lab.report.table import Table, TableCell
from memvec.statistics import Mean, mean_interval

PATHS = 8  # passages whose paths a figure shows


class Group(NamedTuple):
    """The passages of one model, source, length and K."""

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
        """Attention on the vectors, by layer."""
        return [mean_interval([own[i] for own in self.attention]) for i in range(self.layers)]

    def left(self, above: bool) -> list[Mean]:
        """Share of the leading tokens that is left without a layer, or without it and all above."""
        return [
            mean_interval(
                [own[f"{i}{'+' * above}"][0] / max(1.0, own["none"][0]) for own in self.cut]
            )
            for i in range(self.layers)
        ]

    def bits(self) -> list[Mean]:
        """-log2 p of the first token through the lens, by layer."""
        return [mean_interval([own[i][0] for own in self.lens]) for i in range(self.layers)]

    def right(self, layer: int) -> int:
        """Passages whose first token is the arg-max there."""
        return sum(own[layer][1] == 1 for own in self.lens)


def groups(rows: pd.DataFrame) -> Iterator[Group]:
    """In the order of the spec."""
    for key, part in by_length(rows):
        model, series, length, K = key
        extras = (extra_of(part, "reading", x) for x in ("attention", "cut", "lens", "path"))
        yield Group(f"{short(model)}, {series}, {length} tokens, K = {K}", key, part, *extras)


def tables(rows: pd.DataFrame) -> list[Table]:
    """Layer by layer."""
    found: list[list[TableCell]] = []
    for group in groups(rows):
        model, series, length, K = group.key
        n = len(group.rows)
        measured = (group.shares(), group.left(above=False), group.left(above=True), group.bits())
        for i, means in enumerate(zip(*measured, strict=True)):
            row: list[TableCell] = [short(model), series, length, K, i]
            for mean in means:
                row += [mean.mean, mean.low, mean.high]
            found.append([*row, f"{group.right(i)} of {n}", n])
    columns = ["model", "source", "length", "K", "layer", "attention share", "low", "high"]
    columns += ["left without it", "low", "high", "left without it and above", "low", "high"]
    columns += ["first token, bits", "low", "high", "arg-max right", "n"]
    note = (
        "Means over passages with 95 % intervals (Student's t). Attention share: on the vectors, "
        "of all positions behind them. Left: leading right tokens with attention to the vectors "
        "cut in the layer, or in it and all above, over those with none cut. First token: what the "
        "final norm and head make of the layer's state behind BOS (logit lens); of the last layer "
        "it is the model's answer."
    )
    return [Table("reading", "Where the model reads the vectors", note, columns, found)]


def figures(rows: pd.DataFrame) -> list[Plot]:
    """Four panels of layers, and the paths."""
    found = list(groups(rows))
    if not found:
        return []
    layers = max(group.layers for group in found)
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
        Panel(title, "layer", y, [_line(g.name, of(g)) for g in found]) for title, y, of in measures
    ]
    n = sum(len(group.rows) for group in found)
    caption = (
        f"{n} passages, {layers} layers, means with 95 % intervals. Layers are counted from 0. "
        "Where a line of what is left is at 0, nothing comes back without that layer's attention "
        "to the vectors."
    )
    return [Plot("reading", "Where the model reads the vectors", caption, panels), _paths(found)]


def _line(name: str, means: Sequence[Mean]) -> Series:
    return line_of_means(name, list(range(len(means))), means)


def _paths(found: list[Group]) -> Plot:
    panels = []
    explained: list[float] = []
    for group in found:
        series = []
        for number, path in list(zip(group.rows["number"], group.path, strict=True))[:PATHS]:
            steps = range(len(path["x"]))
            hover = [f"passage {number}, step {s}: {path['leading'][s]} tokens" for s in steps]
            series.append(Series(f"passage {number}", path["x"], path["y"], "line", hover=hover))
        panels.append(Panel(group.name, "first component", "second component", series))
        # Three points always lie in a plane.
        explained += [float(p["explained"]) for p in group.path if len(p["x"]) > 3]
    share = (
        f"The planes hold {100 * float(np.mean(explained)):.0f} % of the variance (mean of "
        f"{len(explained)} passages of more than three steps; {100 * min(explained):.0f} to "
        f"{100 * max(explained):.0f} %). "
        if explained
        else ""
    )
    caption = (
        "The vectors of every step of a passage, in the plane of their own first two principal "
        "components; the passage was crammed once more, alone. A path ends at positive values. "
        f"{share}Point at a step to see how many leading tokens came back by then."
    )
    return Plot("reading-paths", "The optimiser's paths", caption, panels)
