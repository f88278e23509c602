"""The usable encoder: starts for cramming usable vectors, in one pass of the model with adapters.

The frozen LM, with low-rank adapters for this pass only, reads BOS, the passage and K summary
embeddings. Its last hidden states at the summary embeddings, through a linear map, are added to the
embeddings of the passage's last K tokens, which are the start without an encoder (docs/usable.md)
and get a trained factor each. Summary embeddings, adapters, map and factors are trained with the
losses of decoding mode and context mode (`usable_training.py`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.companions.encoder import EncoderFile, TrainedEncoder
from memvec.encoders.adapted import own_summary
from memvec.encoders.adapters import Adapters, called_maps
from memvec.encoders.recurrent import state_width
from memvec.usable.queries import after_bos
from memvec.usable.starts import last_embeddings

if TYPE_CHECKING:
    from memvec.cramming.recipe import Recipe
    from memvec.model.lm import FrozenLM


class UsableNetwork(nn.Module):
    """The trained parameters: summaries (S, D), adapters, map (H to D), token factors (S, 1)."""

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
        """The same network with its summaries before training: the LM's own one plus noise.

        Without a summary encoder it is `mean` (D), the mean of the LM's embeddings, plus noise.
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

    `trigger` is the identity of the crammed trigger in training; None for BOS.
    """

    kind = "usable"
    for_use = True
    network: UsableNetwork

    def __init__(self, network: UsableNetwork, trigger: str | None = None) -> None:
        self.network, self.trigger = network.eval(), trigger
        self.max_vectors = len(network.summary)

    def fits(self, lm: FrozenLM, recipe: Recipe) -> bool:
        """True for trigger and front 'auto', if the model's own trigger is that of training."""
        return recipe.trigger == recipe.front == "auto" and own_trigger_of(lm) == self.trigger

    def to(self, device: torch.device, dtype: torch.dtype) -> UsableEncoder:
        return UsableEncoder(self.network.to(device).requires_grad_(False), self.trigger)

    def read(self, lm: FrozenLM, ids: Int[Tensor, "B T"], K: int) -> Float[Tensor, "B K D"]:
        network = self.network
        summary = network.summary[:K].to(lm.dtype).expand(len(ids), -1, -1)
        inputs = torch.cat([after_bos(lm, ids), summary], 1)
        with network.adapters.on(lm):
            hidden = lm.hidden(inputs, keep=K)
        weight, bias = network.map.weight.float(), network.map.bias.float()
        added: Tensor = nn.functional.linear(hidden.float(), weight, bias)
        return network.share[:K].float() * last_embeddings(lm, ids, K) + added

    def settings(self) -> dict[str, Any]:
        """The adapted linear maps and the trigger; the tensors give slots and rank."""
        return {"modules": self.network.adapters.names, "trigger": self.trigger}


def own_trigger_of(lm: FrozenLM) -> str | None:
    """The identity of the crammed trigger in the model's folder; None without one."""
    return None if lm.own_trigger is None else lm.own_trigger.identity


def fresh(lm: FrozenLM, *, slots: int, rank: int) -> UsableNetwork:
    """An untrained network that adapts every linear map that the model calls."""
    return UsableNetwork(lm, called_maps(lm), states=state_width(lm), slots=slots, rank=rank)


def read(file: EncoderFile, lm: FrozenLM) -> UsableEncoder:
    """The usable encoder in a file.

    Raises MemvecError if its tensors, which give slots and rank, do not fit the model.
    """
    shape = json.loads(file.metadata["shape"])
    modules, trigger = [str(name) for name in shape["modules"]], shape.get("trigger")
    sizes = {
        "states": state_width(lm),
        "slots": len(file.tensors["summary"]),
        "rank": len(file.tensors["adapters.down.0"]),
    }
    network = file.load_into(lambda: UsableNetwork(lm, modules, **sizes), lm)
    return UsableEncoder(network, None if trigger is None else str(trigger))
