"""Tables and first numbers of the protocol 'usable', from its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from memvec.lab.protocols.protocol import Card
from memvec.lab.report.data import Data, by_length, short
from memvec.lab.report.table import Table, TableCell
from memvec.statistics import (
    Interval,
    Mean,
    Share,
    bootstrap_mean,
    mean_interval,
    ratio_of_means,
    share_interval,
)
from memvec.usable.certificate import FULL, NONE, VECTORS


@dataclass(frozen=True)
class ContextScore:
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

    def measured(self, what: str) -> list[dict[str, list[float]]]:
        """What an option added to each row that has it: 'layers' or 'directions'."""
        return [extra[what] for extra in self.extras if extra[what]]

    @property
    def per_vector(self) -> Mean:
        """Leading tokens that decode freely, per vector."""
        return mean_interval((self.rows["horizon"] / self.K).tolist())

    @property
    def exact(self) -> Share:
        """Share of passages that came back whole."""
        return share_interval(int((self.rows["exact"] == 1).sum()), len(self.rows))

    def contexts(self) -> list[str]:
        """Names of the contexts that any passage has, but the text itself."""
        names = dict.fromkeys(name for extra in self.extras for name in extra["contexts"])
        return [name for name in names if name != FULL]

    def score(self, context: str) -> ContextScore:
        """How well a context stands for the text, over the passages that have it."""
        own = [e["contexts"] for e in self.extras if context in e["contexts"]]
        kl = [c[context][0] for c in own]
        return ContextScore(
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
        best = min(own, key=lambda g: g.score(VECTORS).ratio.value)
        ratio = best.score(VECTORS).ratio
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
    if knocked := [group for group in found if group.measured("layers")]:
        shown.append(_knocked(knocked))
    compared = [group for group in found if group.measured("directions")]
    return [*shown, _spans(data, compared)] if compared else shown


def _trade(data: Data, found: list[Group]) -> Table:
    rows: list[list[TableCell]] = []
    for g in found:
        recipe = _recipe(data, g)
        score = g.score(VECTORS)
        rms = mean_interval([extra["rms"] for extra in g.extras])
        row: list[TableCell] = [short(g.model), g.series, g.length, g.K]
        row += [recipe["term_weight"] if recipe["term"] == "use" else 0.0, recipe["trigger"]]
        row += [rms.mean, str(g.exact), g.per_vector.mean, score.kl.value, *score.ratio]
        rows.append([*row, *score.kept, len(g.rows)])
    columns = ["model", "source", "length", "K", "weight", "trigger", "RMS", "exact"]
    columns += ["tokens/vector", "KL", "KL/nothing", "low", "high", "kept", "low", "high", "n"]
    return Table(
        "usable",
        "Exactness against use",
        "Weight: of the divergence beside the passage's own loss; RMS: of the vectors' numbers; "
        "exact: share of passages that decode whole; tokens/vector: leading tokens that decode, "
        "per vector; KL: from the model behind the text on held-out words, nats a word; "
        "KL/nothing: over that without context; kept: share of the text's gain on these words. "
        "95 % intervals.",
        columns,
        rows,
    )


def _contexts(found: list[Group]) -> Table:
    rows: list[list[TableCell]] = []
    for g in found:
        for name in g.contexts():
            w = g.score(name)
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


def _knocked(found: list[Group]) -> Table:
    rows: list[list[TableCell]] = []
    for g in found:
        entries = g.measured("layers")
        for name in entries[0]:
            row: list[TableCell] = [short(g.model), g.series, g.length, g.K, name]
            row += [float(value) for value in np.mean([e[name] for e in entries], axis=0)]
            rows.append([*row, *rise(entries, name), len(entries)])
    columns = ["model", "source", "length", "K", "without", "tokens", "margin", "KL"]
    return Table(
        "usable-layers",
        "Without attention to the vectors in some layers",
        "Without: a layer, or it and all above ('2+'); tokens: leading ones right behind the "
        "trigger; margin: mean of the passage's, logits; KL: as context, nats a word; KL / whole: "
        "over that with all layers, 95 % interval. '0+' reads no vectors, and no BOS either.",
        [*columns, "KL / whole", "low", "high", "n"],
        rows,
    )


def _spans(data: Data, found: list[Group]) -> Table:
    rows: list[list[TableCell]] = []
    for g in found:
        own = g.measured("directions")
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


def rise(entries: list[dict[str, list[float]]], name: str) -> Interval:
    """KL with something knocked out over that of the same passages with nothing knocked out."""
    return ratio_of_means([e[name][2] for e in entries], [e["none"][2] for e in entries])
