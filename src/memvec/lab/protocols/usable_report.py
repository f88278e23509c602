"""Tables and first numbers of the protocol 'usable', from its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from memvec.lab.protocols.protocol import Card
from memvec.lab.report.data import Data, by_length, place
from memvec.lab.report.table import Table, TableLine, interval
from memvec.statistics import (
    Interval,
    Mean,
    Share,
    bootstrap_mean,
    mean_interval,
    ratio_of_means,
    share_interval,
)
from memvec.usable.contexts import FULL, NONE, VECTORS
from memvec.writing import read_json


@dataclass(frozen=True)
class ContextScore:
    """KL and ratios of one context of a group, with 95 % intervals over passages."""

    kl: Interval  # nats per word
    ratio: Interval  # KL of this context / KL of no context
    kept: Interval  # share of the text's gain in NLL that this context has
    over_vectors: Interval  # KL of this context / KL of the vectors
    n: int


class Group(NamedTuple):
    """The rows of one model, series, length and K, with their extra measurements."""

    model: str
    series: str
    length: int
    K: int
    rows: pd.DataFrame
    extras: list[dict[str, Any]]

    def measured(self, what: str) -> list[dict[str, list[float]]]:
        """The measurements of the option 'layers' or 'directions', of each row that has them."""
        return [extra[what] for extra in self.extras if extra[what]]

    @property
    def per_vector(self) -> Mean:
        """Leading tokens that decode freely, per vector."""
        return mean_interval((self.rows["horizon"] / self.K).tolist())

    @property
    def exact(self) -> Share:
        """Share of passages that are exact."""
        return share_interval(int((self.rows["exact"] == 1).sum()), len(self.rows))

    def contexts(self) -> list[str]:
        """Names of the contexts that any passage has, but the text itself."""
        names = dict.fromkeys(name for extra in self.extras for name in extra["contexts"])
        return [name for name in names if name != FULL]

    def score(self, context: str) -> ContextScore:
        """The KL and ratios of a context, over the passages that have it."""
        measured = [e["contexts"] for e in self.extras if context in e["contexts"]]
        kl = [c[context][0] for c in measured]
        return ContextScore(
            bootstrap_mean(kl),
            ratio_of_means(kl, [c[NONE][0] for c in measured]),
            ratio_of_means(
                [c[NONE][1] - c[context][1] for c in measured],
                [c[NONE][1] - c[FULL][1] for c in measured],
            ),
            ratio_of_means(kl, [c[VECTORS][0] for c in measured]),
            len(measured),
        )


def groups_of(rows: pd.DataFrame) -> Iterator[Group]:
    """The groups of a protocol's rows, in the order of the spec."""
    for key, part in by_length(rows):
        yield Group(*key, part, [read_json(extra) for extra in part["extra"]])


def cards(rows: pd.DataFrame) -> list[Card]:
    """For each model, the smallest KL ratio among groups whose passages are all exact."""
    whole: dict[str, list[Group]] = {}
    for group in groups_of(rows):
        if group.exact.share == 1:
            whole.setdefault(group.model, []).append(group)
    best_cards = []
    for model, groups in whole.items():
        best = min(groups, key=lambda g: g.score(VECTORS).ratio.value)
        ratio = best.score(VECTORS).ratio
        best_cards.append(
            Card(
                f"{ratio.value:.2f} × KL",
                f"of no context, {best.length} exact tokens in K = {best.K}: {best.series}, "
                f"{model}; 95 % [{ratio.low:.2f}, {ratio.high:.2f}], n {len(best.rows)}",
            )
        )
    return best_cards


# ---------------------------------------------------------------------- tables


def tables(data: Data, rows: pd.DataFrame) -> list[Table]:
    """Tables of exactness against use, of all contexts, of layers and of subspaces."""
    groups = list(groups_of(rows))
    report_tables = [_trade(data, groups), _contexts(groups)]
    if knocked := [group for group in groups if group.measured("layers")]:
        report_tables.append(_knocked(knocked))
    compared = [group for group in groups if group.measured("directions")]
    return [*report_tables, _spans(data, compared)] if compared else report_tables


