"""Floating-point operations of a sentence, computed from shapes.

A multiply-add is two operations. A causal LM with P parameters in its blocks, L layers, attention
of width A = heads x head width, a head of H x V, that reads n inputs behind c others whose keys
and values it has kept:

    n 2 P + 4 L A (n c + n (n + 1) / 2),  and 2 H V for each token that it predicts.

The attention's term is its two products (queries with keys, weights with values) over the pairs of
positions. Norms, activations and the softmax are left out, as usual; models without attention have
A = 0. The latent model reads one input behind s others by the same formula.
"""

from __future__ import annotations

from typing import NamedTuple

from memvec.encoders.base import OnePassEncoder
from memvec.encoders.slots import SlotEncoder
from memvec.lab.sentences.latents import need_encoder
from memvec.lab.sentences.model import LatentModel
from memvec.model.lm import FrozenLM

COSTS = {
    "text": "token by token, behind all text before that fits",
    "recent": "token by token, behind the text of the last sentences",
    "continuous": "predicted latent, nothing written",
    "written": "predicted latent, written as a sentence",
    "discretised": "predicted latent, written and encoded again",
}


class Shape(NamedTuple):
    """What the formula asks of a model: P, L, A, and the numbers of its head (H x V)."""

    parameters: int
    layers: int
    attention: int
    head: int

    def reading(self, n: float | int, behind: float | int = 0, predicted: float | int = 0) -> float:
        """Operations for n inputs behind others, `predicted` of which are turned into logits."""
        pairs = n * behind + n * (n + 1) / 2
        products = 2 * n * self.parameters + 4 * self.layers * self.attention * pairs
        return float(products + 2 * self.head * predicted)


def shape_of(lm: FrozenLM) -> Shape:
    """The shape of a frozen LM, from its parameters and its configuration."""
    config = lm.config.get_text_config()
    embedding: int = lm.embedding.weight.numel()  # type: ignore[union-attr,operator,assignment]
    head = lm.model.get_output_embeddings()  # type: ignore[operator]
    tied = head.weight is lm.embedding.weight
    parameters = sum(p.numel() for p in lm.model.parameters()) - embedding
    heads = int(getattr(config, "num_attention_heads", None) or 0)
    hidden = int(config.hidden_size)
    width = int(getattr(config, "head_dim", None) or (hidden // heads if heads else 0))
    return Shape(
        parameters - (0 if tied else head.weight.numel()),
        int(config.num_hidden_layers),
        heads * width,
        head.weight.numel(),
    )


def shape_of_latent(model: LatentModel) -> Shape:
    """The shape of a latent model: it has no head of its own, its output map is a parameter."""
    sizes = model.network.shape
    parameters = sum(p.numel() for p in model.network.parameters())
    return Shape(parameters, sizes["layers"], sizes["hidden"], 0)


def encoding(lm: FrozenLM, T: int, K: int) -> float:
    """Operations of K vectors of a sentence of T tokens.

    The summary encoder, and one of another package, counts as one pass of the LM over K parts with
    a summary embedding each, and a D x D map; a slot encoder as its own transformer.
    """
    encoder: OnePassEncoder = need_encoder(lm)
    if isinstance(encoder, SlotEncoder):
        sizes = encoder.network.shape
        own = sum(p.numel() for p in encoder.network.parameters())
        n = T + K  # in both directions: all n^2 pairs
        attention = int(sizes["layers"]) * int(sizes["hidden"])
        return float(2 * n * own + 4 * attention * n * n)
    return K * shape_of(lm).reading(T / K + 1) + 2 * K * lm.width**2


def costs(
    lm: FrozenLM, model: LatentModel, T: int, recent: int, whole: int, sentences: int
) -> dict[str, float]:
    """Operations of the next sentence of T tokens, by the ways of COSTS.

    Behind `recent` tokens of the last `sentences` sentences, or behind `whole` tokens of text. What
    stands before was read, or encoded, when it was made: its keys and values, or latents, are kept.
    """
    shape, K = shape_of(lm), model.vectors
    latent = shape_of_latent(model).reading(1, sentences)
    writing = shape.reading(K + T, predicted=T)
    return {
        "text": shape.reading(T, whole, T),
        "recent": shape.reading(T, recent, T),
        "continuous": latent,
        "written": latent + writing,
        "discretised": latent + writing + encoding(lm, T, K),
    }
