"""The summary encoder: the LM itself encodes a passage, with summary embeddings after its tokens.

One linear map turns the last hidden states at the summary embeddings into the vectors. This needs
an LM that was trained together with the encoder (recipes/pocket.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memvec.companions.encoder import EncoderFile, OnePassEncoder
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM


class SummaryEncoder(OnePassEncoder):
    """Summary embeddings (S, D), and a linear map (D, D) with bias (D)."""

    def __init__(
        self,
        summary: Float[Tensor, "S D"],
        weight: Float[Tensor, "D D"],
        bias: Float[Tensor, " D"],
        tokens: int = 0,
    ) -> None:
        self.summary, self.weight, self.bias = summary, weight, bias
        self.tokens = tokens
        self.max_vectors = len(summary)

    def to(self, device: torch.device, dtype: torch.dtype) -> SummaryEncoder:
        summary, weight, bias = (
            t.to(device, dtype) for t in (self.summary, self.weight, self.bias)
        )
        moved = SummaryEncoder(summary, weight, bias, self.tokens)
        moved.file, moved.identity = self.file, self.identity
        return moved

    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        summary = self.summary[:K].expand(len(ids), -1, -1)
        hidden = lm.hidden(torch.cat([lm.embed(ids), summary], dim=1), keep=K)
        return hidden @ self.weight.T + self.bias


def read(file: EncoderFile, lm: FrozenLM) -> SummaryEncoder:
    """The summary encoder in a file. Raises MemvecError if a tensor is missing or does not fit."""
    missing = {"summary", "map.weight", "map.bias"} - file.tensors.keys()
    if missing:
        raise MemvecError(f"{file.path} is not an encoder that memvec can read: no {min(missing)}.")
    summary, weight, bias = (file.tensors[key] for key in ("summary", "map.weight", "map.bias"))
    D = lm.width
    summary = summary.reshape(-1, D) if summary.shape[-1:] == (D,) else summary
    if summary.shape[1:] != (D,) or weight.shape != (D, D) or bias.shape != (D,):
        raise MemvecError(f"{file.path} was made for another model: its width is not {D}.")
    return SummaryEncoder(summary, weight, bias)
