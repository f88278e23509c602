"""Which order of e and m can be decoded in one forward pass (arXiv 2505.21189, inputs' ablation).

The measure is accuracy, which is the same with and without teacher forcing, because no input
depends on a token. A run has one arrangement; `arrangements.py` defines them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from memvec.lab.protocols import protocol
from memvec.lab.protocols.arrangements import FORMULAS, Arranged, Arrangement
from memvec.lab.protocols.protocol import Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data
from memvec.lab.report.plot import Panel, Plot, estimates
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.study.spec import RunSpec
from memvec.statistics import mean_interval, share_interval


class OneStepArrangements(Protocol):
    """Accuracy by arrangement and length."""

    preset = "one-step"
    layout = "one-step"

    class Options(protocol.Options):
        """The order of the inputs."""

        arrangement: Arrangement = Field(
            default="m-for-rest", description="which vector each input of the forward pass is"
        )

    def problem(self, run: RunSpec) -> str | None:
        alone = run.options.get("arrangement") == "e"
        if run.vectors != ((1,) if alone else (2,)):
            return (
                "with the arrangement 'e' has one vector: write vectors = [1]"
                if alone
                else "has two vectors, e and m: write vectors = [2]"
            )
        return None

    def reading(self, length: int, options: Mapping[str, Any]) -> Arranged:
        return Arranged(options["arrangement"], length)

    def inputs_at_once(
        self, predicted: int, length: int, options: Mapping[str, Any]
    ) -> list[int] | None:
        kind, half = options["arrangement"], length // 2 + length % 2
        e, m = [0], [1]
        orders = {
            "e": e * predicted,
            "halves": (e * half + m * predicted)[:predicted],
            "pairs": ((e + m) * predicted)[:predicted],
            "m-for-each": e + m * predicted,
            "m-for-rest": (e + m * predicted)[:predicted],
        }
        return orders[kind]

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for (model, source, length, kind), group in self._groups(data):
            m = mean_interval(group["accuracy"].tolist())
            exact = share_interval(int((group["exact"] == 1).sum()), len(group))
            line: TableLine = [
                ("model", model),
                ("source", source),
                ("N", length),
                ("inputs", FORMULAS[kind]),
                *interval("accuracy", m),
                ("exact", str(exact)),
                ("n", m.n),
            ]
            if compare:
                line.append(("paper accuracy", _published(data.published_as(model), kind, length)))
            lines.append(line)
        return [
            Table.of(
                "one-step-arrangements",
                "One-step decoding by the order of e and m",
                "Accuracy: mean over passages with 95 % interval; exact: share of passages given "
                "back to the last token.",
                lines,
            )
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        lines: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
        for (model, source, length, kind), group in self._groups(data):
            m = mean_interval(group["accuracy"].tolist())
            lines.setdefault((model, source), {}).setdefault(kind, {})[length] = m
        panels, best = [], []
        for (model, source), kinds in lines.items():
            series = [
                estimates(FORMULAS[kind], means, means.values()) for kind, means in kinds.items()
            ]
            panels.append(Panel(f"{model}, {source}", "tokens, N", "accuracy", series, log=True))
            longest = max(max(means) for means in kinds.values())
            there = {k: means[longest].mean for k, means in kinds.items() if longest in means}
            top = max(there.values())
            names = " and ".join(FORMULAS[k] for k, v in there.items() if v == top)
            best.append(f"{model}, {source}, {longest} tokens: {names} ({top:.3f}).")
        caption = "Mean over passages, 95 % interval. Highest accuracy at the longest length: "
        return [
            Plot(
                "one-step-arrangements",
                "The order of e and m (one-step decoding)",
                caption + " ".join(best),
                panels,
            )
        ]

    def _groups(self, data: Data) -> Any:
        rows = data.of(self.name)
        rows = rows.assign(
            kind=data.option(rows, "arrangement"), line=data.series_without(rows, "arrangement")
        )
        for key, group in rows.groupby(["model", "line", "length", "kind"], sort=False):
            model, source, length, kind = key
            yield (str(model), str(source), int(length), str(kind)), group


def _published(model: str, kind: str, length: int) -> float | None:
    known = published.published()["one_step"]["values"]["arrangements"].get(model, {})
    value = known.get(kind, {}).get(str(length))
    return None if value is None else float(value)
