"""The slot encoder: a small transformer of its own, trained for a frozen LM.

It reads the LM's embeddings of a passage together with S learned slots, with attention in both
directions; its outputs at the slots are the vectors. The LM is neither changed nor run. This is a
baseline for encoders that compress a context into slots (ICAE, Ge et al. 2024: K slots,
reconstruction through the frozen LM), with a small encoder in place of an adapted copy of the LM.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.companions.encoder import EncoderFile, TrainedEncoder

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

LARGEST = {"hidden": 16_384, "layers": 256, "heads": 512, "slots": 4096}  # limits for a file


def position_codes(T: int, width: int, device: torch.device) -> Float[Tensor, "T width"]:
    """Sinusoidal codes of T positions (Vaswani et al. 2017), for passages of any length."""
    rates = torch.exp(
        torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / max(width, 1))
    )
    angles = torch.arange(T, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def transformer(hidden: int, layers: int, heads: int) -> nn.TransformerEncoder:
    """A small transformer with pre-norm layers and no dropout; inputs are (B, N, hidden)."""
    layer = nn.TransformerEncoderLayer(
        hidden,
        heads,
        4 * hidden,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    # Nested tensors bring nothing, since all rows of a batch have the same length.
    return nn.TransformerEncoder(
        layer, layers, norm=nn.LayerNorm(hidden), enable_nested_tensor=False
    )


class SlotNetwork(nn.Module):
    """Maps embedded passages (B, T, D) to vectors (B, K, D), K <= S slots."""

    def __init__(self, width: int, *, hidden: int, layers: int, heads: int, slots: int) -> None:
        super().__init__()
        self.shape = {"hidden": hidden, "layers": layers, "heads": heads, "slots": slots}
        self.into = nn.Linear(width, hidden)
        self.slots = nn.Parameter(0.02 * torch.randn(slots, hidden))
        self.layers = transformer(hidden, layers, heads)
        self.out = nn.Linear(hidden, width)
        # Mean and standard deviation of the LM's embeddings, scale of the vectors: set by `scaled`.
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("size", torch.ones(()))

    mean: Tensor
    std: Tensor
    size: Tensor

    def scaled(self, mean: Tensor, std: float, size: float) -> SlotNetwork:
        """The same network, set up for embeddings with mean (D) `mean` and deviation `std`.

        `size` multiplies the output of the last layer; untrained vectors have about this RMS.
        """
        self.mean.copy_(mean)
        self.std.fill_(std)
        self.size.fill_(size)
        return self

    def forward(self, embedded: Float[Tensor, "B T D"], K: int) -> Float[Tensor, "B K D"]:
        inputs = self.into((embedded.float() - self.mean) / self.std)
        inputs = inputs + position_codes(inputs.shape[1], inputs.shape[2], inputs.device)
        slots = self.slots[:K].expand(len(inputs), -1, -1)
        outputs: Tensor = self.layers(torch.cat([slots, inputs], dim=1))[:, :K]
        vectors: Tensor = self.out(outputs) * self.size + self.mean
        return vectors


class SlotEncoder(TrainedEncoder):
    """A slot network as an encoder. It stays in float32."""

    kind = "slots"
    network: SlotNetwork

    def __init__(self, network: SlotNetwork, tokens: int = 0) -> None:
        self.network, self.tokens = network.eval(), tokens
        self.max_vectors = int(network.shape["slots"])

    def to(self, device: torch.device, dtype: torch.dtype) -> SlotEncoder:
        return SlotEncoder(self.network.to(device).eval().requires_grad_(False), self.tokens)

    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        vectors: Tensor = self.network(lm.embed(ids), K)
        return vectors

    def settings(self) -> dict[str, Any]:
        """The shape of the network, as stored in its file."""
        return dict(self.network.shape)


def read(file: EncoderFile, lm: FrozenLM) -> SlotEncoder:
    """The slot encoder in a file.

    Raises MemvecError if its tensors do not fit its shape or the model.
    """
    shape = file.sizes(LARGEST)
    file.refuse_claims(shape["layers"] * 12 * shape["hidden"] ** 2)
    return SlotEncoder(file.load_into(lambda: SlotNetwork(lm.width, **shape), lm))
