"""The one-pass encoder that may stand beside a frozen LM: a start for cramming, K vectors at once.

The LM reads a passage followed by K learned summary embeddings; its last hidden states there go
through one linear map and are the K [mem] vectors. Made together with the LM (see recipes/) or
trained for a frozen one; kept in the model's folder as `encoder.safetensors`.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.lm import FrozenLM


class OnePassEncoder:
    """Summary embeddings (S, D), and a linear map (D, D) with bias (D)."""

    def __init__(
        self,
        summary: Float[Tensor, "S D"],
        weight: Float[Tensor, "D D"],
        bias: Float[Tensor, " D"],
        tokens: int = 0,
    ) -> None:
        self.summary, self.weight, self.bias = summary, weight, bias
        self.tokens = tokens  # leading tokens per vector worth encoding; 0: the whole passage

    @property
    def max_vectors(self) -> int:
        """Most vectors it was made to give at once."""
        return len(self.summary)

    @classmethod
    def load(cls, path: Path, width: int) -> OnePassEncoder:
        """Read `encoder.safetensors`. Raises MemvecError if it is not an encoder of this width."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                summary, weight, bias = (
                    file.get_tensor(key) for key in ("summary", "map.weight", "map.bias")
                )
        except (SafetensorError, OSError) as error:
            raise MemvecError(f"{path} is not an encoder that memvec can read: {error}") from error
        summary = summary.reshape(-1, summary.shape[-1])
        if summary.shape[1] != width or weight.shape != (width, width) or bias.shape != (width,):
            raise MemvecError(f"{path} was made for another model: its width is not {width}.")
        return cls(summary, weight, bias, int(metadata.get("tokens", 0)))

    def to(self, device: torch.device, dtype: torch.dtype) -> OnePassEncoder:
        """The same encoder on a device, in a dtype."""
        summary, weight, bias = (
            t.to(device, dtype) for t in (self.summary, self.weight, self.bias)
        )
        return OnePassEncoder(summary, weight, bias, self.tokens)

    @torch.no_grad()
    def encode(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        """K vectors for each passage, in one forward pass.

        For K above `max_vectors` the passage is encoded in equal parts, in order. In float32.
        """
        parts = -(-K // self.max_vectors)
        bounds = [round(i * K / parts) for i in range(parts + 1)]
        T = ids.shape[1]
        vectors = []
        for first, last in itertools.pairwise(bounds):
            part = ids[:, T * first // K : max(T * last // K, T * first // K + 1)]
            if self.tokens:
                part = part[:, : self.tokens * (last - first)]
            summary = self.summary[: last - first].expand(len(ids), -1, -1)
            hidden = lm.hidden(torch.cat([lm.embed(part), summary], dim=1), keep=last - first)
            vectors.append((hidden @ self.weight.T + self.bias).float())
        return torch.cat(vectors, dim=1)
