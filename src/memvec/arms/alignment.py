"""Activation alignment: a second loss that makes hidden states similar to those of the plain text.

    alpha x sum over the first L layers of the mean over the tokens that are read of
        1 - cos(hidden state with the vectors, hidden state without)

This is the "hybrid" loss of Tarasov et al. (2026), their best loss for an 8B model. Hidden states
are those at the passage's own tokens. Those without vectors are computed once for a passage, from
the text alone. Two details differ from the published program. Here the text is read after the
model's BOS, if it has one; the program reads it as the tokenizer returns it. Here the last token
that counts is not read, so the mean is over one token less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memvec.cramming.batch import BatchState
from memvec.cramming.recipe import Recipe
from memvec.cramming.rows import Rows, with_padding
from memvec.cramming.terms import Term, TermLoss
from memvec.errors import MemvecError
from memvec.model.large import layers_of
from memvec.model.lm import FrozenLM
from memvec.model.reading import StartRule
from memvec.passages.passage import Passage, padded_ids


@dataclass
class PlainStates(Rows):
    """The states of L layers at the first t tokens of each passage, read without vectors."""

    states: Float[Tensor, "B t L H"]  # right-padded

    def joined(self, other: PlainStates) -> PlainStates:
        """The rows of `self`, then those of `other`, padded to the same length."""
        tokens = max(self.states.shape[1], other.states.shape[1])
        return PlainStates(torch.cat([self.at(tokens), other.at(tokens)]))

    def at(self, tokens: int) -> Float[Tensor, "B tokens L H"]:
        """The states of the first `tokens` tokens, padded with 0."""
        return torch.nn.functional.pad(self.states, (0, 0, 0, 0, 0, tokens - self.states.shape[1]))


class Alignment(Term):
    """The cosine distance of hidden states with and without the vectors, in the first layers.

    Raises MemvecError for one-step vectors, for keys and values, and for more layers than the model
    has.
    """

    def __init__(
        self, lm: FrozenLM, module: FrozenLM, recipe: Recipe, K: int, start_rule: StartRule
    ) -> None:
        super().__init__(lm, module, recipe, K, start_rule)
        layers = layers_of(module.model)
        if not lm.reading.feeds_back:
            raise MemvecError("one-step vectors stand before no tokens, so nothing can be aligned.")
        if lm.reading.space.startswith("prefix"):
            raise MemvecError("keys and values stand before no states, so nothing can be aligned.")
        if not 1 <= recipe.align_layers <= len(layers):
            raise MemvecError(
                f"{lm.name} has {len(layers)} layers: the recipe's align_layers cannot be "
                f"{recipe.align_layers}."
            )
        self._layers = layers[: recipe.align_layers]
        self._seen: list[Tensor] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager that keeps the outputs of the first layers while the model runs."""
        self._seen = []
        hooks = [layer.register_forward_hook(self._keep) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def measure(
        self,
        vectors: Float[Tensor, "N K D"],
        batch: BatchState,
        columns: int,
        padding_rows: int,
    ) -> TermLoss:
        B, tokens = len(batch), columns + int(self.start_rule == "first-token") - 1
        if tokens < 1:  # a single token is predicted, so no token is read
            return TermLoss(torch.zeros(B, device=vectors.device))
        after = [states[:, -tokens:] for states in self._seen[: len(self._layers)]]
        assert isinstance(batch.term, PlainStates)
        plain = with_padding(batch.term.at(tokens), padding_rows).unbind(2)
        with torch.enable_grad():
            cosine = torch.stack(
                [
                    torch.cosine_similarity(with_vectors.float(), without.float(), dim=-1)
                    for with_vectors, without in zip(after, plain, strict=True)
                ]
            )
            distance = (1 - cosine).sum(0)
        share = self._share(batch.length.minimum(batch.room), tokens)
        loss = (distance.detach()[:B] * share).sum(-1)
        return TermLoss(loss, (distance,), (torch.ones_like(distance),))

    def fresh(self, passages: Sequence[Passage]) -> Rows:
        """The hidden states of each passage's text without vectors."""
        ids = padded_ids(passages, max(2, *map(len, passages))).to(self.module.device)
        states = [layer.to(self.module.device) for layer in self._without_vectors(ids)]
        return PlainStates(torch.stack(states, dim=2))

    def _without_vectors(self, ids: Int[Tensor, "N T"]) -> list[Float[Tensor, "N t H"]]:
        """The states of each layer at the first t = T - 1 tokens, read after BOS.

        A passage that begins with BOS (a source's `bos`) gets no second one, whatever the other
        passages begin with.
        """
        bos, t = self.lm.bos_id, ids.shape[1] - 1
        with torch.no_grad(), self.watching():
            if bos is None:
                self.module.states(None, ids, "first-token")
                return self._seen[: len(self._layers)]
            begins = (ids[:, 0] == bos)[:, None]
            self.module.states(None, torch.where(begins, ids.roll(-1, 1), ids), "bos")
        return [
            torch.where(begins[..., None], states[:, :t], states[:, 1:])
            for states in self._seen[: len(self._layers)]
        ]

    def slopes(
        self, measured: TermLoss, counted: Int[Tensor, " B"], padding_rows: int
    ) -> tuple[Tensor, ...]:
        return tuple(
            with_padding(self._share(counted, gradient.shape[1]), padding_rows)
            for gradient in measured.gradients
        )

    def _share(self, predicted: Int[Tensor, " B"], tokens: int) -> Float[Tensor, "B T"]:
        """Equal weights over the tokens that are read to predict `predicted` tokens."""
        read = predicted[:, None] + int(self.start_rule == "first-token") - 1
        within = torch.arange(tokens, device=predicted.device) < read
        return within / within.sum(-1, keepdim=True).clamp_min(1)

    def _keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self._seen.append(output[0] if isinstance(output, tuple) else output)
