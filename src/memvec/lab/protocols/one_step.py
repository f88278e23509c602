"""The one-step protocol: two vectors, one forward pass, a grid of lengths.

Mezentsev & Oseledets (arXiv 2505.21189), Table 2: lengths grow by a factor of the square root of 2
from 4, a passage counts as decoded from an accuracy of 0.99, and the published figure is the
*longest* decoded passage, a maximum over passages and not a mean. The report has this rule, and
beside it the share of passages that are exact at each length. Accuracy is the same with and without
teacher forcing, because no input depends on an earlier token. The first passages of each cell are
also timed: one forward pass against token-by-token decoding (`throughput.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from memvec.cramming.outcomes import Outcome
from memvec.lab.protocols import protocol
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.protocols.throughput import decode_seconds
from memvec.lab.report import published
from memvec.lab.report.data import Data, averaged, by_series
from memvec.lab.report.plot import Panel, Plot, estimates
from memvec.lab.report.table import Table, TableLine, interval, with_sd
from memvec.lab.sources import SourcedPassage
from memvec.lab.study.spec import RunSpec
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.statistics import (
    Interval,
    Mean,
    Share,
    mean_interval,
    ratio_of_means,
    share_interval,
)
from memvec.writing import read_json

THRESHOLD = 0.99


class OneStep(Protocol):
    """One-step capacity from [e, m, ..., m], by the published rule and by exactness."""

    preset = "one-step"
    layout = "one-step"
    extras = {  # noqa: RUF012
        "decode_seconds": "seconds to decode this passage alone, [in one forward pass, token by "
        "token]; null where it was not timed"
    }

    class Options(protocol.Options):
        """How many passages are timed."""

        timed: int = Field(
            default=3, ge=0, description="passages of each cell whose decoding is timed"
        )

    def problem(self, run: RunSpec) -> str | None:
        if run.vectors != (2,):
            return "has two vectors, e and m: write vectors = [2]"
        return None

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        if sourced.number >= options["timed"]:
            return {"decode_seconds": None}
        tokens = len(sourced.passage)
        return {"decode_seconds": list(decode_seconds(lm, outcome.vectors.float(), tokens))}

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for (model, source, _), group in by_series(data.of(self.name)):
            result = one_step_result(group)
            known = (
                published_longest(data.published_as(model), str(group["source"].iloc[0]))
                if compare
                else []
            )
            for at in result.lengths:
                lines.append(
                    [
                        ("model", model),
                        ("source", source),
                        ("length", at.length),
                        ("exact", str(at.exact)),
                        *interval("accuracy", at.accuracy),
                        ("n", at.accuracy.n),
                        ("always exact", result.always),
                        ("longest", result.longest),
                        ("H of it, bits", result.longest_bits),
                        *known,
                    ]
                )
        return [
            Table.of(
                "one-step",
                "One-step decoding: two vectors, one forward pass",
                "Exact: share of the n passages that decode to the last token, with its 95 % "
                "interval; accuracy: their mean with its 95 % interval. Always exact: the length "
                "up to which all passages of all lengths are exact. Longest: by the published "
                "rule, the longest single passage with an accuracy of at least 0.99, which is a "
                "maximum over passages. H: its bits without vectors.",
                lines,
            ),
            _speed_table(self._timed(data), compare),
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels = []
        timed = self._timed(data)
        for model, group in timed.groupby("model", sort=False):
            lines = []
            for name, column in (("one forward pass", "once"), ("token by token", "one_by_one")):
                means = {
                    float(str(n)): mean_interval((part["tokens"] / part[column]).tolist())
                    for n, part in group.groupby("length")
                }
                lines.append(estimates(name, means, means.values()))
            panels.append(Panel(str(model), "tokens", "tokens per second", lines, log=True))
        caption = f"Mean over passages with 95 % interval, one passage at a time. {_faster(timed)}"
        return [Plot("one-step-speed", "Speed of one-step decoding", caption.strip(), panels)]

    def _timed(self, data: Data) -> pd.DataFrame:
        """Timed passages, with columns `once` and `one_by_one`: seconds of the two ways to decode.

        Restarts are averaged. Stores of an earlier memvec have no times.
        """
        rows = data.restarts(self.name)
        times = [read_json(extra).get("decode_seconds") for extra in rows["extra"]]
        kept = [pair for pair in times if pair is not None]
        timed = rows[np.array([pair is not None for pair in times], dtype=bool)].assign(
            once=[float(once) for once, _ in kept], one_by_one=[float(s) for _, s in kept]
        )
        return averaged(timed)


def _speed_table(timed: pd.DataFrame, compare: bool) -> Table:
    """Tokens per second in one forward pass and token by token, by length."""
    lines: list[TableLine] = []
    keys = ["model", "series", "length"]
    for (model, source, length), group in timed.groupby(keys, sort=False):
        once, one_by_one = (
            mean_interval((group["tokens"] / group[c]).tolist()) for c in ("once", "one_by_one")
        )
        lines.append(
            [
                ("model", str(model)),
                ("source", str(source)),
                ("length", int(str(length))),
                *with_sd("tokens / s, one pass", once),
                *with_sd("tokens / s, token by token", one_by_one),
                *interval("times faster", times_faster(group)),
                ("n", len(group)),
            ]
        )
    note = (
        "One passage at a time on the machine of the rows; means and standard deviations over n "
        "timed passages. Times faster: ratio of the mean seconds, with its 95 % bootstrap interval."
    )
    if compare:
        factor = published.published()["one_step"]["values"]["times_faster"]
        note += f" Published: {factor} times faster on average."
    return Table.of("one-step-speed", "Speed of one-step decoding", note, lines)


def times_faster(timed: pd.DataFrame) -> Interval:
    """Seconds token by token over seconds in one forward pass, over the same passages."""
    return ratio_of_means(timed["one_by_one"].tolist(), timed["once"].tolist())


def _faster(timed: pd.DataFrame) -> str:
    """A sentence with the range of the speed ratio over models and lengths."""
    values = [
        times_faster(part).value for _, part in timed.groupby(["model", "length"], sort=False)
    ]
    if not values:
        return ""
    slower = sum(v < 1 for v in values)
    sentence = f"One pass is {min(values):.1f} to {max(values):.1f} times as fast"
    return sentence + (f", slower in {slower} of {len(values)} cases." if slower else ".")


def published_longest(model: str, source: str) -> TableLine:
    """The paper's longest with an m per passage, with one m for all, and H of it (bits)."""
    values = published.published()["one_step"]["values"]
    known = values["longest"].get(model, {}).get(source, {})
    nats = values["nats"][model] if known and source == "pg19" else None
    return [
        ("paper longest", known.get("own_m")),
        ("paper, one m for all", known.get("shared_m")),
        ("paper H, bits", None if nats is None else published.bits(float(nats))),
    ]


