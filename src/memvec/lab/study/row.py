"""A row: one passage of one cell. Every column has its sentence, and nothing else is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def _says(text: str) -> Any:
    return field(metadata={"help": text})


@dataclass(frozen=True)
class Row:
    """What is known of one crammed passage. Bits and counts are sums over the same positions."""

    cell: str = _says("key of the cell")
    number: int = _says("number of the passage in its source")
    passage: str = _says("SHA-256 of the passage's token ids (int32, little-endian)")
    tokens: int = _says("tokens of the passage")
    predicted: int = _says("tokens that had to come from the vectors")
    status: str = _says("'done' (every margin met), 'budget' or 'not-finite'")
    exact: bool = _says("free-running decoding of the stored vectors gave back every token")
    horizon: int = _says("leading tokens that free-running decoding gave back")
    accuracy: float = _says("teacher-forced accuracy")
    margin: float = _says("smallest margin, logits")
    margin_asked: float = _says("margin at which a token counted as right while cramming, logits")
    lm_bits: float = _says("H_LM: bits of the passage under the model alone")
    mem_bits: float = _says("H_mem: bits left with the vectors")
    information_gain: float = _says("H_LM - H_mem, bits")
    token_gain: int = _says("arg-max hits with the vectors minus without")
    lm_right: int = _says("arg-max hits of the model alone")
    horizon_gain: float = _says("information gain over the horizon, bits")
    horizon_token_gain: int = _says("token gain over the horizon")
    steps: int = _says("optimisation steps")
    spent: int = _says("forward-backward tokens")
    seconds: float = _says("this passage's share of the wall time, s")
    start_rule: str = _says("what follows the vectors: 'vectors', 'bos' or 'first-token'")
    batch_size: int = _says("passages crammed at once")
    worker: str = _says("who crammed it")
    extra: dict[str, Any] = _says("what the protocol measured besides (JSON)")


@dataclass(frozen=True)
class Finished:
    """A row with its tensors: vectors (K, D) as stored; per position, float32 (4, N): bits without
    vectors, bits with, margin with, margin without."""

    row: Row
    vectors: Tensor
    positions: Tensor

    def to_plain(self) -> Finished:
        """On the CPU, contiguous, detached: fit to travel and to be stored."""
        return Finished(
            self.row,
            self.vectors.detach().cpu().contiguous(),
            self.positions.detach().cpu().to(torch.float32).contiguous(),
        )


@dataclass(frozen=True)
class Text:
    """A passage's text: its bytes in UTF-8, and what each token shows as."""

    data: bytes
    pieces: list[str]
