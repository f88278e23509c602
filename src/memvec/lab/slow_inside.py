"""Attention shares and the logit lens, the slow and independent way (beside memvec.lab.slow).

Shares come from queries and keys as the model hands them to its attention function: scores and
their softmax in float64 with numpy, one head and one position at a time, of what a position may
see. The lens of a layer is the answer of the model that ends behind it: the same model with its
other layers taken out, so that its own norm and head follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memvec.lab import slow
from memvec.model.lm import FrozenLM

WATCHED = "memvec_watched"  # the name under which transformers knows the function that looks on


@torch.no_grad()
def attention_shares(lm: FrozenLM, vectors: Tensor, ids: Sequence[int | None]) -> list[float]:
    """Share of attention on the vectors (K, D) of all positions behind them, for each layer."""
    seen: list[tuple[Tensor, Tensor, float]] = []
    with _watching(lm, seen):
        slow.logits(lm, vectors, ids)
    K = len(vectors)
    return [_share(query, key, scale, K) for query, key, scale in seen]


def _share(query: Tensor, key: Tensor, scale: float, K: int) -> float:
    q, k = query[0].double().cpu().numpy(), key[0].double().cpu().numpy()
    groups = len(q) // len(k)
    shares = []
    for head in range(len(q)):
        for at in range(K, q.shape[1]):
            scores = k[head // groups, : at + 1] @ q[head, at] * scale
            weights = np.exp(scores - scores.max())
            shares.append(float(weights[:K].sum() / weights.sum()))
    return float(np.mean(shares))


@contextlib.contextmanager
def _watching(lm: FrozenLM, seen: list[tuple[Tensor, Tensor, float]]) -> Iterator[None]:
    """While this holds, each layer's queries, keys and scale are noted on their way."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kw: Any):  # type: ignore[no-untyped-def]
        scale = kw.get("scaling") or query.shape[-1] ** -0.5
        seen.append((query, key, float(scale)))
        return sdpa_attention_forward(module, query, key, value, *rest, **kw)

    AttentionInterface.register(WATCHED, look)
    AttentionMaskInterface.register(WATCHED, sdpa_mask)
    before, model = lm.config._attn_implementation, lm.model
    try:
        model.set_attn_implementation(WATCHED)  # type: ignore[operator]
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def lens(lm: FrozenLM, vectors: Tensor, ids: Sequence[int | None], token: int) -> list[list[float]]:
    """For each layer, [-log2 p of a token, its rank, the arg-max] at the last of [vectors, ids], of
    the model without the layers behind."""
    found = []
    count = int(lm.config.get_text_config().num_hidden_layers)
    for last in range(1, count + 1):
        with _shortened(lm, last, count):
            table = slow.logits(lm, vectors, ids)[-1:]
        bits, _ = slow.bits_and_margins(table, [token])
        above = table[0] > table[0, token]
        found.append([float(bits[0]), 1.0 + float(above.sum()), float(table[0].argmax())])
    return found


@contextlib.contextmanager
def _shortened(lm: FrozenLM, last: int, count: int) -> Iterator[None]:
    """While this holds, the model has its first `last` layers only."""
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
