"""Bits of a sentence's tokens after text, latents and predictions.

All ways score the same T tokens of the true sentence with the same frozen LM; they differ in the
inputs in front of these tokens (WAYS). For a prediction h sentences ahead, the last h - 1 sentences
are replaced by the latent model's own predictions, unchanged or written and encoded again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memvec import metrics
from memvec.cramming.recipe import Recipe
from memvec.errors import MemvecError
from memvec.lab.sentences import latents
from memvec.lab.sentences.latents import Ids
from memvec.lab.sentences.model import LatentModel
from memvec.model.lm import FrozenLM

WAYS = {
    "alone": "nothing but the start token",
    "nothing": "the latent predicted from no sentence",
    "latents": "the latents of the sentences before, side by side",
    "discretised": "the predicted latent, written and encoded again",
    "predicted": "the predicted latent",
    "crammed": "the latent predicted from crammed latents",
    "text": "the text of the sentences before",
    "full": "all text before that fits the context",
    "encoded": "the sentence's own latent, encoded in one pass",
    "own": "the sentence's own latent, crammed",
}


@dataclass(frozen=True)
class Measured:
    """Measures of one sentence in all ways but `alone` and `own`, which cramming measures.

    `bits`: bits of all its tokens, by WAYS. `predicted`: the predicted latent (K, D). `written`:
    the token ids that it decodes to. `continuous` and `discretised`: bits after predictions 2, 3,
    ... sentences ahead. `before_exact`: for each of the sentences before, [1 if its encoded latent
    decodes exactly, 1 if its crammed one does]. `encoded_exact`: whether the encoded latent of the
    sentence decodes exactly.
    """

    bits: dict[str, float]
    predicted: Tensor
    written: tuple[int, ...]
    continuous: list[float]
    discretised: list[float]
    before_exact: list[list[int]]
    encoded_exact: bool


@torch.no_grad()
def bits_after(lm: FrozenLM, vectors: Float[Tensor, "N D"], ids: Ids) -> float:
    """Bits of a sentence of token ids (T,) directly after vectors, no trigger between them."""
    table = torch.tensor([list(ids)], device=lm.device)
    rows = vectors[None].to(lm.device)
    return float(metrics.surprisal(lm.logits(rows, table), table).double().sum())


@torch.no_grad()
def bits_after_text(lm: FrozenLM, before: Ids, ids: Ids) -> float:
    """Bits of a sentence of token ids after BOS, where the model has one, and a text.

    Raises ValueError if no token precedes the sentence.
    """
    head = [] if lm.bos_id is None else [lm.bos_id]
    whole = [*head, *before, *ids]
    if len(whole) == len(ids):
        raise ValueError("the first token needs something before it")
    table = torch.tensor([whole], device=lm.device)
    # Logits of the sentence alone: those of a long text would not fit in memory.
    logits = lm.head(lm.states_of(lm.embed(table), keep=len(ids) + 1))[:, :-1]
    return float(metrics.surprisal(logits, table[:, -len(ids) :]).double().sum())


def fitting(lm: FrozenLM, before: Ids, n: int) -> Ids:
    """The last tokens of a text that fit the model's context in front of n others."""
    if lm.context is None:
        return before
    room = lm.context - n - int(lm.bos_id is not None)
    return before[max(0, len(before) - room) :] if room > 0 else ()


def measure(
    lm: FrozenLM,
    model: LatentModel,
    before: Sequence[Ids],
    text: Ids,
    ids: Ids,
    recipe: Recipe,
    horizon: int,
    storage: torch.dtype = torch.float32,
) -> Measured:
    """Measure a sentence `ids` after the sentences `before`, and after all `text` before it.

    The latents of the sentences before are also crammed by `recipe` and rounded to `storage`.
    Raises MemvecError if the sentences do not fit the context, if there are fewer than `horizon`,
    or if one is longer than the model's limit.
    """
    check_lengths(lm, model, [*before, ids], horizon)
    K = model.vectors
    vectors, decodes = latents.encoded(lm, [*before, ids], K)
    known, own_latent, S = vectors[:-1], vectors[-1], len(before)
    crammed = latents.crammed(lm, before, K, recipe, storage)
    aheads = range(1, horizon + 1)
    seen = [known[: S - ahead + 1] for ahead in aheads]
    rolled = [steps[-1] for steps in model.discretised(lm, seen, aheads)]
    continuous = [
        bits_after(lm, model.continuous(some[None], ahead)[-1][0], ids)
        for some, ahead in zip(seen, aheads, strict=True)
    ]
    discretised = [bits_after(lm, step.again, ids) for step in rolled]
    bits = {
        "nothing": bits_after(lm, model.predict(known[None, :0])[0], ids),
        "latents": bits_after(lm, known.flatten(0, 1), ids),
        "discretised": discretised[0],
        "predicted": continuous[0],
        "crammed": bits_after(lm, model.predict(crammed.vectors[None])[0], ids),
        "text": bits_after_text(lm, [*itertools.chain(*before)], ids),
        "full": bits_after_text(lm, fitting(lm, text, len(ids)), ids),
        "encoded": bits_after(lm, own_latent, ids),
    }
    return Measured(
        bits,
        rolled[0].predicted,
        rolled[0].ids,
        continuous[1:],
        discretised[1:],
        [[int(a), int(b)] for a, b in zip(decodes[:-1], crammed.exact, strict=True)],
        decodes[-1],
    )


def check_lengths(lm: FrozenLM, model: LatentModel, sentences: Sequence[Ids], horizon: int) -> None:
    """Raise MemvecError if the last of the sentences cannot be predicted from the others."""
    longest, before = max(map(len, sentences)), len(sentences) - 1
    if longest > model.max_tokens:
        raise MemvecError(
            f"a sentence of {longest} tokens is longer than those that the latent model was "
            f"trained on, up to {model.max_tokens}: cut at that length."
        )
    if before < horizon:
        raise MemvecError(
            f"{before} sentence(s) are too few to predict {horizon} ahead: give more, or lower "
            "horizon."
        )
    needed = max(sum(map(len, sentences)) + 1, before * model.vectors + len(sentences[-1]))
    if lm.context is not None and needed > lm.context:
        raise MemvecError(
            f"{before} sentences before do not fit the context of {lm.name} ({lm.context} tokens): "
            "take fewer."
        )
