"""Bits needed for the arg-max against bits removed (`text_compression_upper_bound.ipynb`).

An ideal compressor would move just enough probability that every true token becomes the
arg-max. Here the true token's logit is raised by its deficit: from p to q / (1 - p + q), where
q is the best other token's probability. Positions that are right already need nothing. The
authors' notebook moves the least probability instead, from several other tokens, which needs fewer
bits: its published shares and these are not the same quantity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cramming.certify import Outcome
from memvec.lab.protocols.protocol import Compared, Protocol
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_length, by_recipe, panel_title, short
from memvec.lab.report.plot import Panel, Plot, Series, cloud
from memvec.lab.report.table import Table, TableCell
from memvec.lab.slow import SlowPassage
from memvec.lab.sources import SourcedPassage
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule


def needed_bits(bits: Float[Tensor, " T"], margin: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Bits per position that raise the true token to the arg-max.

    From its surprisal (bits) and its margin (logits): p = 2^-bits and q = p e^-margin.
    """
    p = torch.exp2(-bits.double())
    q = p * torch.exp(-margin.double())
    raised = q / (1 - p + q)
    return torch.where(margin > 0, torch.zeros_like(p), torch.log2(raised / p))


class UpperBound(Protocol):
    """Needed against removed."""

    extras = {"needed_bits": "bits that make every true token the arg-max"}  # noqa: RUF012

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        scores = outcome.scores
        assert scores is not None, "an outcome that comes from the engine has its scores"
        return {"needed_bits": float(needed_bits(scores.lm_bits, scores.lm_margin).sum())}

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        bits, margin = passage.lm_bits, passage.lm_margin
        p = 2.0**-bits
        q = p * np.exp(-margin)
        needed = np.log2(q / (1 - p + q)) - np.log2(p)
        total = float(needed[margin <= 0].sum())
        name, value = "needed_bits", float(stored["needed_bits"])
        return [Compared(name, [value], [total], [passage.bits_tolerance])]

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        rows: list[list[TableCell]] = []
        for (model, source, length, K), everything in by_length(data.of(self.name)):
            group = _with_needed(everything)
            H, needed, gain = (group[c] for c in ("lm_bits", "needed", "information_gain"))
            row: list[TableCell] = [short(model), source, length, K]
            row += [float(H.mean()), float(needed.mean()), float(gain.mean())]
            rows.append([*row, 100 * float(needed.sum() / gain.sum()), len(group)])
        columns = ["model", "source", "length", "K", "H, bits", "needed", "removed"]
        return [
            Table(
                "upper-bound",
                "Bits needed for the arg-max against bits removed",
                "Needed: raising each true token's logit just to the best other one. The paper's "
                "notebook lowers several other tokens instead, which needs fewer bits.",
                [*columns, "needed / removed, %", "n"],
                rows,
            )
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels = []
        for (model, K, recipe), everything in by_recipe(data.of(self.name)):
            group = _with_needed(everything)
            series = []
            pairs = (("removed", "information_gain"), ("needed for the arg-max", "needed"))
            for name, column in pairs:
                series.append(cloud(name, group, "lm_bits", column))
                series += _straight_fit(group, column)
            title = panel_title(model, K, recipe)
            panels.append(Panel(title, "bits without vectors, H", "bits", series))
        title = "What the arg-max needs and what vectors remove"
        caption = "One point per passage, with straight fits." + (_published() if compare else "")
        return [Plot("upper-bound", title, caption, panels)]


def _with_needed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(needed=[json.loads(extra)["needed_bits"] for extra in rows["extra"]])


def _straight_fit(rows: pd.DataFrame, column: str) -> list[Series]:
    """Least squares of a column against H, where there are three values of H."""
    if rows["lm_bits"].nunique() <= 2:
        return []
    slope, level = np.polyfit(rows["lm_bits"], rows[column], 1)
    ends = [float(rows["lm_bits"].min()), float(rows["lm_bits"].max())]
    return [
        Series(f"{slope:.2f} H {level:+.0f}", ends, [slope * x + level for x in ends], "dashed")
    ]


def _published() -> str:
    """The paper's slopes, whose 'needed' is another bound (see above)."""
    values = published.published()["upper_bound"]["values"]
    slopes = [
        f"{short(model)}: needed {v['needed']['slope']:.2f} H, "
        f"removed {v['removed']['slope']:.2f} H"
        for model, v in values.items()
    ]
    return f" Published, with probability moved from several tokens: {'; '.join(slopes)}."
