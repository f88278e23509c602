"""The slow, independent path: a frozen model's own forward, one passage at a time, in float64.

Nothing of the engine's, the decoder's or the certification's code is used: vectors and tokens go
through the model's own forward as `inputs_embeds` without padding or cache, with one whole forward
per decoded token; bits and margins are summed in float64 with numpy. `study check` recomputes
columns with it, and protocols recompute what they measured besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memvec.lab import slow_space
from memvec.model.lm import FrozenLM

Floats = NDArray[np.float64]
TIE = 1e-2  # logits: below, an arg-max may flip when sums are taken in another order
TIED = float(np.finfo(np.float32).tiny)  # margin of a tie that the arg-max gets right


@dataclass(frozen=True)
class SlowPassage:
    """A passage of a row, and what the slow path computed of the model alone.

    `ids` are its T tokens, `before` the real tokens in front of it; the first `given` tokens are
    not predicted. `lm_bits` and `lm_margin` (N,) are of the N predicted positions, in bits and
    logits; sums of bits may differ by `bits_tolerance`. `options` are the protocol's. `vectors`
    (K, D) are as stored, in float32; `lm` has the trigger that they were crammed with.
    """

    lm: FrozenLM
    ids: tuple[int, ...]
    before: tuple[int, ...]
    given: int
    lm_bits: Floats
    lm_margin: Floats
    bits_tolerance: float
    options: dict[str, Any]
    vectors: Tensor

    def bits_after(self, prefix: Sequence[int]) -> tuple[float, int]:
        """(bits, arg-max hits) of the predicted tokens after `prefix`, no vectors."""
        truth = self.ids[self.given :]
        table = logits(self.lm, None, [*prefix, *self.ids])[-len(truth) - 1 : -1]
        bits, margin = bits_and_margins(table, truth)
        return float(bits.sum()), int((margin > 0).sum())


@torch.no_grad()
def logits(lm: FrozenLM, vectors: Tensor | None, ids: Sequence[int | None]) -> Floats:
    """(F + K + N, V) logits of the model's own forward on [front, vectors, ids (N,)], float64.

    (N, V) behind the keys and values of a space.
    """
    table = torch.tensor([[i for i in ids if i is not None]], device=lm.device, dtype=torch.long)
    if vectors is None:
        out = lm.model(input_ids=table, use_cache=False)
    else:
        front, options = slow_space.front(lm, vectors)
        inputs = lm.embed(table)
        if front is not None:
            front = torch.cat([first_rows(lm), front.to(lm.device, lm.dtype)])
            inputs = torch.cat([front[None], inputs], dim=1)
        out = lm.model(inputs_embeds=inputs, **options)
    table_of_logits: Floats = out.logits[0].double().cpu().numpy()
    return table_of_logits


def first_rows(lm: FrozenLM) -> Tensor:
    """The embeddings (F, D) of the tokens in front of the vectors."""
    return lm.embed(torch.tensor(list(lm.front), dtype=torch.long, device=lm.device))


@torch.no_grad()
def one_step_logits(lm: FrozenLM, vectors: Tensor, order: Sequence[int]) -> Floats:
    """(N, V) logits of the model's own forward on vectors (K, D) in this order, float64."""
    rows = vectors.to(lm.device, lm.dtype)
    inputs = torch.stack([rows[i] for i in order])[None]
    out = lm.model(inputs_embeds=inputs, use_cache=False)
    table_of_logits: Floats = out.logits[0].double().cpu().numpy()
    return table_of_logits


def greedy(lm: FrozenLM, vectors: Tensor, prefix: Sequence[int | None], n: int) -> list[int]:
    """n tokens by arg-max after [vectors, prefix], a whole forward for each."""
    decoded: list[int] = []
    for _ in range(n):
        decoded.append(int(logits(lm, vectors, [*prefix, *decoded])[-1].argmax()))
    return decoded


def bits_and_margins(table: Floats, ids: Sequence[int]) -> tuple[Floats, Floats]:
    """Per position: -log2 p of the true token, and its logit minus the best other one."""
    rows, truth = np.arange(len(ids)), np.asarray(ids)
    top = table.max(1, keepdims=True)
    total = np.log(np.exp(table - top).sum(1)) + top[:, 0]
    true = table[rows, truth]
    others = table.copy()
    others[rows, truth] = -np.inf
    margin = true - others.max(1)
    tied = (margin == 0) & (table.argmax(1) == truth)  # the arg-max takes the first of equals
    margin[tied] = TIED
    return (total - true) / math.log(2), margin


def teacher_forced(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int], start: str
) -> tuple[Floats, Floats]:
    """Bits and margins of the predicted tokens after the vectors (K, D) and the start token."""
    given = int(start == "first-token")
    middle = list(lm.trigger) if start == "bos" else []
    n = len(ids) - given
    table = logits(lm, vectors.float(), [*middle, *ids])[-n - 1 : -1]
    return bits_and_margins(table, tuple(ids)[given:])
