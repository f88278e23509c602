"""One m for a group of passages, an e for each: how much is lost as the group grows?

Mezentsev & Oseledets (arXiv 2505.21189) share m among 1, 16 and 256 texts at 256 tokens. The
passages of a group have neighbouring numbers and are crammed together (`memvec.arms.shared_m`);
their rows are written when all of them are finished. Passages of a group are not independent of
each other, and neither are restarts of a group: n is the number of groups. With a single group, as
in the publication, nothing is known of others, and n is the number of its restarts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from pydantic import Field

from memvec.lab.protocols import protocol
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.study.spec import RunSpec
from memvec.statistics import mean_interval


class OneStepGroups(Protocol):
    """Accuracy and whole passages by size of the group."""

    preset = "one-step"
    layout = "one-step-shared"

    class Options(protocol.Options):
        """How many passages share m."""

        group: int = Field(default=16, ge=1, strict=True, description="passages that share one m")

    def problem(self, run: RunSpec) -> str | None:
        group = run.options.get("group", 16)
        if run.vectors != (2,):
            return "has two vectors, e and m: write vectors = [2]"
        if isinstance(group, int) and group > 0 and run.passages % group:
            return (
                f"has groups of {group} passages, so passages must be a multiple of {group}, not "
                f"{run.passages}"
            )
        return None

    def group_size(self, options: Mapping[str, Any]) -> int:
        return int(options["group"])

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        measured = data.restarts(self.name)
        measured = measured.assign(
            size=data.option(measured, "group"), line=data.series_without(measured, "group")
        )
        keys = ["model", "line", "length", "size"]
        for (model, source, length, size), part in measured.groupby(keys, sort=False):
            number, size = int(str(length)), int(str(size))
            m = mean_interval(group_means(part, size).tolist())
            line: TableLine = [
                ("model", str(model)),
                ("source", str(source)),
                ("tokens", number),
                ("group", size),
                ("vectors / passage", (size + 1) / size),
                *interval("accuracy", m),
                ("best passage", float(part["accuracy"].max())),
                ("% exact", 100 * float((part["exact"] == 1).mean())),
                ("n", m.n),
            ]
            if compare:
                line += _published(number, size)
            lines.append(line)
        return [
            Table.of(
                "one-step-groups",
                "One-step decoding with one m for a group of passages",
                "Accuracy: mean over n groups with 95 % interval (passages of one group share m "
                "and are not independent; restarts of a group are averaged). Where there is one "
                "group only, the interval is over its n restarts.",
                lines,
            )
        ]


def group_means(rows: pd.DataFrame, size: int) -> pd.Series:
    """Mean accuracy of each group over its restarts; of a single group, of each restart."""
    groups = rows["number"] // size
    return rows.groupby(groups if groups.nunique() > 1 else "cell")["accuracy"].mean()


def _published(length: int, size: int) -> TableLine:
    known = published.published()["one_step"]["values"]["groups"]

    def accuracy(name: str) -> float | None:
        value = known[name].get(str(size)) if length == known["length"] else None
        return None if value is None else float(value)

    return [("paper accuracy", accuracy("mean")), ("paper best", accuracy("maximum"))]