@dataclass(frozen=True)
class Length:
    """The result at one length of the grid."""

    length: int
    exact: Share  # share of passages given back to the last token, 95 %
    accuracy: Mean


@dataclass(frozen=True)
class OneStepResult:
    """One-step capacity of one model and source."""

    longest: int | None  # published rule: longest passage with accuracy >= 0.99; None: none
    longest_bits: float | None  # its bits without vectors; of several passages the largest
    always: int | None  # longest length up to which every passage of every length came back exactly
    lengths: tuple[Length, ...]


def one_step_result(rows: pd.DataFrame) -> OneStepResult:
    """Summary of the rows of one model and source, all lengths together."""
    passed = rows[rows["accuracy"] >= THRESHOLD]
    lengths, always, unbroken = [], None, True
    for length, group in rows.groupby("length"):
        exact = int((group["exact"] == 1).sum())  # of restarts: all of them
        unbroken = unbroken and exact == len(group)
        if unbroken:
            always = int(str(length))
        lengths.append(
            Length(
                int(str(length)),
                share_interval(exact, len(group)),
                mean_interval(group["accuracy"].tolist()),
            )
        )
    longest, bits = None, None
    if len(passed):
        longest = int(passed["tokens"].max())
        bits = float(passed.loc[passed["tokens"] == longest, "lm_bits"].max())
    return OneStepResult(longest, bits, always, tuple(lengths))
