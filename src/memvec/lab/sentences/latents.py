"""Latents: K [mem] vectors of each sentence, from the model's one-pass encoder or crammed.

Encoded latents cost one forward pass and mostly do not decode to the whole sentence. Crammed
latents start from the encoded ones and are optimised until they decode exactly, which the engine
certifies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from memvec.companions.encoder import OnePassEncoder
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.decoding import decode_ids
from memvec.encoders.measure import crammed_in_order
from memvec.errors import MemvecError
from memvec.lab.sentences.cutting import first_sentence
from memvec.model.lm import FrozenLM
from memvec.model.precision import for_steps

BATCH = 64  # sentences encoded or crammed together
Ids = Sequence[int]


class Latents(NamedTuple):
    """Vectors (S, K, D) of S sentences in float32, and which of them (S) decode exactly."""

    vectors: Tensor
    exact: list[bool]


def need_encoder(lm: FrozenLM) -> OnePassEncoder:
    """The model's encoder. Raises MemvecError if it has none."""
    if lm.encoder is None:
        raise MemvecError(
            f"{lm.name} has no one-pass encoder: train one with memvec encoder train."
        )
    return lm.encoder


@torch.no_grad()
def encode(
    lm: FrozenLM,
    sentences: Sequence[Ids],
    K: int,
    *,
    fast: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "S K D"]:
    """K vectors of each of S sentences by the model's encoder, in float32 on the CPU.

    Sentences of one length are encoded together, because an encoder takes no padding. `fast` rounds
    products to bfloat16 where cramming steps do, to encode training data faster. `on_progress` gets
    the number of sentences done. Raises MemvecError for a model without an encoder.
    """
    encoder, reader = need_encoder(lm), lm
    if fast and (rounded := for_steps(lm, "auto")) is not lm:
        encoder, reader = encoder.to(lm.device, rounded.dtype), rounded
    vectors = torch.empty(len(sentences), K, lm.width)
    lengths: dict[int, list[int]] = {}
    for i, ids in enumerate(sentences):
        lengths.setdefault(len(ids), []).append(i)
    done = 0
    for rows in lengths.values():
        for at in range(0, len(rows), BATCH):
            some = rows[at : at + BATCH]
            table = torch.tensor([list(sentences[i]) for i in some], device=lm.device)
            vectors[some] = encoder.encode(reader, table, K).cpu()
            done += len(some)
            if on_progress is not None:
                on_progress(done)
    return vectors


def encoded(lm: FrozenLM, sentences: Sequence[Ids], K: int) -> Latents:
    """Latents of one pass, each decoded freely to see whether it is exact."""
    vectors = encode(lm, sentences, K)
    decoded = decode_ids(lm, vectors, [len(ids) for ids in sentences])
    exact = [tuple(a) == tuple(b) for a, b in zip(decoded, sentences, strict=True)]
    return Latents(vectors, exact)


def crammed(
    lm: FrozenLM,
    sentences: Sequence[Ids],
    K: int,
    recipe: Recipe,
    storage: torch.dtype = torch.float32,
) -> Latents:
    """Latents crammed from the encoder's vectors until they decode exactly or the recipe stops.

    `exact` is the engine's certificate. Raises MemvecError for a model without an encoder.
    """
    need_encoder(lm)
    distinct = list(dict.fromkeys(tuple(ids) for ids in sentences))
    engine = Engine(
        lm, replace(recipe, start="encoder"), vectors=K, batch_size=BATCH // 4, storage=storage
    )
    by_ids = dict(zip(distinct, crammed_in_order(engine, distinct), strict=True))
    outcomes = [by_ids[tuple(ids)] for ids in sentences]
    return Latents(torch.stack([o.vectors.float() for o in outcomes]), [o.exact for o in outcomes])


def written(
    lm: FrozenLM, vectors: Float[Tensor, "B K D"], max_tokens: int
) -> list[tuple[int, ...]]:
    """The sentence that each latent decodes to freely: up to its first end, or `max_tokens`."""
    decoded = decode_ids(lm, vectors, [max_tokens] * len(vectors))
    return [first_sentence(lm, ids) for ids in decoded]
