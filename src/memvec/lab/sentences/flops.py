"""Floating-point operations of a sentence, computed from shapes.

A multiply-add is two operations. A causal LM has `parameters` in its blocks, L layers, attention of
width A = heads x head width, and an output head of H x V numbers. To read n inputs after c others
whose keys and values are cached, it needs

    2 n parameters + 4 L A (n c + n (n + 1) / 2),  and 2 H V for each token that it predicts.

The attention's term counts its two products (queries with keys, weights with values) over the pairs
of positions. Norms, activations and the softmax are left out, as usual; models without attention
have A = 0. The same formula counts the latent model, which reads one input after the others.
"""

from __future__ import annotations

from typing import NamedTuple

from memvec.companions.encoder import OnePassEncoder
from memvec.encoders.adapted import AdaptedEncoder
from memvec.encoders.slots import SlotEncoder
from memvec.lab.sentences.latents import need_encoder
from memvec.lab.sentences.model import LatentModel
from memvec.model.configuration import setting
from memvec.model.lm import FrozenLM

COSTS = {
    "text": "token by token, after all text before that fits",
    "recent": "token by token, after the text of the last sentences",
    "continuous": "predicted latent, nothing written",
    "written": "predicted latent, written as a sentence",
    "discretised": "predicted latent, written and encoded again",
}


class Shape(NamedTuple):
    """A model's sizes in the formula: block parameters, L, A, and the head's H x V."""

    parameters: int
    layers: int
    attention: int
    head: int

    def reading(self, n: float | int, after: float | int = 0, predicted: float | int = 0) -> float:
        """Operations for n inputs after `after` others; `predicted` outputs become logits."""
        pairs = n * after + n * (n + 1) / 2
        products = 2 * n * self.parameters + 4 * self.layers * self.attention * pairs
        return float(products + 2 * self.head * predicted)


def shape_of(lm: FrozenLM) -> Shape:
    """The shape of a frozen LM, from its parameters and its configuration."""
    config = lm.config.get_text_config()
    embedding: int = lm.embedding.weight.numel()  # type: ignore[union-attr,operator,assignment]
    head = lm.model.get_output_embeddings()  # type: ignore[operator]
    tied = head.weight is lm.embedding.weight
    parameters = sum(p.numel() for p in lm.model.parameters()) - embedding
    heads = int(setting(config, "num_attention_heads") or 0)
    hidden = int(config.hidden_size)
    width = int(setting(config, "head_dim") or (hidden // heads if heads else 0))
    return Shape(
        parameters - (0 if tied else head.weight.numel()),
        int(config.num_hidden_layers),
        heads * width,
        head.weight.numel(),
    )


def shape_of_latent(model: LatentModel) -> Shape:
    """The shape of a latent model, whose output map counts among its parameters."""
    sizes = model.network.shape
    parameters = sum(p.numel() for p in model.network.parameters())
    return Shape(parameters, sizes["layers"], sizes["hidden"], 0)


def encoding(lm: FrozenLM, T: int, K: int) -> float:
    """Operations of K vectors of a sentence of T tokens.

    The summary encoder, and one of another package, counts as one pass of the LM over K parts with
    a summary embedding each, and a D x D map. An adapted encoder reads all parts in one pass, in
    which its adapters add products to those of the LM; a slot encoder is its own transformer.
    """
    encoder: OnePassEncoder = need_encoder(lm)
    if isinstance(encoder, SlotEncoder):
        sizes = encoder.network.shape
        parameters = sum(p.numel() for p in encoder.network.parameters())
        n = T + K  # in both directions: all n^2 pairs
        attention = int(sizes["layers"]) * int(sizes["hidden"])
        return float(2 * n * parameters + 4 * attention * n * n)
    if isinstance(encoder, AdaptedEncoder):
        network, n = encoder.network, T + K
        adapters = sum(p.numel() for p in network.adapters.parameters())
        return shape_of(lm).reading(n) + 2 * n * adapters + 2 * K * network.map.weight.numel()
    return K * shape_of(lm).reading(T / K + 1) + 2 * K * lm.width**2


def costs(
    lm: FrozenLM, model: LatentModel, T: int, recent: int, whole: int, sentences: int
) -> dict[str, float]:
    """Operations of the next sentence of T tokens, by the ways of COSTS.

    The sentence follows `recent` tokens of the last `sentences` sentences, or `whole` tokens of
    text. The keys and values, or the latents, of the earlier text are cached and not counted.
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
