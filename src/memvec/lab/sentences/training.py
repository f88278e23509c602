"""Training of a latent model that predicts the latents of the next sentences for a frozen LM.

The loss is one of two, or their sum:

- `tokens`: cross-entropy of the next sentence's tokens after the predicted latent, through the
  frozen LM, per token. Its gradient goes through the LM into the prediction (Hwang et al. 2025:
  contextual embeddings);
- `latents`: squared distance of the prediction to the next sentence's encoded latent, per number,
  in units of the latents' standard deviation (their semantic embeddings, whose target encodes the
  sentence itself).

All sentences are encoded once before training; a sequence is `window` consecutive sentences, which
are predicted in parallel.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.cramming.objectives import score
from memvec.encoders.checkpoint import model_of
from memvec.encoders.resumable import ResumableRun
from memvec.encoders.training_run import CROSS_ENTROPY, seeded
from memvec.errors import MemvecError
from memvec.lab.sentences.cutting import Sentence, share_cut
from memvec.lab.sentences.latents import encode, need_encoder
from memvec.lab.sentences.model import LatentModel, LatentNetwork
from memvec.lab.sentences.plan import LatentPlan, check_sizes
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage, padded_ids

HELD_OUT = 0.02  # share of each document's sentences, at its end, that is never trained on
GROUPS = 4  # groups of sentences by length in a step: less padding of short ones
CHECKED = 96  # held-out sentences of each measurement during training


@dataclass(frozen=True)
class LatentProgress:
    """The state of a run, for a progress display."""

    step: int
    steps: int
    bits: float  # bits per token after the predictions, mean of the last step; NaN for 'latents'
    distance: float  # squared, per number, in units of the latents' standard deviation
    held_out: float | None  # bits per token of held-out sentences, at every checkpoint
    seconds: float
    of_training: bool  # nothing is held out: those sentences are of the training text


class LatentTraining(ResumableRun[LatentProgress, LatentModel]):
    """A training run of a latent model.

    `documents` are the sentences of each document in order. Raises MemvecError as `ResumableRun`,
    if there is no encoder or too little text, and if sentences are too long for the encoder or the
    LM's context.
    """

    plan: LatentPlan
    network: LatentNetwork

    @plain_torch()
    def __init__(
        self,
        lm: FrozenLM,
        documents: Sequence[Sequence[Sentence]],
        plan: LatentPlan,
        on_encoded: Callable[[int], None] | None = None,
    ) -> None:
        check_sizes(lm, plan)
        super().__init__(lm, plan)
        kept = _beginnings(documents, plan.sentences)
        self.train, self.held_out = _parted(kept)
        self.sentences = [s for document in kept for s in document]
        self.identity = {
            "plan": asdict(plan),
            "model": model_of(lm),
            "encoder": need_encoder(lm).identity,
            "text": hashlib.sha256(repr([[s.ids for s in d] for d in kept]).encode()).hexdigest(),
        }
        ids = [s.ids for s in self.sentences]
        self.latents = encode(lm, ids, plan.vectors, fast=True, on_progress=on_encoded).flatten(1)
        shape = {k: getattr(plan, k) for k in ("hidden", "layers", "heads")}
        with seeded(plan.seed):
            self.network = LatentNetwork(plan.vectors * lm.width, **shape)
        known = torch.cat([self.latents[start:end] for start, end in self.train])
        self.network.scaled(known).to(lm.device)
        self.optimizer = self.optimized(self.network.parameters())

    def _progress(self, measured: tuple[float, float], checkpoint: bool) -> LatentProgress:
        return LatentProgress(
            self.step,
            self.plan.steps,
            *measured,
            held_out=self.held_out_bits() if checkpoint else None,
            seconds=self.seconds,
            of_training=self.held_out == self.train,
        )

    def _finished(self) -> LatentModel:
        plan, network = self.plan, self.network.eval().requires_grad_(False)
        return LatentModel(network, plan.vectors, plan.max_tokens, plan.window, self.about())

    def about(self) -> dict[str, Any]:
        """Facts about the run, for the file of the latent model."""
        return {
            **self.identity,
            "seconds": round(self.seconds, 1),
            "documents": len(self.train),
            "sentences": len(self.sentences),
            "tokens": sum(len(s.ids) for s in self.sentences),
            "cut": share_cut(self.sentences),
        }

    def _train_step(self) -> tuple[float, float]:
        """One step: (mean bits per token, NaN without that loss; mean squared distance)."""
        plan, network = self.plan, self.network.train()
        rows, present = self._sequences(self._generator("step", self.step))
        known = self.latents[rows].to(self.lm.device)
        predicted = network(known[:, :-1])[present]
        gap = network.normalised(predicted) - network.normalised(known[present])
        distance = gap.square().mean()
        loss = torch.zeros((), device=self.lm.device)
        bits = math.nan
        if plan.loss != "latents":
            nats, slope = self._through_lm(predicted, rows[present])
            loss, bits = (predicted * slope).sum(), nats / math.log(2)
        if plan.loss != "tokens":
            loss = loss + distance
        self._need_finite(float(distance.detach()), *([] if plan.loss == "latents" else [bits]))
        self._move([loss])
        return bits, float(distance.detach())

    def _through_lm(
        self, predicted: Float[Tensor, "M W"], sentences: Tensor, backward: bool = True
    ) -> tuple[float, Float[Tensor, "M W"]]:
        """(mean nats per token through the frozen LM, its gradient at the predicted latents).

        `sentences` has the indices of the M sentences that the latents predict. Without `backward`
        the gradient is zero.
        """
        lm, K = self.fast, self.plan.vectors
        passages = [Passage(self.sentences[i].ids) for i in sentences.tolist()]
        order = sorted(range(len(passages)), key=lambda i: len(passages[i]))
        total = sum(len(p) for p in passages)
        slope, nats = torch.zeros_like(predicted), 0.0
        size = -(-len(order) // GROUPS)
        for at in range(0, len(order), size):
            group = [passages[i] for i in order[at : at + size]]
            some = torch.tensor(order[at : at + size], device=lm.device)
            longest = max(map(len, group))
            lengths = torch.tensor([*map(len, group)], device=lm.device)
            ids = padded_ids(group, longest).to(lm.device)
            counts = torch.arange(longest, device=lm.device) < lengths[:, None]
            with torch.set_grad_enabled(backward):
                vectors = predicted[some].detach().reshape(-1, K, lm.width)
                vectors.requires_grad_(backward)
                states = lm.states(vectors, ids, "vectors")
            scores = score(lm.head, states, ids, CROSS_ENTROPY, V=lm.vocab_size)
            nats += float(scores.loss[counts].double().sum())
            if backward:
                weights = counts[..., None] / total
                (slope[some],) = (
                    g.flatten(1)
                    for g in torch.autograd.grad(
                        states, vectors, (scores.gradient * weights).to(states.dtype)
                    )
                )
        return nats / total, slope

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """Bits per token of held-out sentences after their predictions, the same every time."""
        rows, present = self._sequences(self._generator("held out", 0), held_out=True)
        known = self.latents[rows].to(self.lm.device)
        predicted = self.network.eval()(known[:, :-1])[present]
        nats, _ = self._through_lm(predicted, rows[present], backward=False)
        return nats / math.log(2)

    def _sequences(self, draw: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """(indices of sentences (B, window), mask (B, window) of the places with a sentence)."""
        plan, spans = self.plan, self.held_out if held_out else self.train
        count = -(-CHECKED // plan.window) if held_out else plan.batch
        sizes = torch.tensor([float(end - start) for start, end in spans])
        chosen = torch.multinomial(sizes, count, replacement=True, generator=draw)
        rows = torch.zeros(count, plan.window, dtype=torch.long)
        present = torch.zeros(count, plan.window, dtype=torch.bool)
        for row, present_row, span in zip(rows, present, chosen.tolist(), strict=True):
            start, end = spans[span]
            n = min(plan.window, end - start)
            first = start + int(torch.randint(end - start - n + 1, (), generator=draw))
            row[:n], present_row[:n] = torch.arange(first, first + n), True
        return rows, present


def _beginnings(documents: Sequence[Sequence[Sentence]], count: int) -> list[list[Sentence]]:
    """The beginnings of all documents of at least two sentences, about `count` sentences in all."""
    some = [document for document in documents if len(document) > 1]
    if not some:
        raise MemvecError(
            "there is no text of at least two sentences, so there is no next sentence to predict: "
            "give more text."
        )
    share = of_each(count, len(some))
    return [list(document[:share]) for document in some]


def of_each(count: int, documents: int) -> int:
    """Sentences of each document for `count` in all: at least two."""
    return max(2, count // documents)


def _parted(
    documents: Sequence[Sequence[Sentence]],
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(spans to train on, spans held out) as first and last index over all documents' sentences.

    Short documents have no held-out span. If no document has one, the training spans are used for
    the measurements during training.
    """
    train, held_out, start = [], [], 0
    for document in documents:
        end = start + len(document)
        cut = int(len(document) * HELD_OUT)
        cut = cut if cut >= 2 else 0
        train.append((start, end - cut))
        if cut:
            held_out.append((end - cut, end))
        start = end
    return train, held_out or train
