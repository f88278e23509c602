"""A vector against n real preceding tokens (paper, Table 2 and `ablations_context_length.ipynb`).

How many bits of the passage does ordinary context remove? The source must have text before its
passages; where it has fewer than n tokens, the entry is missing.

As in the notebook, the n tokens are the last ones of the text before the passage followed by a
space (its "option 2", which is the one that its code runs). They have no BOS in front, because the
notebook cuts it off with the earlier tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from pydantic import Field, PositiveInt

from memvec.cramming.outcomes import Outcome
from memvec.lab.protocols import protocol
from memvec.lab.protocols.protocol import (
    Compared,
    Protocol,
    bits_after,
    bits_and_hits,
    extra_of,
)
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_length, place
from memvec.lab.report.plot import Panel, Plot, Series, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.statistics import Mean, mean_interval


class Context(Protocol):
    """Bits of a passage after real preceding tokens, beside those after vectors."""

    extras = {  # noqa: RUF012
        "after_context": "for each n: [bits of the passage, arg-max hits] after its n preceding "
        "tokens and nothing else, no vectors"
    }

    class Options(protocol.Options):
        """The numbers of preceding tokens."""

        contexts: tuple[PositiveInt, ...] = Field(
            default=(64, 128, 512, 1024), description="real tokens given instead of vectors"
        )

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        ids, before, given = sourced.passage.ids, sourced.before, int(start_rule == "first-token")
        return {
            "after_context": {
                str(n): list(bits_after(lm, before[-n:] if n else (), ids, given))
                for n in _possible(lm, options["contexts"], len(before), len(ids))
            }
        }

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        table = {int(n): pair for n, pair in stored["after_context"].items()}
        before, ids = passage.before, passage.ids
        possible = _possible(passage.lm, passage.options["contexts"], len(before), len(ids))
        if sorted(table) != sorted(set(possible)):
            names = [[float(n) for n in sorted(v)] for v in (table, possible)]
            return [Compared("context, numbers of tokens", names[0], names[1], [])]
        return [
            bits_and_hits(
                f"context {n}", pair, passage.bits_after(before[len(before) - n :]), passage
            )
            for n, pair in table.items()
        ]

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for (model, source, length, K), group in by_length(data.of(self.name)):
            vector = f"{K} vector{'s' if K > 1 else ''}"
            for name, pairs in _entries(group, vector).items():
                m = mean_interval([left for left, _ in pairs])
                base = mean_interval([base for _, base in pairs]).mean
                line: TableLine = [
                    *place(model, source, length, K),
                    ("given", name),
                    *interval("bits left", m),
                    ("% removed", 100 * (1 - m.mean / base)),
                    ("n", m.n),
                ]
                if compare:
                    key = {"none": "0", vector: "vector"}.get(name, name.split()[0])
                    comparable = key != "vector" or K == 1
                    text = str(group["source"].iloc[0])
                    known = (
                        _published(data.published_as(model), text, length, key)
                        if comparable
                        else None
                    )
                    line.append(("paper, bits", known))
                lines.append(line)
        note = (
            "Bits left: bits of the passage after what is given, mean over n passages with its "
            "95 % interval. Removed: share of the bits of the same passages with nothing given. "
            "Not every passage has so many tokens before it, so n may differ."
        )
        return [Table.of("context", "A vector against real preceding tokens", note, lines)]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels, ahead, cases = [], 0, 0
        keys = ["model", "series", "length"]
        for (model, source, length), group in data.of(self.name).groupby(keys, sort=False):
            by_K = group.groupby("vectors", sort=False)
            _, same = next(iter(by_K))  # without vectors, K makes no difference
            means = _means_by_context(same)
            series = [estimates("real preceding tokens", means, means.values())]
            for K, part in by_K:
                level = mean_interval(part["mem_bits"].tolist()).mean
                ends = [float(min(means)), float(max(means))]
                series.append(Series(f"K = {K}", ends, [level] * 2, "dashed"))
                cases += 1
                ahead += level < min(m.mean for m in means.values())
            title = f"{model}, {source}, {length} tokens"
            panels.append(Panel(title, "real tokens given", "bits left", series))
        caption = (
            f"In {ahead} of {cases} cases (a panel and a K) the vectors leave fewer bits than any "
            "number of real tokens that was tried."
        )
        return [Plot("context", "A vector against real context (Table 2)", caption, panels)]


def _possible(lm: FrozenLM, contexts: Any, before: int, tokens: int) -> list[int]:
    """Those numbers of tokens that precede the passage and fit the model's context with it."""
    limit = before if lm.context is None else min(before, lm.context - tokens)
    return [n for n in contexts if 0 < n <= limit]


def _entries(group: pd.DataFrame, vector: str) -> dict[str, list[tuple[float, float]]]:
    """For each kind of context: (bits left, bits with nothing given) of each passage that has it.

    Not every passage has every context, so each mean is compared with that of the same passages.
    """
    H = group["lm_bits"].tolist()
    entries: dict[str, list[tuple[float, float]]] = {"none": list(zip(H, H, strict=True))}
    for after, base in zip(extra_of(group, "context", "after_context"), H, strict=True):
        for n, (bits, _) in after.items():
            entries.setdefault(f"{n} tokens", []).append((bits, base))
    entries[vector] = list(zip(group["mem_bits"], H, strict=True))
    return entries


def _means_by_context(rows: pd.DataFrame) -> dict[int, Mean]:
    """Mean bits left by number of preceding tokens, 0 included."""
    left: dict[int, list[float]] = {0: rows["lm_bits"].tolist()}
    for after in extra_of(rows, "context", "after_context"):
        for n, (bits, _) in after.items():
            left.setdefault(int(n), []).append(float(bits))
    return {n: mean_interval(values) for n, values in sorted(left.items())}


def _published(model: str, source: str, length: int, key: str) -> float | None:
    """Bits left in the paper's Table 2; None if it lacks this model, text, length or context."""
    known = published.published()["context"]["values"].get(model)
    if source != "pg19" or known is None:
        return None
    if known["length"] != length or key not in known["nats"]:
        return None
    return published.bits(known["nats"][key])