def _trade(data: Data, groups: list[Group]) -> Table:
    lines: list[TableLine] = []
    for g in groups:
        recipe = _recipe(data, g)
        score = g.score(VECTORS)
        lines.append(
            [
                *place(g.model, g.series, g.length, g.K),
                ("weight", recipe["term_weight"] if recipe["term"] == "use" else 0.0),
                ("trigger", recipe["trigger"]),
                ("RMS", mean_interval([extra["rms"] for extra in g.extras]).mean),
                ("exact", str(g.exact)),
                *interval("tokens/vector", g.per_vector),
                *interval("KL", score.kl),
                *interval("KL/nothing", score.ratio),
                *interval("kept", score.kept),
                ("n", len(g.rows)),
            ]
        )
    return Table.of(
        "usable",
        "Exactness against use",
        "Weight: weight of the KL divergence beside the loss of the passage; RMS: root mean square "
        "of the vectors' numbers; exact: share of the n passages that decode whole; tokens/vector: "
        "leading tokens that decode, per vector; KL: divergence from the model that has read the "
        "text, on held-out words, in nats per word; KL/nothing: ratio to the KL without context; "
        "kept: share of the text's gain on these words. Intervals: 95 % over passages.",
        lines,
    )


def _contexts(groups: list[Group]) -> Table:
    lines: list[TableLine] = []
    for g in groups:
        for name in g.contexts():
            score = g.score(name)
            lines.append(
                [
                    *place(g.model, g.series, g.length, g.K),
                    ("context", name),
                    *interval("KL", score.kl),
                    *interval("kept", score.kept),
                    *interval("KL / KL of vectors", score.over_vectors),
                    ("n", score.n),
                ]
            )
    return Table.of(
        "usable-contexts",
        "What stands in front of the same words",
        "KL: divergence from the model that has read the whole text, in nats per word. Kept: share "
        "of the text's gain on these words. Where KL / KL of vectors is above 1, the vectors are "
        "nearer to the text than the context. 95 % intervals over n passages.",
        lines,
    )


def _knocked(groups: list[Group]) -> Table:
    lines: list[TableLine] = []
    for g in groups:
        entries = g.measured("layers")
        for name in entries[0]:
            tokens, margin, kl = (mean_interval([e[name][i] for e in entries]) for i in range(3))
            lines.append(
                [
                    *place(g.model, g.series, g.length, g.K),
                    ("without", name),
                    *interval("tokens", tokens),
                    *interval("margin", margin),
                    *interval("KL", kl),
                    *interval("KL / whole", rise(entries, name)),
                    ("n", len(entries)),
                ]
            )
    return Table.of(
        "usable-layers",
        "Without attention to the vectors in some layers",
        "Without: the layer without attention to the vectors, or it and all above ('2+'); tokens: "
        "leading right tokens in decoding mode; margin: mean over the passage in decoding mode, "
        "logits; KL: of the vectors in context mode, nats per word; KL / whole: ratio to the KL "
        "with all layers. Means over n passages, all with 95 % intervals. In '0+' no layer attends "
        "to the vectors or to BOS.",
        lines,
    )


def _spans(data: Data, groups: list[Group]) -> Table:
    lines: list[TableLine] = []
    for g in groups:
        measured = g.measured("directions")
        text_in_use = mean_interval([d["text in use"][0] for d in measured])
        use_in_text = mean_interval([d["use in text"][0] for d in measured])
        for name in ("whole", "without text", "without use", "without random"):
            if any(name not in d for d in measured):
                continue  # earlier studies have no random span
            lines.append(
                [
                    *place(g.model, g.series, g.length, g.K),
                    ("vectors", name),
                    *interval("tokens", mean_interval([d[name][0] for d in measured])),
                    *interval("KL", mean_interval([d[name][2] for d in measured])),
                    ("chance", g.length / (g.K * int(data.models[g.model]["width"]))),
                    *interval("text in use", text_in_use),
                    *interval("use in text", use_in_text),
                    ("n", len(measured)),
                ]
            )
    return Table.of(
        "usable-directions",
        "Directions of the text and of its use",
        "Text in use: share of the squared length of the gradients of the tokens' margins inside "
        "the span of as many gradients of held-out words' log probabilities; use in text: the "
        "reverse; chance: the share inside a random span of that size. Tokens: leading right "
        "tokens in decoding mode; KL: of the vectors in context mode, nats per word; both for the "
        "whole vectors, for the vectors without their part in either span, and without their part "
        "in a random span of that size. Means over n passages with 95 % intervals.",
        lines,
    )


def _recipe(data: Data, group: Group) -> dict[str, Any]:
    """The recipe of a group's rows, whose cells differ only in the seed."""
    return data.recipe_of(str(group.rows["cell"].iloc[0]))


def rise(entries: list[dict[str, list[float]]], name: str) -> Interval:
    """KL in case `name` of a knock-out, divided by that with all layers, 95 % interval."""
    return ratio_of_means([e[name][2] for e in entries], [e["none"][2] for e in entries])
