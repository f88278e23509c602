"""Attention shares and the logit lens, computed slowly and independently of memvec.lab.inside.

Shares are computed from the queries and keys that the model passes to its attention function:
scores and their softmax in float64 with numpy, for one head and one position at a time, over the
positions that it may attend to, with the layer's window, soft cap and sinks. The lens of a layer is
computed with the model cut off after that layer: the later layers are removed, so that the final
norm and the head follow directly.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from memvec.lab import slow
from memvec.model.lm import FrozenLM

WATCHED = "memvec_watched"  # name of the recording attention function in transformers


@torch.no_grad()
def attention_shares(lm: FrozenLM, vectors: Tensor, ids: Sequence[int | None]) -> list[float]:
    """For each layer, the share of attention on the vectors (K, D), mean over later positions."""
    seen: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    with _watching(lm, seen):
        slow.logits(lm, vectors, ids)
    K = len(vectors)
    return [_share(query, key, options, K) for query, key, options in seen]


def _share(query: Tensor, key: Tensor, options: dict[str, Any], K: int) -> float:
    q, k = query[0].double().cpu().numpy(), key[0].double().cpu().numpy()
    groups, window = len(q) // len(k), options.get("sliding_window") or q.shape[1]
    scale, cap = options.get("scaling") or q.shape[-1] ** -0.5, options.get("softcap")
    sinks = options.get("s_aux")  # a further score of each head, on nothing (gpt-oss)
    shares = []
    for head in range(len(q)):
        for at in range(K, q.shape[1]):
            first = max(0, at + 1 - window)
            scores = k[head // groups, first : at + 1] @ q[head, at] * scale
            scores = np.tanh(scores / cap) * cap if cap else scores
            unread = [] if sinks is None else [float(sinks[head])]
            weights = np.exp(np.append(scores, unread) - max(scores.max(), *unread, -np.inf))
            shares.append(float(weights[: max(0, K - first)].sum() / weights.sum()))
    return float(np.mean(shares))


@contextlib.contextmanager
def _watching(lm: FrozenLM, seen: list[tuple[Tensor, Tensor, dict[str, Any]]]) -> Iterator[None]:
    """Record each layer's queries, keys and options in `seen` while the context is open."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def record(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((query, key, options))
        own: Any = sys.modules[type(module).__module__]  # that of the family's own file
        return own.eager_attention_forward(module, query, key, *args, **options)

    AttentionInterface.register(WATCHED, record)
    AttentionMaskInterface.register(WATCHED, eager_mask)
    before, model = lm.config._attn_implementation, lm.model
    try:
        model.set_attn_implementation(WATCHED)  # type: ignore[operator]
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def lens(lm: FrozenLM, vectors: Tensor, ids: Sequence[int | None], token: int) -> list[list[float]]:
    """For each layer, [-log2 p of a token (bits), its rank, id of the arg-max] at the last input.

    The inputs are [vectors (K, D), ids], and the model has no layers after that one.
    """
    answers = []
    for logits in _tables(lm, vectors, ids):
        bits, _ = slow.bits_and_margins(logits[None], [token])
        above = logits > logits[token]
        answers.append([float(bits[0]), 1.0 + float(above.sum()), float(logits.argmax())])
    return answers


def may_rank(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int | None], token: int, tie: float
) -> list[tuple[float, float]]:
    """For each layer of `lens`, (how far the token's rank may differ, 1 if the arg-max may too).

    `vectors` are (K, D). Tokens whose logits are within `tie` of each other may change places.
    """
    allowed = []
    for logits in _tables(lm, vectors, ids):
        near = int((np.abs(logits - logits[token]) < tie).sum()) - 1  # without the token itself
        first, second = np.sort(logits)[:-3:-1]
        allowed.append((float(near), float(first - second < tie)))
    return allowed


def _tables(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int | None]
) -> Iterator[NDArray[np.float64]]:
    """The logits (V,) at the last input, of the model that ends with each of its layers."""
    count = int(lm.config.get_text_config().num_hidden_layers)
    for last in range(1, count + 1):
        with _shortened(lm, last, count):
            table = slow.logits(lm, vectors, ids)[-1]
        yield table


@contextlib.contextmanager
def _shortened(lm: FrozenLM, last: int, count: int) -> Iterator[None]:
    """Remove all layers of the model but the first `last` while the context is open."""
    stacks = [
        (parent, name, child)
        for parent in lm.model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    parent, name, layers = stacks[0]
    text: Any = lm.config.get_text_config()
    try:
        setattr(parent, name, layers[:last])
        text.num_hidden_layers = last
        yield
    finally:
        setattr(parent, name, layers)
        text.num_hidden_layers = count
