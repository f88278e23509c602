"""Tables and figures of the protocol 'usable', from its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from memvec.lab.protocols.protocol import Card
from memvec.lab.report.data import Data, by_length, panel_title, short
from memvec.lab.report.plot import Panel, Plot, Series
from memvec.lab.report.table import Table, TableCell
from memvec.lab.statistics import (
    Interval,
    Mean,
    Share,
    bootstrap_mean,
    mean_interval,
    ratio_of_means,
    share_interval,
)
from memvec.usable.certificate import FULL, NONE, VECTORS

DASHED = 2  # controls that a panel of the frontier shows: the last K tokens and the next longer


@dataclass(frozen=True)
class Worth:
    """One context of a group: KL from the text, the same over that of nothing, the share kept."""

    kl: Interval  # nats a word
    ratio: Interval
    kept: Interval
    over_vectors: Interval  # KL of this context / KL of the vectors
    n: int


class Group(NamedTuple):
    """The rows of one model, series, length and K, with what the protocol measured of each."""

    model: str
    series: str
    length: int
    K: int
    rows: pd.DataFrame
    extras: list[dict[str, Any]]

    @property
    def per_vector(self) -> Mean:
        """Leading tokens that decode freely, per vector."""
        return mean_interval((self.rows["horizon"] / self.K).tolist())

    @property
    def exact(self) -> Share:
        """Share of passages that came back whole."""
        return share_interval(int((self.rows["exact"] > 0).sum()), len(self.rows))

    def contexts(self) -> list[str]:
        """Names of the contexts that any passage has, but the text itself."""
        names = dict.fromkeys(name for extra in self.extras for name in extra["contexts"])
        return [name for name in names if name != FULL]

    def worth(self, context: str) -> Worth:
        """What a context is worth, over the passages that have it."""
        own = [e["contexts"] for e in self.extras if context in e["contexts"]]
        kl = [c[context][0] for c in own]
        return Worth(
            bootstrap_mean(kl),
            ratio_of_means(kl, [c[NONE][0] for c in own]),
            ratio_of_means(
                [c[NONE][1] - c[context][1] for c in own], [c[NONE][1] - c[FULL][1] for c in own]
            ),
            ratio_of_means(kl, [c[VECTORS][0] for c in own]),
            len(own),
        )


def groups(rows: pd.DataFrame) -> Iterator[Group]:
    """The groups of a protocol's rows, in the order of the spec."""
    for key, part in by_length(rows):
        yield Group(*key, part, [json.loads(extra) for extra in part["extra"]])


def cards(rows: pd.DataFrame) -> list[Card]:
    """For each model the group of smallest KL ratio among those whose passages are all exact."""
    whole: dict[str, list[Group]] = {}
    for group in groups(rows):
        if group.exact.share == 1:
            whole.setdefault(group.model, []).append(group)
    shown = []
    for model, own in whole.items():
        best = min(own, key=lambda g: g.worth(VECTORS).ratio.value)
        ratio = best.worth(VECTORS).ratio
        shown.append(
            Card(
                f"{ratio.value:.2f} × KL",
                f"of no context, {best.length} exact tokens in K = {best.K}: {best.series}, "
                f"{short(model)}; 95 % [{ratio.low:.2f}, {ratio.high:.2f}], n {len(best.rows)}",
            )
        )
    return shown


# ---------------------------------------------------------------------- tables


def tables(data: Data, rows: pd.DataFrame) -> list[Table]:
    """The trade, every context beside the vectors, and the subspaces where they were compared."""
    found = list(groups(rows))
    shown = [_trade(data, found), _contexts(found)]
    compared = [group for group in found if any(extra["directions"] for extra in group.extras)]
    return [*shown, _spans(data, compared)] if compared else shown


