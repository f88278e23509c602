"""Bits needed for the arg-max against bits removed (`text_compression_upper_bound.ipynb`).

An ideal compressor would move just enough probability that every true token becomes the arg-max.
Two counts are measured:

- `least_moved`, the paper's count, moves the least probability. The likeliest tokens are lowered to
  a common level and the true token gets what they lose, until it reaches that level too.
- `raised_logit` raises the true token's logit to the best other one. Its probability rises from p
  to q / (1 - p + q), where q is the best other token's probability, and all others keep their
  ratios. This needs more bits.

Positions whose arg-max is right already need 0 bits, and so does the first one of a model without
a BOS, at which all tokens tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.cramming.outcomes import Outcome
from memvec.lab.protocols.protocol import Compared, Protocol, extra_of, own_bos
from memvec.lab.report import published
from memvec.lab.report.data import Data, by_length, by_recipe, panel_title, place
from memvec.lab.report.plot import Panel, Plot, Series, cloud
from memvec.lab.report.table import Table, TableLine, interval
from memvec.lab.slow import SlowPassage, logits
from memvec.lab.sources import SourcedPassage
from memvec.model import memory
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.statistics import Interval, mean_interval, ratio_of_means


def least_moved_bits(logits: Float[Tensor, "T V"], ids: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Bits per position that the true token gains when the least probability is moved.

    This is the paper's bound. Let p be the true token's probability and q_1 >= q_2 ... those of the
    others. Lowering the first k to a common level gives (p + q_1 + ... + q_k) / (k + 1). This level
    is highest at the first k where it is at least q_(k+1), and then no token is above it.
    """
    p = torch.softmax(logits.double(), dim=-1)
    true = p.gather(-1, ids[:, None])
    others = p.scatter(-1, ids[:, None], 0.0).sort(-1, descending=True).values
    taken = torch.cat([true, others], dim=-1).cumsum(-1)
    level = taken / torch.arange(1, taken.shape[-1] + 1, device=p.device)
    return torch.log2(level.amax(-1) / true[:, 0])


