"""The measures of a crammed passage, each defined once, with its unit.

The passage records of files, the rows of journals and the rows of studies consist of these classes,
so each figure has the same definition everywhere. All sums of a passage run over the same
positions: the tokens that must come from the vectors. The formulas are those of Kuratov et al.
(ACL 2025), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from memvec import metrics

Status = Literal["done", "budget", "not-finite"]


@dataclass(frozen=True)
class Score:
    """The results of a forward pass for each position."""

    loss: Float[Tensor, "B T"]  # logits, since the objective multiplies it by its temperature
    margin: Float[Tensor, "B T"]  # logits
    gradient: Float[Tensor, "B T H"]  # gradient of the position's loss at its hidden state


class Record(BaseModel):
    """The base of immutable records; numbers may be NaN or infinite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=True, ser_json_inf_nan="strings"
    )


class Measures(Record):
    """The measures of one passage's stored vectors, with teacher forcing and in free decoding."""

    tokens: int = Field(ge=1, description="tokens of the passage")
    predicted: int = Field(ge=0, description="tokens that had to come from the vectors")
    horizon: int = Field(
        ge=0, description="leading tokens that free-running decoding gave back before an error"
    )
    accuracy: float = Field(
        description="teacher-forced accuracy: share of positions whose arg-max is right when the "
        "true earlier tokens are given"
    )
    margin: float = Field(
        description="smallest margin (logit of the true token minus the best other one) over the "
        "positions that are not corrected, logits"
    )
    lm_bits: float = Field(description="H_LM = -sum log2 p(t_i | t_<i), bits")
    mem_bits: float = Field(description="H_mem = -sum log2 p(t_i | vectors, t_<i), bits")
    information_gain: float = Field(description="H_LM - H_mem, bits")
    token_gain: int = Field(description="arg-max hits with the vectors minus hits without them")


class PassageResult(Measures):
    """The measures of a passage, its status, and the costs of cramming it."""

    status: Status = Field(
        description="why cramming ended: 'done' (every margin met), 'budget' (steps, patience or "
        "tokens ran out) or 'not-finite'"
    )
    exact: bool = Field(
        description="free-running decoding of the stored vectors gave back every token"
    )
    margin_asked: float = Field(
        description="margin at which a token counted as right while cramming, logits"
    )
    steps: int = Field(
        ge=0,
        description="optimiser steps, plus one for each failed certification after which cramming "
        "continued",
    )
    spent: int = Field(
        ge=0,
        description="forward-backward tokens: summed over its steps, the tokens that counted, the "
        "inputs in front of them and those of a second loss; other columns are not charged",
    )
    seconds: float = Field(ge=0, description="share of the wall time of the batch, seconds")


@dataclass(frozen=True)
class PositionScores:
    """Bits and margins of predicted positions: with the vectors, and of the model alone.

    Tensors have shape (N,) for one passage, or (B, N) for a batch; shorter rows are right-padded,
    and values in the padding have no meaning. Bits are surprisals -log2 p; margins are in logits. A
    position is a hit if its margin is above 0.
    """

    bits: Float[Tensor, "*B N"]
    margin: Float[Tensor, "*B N"]
    lm_bits: Float[Tensor, "*B N"]
    lm_margin: Float[Tensor, "*B N"]

    def __getitem__(self, at: slice | tuple[int, slice]) -> PositionScores:
        """The scores at a tensor index; `scores[row, :n]` is one passage without its padding."""
        return PositionScores(self.bits[at], self.margin[at], self.lm_bits[at], self.lm_margin[at])

    def information_gain(self) -> float:
        """H_LM - H_mem over these positions, bits."""
        return metrics.information_gain(self.bits, self.lm_bits)

    def token_gain(self) -> int:
        """Hits with the vectors minus hits without them, over these positions."""
        return metrics.token_gain(self.margin > 0, self.lm_margin > 0)

    def measures(self, tokens: int, horizon: int, corrected: Sequence[int] = ()) -> Measures:
        """The measures of a passage of `tokens` tokens, from the scores (N,) of its N positions.

        `horizon` is that of free decoding, in tokens. `corrected` positions do not count in the
        smallest margin; at least one other position must exist.
        """
        uncorrected = [i for i in range(len(self.margin)) if i not in set(corrected)]
        return Measures(
            tokens=tokens,
            predicted=len(self.margin),
            horizon=horizon,
            accuracy=metrics.teacher_forced_accuracy(self.margin > 0),
            margin=float(self.margin[uncorrected].min()),
            lm_bits=float(self.lm_bits.double().sum()),
            mem_bits=float(self.bits.double().sum()),
            information_gain=self.information_gain(),
            token_gain=self.token_gain(),
        )

    def stacked(self) -> Float[Tensor, "4 N"]:
        """The scores as a study stores them: LM bits, bits, margins, LM margins, a row each."""
        return torch.stack([self.lm_bits, self.bits, self.margin, self.lm_margin])
