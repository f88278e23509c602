"""The interface of one-pass encoders, which compute the K [mem] vectors of a passage in one pass.

Encoders provide starts for cramming. Studies also compare them with cramming, which is their upper
bound (Kuratov et al. 2025, limitations).

At run time this file does not import memvec.model, so that a model can hold an encoder.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.cramming.recipe import Recipe
    from memvec.model.lm import FrozenLM

Network = TypeVar("Network", bound=nn.Module)


class OnePassEncoder(ABC):
    """Encodes passages of equal length T into K [mem] vectors each.

    `tokens` is the number of leading tokens per vector that are encoded (0: the whole passage).
    More tokens than an encoder can give back make a worse start. `max_vectors` is the maximum K of
    one forward pass; for a larger K, the passage is encoded in equal parts, in order.
    """

    tokens: int = 0
    max_vectors: int = 1
    beside: int = 1  # inputs of a pass for one vector, besides the passage
    for_use: bool = False  # True for an encoder of usable vectors
    file: Path | None = None  # the file from which it was loaded
    identity: str = "in-memory"  # hash of its file, in records because starts change vectors

    def fits(self, lm: FrozenLM, recipe: Recipe) -> bool:
        """True if the encoder was trained for this model with the recipe's trigger and front.

        Always true here; encoders of usable vectors override it.
        """
        return True

    def refuse_unfit(self, lm: FrozenLM, recipe: Recipe) -> None:
        """Raise MemvecError unless it fits; otherwise cramming from its vectors takes longer."""
        if not self.fits(lm, recipe):
            raise MemvecError(
                f"the usable encoder of {lm.name} knows one trigger and front, and these are "
                "others: use the start 'last-tokens', or trigger and front 'auto'."
            )

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> OnePassEncoder:
        """The same encoder on a device, in the frozen LM's dtype."""

    @abstractmethod
    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        """K <= max_vectors vectors of whole passages; differentiable in the encoder's weights."""

    @torch.no_grad()
    def encode(
        self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int, *, whole: bool = False
    ) -> Float[Tensor, "B K D"]:
        """K vectors for each passage, in float32; one forward pass per `max_vectors` vectors.

        `whole` encodes all tokens of the passage, also beyond `tokens` per vector.
        """
        parts = -(-K // self.max_vectors)
        bounds = [round(i * K / parts) for i in range(parts + 1)]
        T = ids.shape[1]
        vectors = []
        for first, last in itertools.pairwise(bounds):
            part = ids[:, T * first // K : max(T * last // K, T * first // K + 1)]
            if self.tokens and not whole:
                part = part[:, : self.tokens * (last - first)]
            vectors.append(self.read(lm, part, last - first).float())
        return torch.cat(vectors, dim=1)


class TrainedEncoder(OnePassEncoder):
    """An encoder with its own network, trained with a frozen LM."""

    kind: str  # name in `memvec.registry` of the function that reads its file
    network: nn.Module

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The shape of the network, as stored in its file."""


@dataclass(frozen=True)
class EncoderFile:
    """An encoder's file for the functions that read one: path, tensors and metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def sizes(self, largest: Mapping[str, int]) -> dict[str, int]:
        """The sizes of the network, by the names of `largest`, which has their limits.

        Raises MemvecError for a size below 1 or above its limit.
        """
        shape = json.loads(self.metadata["shape"])
        sizes = {name: int(shape[name]) for name in largest}
        for name, size in sizes.items():
            if not 1 <= size <= largest[name]:
                raise MemvecError(f"{self.path} claims {size} {name}: not an encoder of memvec's.")
        return sizes

    def refuse_claims(self, numbers: int) -> None:
        """Raise MemvecError if a network of so many numbers is far larger than the tensors."""
        if claims_too_much(numbers, self.tensors):
            raise MemvecError(f"{self.path} claims more than it holds: the file is damaged.")

    def load_into(self, make: Callable[[], Network], lm: FrozenLM) -> Network:
        """The network that `make` builds, with the tensors of the file in float32.

        It is built on the device `meta`, so it takes no more memory than the tensors. Raises
        MemvecError if their names or shapes do not match.
        """
        try:
            with torch.device("meta"):
                network = make()
            network.load_state_dict({k: v.float() for k, v in self.tensors.items()}, assign=True)
        except (RuntimeError, ValueError, AssertionError):
            raise MemvecError(
                f"{self.path} does not fit {lm.name} (D {lm.width}): it was made for another model."
            ) from None
        return network


def claims_too_much(numbers: int, tensors: dict[str, Tensor]) -> bool:
    """True if a file claims a network with far more numbers than its tensors have.

    Call this before allocating a network of the claimed shape, which may not fit in memory.
    """
    present: int = sum(tensor.numel() for tensor in tensors.values())
    return numbers > 2 * present + 1024
