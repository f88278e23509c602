"""The recurrent encoder: K vectors that a frozen LM carries from segment to segment of a document.

The memory after segment i is computed from segment i and the memory after segment i - 1: the LM
reads [memory, segment, K slots], and a small trained network computes the new vectors from its last
hidden states at the slots. (The Recurrent Memory Transformer, Bulatov et al. 2022, arXiv
2207.06881, also passes a memory on as inputs.) The LM itself is frozen.

With every segment the vectors shift by one place, and a gate mixes each with its new value. At the
start of training the memory is therefore a queue, whose last vector encodes the newest segment.
The network learns what to overwrite, to keep, or to combine in one vector.

A trained vector for each lag, the question, follows the memory in the place of a trigger, to select
the segment to decode: [memory, question r, passage] gives back the segment r before the newest. The
question comes last so that the memory can be read once for all lags. [memory, question] are K + 1
ordinary [mem] vectors and decode with the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from memvec.companions.encoder import EncoderFile, TrainedEncoder
from memvec.encoders.slots import position_codes, transformer
from memvec.encoders.summary import SummaryEncoder
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

# Upper limits for the shape in a file, so that no file makes memvec allocate too much memory.
LARGEST = {"hidden": 16_384, "layers": 256, "heads": 512, "slots": 4096, "lags": 4096}
LARGEST |= {"segment": 65_536}
KEPT, RENEWED = -3.0, 4.0  # initial gates: older vectors are kept, the last one is replaced


class RecurrentNetwork(nn.Module):
    """The trained parameters: slots (K, D), questions (R, D), and the network for the memory.

    `width` is D, `states` is H. Memories are (B, K, D) in float32.
    """

    def __init__(
        self,
        width: int,
        states: int,
        *,
        hidden: int,
        layers: int,
        heads: int,
        slots: int,
        lags: int,
        segment: int,
    ) -> None:
        super().__init__()
        self.shape = {"hidden": hidden, "layers": layers, "heads": heads}
        self.shape |= {"slots": slots, "lags": lags, "segment": segment}
        self.first = nn.Parameter(torch.randn(slots, width))  # the memory before any segment
        self.slots = nn.Parameter(torch.randn(slots, width))
        self.questions = nn.Parameter(torch.randn(lags, width))
        self.map = nn.Linear(states, width)
        self.from_states = nn.Linear(states, hidden)
        self.from_memory = nn.Linear(width, hidden)
        self.from_tokens = nn.Linear(width, hidden)
        self.places = nn.Parameter(0.02 * torch.randn(2 * slots, hidden))
        self.layers = transformer(hidden, layers, heads)
        self.out = nn.Linear(hidden, width)
        self.gate = nn.Linear(hidden, width)
        gates = torch.full((slots, 1), KEPT)
        gates[-1] = RENEWED
        self.openness = nn.Parameter(gates)
        # Mean and standard deviation of the LM's embeddings, scale of the vectors: set by `begun`.
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("size", torch.ones(()))

    mean: Tensor
    std: Tensor
    size: Tensor

    @torch.no_grad()
    def begun(
        self, mean: Tensor, std: float, size: float, summary_encoder: SummaryEncoder | None
    ) -> RecurrentNetwork:
        """The same network with its values before training.

        `mean` (D) and `std` are those of the LM's embeddings. With the LM's own `summary_encoder`,
        the newest vector is at first that encoder's vector of the segment; without one it is the
        network's output times `size`, plus `mean`.
        """
        self.mean.copy_(mean)
        self.std.fill_(std)
        self.size.fill_(size)
        for parameter in (self.slots, self.questions):
            parameter.mul_(std).add_(mean)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        if summary_encoder is None:
            nn.init.zeros_(self.map.weight)
            self.map.bias.copy_(mean)
            self.first.mul_(size).add_(mean)
            return self
        summary_encoder = summary_encoder.to(self.slots.device, self.slots.dtype)
        self.slots.copy_(summary_encoder.summary[:1] + std * 0.1 * torch.randn_like(self.slots))
        self.map.weight.copy_(summary_encoder.weight)
        self.map.bias.copy_(summary_encoder.bias)
        self.first.mul_(0.5).add_(summary_encoder.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        return self

    def forward(
        self,
        memory: Float[Tensor, "B K D"],
        embedded: Float[Tensor, "B T D"],
        heard: Float[Tensor, "B K H"],
    ) -> Float[Tensor, "B K D"]:
        """The memory after a segment; `heard` are the LM's hidden states at the slots."""
        K = memory.shape[1]
        tokens = self.from_tokens((embedded - self.mean) / self.std)
        tokens = tokens + position_codes(tokens.shape[1], tokens.shape[2], tokens.device)
        read = [
            self.from_states(layer_norm(heard, heard.shape[-1:])) + self.places[:K],
            self.from_memory(layer_norm(memory, memory.shape[-1:])) + self.places[K:],
            tokens,
        ]
        outputs: Tensor = self.layers(torch.cat(read, dim=1))[:, :K]
        new = self.map(heard) + self.size * self.out(outputs)
        share = torch.sigmoid(self.gate(outputs) + self.openness)
        moved = torch.cat([memory[:, 1:], memory[:, -1:]], dim=1)
        carried: Tensor = moved + share * (new - moved)
        return carried


