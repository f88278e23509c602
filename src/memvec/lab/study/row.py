"""A row of a study: the results of one passage of one cell, with a sentence for each column."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from memvec.results import PassageResult


class Row(PassageResult):
    """The result of a passage in a study: the columns of `memvec.results.PassageResult`, and these.

    Bits and counts are sums over the same positions.
    """

    cell: str = Field(description="key of the cell")
    number: int = Field(ge=0, description="number of the passage in its source")
    passage: str = Field(
        description="SHA-256 of the passage's token ids (int32, little-endian), hex"
    )
    lm_right: int = Field(ge=0, description="arg-max hits of the model alone")
    horizon_gain: float = Field(description="information gain over the horizon, bits")
    horizon_token_gain: int = Field(description="token gain over the horizon, hits")
    least_loss_gain: float = Field(
        default=math.nan,
        description="information gain at the least loss that any step measured, as the published "
        "tables have it (information_gain is that of the stored vectors), bits; missing where the "
        "loss of a step is not the cross-entropy of the whole passage",
    )
    start_rule: str = Field(
        description="what follows the vectors: 'vectors' (nothing), 'bos' or 'first-token'"
    )
    batch_size: int = Field(ge=1, description="passages crammed at once")
    worker: str = Field(description="process that crammed it")
    extra: dict[str, Any] = Field(description="what the protocol measured besides (JSON)")


@dataclass(frozen=True)
class StoreEntry:
    """A row with its tensors.

    `vectors` (K, D) are in the storage dtype. `positions` (4, N), float32, has for each of N
    predicted positions: bits without vectors, bits with, margin with, margin without.
    """

    row: Row
    vectors: Tensor
    positions: Tensor

    def to_plain(self) -> StoreEntry:
        """On the CPU, contiguous, detached: fit to travel and to be stored."""
        return StoreEntry(
            self.row,
            self.vectors.detach().cpu().contiguous(),
            self.positions.detach().cpu().to(torch.float32).contiguous(),
        )


@dataclass(frozen=True)
class Text:
    """A passage's text: its bytes in UTF-8, and the text of each token."""

    data: bytes
    pieces: list[str]
