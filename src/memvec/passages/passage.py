"""A passage: the token ids that one set of [mem] vectors must give back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from memvec.errors import MemvecError


def ids_hash(ids: Sequence[int]) -> str:
    """SHA-256 (hex) of token ids as 32-bit little-endian integers; it identifies a passage."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Passage:
    """Consecutive token ids of a document. Raises MemvecError without a token."""

    ids: tuple[int, ...]
    document: int = 0  # index of the document
    offset: int = 0  # position of the first token in the document

    def __post_init__(self) -> None:
        if not self.ids:
            raise MemvecError("a passage needs at least one token.")

    def __len__(self) -> int:
        return len(self.ids)

    def halves(self) -> tuple[Passage, Passage]:
        """The two halves of the passage; the second is longer if the length is odd."""
        middle = len(self.ids) // 2
        first = replace(self, ids=self.ids[:middle])
        return first, replace(self, ids=self.ids[middle:], offset=self.offset + middle)


def padded_ids(passages: Sequence[Passage], columns: int) -> Int[Tensor, "B T"]:
    """Token ids of passages as rows, right-padded with 0, on the CPU."""
    ids = torch.zeros(len(passages), columns, dtype=torch.long)
    for row, passage in zip(ids, passages, strict=True):
        row[: len(passage)] = torch.tensor(passage.ids)
    return ids
