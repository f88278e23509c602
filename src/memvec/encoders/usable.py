"""The usable encoder: where cramming for use begins, in one pass of the model with adapters.

The frozen LM, with low-rank adapters that stand only for this pass, reads BOS, the passage and K
summary embeddings. Its last hidden states there, through a linear map, are added to the embeddings
of the passage's last K tokens, which cramming for use begins as without it (docs/usable.md). The
summaries, the adapters and the map are trained by both losses of use (`usable_training.py`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.encoders.adapted import own_summary
from memvec.encoders.adapters import Adapters, called_maps, load_network
from memvec.encoders.base import EncoderFile, TrainedEncoder
from memvec.encoders.recurrent import state_width
from memvec.usable.queries import behind_bos
from memvec.usable.starts import last_embeddings

if TYPE_CHECKING:
    from memvec.cramming.recipe import Recipe
    from memvec.model.lm import FrozenLM


class UsableNetwork(nn.Module):
    """What is trained: summaries (S, D), the adapters, a map (H to D), shares (S, 1) of tokens."""

    def __init__(
        self, lm: FrozenLM, modules: list[str], *, states: int, slots: int, rank: int
    ) -> None:
        super().__init__()
        self.summary = nn.Parameter(torch.zeros(slots, lm.width))
        self.adapters = Adapters(lm, modules, rank)
        self.map = nn.Linear(states, lm.width)
        self.share = nn.Parameter(torch.ones(slots, 1))
        nn.init.normal_(self.map.weight, std=0.01)
        nn.init.zeros_(self.map.bias)

    def begun(self, lm: FrozenLM, mean: Float[Tensor, " D"]) -> UsableNetwork:
        """The same network with summaries near the LM's own, or near its mean embedding, and noise.

        Equal summaries could not learn to encode different parts of a text.
        """
        summary_encoder = own_summary(lm)
        base = (mean if summary_encoder is None else summary_encoder.summary[0]).float().cpu()
        noise = torch.randn_like(self.summary) * (0.1 * base.std())
        with torch.no_grad():
            self.summary.copy_(base + noise)
        return self


class UsableEncoder(TrainedEncoder):
    """A usable network as an encoder: passages (B, T) to vectors (B, K, D), K <= S.

    `trigger` is the identity of the crammed trigger that it was trained with; None: BOS.
    """

    kind = "usable"
    for_use = True
    network: UsableNetwork

    def __init__(self, network: UsableNetwork, trigger: str | None = None) -> None:
        self.network, self.trigger = network.eval(), trigger
        self.max_vectors = len(network.summary)

    def fits(self, lm: FrozenLM, recipe: Recipe) -> bool:
        """True for the model's own trigger and front, if it is still the one of the training."""
        return recipe.trigger == recipe.front == "auto" and own_trigger_of(lm) == self.trigger

    def to(self, device: torch.device, dtype: torch.dtype) -> UsableEncoder:
        return UsableEncoder(self.network.to(device).requires_grad_(False), self.trigger)

    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        network = self.network
        summary = network.summary[:K].to(lm.dtype).expand(len(ids), -1, -1)
        inputs = torch.cat([behind_bos(lm, ids), summary], 1)
        with network.adapters.on(lm):
            hidden = lm.hidden(inputs, keep=K)
        weight, bias = network.map.weight.float(), network.map.bias.float()
        added: Tensor = nn.functional.linear(hidden.float(), weight, bias)
        return network.share[:K].float() * last_embeddings(lm, ids, K) + added

    def settings(self) -> dict[str, Any]:
        """The linear maps that it adapts, and its trigger; slots and rank are in its tensors."""
        return {"modules": self.network.adapters.names, "trigger": self.trigger}


def own_trigger_of(lm: FrozenLM) -> str | None:
    """The identity of the crammed trigger in the model's folder; None: it has none."""
    return None if lm.own_trigger is None else lm.own_trigger.identity


def fresh(lm: FrozenLM, *, slots: int, rank: int) -> UsableNetwork:
    """An untrained network that adapts every linear map that the model calls."""
    return UsableNetwork(lm, called_maps(lm), states=state_width(lm), slots=slots, rank=rank)


def read(file: EncoderFile, lm: FrozenLM) -> UsableEncoder:
    """The usable encoder in a file.

    Raises MemvecError if its tensors do not fit the model. Slots and rank are those of its tensors,
    so no file asks for more memory than it holds.
    """
    shape = json.loads(file.metadata["shape"])
    modules, trigger = [str(name) for name in shape["modules"]], shape.get("trigger")
    slots = len(file.tensors["summary"])
    rank = len(file.tensors["adapters.down.0"])
    states = state_width(lm)
    with torch.device("meta"):  # no random numbers that the file's would replace
        network = UsableNetwork(lm, modules, states=states, slots=slots, rank=rank)
    load_network(network, file, lm)
    return UsableEncoder(network, None if trigger is None else str(trigger))