def _trade(data: Data, found: list[Group]) -> Table:
    rows: list[list[TableCell]] = []
    for g in found:
        recipe = _recipe(data, g)
        worth = g.worth(VECTORS)
        rms = mean_interval([extra["rms"] for extra in g.extras])
        row: list[TableCell] = [short(g.model), g.series, g.length, g.K]
        row += [recipe["term_weight"] if recipe["term"] == "use" else 0.0, recipe["trigger"]]
        row += [rms.mean, str(g.exact), g.per_vector.mean, worth.kl.value, *worth.ratio]
        rows.append([*row, *worth.kept, len(g.rows)])
    columns = ["model", "source", "length", "K", "weight", "trigger", "RMS", "exact"]
    columns += ["tokens/vector", "KL", "KL/nothing", "low", "high", "kept", "low", "high", "n"]
    return Table(
        "usable",
        "Exactness against use",
        "Weight: of the divergence beside the passage's own loss; RMS: of the vectors; exact: share "
        "of passages that decode whole; tokens/vector: leading tokens that decode, per vector; KL: "
        "from the model behind the text on held-out words, nats a word; KL/nothing: over that "
        "without context; kept: share of the text's gain on these words. 95 % intervals.",
        columns,
        rows,
    )


def _contexts(found: list[Group]) -> Table:
    rows: list[list[TableCell]] = []
    for g in found:
        for name in g.contexts():
            w = g.worth(name)
            row: list[TableCell] = [short(g.model), g.series, g.length, g.K, name]
            rows.append([*row, *w.kl, *w.kept, *w.over_vectors, w.n])
    columns = ["model", "source", "length", "K", "context", "KL", "low", "high"]
    columns += ["kept", "low", "high", "KL / KL of vectors", "low", "high", "n"]
    return Table(
        "usable-contexts",
        "What stands in front of the same words",
        "KL from the model behind the whole text, nats a word; above 1 in KL / KL of vectors, the "
        "vectors are nearer to the text. 95 % intervals over passages.",
        columns,
        rows,
    )


def _spans(data: Data, found: list[Group]) -> Table:
    rows: list[list[TableCell]] = []
    for g in found:
        own = [extra["directions"] for extra in g.extras if extra["directions"]]
        chance = g.length / (g.K * int(data.models[g.model]["width"]))
        row: list[TableCell] = [short(g.model), g.series, g.length, g.K, chance]
        for name in ("text in use", "use in text"):
            row.append(mean_interval([d[name][0] for d in own]).mean)
        for name in ("whole", "without text", "without use"):
            row.append(mean_interval([d[name][0] for d in own]).mean)
        for name in ("whole", "without text", "without use"):
            row.append(mean_interval([d[name][2] for d in own]).mean)
        rows.append([*row, len(own)])
    columns = ["model", "source", "length", "K", "chance", "text in use", "use in text"]
    columns += ["tokens", "without text", "without use", "KL", "without text", "without use", "n"]
    return Table(
        "usable-directions",
        "Directions of the text and of its use",
        "Text in use: share of the gradients of the tokens' margins inside the span of as many "
        "gradients of held-out words' log-probabilities, and the reverse; chance: of a random span "
        "of that size. Tokens (leading ones right behind the trigger) and KL (nats a word) of the "
        "vectors whole, and without what they have in either span. Means over passages.",
        columns,
        rows,
    )


def _recipe(data: Data, group: Group) -> dict[str, Any]:
    """The recipe of a group's rows, which are of one cell but for its seed."""
    (settings,) = data.store.db.execute(
        "SELECT settings FROM cells WHERE cell=?", (str(group.rows["cell"].iloc[0]),)
    ).fetchone()
    recipe: dict[str, Any] = json.loads(settings)["recipe"]
    return recipe


# ---------------------------------------------------------------------- figures


def figures(rows: pd.DataFrame) -> list[Plot]:
    """The frontier, and the layers where attention was knocked out."""
    found = list(groups(rows))
    plots = [_frontier(found)]
    knocked = [group for group in found if any(extra["layers"] for extra in group.extras)]
    return [*plots, _layers(knocked)] if knocked else plots


