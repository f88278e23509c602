"""The latent model: a small causal transformer over latents of sentences.

Its inputs are a learned start and the latents of the sentences before, and its output at sentence i
is a prediction of the latent of sentence i + 1. Inputs and outputs are normalised number by number
with the mean and the standard deviation of the training set. The frozen LM decodes a predicted
latent to a sentence, or computes the probability of a given sentence after it.

In the regime `continuous` the model predicts further from its own predictions, without text; in
`discretised` each prediction is written as a sentence and encoded again. The names are those of
Hwang et al. 2025 (arXiv 2505.22202), whose latent model is an adapted copy of the LM; here it is a
separate network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memvec.encoders.slots import position_codes, transformer
from memvec.lab.sentences import latents
from memvec.model.lm import FrozenLM


class LatentNetwork(nn.Module):
    """A causal transformer from latents of W = K · D numbers to predictions of the next ones."""

    def __init__(self, numbers: int, *, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.shape = {"hidden": hidden, "layers": layers, "heads": heads}
        self.into = nn.Linear(numbers, hidden)
        self.start = nn.Parameter(0.02 * torch.randn(hidden))
        self.layers = transformer(hidden, layers, heads)
        self.out = nn.Linear(hidden, numbers)
        nn.init.normal_(self.out.weight, std=0.1 / hidden**0.5)  # it begins near the mean latent
        nn.init.zeros_(self.out.bias)
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("std", torch.ones(numbers))

    mean: Tensor
    std: Tensor

    def scaled(self, known: Float[Tensor, "n W"]) -> LatentNetwork:
        """Set mean and standard deviation from these latents; returns the network itself."""
        self.mean.copy_(known.mean(0))
        self.std.copy_(known.std(0).clamp_min(1e-6))
        return self

    def normalised(self, vectors: Float[Tensor, "*shape W"]) -> Float[Tensor, "*shape W"]:
        """Latents with the training set's mean subtracted, divided by its standard deviation."""
        return (vectors - self.mean) / self.std

    def forward(self, before: Float[Tensor, "B S W"]) -> Float[Tensor, "B S+1 W"]:
        """Predictions of the latents of sentences 0 to S, each from the sentences before it."""
        start = self.start.expand(len(before), 1, -1)
        inputs = torch.cat([start, self.into(self.normalised(before))], dim=1)
        inputs = inputs + position_codes(inputs.shape[1], inputs.shape[2], inputs.device)
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], inputs.device)
        states: Tensor = self.layers(inputs, mask=mask, is_causal=True)
        predicted: Tensor = self.mean + self.std * self.out(states)
        return predicted


class Step(NamedTuple):
    """A prediction (K, D), the sentence that it decodes to, and that sentence's own latent."""

    predicted: Tensor
    ids: tuple[int, ...]
    again: Tensor


@dataclass(frozen=True, eq=False)
class LatentModel:
    """A trained latent network with its limits.

    `vectors`: K. `max_tokens`: limit of a sentence. `window`: sentences of one training sequence;
    at most `window` - 1 are read before a prediction. `identity`: hash of its file.
    """

    network: LatentNetwork
    vectors: int
    max_tokens: int
    window: int
    about: dict[str, Any]
    identity: str = "in-memory"

    @torch.no_grad()
    def predict(self, before: Float[Tensor, "B S K D"]) -> Float[Tensor, "B K D"]:
        """The next sentence's latent, from the last `window` - 1 of S >= 0 latents, on the CPU."""
        _, S, K, D = before.shape
        kept = before[:, max(0, S - self.window + 1) :].flatten(2).to(self.network.mean.device)
        predicted: Tensor = self.network(kept)[:, -1].reshape(-1, K, D)
        return predicted.cpu()

    def continuous(
        self, before: Float[Tensor, "B S K D"], steps: int
    ) -> list[Float[Tensor, "B K D"]]:
        """`steps` predictions, each from the latents before and the predictions so far."""
        predictions = []
        for _ in range(steps):
            predictions.append(self.predict(before))
            before = torch.cat([before, predictions[-1][:, None]], dim=1)
        return predictions

    def discretised(
        self, lm: FrozenLM, before: Sequence[Float[Tensor, "_ K D"]], steps: Sequence[int]
    ) -> list[list[Step]]:
        """Predictions where each one is decoded to a sentence, which is encoded again.

        `before` are sequences (S, K, D) of different lengths S, and `steps` has the number of
        predictions of each. Predictions of one round are decoded together. Raises MemvecError for
        an LM without an encoder.
        """
        seen = list(before)
        rolled: list[list[Step]] = [[] for _ in before]
        for round_ in range(max(steps, default=0)):
            rows = [i for i, count in enumerate(steps) if count > round_]
            predicted = torch.cat([self.predict(seen[i][None]) for i in rows])
            written = latents.written(lm, predicted, self.max_tokens)
            again = latents.encode(lm, written, self.vectors)
            for i, *step in zip(rows, predicted, written, again, strict=True):
                rolled[i].append(Step(*step))
                seen[i] = torch.cat([seen[i], rolled[i][-1].again[None]])
        return rolled
