"""Figures of the protocol 'usable', from its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from memvec.lab.protocols.usable_report import Group, groups_of, rise
from memvec.lab.report.plot import Panel, Plot, Series, estimates
from memvec.statistics import mean_interval
from memvec.usable.contexts import VECTORS

DASHED = 2  # controls in a panel of the frontier: the last K and the last 2 K tokens


def figures(rows: pd.DataFrame) -> list[Plot]:
    """A figure of exactness against use, and one of knocked-out layers where they were measured."""
    groups = list(groups_of(rows))
    plots = [_frontier(groups)]
    knocked = [group for group in groups if group.measured("layers")]
    return [*plots, _layers(knocked)] if knocked else plots


def _frontier(groups: list[Group]) -> Plot:
    panels: list[Panel] = []
    by_panel: dict[tuple[str, int], list[Group]] = {}
    for g in groups:
        by_panel.setdefault((g.model, g.K), []).append(g)
    for (model, K), of_panel in by_panel.items():
        labels = _labels(list(dict.fromkeys(g.series for g in of_panel)))
        series = [
            _points(label, [g for g in of_panel if g.series == name])
            for name, label in labels.items()
        ]
        title = f"{model}, K = {K}"
        axes = ("exact tokens per vector", "KL / KL of no context")
        panels.append(Panel(title, *axes, [*series, *_ends(of_panel)], log_y=True))
    nearer = [g.score(VECTORS).ratio.high < 1 for g in groups]
    whole = [g for g in groups if g.exact.share == 1]
    caption = (
        f"Each point is a model, source, recipe, length and K ({len(groups)} of them), with 95 % "
        f"intervals; in {sum(nearer)} the whole interval of the KL ratio is below 1, so that the "
        f"vectors are nearer to the text than no context is; in {len(whole)} every passage is "
        "exact. Dashed: the last tokens of the text."
    )
    if whole:
        best = min(whole, key=lambda g: g.score(VECTORS).ratio.value)
        ratio = best.score(VECTORS).ratio
        caption += (
            f" Smallest ratio with every passage exact: {ratio.value:.2f} [{ratio.low:.2f}, "
            f"{ratio.high:.2f}], {best.length} tokens in {best.K} vectors ({best.series}, "
            f"{best.model}, n {len(best.rows)})."
        )
    return Plot("usable", "Exactness against use", caption, panels)


def _points(name: str, groups: list[Group]) -> Series:
    ratios = [g.score(VECTORS).ratio for g in groups]
    hover = [f"{g.length} tokens, exact {g.exact}, n {len(g.rows)}" for g in groups]
    return estimates(name, [g.per_vector.mean for g in groups], ratios, hover=hover)


def _ends(groups: list[Group]) -> list[Series]:
    """KL ratios of the last tokens of the text at each length, a line for each source.

    No recipe changes them.
    """
    by_source: dict[str, dict[int, Group]] = {}
    for g in groups:
        by_source.setdefault(str(g.rows["source"].iloc[0]), {}).setdefault(g.length, g)
    several = len(by_source) > 1
    return [
        line
        for source, alike in by_source.items()
        for line in _ends_of_source(list(alike.values()), f", {source}" if several else "")
    ]


def _ends_of_source(groups: list[Group], after: str) -> list[Series]:
    """The lines of one source, whose groups have different lengths; `after` ends their names."""
    lengths = sorted(groups, key=lambda g: g.length)
    names = dict.fromkeys(name for g in lengths for name in g.contexts() if name.startswith("last"))
    series = []
    for name in list(names)[:DASHED]:
        having = [g for g in lengths if name in g.contexts()]
        x = [g.length / g.K for g in having]
        y = [g.score(name).ratio.value for g in having]
        if len(x) == 1:  # a short line, because one point would be invisible
            x, y = [0.9 * x[0], 1.1 * x[0]], y * 2
        series.append(Series(name + after, x, y, "dashed"))
    return series


def _layers(groups: list[Group]) -> Plot:
    """One panel for each mode of a model, length and K; a line for each recipe."""
    panels = []
    alike: dict[tuple[str, int, int], list[Group]] = {}
    for g in groups:
        alike.setdefault((g.model, g.length, g.K), []).append(g)
    for (model, length, K), of_panel in alike.items():
        margins, divergence, names = [], [], []
        labels = _labels([g.series for g in of_panel])
        for g in of_panel:
            entries = g.measured("layers")
            names = ["none", *(name for name in entries[0] if name.isdigit())]
            means = [mean_interval([e[name][1] for e in entries]) for name in names]
            margins.append(estimates(labels[g.series], range(len(names)), means))
            ratios = [rise(entries, name) for name in names]
            divergence.append(estimates(labels[g.series], range(len(names)), ratios))
        title = f"{model}, {length} tokens in {K}"
        panels.append(Panel(title, "without layer", "mean margin, logits", margins, names))
        panels.append(Panel(title, "without layer", "KL / KL with all layers", divergence, names))
    best: dict[str, Group] = {}  # of each model
    for g in sorted(groups, key=lambda g: g.score(VECTORS).ratio.value):
        best.setdefault(g.model, g)
    caption = (
        "Attention to the vectors is knocked out in one layer, for all positions after them; 95 % "
        "intervals over passages. Mean margin: mean over the passage's tokens in decoding mode. "
        "Where the KL ratio is above 1, the vectors are a worse context without that layer. "
        + " ".join(_strongest(g) for g in best.values())
    )
    return Plot("usable-layers", "Which layers read the vectors", caption, panels)


def _strongest(g: Group) -> str:
    """A sentence on the layers without which each mode loses the most."""
    entries = g.measured("layers")
    names = [name for name in entries[0] if name.isdigit()]
    mean = {name: np.mean([e[name] for e in entries], axis=0) for name in entries[0]}
    cost = {name: rise(entries, name).value for name in names}
    text, use = min(names, key=lambda n: mean[n][1]), max(names, key=cost.__getitem__)
    whole, without, fewer = mean["none"], mean[text], mean[use]
    return (
        f"{g.model}, {g.length} tokens in {g.K} ({g.series}, n {len(entries)}): the passage "
        f"needs layer {text} most (without it the mean margin changes from {whole[1]:.2f} to "
        f"{without[1]:.2f} logits, {without[0]:.1f} of {whole[0]:.1f} leading tokens are left and "
        f"the KL is {cost[text]:.2f} times as large), context mode needs layer {use} most (KL "
        f"{cost[use]:.2f} times as large, {fewer[0]:.1f} tokens left)."
    )


def _labels(series: Sequence[str]) -> dict[str, str]:
    """A label for each series: the parts of its name that differ from the most frequent ones."""
    parts = {name: name.split(", ") for name in series}
    if len(parts) == 1 or len({len(words) for words in parts.values()}) > 1:
        return {name: words[0] if len(parts) == 1 else name for name, words in parts.items()}
    columns = list(zip(*parts.values(), strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(varying) == 1:
        return {name: words[varying[0]] for name, words in parts.items()}
    usual = [max(column, key=column.count) for column in columns]
    return {
        name: ", ".join(p for p, q in zip(words, usual, strict=True) if p != q) or "usual recipe"
        for name, words in parts.items()
    }