def _frontier(found: list[Group]) -> Plot:
    panels: dict[str, Panel] = {}
    by_panel: dict[tuple[str, int], list[Group]] = {}
    for g in found:
        by_panel.setdefault((g.model, g.K), []).append(g)
    for (model, K), own in by_panel.items():
        series = []
        for name in dict.fromkeys(g.series for g in own):
            series.append(_points(name, [g for g in own if g.series == name]))
        title = panel_title(model, K)
        panels[title] = Panel(
            title,
            "exact tokens per vector",
            "KL / KL of no context",
            series + _ends(own),
        )
    nearer = [g.worth(VECTORS).ratio.high < 1 for g in found]
    whole = [g for g in found if g.exact.share == 1]
    caption = (
        f"Each point is a model, source, recipe, length and K ({len(found)} of them); in "
        f"{sum(nearer)} the vectors are nearer to the text than no context is, with the whole "
        f"interval; in {len(whole)} every passage is exact. Dashed: ends of the text."
    )
    if whole:
        best = min(whole, key=lambda g: g.worth(VECTORS).ratio.value)
        ratio = best.worth(VECTORS).ratio
        caption += (
            f" Smallest ratio with every passage exact: {ratio.value:.2f} [{ratio.low:.2f}, "
            f"{ratio.high:.2f}], {best.length} tokens in {best.K} vectors ({best.series}, "
            f"{short(best.model)}, n {len(best.rows)})."
        )
    return Plot("usable", "Exactness against use", caption, list(panels.values()))


def _points(name: str, own: list[Group]) -> Series:
    ratios = [g.worth(VECTORS).ratio for g in own]
    return Series(
        name,
        [g.per_vector.mean for g in own],
        [r.value for r in ratios],
        "line",
        [r.low for r in ratios],
        [r.high for r in ratios],
        [f"{g.length} tokens, exact {g.exact}, n {len(g.rows)}" for g in own],
    )


def _ends(own: list[Group]) -> list[Series]:
    """What ends of the text are worth at each length; the recipe makes no difference to them."""
    alike: dict[int, Group] = {}
    for g in own:
        alike.setdefault(g.length, g)
    lengths = sorted(alike.values(), key=lambda g: g.length)
    names = dict.fromkeys(name for g in lengths for name in g.contexts() if name.startswith("last"))
    series = []
    for name in list(names)[:DASHED]:
        having = [g for g in lengths if name in g.contexts()]
        x = [g.length / g.K for g in having]
        y = [g.worth(name).ratio.value for g in having]
        if len(x) == 1:  # a dash beside the points rather than nothing
            x, y = [0.9 * x[0], 1.1 * x[0]], y * 2
        series.append(Series(name, x, y, "dashed"))
    return series


def _layers(found: list[Group]) -> Plot:
    panels, first = [], []
    for g in found:
        own = [extra["layers"] for extra in g.extras if extra["layers"]]
        names = [name for name in own[0] if name.isdigit()]
        for above in ("", "+"):
            lost = {mode: _lost(own, [n + above for n in names], mode) for mode in ("exact", "use")}
            bars = [
                Series(label, [float(i) for i in range(len(names))], lost[mode], "bars")
                for mode, label in (("exact", "leading tokens"), ("use", "use as context"))
            ]
            if not above:
                strongest = {
                    m: names[max(range(len(names)), key=v.__getitem__)] for m, v in lost.items()
                }
                first.append((g, strongest, len(own)))
            what = "in it and all above" if above else "in one layer"
            title = f"{short(g.model)}, {g.series}, {g.length} in {g.K}, {what}"
            panels.append(Panel(title, "layer", "share lost", bars, names))
    sentences = [
        f"{short(g.model)}, {g.series}, {g.length} tokens in {g.K}: layer {s['exact']} for the "
        f"tokens, layer {s['use']} for use (n {n})"
        for g, s, n in first
    ]
    caption = (
        "Attention to the vectors is knocked out for all positions behind them. Lost: of the "
        "leading tokens; and of the KL, its rise over that without any attention to them (1: as if "
        "no layer read them). The layer that costs most alone: " + "; ".join(sentences) + "."
    )
    return Plot("usable-layers", "Which layers read the vectors", caption, panels)


def _lost(own: list[dict[str, list[float]]], names: list[str], mode: str) -> list[float]:
    """Share of the leading tokens lost, or of the rise of the KL to that without any attention."""
    mean = {name: pd.DataFrame([entry[name] for entry in own]).mean().tolist() for name in own[0]}
    at = 0 if mode == "exact" else 2
    whole, nothing = mean["none"][at], 0.0 if mode == "exact" else mean["0+"][2]
    scale = whole - nothing
    return [(whole - mean[name][at]) / scale if scale else 0.0 for name in names]
