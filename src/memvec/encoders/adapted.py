"""The adapted encoder: the frozen LM reads the passage with low-rank adapters, in this pass only.

The passage is divided into K equal parts with a summary embedding after each. The last hidden state
at a summary embedding, through one linear map, is the part's [mem] vector; it also depends on all
earlier parts. Summary and map begin with the values of the LM's own summary encoder, if it was
trained with one. They and the adapters are trained (`adapted_training.py`); the LM is frozen, and
reads the vectors without adapters.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from memvec.companions.encoder import EncoderFile, TrainedEncoder
from memvec.encoders.adapters import Adapters, called_maps
from memvec.encoders.recurrent import state_width
from memvec.encoders.summary import SummaryEncoder

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

LARGEST = {"slots": 4096}  # limit for a file


class AdaptedNetwork(nn.Module):
    """The trained parameters: a summary embedding (1, D), a map (H to D), the adapters."""

    def __init__(self, lm: FrozenLM, modules: list[str], *, states: int, rank: int) -> None:
        super().__init__()
        self.summary = nn.Parameter(torch.zeros(1, lm.width))
        self.map = nn.Linear(states, lm.width)
        self.adapters = Adapters(lm, modules, rank)

    @torch.no_grad()
    def begun(self, lm: FrozenLM, mean: Float[Tensor, " D"], size: float) -> AdaptedNetwork:
        """The same network with its values before training: those of the LM's summary encoder.

        Without one, the summary is near `mean` (D), the mean of the LM's embeddings, and the
        vectors have an RMS of about `size`.
        """
        if (summary_encoder := own_summary(lm)) is not None:
            self.summary.copy_(summary_encoder.summary[:1])
            self.map.weight.copy_(summary_encoder.weight)
            self.map.bias.copy_(summary_encoder.bias)
            return self
        noise = 0.1 * lm.embedding_std * torch.randn_like(self.summary)
        self.summary.copy_(mean.float().cpu() + noise)
        state = lm.hidden(self.summary[None].to(lm.device, lm.dtype), keep=1).float()
        nn.init.normal_(self.map.weight, std=size / float(state.norm()))
        nn.init.zeros_(self.map.bias)
        return self


class AdaptedEncoder(TrainedEncoder):
    """An adapted network as an encoder: passages (B, T) to vectors (B, K, D).

    `max_vectors` is the largest K in training. `summary_encoder` is the one that the LM was trained
    with (None without), from which other trainings begin.
    """

    kind = "adapted"
    network: AdaptedNetwork

    def __init__(
        self,
        network: AdaptedNetwork,
        max_vectors: int,
        summary_encoder: SummaryEncoder | None = None,
    ) -> None:
        self.network, self.max_vectors, self.own = network.eval(), max_vectors, summary_encoder

    def to(self, device: torch.device, dtype: torch.dtype) -> AdaptedEncoder:
        summary_encoder = self.own and self.own.to(device, dtype)
        network = self.network.to(device).requires_grad_(False)
        return AdaptedEncoder(network, self.max_vectors, summary_encoder)

    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        network, (B, T) = self.network, ids.shape
        summary = network.summary.to(lm.dtype).expand(B, 1, -1)
        embedded, bounds = lm.embed(ids), [T * i // K for i in range(K + 1)]
        parts = [embedded[:, bounds[i] : bounds[i + 1]] for i in range(K)]
        inputs = torch.cat([piece for part in parts for piece in (part, summary)], 1)
        first = bounds[1]  # no states before the first summary are needed
        with network.adapters.on(lm):
            hidden = lm.hidden(inputs, keep=inputs.shape[1] - first).float()
        index = torch.tensor(
            [end + i - first for i, end in enumerate(bounds[1:])], device=ids.device
        )
        weight, bias = network.map.weight.float(), network.map.bias.float()
        return linear(hidden[:, index.to(hidden.device)], weight, bias)

    def settings(self) -> dict[str, Any]:
        """The adapted linear maps and the number of slots; the tensors give the rank."""
        return {"modules": self.network.adapters.names, "slots": self.max_vectors}


def own_summary(lm: FrozenLM) -> SummaryEncoder | None:
    """The summary encoder that the LM was trained with; None without one."""
    encoder = lm.encoder.own if isinstance(lm.encoder, AdaptedEncoder) else lm.encoder
    return encoder if isinstance(encoder, SummaryEncoder) else None


def fresh(lm: FrozenLM, *, rank: int) -> AdaptedNetwork:
    """An untrained network that adapts every linear map that the model calls."""
    return AdaptedNetwork(lm, called_maps(lm), states=state_width(lm), rank=rank)


def read(file: EncoderFile, lm: FrozenLM) -> AdaptedEncoder:
    """The adapted encoder in a file.

    Raises MemvecError if its tensors, which give the rank, do not fit the model.
    """
    slots = file.sizes(LARGEST)["slots"]
    modules = [str(name) for name in json.loads(file.metadata["shape"])["modules"]]
    states, rank = state_width(lm), len(file.tensors["adapters.down.0"])
    network = file.load_into(lambda: AdaptedNetwork(lm, modules, states=states, rank=rank), lm)
    return AdaptedEncoder(network, slots, own_summary(lm))
