"""A one-pass encoder: K [mem] vectors of a passage in one forward pass.

Used as a start for cramming, and measured beside it: an encoder is what the papers on cramming ask
for (Kuratov et al. 2025, limitations), and what cramming is an upper bound of.

This file imports nothing of the model, so that a model can hold an encoder.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.cramming.recipe import Recipe
    from memvec.model.lm import FrozenLM


class OnePassEncoder(ABC):
    """Reads passages of one length and gives K [mem] vectors each.

    `tokens`: how many leading tokens per vector to encode (0: the whole passage); an encoder that
    was never right beyond them makes a worse start from more. `max_vectors`: the largest K of one
    forward pass; for more, the passage is encoded in equal parts, in order.
    """

    tokens: int = 0
    max_vectors: int = 1
    for_use: bool = False  # a start of vectors that stand for their text as context
    file: Path | None = None  # that it was read from
    identity: str = "in-memory"  # hash of its file: part of the record, as starts change vectors

    def fits(self, lm: FrozenLM, recipe: Recipe) -> bool:
        """True if the encoder was trained for what the recipe does with this model."""
        return True

    def refuse_unfit(self, lm: FrozenLM, recipe: Recipe) -> None:
        """Raise MemvecError if it is not: from there vectors take longer than from anywhere."""
        if not self.fits(lm, recipe):
            raise MemvecError(
                f"the usable encoder of {lm.name} knows one trigger and front, and these are "
                "others: use --start last-tokens, or trigger and front 'auto'."
            )

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> OnePassEncoder:
        """The same encoder on a device, in the frozen LM's dtype."""

    @abstractmethod
    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        """K <= max_vectors vectors for each whole passage; differentiable in the encoder."""

    @torch.no_grad()
    def encode(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        """K vectors for each passage, in one forward pass per part. In float32."""
        parts = -(-K // self.max_vectors)
        bounds = [round(i * K / parts) for i in range(parts + 1)]
        T = ids.shape[1]
        vectors = []
        for first, last in itertools.pairwise(bounds):
            part = ids[:, T * first // K : max(T * last // K, T * first // K + 1)]
            if self.tokens:
                part = part[:, : self.tokens * (last - first)]
            vectors.append(self.read(lm, part, last - first).float())
        return torch.cat(vectors, dim=1)


class TrainedEncoder(OnePassEncoder):
    """An encoder that was trained beside a frozen LM, as a network with a shape of its own."""

    kind: str  # a name of `memvec.registry`, which says what reads its file
    network: nn.Module

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Its shape, as its file records it."""


@dataclass(frozen=True)
class EncoderFile:
    """An encoder's file as a reader gets it: where it is, its tensors and its metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
