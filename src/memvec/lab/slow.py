"""The slow, independent path: a frozen model's own forward, one passage at a time, in float64.

No code of the engine, the decoder or the certification is used: vectors and tokens go through the
model's own forward as `inputs_embeds` without padding or cache, with one whole forward per decoded
token; bits and margins are summed in float64 with numpy. `study check` recomputes the columns of a
row with it, and protocols recompute their extra measurements.

Shapes: F tokens in front of the vectors, K vectors of width D, vocabulary V, and N predicted
positions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memvec.lab import slow_space
from memvec.model.lm import FrozenLM

Floats = NDArray[np.float64]
TIE = 1e-2  # logits: with a smaller margin another order of summation may change the arg-max
TIED = float(np.finfo(np.float32).tiny)  # margin of a tie whose arg-max is the true token


@dataclass(frozen=True)
class SlowPassage:
    """A passage of a row, with the bits and margins of the model without vectors.

    `ids` are its T tokens, `before` the tokens that precede it in its text; the first `given`
    tokens are not predicted. `lm_bits` (N,) and `lm_margin` (N,) belong to the N predicted
    positions, in bits and logits; sums of bits may differ by `bits_tolerance`. `options` are those
    of the protocol. `vectors` (K, D) are the stored ones in float32; `lm` has the trigger that they
    were crammed with, and `start_rule` is their start rule.
    """

    lm: FrozenLM
    _: KW_ONLY
    ids: tuple[int, ...]
    before: tuple[int, ...]
    given: int
    lm_bits: Floats
    lm_margin: Floats
    bits_tolerance: float
    options: dict[str, Any]
    vectors: Tensor
    start_rule: str = "vectors"

    @property
    def own_bos(self) -> bool:
        """True if a predicted BOS begins the passage: in `lm_bits` it is given (0 bits, a hit)."""
        return self.given == 0 and self.ids[0] == self.lm.bos_id

    def bits_after(self, prefix: Sequence[int]) -> tuple[float, int]:
        """(bits, arg-max hits) of the predicted tokens after `prefix`, no vectors."""
        ids = self.ids[1:] if self.own_bos else self.ids
        truth = ids[self.given :]
        table = logits(self.lm, None, [*prefix, *ids], len(truth) + 1)
        table = table[-len(truth) - 1 : -1]
        bits, margin = bits_and_margins(table, truth)
        return float(bits.sum()), int((margin > 0).sum()) + self.own_bos


@torch.no_grad()
def logits(
    lm: FrozenLM, vectors: Tensor | None, ids: Sequence[int | None], keep: int = 0
) -> Floats:
    """Logits of the model's own forward on [F front tokens, vectors (K, D), ids (T,)], float64.

    The shape is (F + K + T, V). Where the vectors are keys and values in a cache, it is (T, V).
    Entries of `ids` that are None are left out. `keep`: only the last so many rows after tokens
    alone, where the model can leave out the others, which take much memory after a long text.
    """
    table = torch.tensor([[i for i in ids if i is not None]], device=lm.device, dtype=torch.long)
    if vectors is None:
        few = keep and "logits_to_keep" in inspect.signature(lm.model.forward).parameters
        options = {"logits_to_keep": keep} if few else {}
        out = lm.model(input_ids=table, use_cache=False, **options)
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
    """(len(order), V) float64 logits of the model's own forward on vectors (K, D) in this order."""
    rows = vectors.to(lm.device, lm.dtype)
    inputs = torch.stack([rows[i] for i in order])[None]
    out = lm.model(inputs_embeds=inputs, use_cache=False)
    table_of_logits: Floats = out.logits[0].double().cpu().numpy()
    return table_of_logits


def greedy(lm: FrozenLM, vectors: Tensor, prefix: Sequence[int | None], n: int) -> list[int]:
    """n tokens decoded greedily after [vectors (K, D), prefix], one whole forward per token."""
    decoded: list[int] = []
    for _ in range(n):
        decoded.append(int(logits(lm, vectors, [*prefix, *decoded])[-1].argmax()))
    return decoded


def leading(decoded: Sequence[int], truth: Sequence[int]) -> int:
    """Number of decoded tokens before the first wrong one."""
    return int((np.asarray(decoded) == np.asarray(truth)).cumprod().sum())


def bits_and_margins(table: Floats, ids: Sequence[int]) -> tuple[Floats, Floats]:
    """(-log2 p of the true token, bits; its logit minus the best other one), both (N,).

    `table` holds logits (N, V), `ids` the N true tokens.
    """
    rows, truth = np.arange(len(ids)), np.asarray(ids)
    top = table.max(1, keepdims=True)
    total = np.log(np.exp(table - top).sum(1)) + top[:, 0]
    true = table[rows, truth]
    others = table.copy()
    others[rows, truth] = -np.inf
    margin = true - others.max(1)
    tied = (margin == 0) & (table.argmax(1) == truth)  # the arg-max takes the first of equal logits
    margin[tied] = TIED
    return (total - true) / math.log(2), margin


def teacher_forced(
    lm: FrozenLM, vectors: Tensor, ids: Sequence[int], start_rule: str
) -> tuple[Floats, Floats]:
    """Bits and margins of the predicted tokens after the vectors (K, D) and the start token."""
    given = int(start_rule == "first-token")
    middle = list(lm.trigger) if start_rule == "bos" else []
    n = len(ids) - given
    table = logits(lm, vectors.float(), [*middle, *ids])[-n - 1 : -1]
    return bits_and_margins(table, tuple(ids)[given:])