class RecurrentEncoder(TrainedEncoder):
    """A recurrent network as an encoder. It stays in float32.

    `segment` is the number of tokens of a segment in training, `lags` (R) how many of the newest
    segments it was trained to give back.
    """

    kind = "recurrent"
    network: RecurrentNetwork

    def __init__(self, network: RecurrentNetwork, tokens: int = 0) -> None:
        self.network, self.tokens = network.eval(), tokens
        self.slots, self.lags, self.segment = (
            int(network.shape[name]) for name in ("slots", "lags", "segment")
        )
        self.max_vectors = self.slots + 1
        self.beside = 2 * self.slots

    def to(self, device: torch.device, dtype: torch.dtype) -> RecurrentEncoder:
        return RecurrentEncoder(self.network.to(device).eval().requires_grad_(False), self.tokens)

    def settings(self) -> dict[str, Any]:
        """The shape of the network, as stored in its file."""
        return dict(self.network.shape)

    def empty(self, B: int) -> Float[Tensor, "B K D"]:
        """The memory before the first segment."""
        return self.network.first.expand(B, -1, -1)

    def carry(
        self, lm: FrozenLM, memory: Float[Tensor, "B K D"], ids: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B K D"]:
        """The memory after a segment, in float32; differentiable in the encoder and the memory."""
        embedded = lm.embed(ids)
        slots = self.network.slots.expand(len(ids), -1, -1)
        inputs = torch.cat([memory.to(lm.dtype), embedded, slots.to(lm.dtype)], dim=1)
        heard = lm.hidden(inputs, keep=self.slots).float()
        carried: Tensor = self.network(memory, embedded.float(), heard)
        return carried

    def memories(
        self, lm: FrozenLM, ids: Int[Tensor, "B N"], segment: int
    ) -> list[Float[Tensor, "B K D"]]:
        """The memory after each segment of documents, whose N tokens are whole segments.

        Raises MemvecError if they are not.
        """
        if ids.shape[1] < segment or ids.shape[1] % segment:
            raise MemvecError(
                f"a document of {ids.shape[1]} tokens is no chain of whole segments of {segment}."
            )
        memory, memories = self.empty(len(ids)), []
        for part in torch.split(ids, segment, dim=1):
            memory = self.carry(lm, memory, part)
            memories.append(memory)
        return memories

    def asked(self, memory: Float[Tensor, "B K D"], lag: int) -> Float[Tensor, "B K1 D"]:
        """The memory and the question for the segment `lag` before the newest: K + 1 vectors.

        Raises MemvecError for a lag that no question was trained for.
        """
        if not 0 <= lag < self.lags:
            raise MemvecError(
                f"lag {lag} is out of range: this encoder was trained for lags 0 to "
                f"{self.lags - 1}."
            )
        question = self.network.questions[lag].expand(len(memory), 1, -1)
        return torch.cat([memory, question], dim=1)

    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        """The last K vectors of the memory after the passage as the first segment.

        With K = slots + 1: the whole memory and the question of lag 0. A passage that does not fit
        the context between memory and slots is read as far as it does.
        """
        fitting = ids if lm.context is None else ids[:, : lm.context - self.beside]
        memory = self.carry(lm, self.empty(len(ids)), fitting)
        return self.asked(memory, 0) if self.slots < K else memory[:, self.slots - K :]


def recurrent_of(lm: FrozenLM) -> RecurrentEncoder:
    """The model's recurrent encoder. Raises MemvecError if it has none, or one of another kind."""
    if not isinstance(lm.encoder, RecurrentEncoder):
        raise MemvecError(
            f"{lm.name} has no recurrent encoder: train one with memvec encoder train --recurrent, "
            "and load it with encoder=FILE."
        )
    return lm.encoder


def state_width(lm: FrozenLM) -> int:
    """H, the width of a hidden state. Raises MemvecError for a model without a split head."""
    with torch.no_grad():
        blank = torch.zeros(1, 1, lm.width, dtype=lm.dtype, device=lm.device)
        return int(lm.hidden(blank, keep=1).shape[-1])


def read(file: EncoderFile, lm: FrozenLM) -> RecurrentEncoder:
    """The recurrent encoder in a file.

    Raises MemvecError if its tensors do not fit its shape or the model.
    """
    shape = file.sizes(LARGEST)
    of_layers = shape["layers"] * 12 * shape["hidden"] ** 2
    file.refuse_claims(of_layers + (2 * shape["slots"] + shape["lags"]) * lm.width)
    states = state_width(lm)
    return RecurrentEncoder(file.load_into(lambda: RecurrentNetwork(lm.width, states, **shape), lm))