def raised_logit_bits(
    bits: Float[Tensor, " T"], margin: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """Bits per position that raise the true token's logit to the best other one.

    They follow from its surprisal (bits) and its margin (logits): p = 2^-bits and q = p e^-margin.
    """
    p = torch.exp2(-bits.double())
    q = p * torch.exp(-margin.double())
    raised = q / (1 - p + q)
    return torch.where(margin > 0, torch.zeros_like(p), torch.log2(raised / p))


class UpperBound(Protocol):
    """Bits that the arg-max needs, against bits that the vectors remove."""

    extras = {  # noqa: RUF012
        "least_moved_bits": "bits that make every true token the arg-max when the least "
        "probability is moved (the paper's bound)",
        "needed_bits": "bits that make every true token the arg-max when its logit alone is raised",
    }

    def extra(
        self,
        lm: FrozenLM,
        sourced: SourcedPassage,
        outcome: Outcome,
        start_rule: StartRule,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        scores = outcome.scores
        assert scores is not None, "an outcome that comes from the engine has its scores"
        raised = raised_logit_bits(scores.lm_bits, scores.lm_margin)
        given = int(start_rule == "first-token")
        raised = raised[int(lm.bos_id is None and not given) :]  # as `_least_moved`
        return {
            "least_moved_bits": _least_moved(lm, sourced.passage.ids, given),
            "needed_bits": float(raised.sum()),
        }

    def recompute(self, passage: SlowPassage, stored: Mapping[str, Any]) -> list[Compared]:
        first = int(passage.lm.bos_id is None and not passage.given)
        bits, margin = passage.lm_bits[first:], passage.lm_margin[first:]
        p = 2.0**-bits
        q = p * np.exp(-margin)
        needed = np.log2(q / (1 - p + q)) - np.log2(p)
        total = float(needed[margin <= 0].sum())
        again = {"needed_bits": total, "least_moved_bits": _slow_least_moved(passage)}
        return [
            Compared(name, [float(stored[name])], [value], [passage.bits_tolerance])
            for name, value in again.items()
        ]

    def tables(self, data: Data, *, compare: bool) -> list[Table]:
        lines: list[TableLine] = []
        for key, everything in by_length(data.of(self.name)):
            group = _with_needed(everything)
            least, raised, removed = (
                group[name].tolist() for name in ("least_moved", "raised_logit", "information_gain")
            )
            lines.append(
                [
                    *place(*key),
                    ("H, bits", float(group["lm_bits"].mean())),
                    *interval("least moved", mean_interval(least)),
                    *interval("raised logit", mean_interval(raised)),
                    *interval("removed", mean_interval(removed)),
                    *interval("least moved / removed, %", _percent(least, removed)),
                    *interval("raised logit / removed, %", _percent(raised, removed)),
                    ("n", len(group)),
                ]
            )
        return [
            Table.of(
                "upper-bound",
                "Bits needed for the arg-max against bits removed",
                "Means over n passages with their 95 % intervals (Student's t), and ratios of "
                "these means (paired bootstrap). H: bits without vectors. Needed are the bits that "
                "make each true token the arg-max: with the least probability moved, from as many "
                "of the likeliest tokens as necessary (least moved, the paper's bound), or with "
                "the true token's logit raised to the best other one (raised logit). Removed: "
                "information gain of the vectors.",
                lines,
            )
        ]

    def figures(self, data: Data, *, compare: bool) -> list[Plot]:
        panels = []
        for (model, K, recipe), everything in by_recipe(data.of(self.name)):
            group = _with_needed(everything)
            series = []
            pairs = (
                ("removed", "information_gain"),
                ("least moved (the paper's)", "least_moved"),
                ("raised logit", "raised_logit"),
            )
            for name, column in pairs:
                series.append(cloud(name, group, "lm_bits", column))
                series += _straight_fit(group, column)
            title = panel_title(model, K, recipe)
            panels.append(Panel(title, "bits without vectors, H", "bits", series))
        title = "What the arg-max needs and what vectors remove"
        caption = "One point per passage, with straight fits." + (_published() if compare else "")
        return [Plot("upper-bound", title, caption, panels)]


def _percent(needed: list[float], removed: list[float]) -> Interval:
    """Ratio of the means, in percent."""
    return Interval(*(100 * part for part in ratio_of_means(needed, removed)))


def _with_needed(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(
        least_moved=extra_of(rows, "upper-bound", "least_moved_bits"),
        raised_logit=extra_of(rows, "upper-bound", "needed_bits"),
    )


@torch.no_grad()
def _least_moved(lm: FrozenLM, ids: tuple[int, ...], given: int) -> float:
    """The paper's bound of a passage under the model alone, bits; the same positions as H_LM."""
    table = torch.tensor([ids], device=lm.device)
    given += own_bos(lm, ids, given)
    after_bos = lm.bos_id is not None and not given
    if len(ids) == 1 and not after_bos:  # no token is predicted from another
        return 0.0
    states = lm.states(None, table, "bos" if after_bos else "first-token")
    truth = table[0, len(ids) - states.shape[1] :]
    rows = max(1, memory.LOGITS_AT_ONCE // (4 * lm.vocab_size))  # doubles, and their sorted copy
    total = sum(
        float(least_moved_bits(lm.head(states[0, at : at + rows]), truth[at : at + rows]).sum())
        for at in range(0, len(truth), rows)
    )
    # Without a token that starts a text, the first position is left out: all tokens tie there.
    return total


def _slow_least_moved(passage: SlowPassage) -> float:
    """`least_moved_bits` of a passage by the slow path, lowering one token after the other."""
    lm, ids = passage.lm, passage.ids
    after_bos = lm.bos_id is not None and not passage.given and not passage.own_bos
    head = [lm.bos_id] if after_bos else []
    table = logits(lm, None, [*head, *ids])[:-1][passage.given - len(ids) :]
    total = 0.0
    for row, token in zip(table, ids[len(ids) - len(table) :], strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        level, lowered = p[token], 1
        for other in np.sort(np.delete(p, token))[::-1]:
            if other <= level:
                break
            level = (level * lowered + other) / (lowered + 1)
            lowered += 1
        total += float(np.log2(level / p[token]))
    return total


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
    """The paper's slopes; its 'needed' is the least moved probability."""
    values = published.published()["upper_bound"]["values"]
    slopes = [
        f"{model}: least moved {v['needed']['slope']:.2f} H, removed {v['removed']['slope']:.2f} H"
        for model, v in values.items()
    ]
    return f" Published: {'; '.join(slopes)}."
