"""The adapted encoder: the frozen LM, with low-rank adapters for this pass only, reads its text.

A passage is read in K equal parts, a summary embedding behind each; the last hidden state there,
through one linear map, is the part's [mem] vector. A part is read behind all that came before it.
Summary, map and adapters begin as the LM's own summary encoder, where it was trained with one, and
are trained beside the frozen LM (`adapted_training.py`): the vectors are for the LM as it is.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from memvec.encoders.adapters import Adapters, called_maps, load_network
from memvec.encoders.base import EncoderFile, TrainedEncoder
from memvec.encoders.recurrent import state_width
from memvec.encoders.summary import SummaryEncoder
from memvec.errors import MemvecError

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

LARGEST_SLOTS = 4096  # that a file may claim


class AdaptedNetwork(nn.Module):
    """What is trained: a summary embedding (1, D), a map (H to D), the adapters."""

    def __init__(self, lm: FrozenLM, modules: list[str], *, states: int, rank: int) -> None:
        super().__init__()
        self.summary = nn.Parameter(torch.zeros(1, lm.width))
        self.map = nn.Linear(states, lm.width)
        self.adapters = Adapters(lm, modules, rank)

    @torch.no_grad()
    def begun(self, lm: FrozenLM, mean: Float[Tensor, " D"], size: float) -> AdaptedNetwork:
        """The same network before training: the LM's own summary encoder, or near nothing.

        Without one the summary is near `mean`, that of the LM's embeddings, and the vectors
        have an RMS of about `size`.
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

    `max_vectors`: the largest K that it was trained for. `summary_encoder`: the one that the LM was
    trained with, from which other trainings begin; None: it was trained without one.
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
        first = bounds[1]  # nothing before the first summary is asked for
        with network.adapters.on(lm):
            hidden = lm.hidden(inputs, keep=inputs.shape[1] - first).float()
        index = torch.tensor(
            [end + i - first for i, end in enumerate(bounds[1:])], device=ids.device
        )
        weight, bias = network.map.weight.float(), network.map.bias.float()
        return linear(hidden[:, index.to(hidden.device)], weight, bias)

    def settings(self) -> dict[str, Any]:
        """The linear maps that it adapts, and its slots; the rank is in its tensors."""
        return {"modules": self.network.adapters.names, "slots": self.max_vectors}


def own_summary(lm: FrozenLM) -> SummaryEncoder | None:
    """The summary encoder that the LM was trained with, if there is one."""
    encoder = lm.encoder.own if isinstance(lm.encoder, AdaptedEncoder) else lm.encoder
    return encoder if isinstance(encoder, SummaryEncoder) else None


def fresh(lm: FrozenLM, *, rank: int) -> AdaptedNetwork:
    """An untrained network that adapts every linear map that the model calls."""
    return AdaptedNetwork(lm, called_maps(lm), states=state_width(lm), rank=rank)


def read(file: EncoderFile, lm: FrozenLM) -> AdaptedEncoder:
    """The adapted encoder in a file.

    Raises MemvecError if its tensors do not fit the model. The rank is that of its tensors, so no
    file asks for more memory than it holds.
    """
    shape = json.loads(file.metadata["shape"])
    modules, slots = [str(name) for name in shape["modules"]], int(shape["slots"])
    if not 1 <= slots <= LARGEST_SLOTS:
        raise MemvecError(f"{file.path} claims {slots} slots: not an encoder of memvec's.")
    states, rank = state_width(lm), len(file.tensors["adapters.down.0"])
    with torch.device("meta"):  # no random numbers that the file's would replace
        network = AdaptedNetwork(lm, modules, states=states, rank=rank)
    load_network(network, file, lm)
    return AdaptedEncoder(network, slots, own_summary(lm))
