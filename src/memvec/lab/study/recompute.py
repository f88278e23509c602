"""The slow path of `memvec study check`: a row's columns again, from its vectors and token ids.

Nothing of the engine's, the decoder's or the certification's code is used: vectors and tokens go
through the model's own forward as `inputs_embeds`, one passage at a time without padding or cache,
one whole forward per decoded token; bits, margins and gains are summed in float64 with numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memvec.lab.protocols import PROTOCOLS
from memvec.lab.study.cells import Cell

if TYPE_CHECKING:
    from memvec.model.lm import FrozenLM

Floats = NDArray[np.float64]
RAISE = 0.05  # of the logits' spread: the least margin asked after a failed certification
SPREAD = 1e-3  # relative: the spread is measured, on whichever machine


@dataclass(frozen=True)
class Slow:
    """What the slow path finds of one row."""

    columns: dict[str, Any]  # by name of the column
    steps: tuple[int, int]  # least and most that a row with this recipe and margin can have
    spent: tuple[int, int]  # least and most for its steps
    margins: tuple[float, ...]  # margins that can have been asked
    positions: Floats  # (4, N): bits without vectors, bits with, margin with, margin without
    extra: dict[str, list[float]]  # what protocols measured besides
    ties: int  # positions whose margin with vectors is below the tie
    lm_ties: int  # the same without


def recompute(
    lm: FrozenLM,
    cell: Cell,
    row: dict[str, Any],
    vectors: Tensor,
    ids: tuple[int, ...],
    before: tuple[int, ...],
    tie: float,
) -> Slow:
    """Every measured column of a row. `vectors` (K, D) as stored; `tie`: a margin of about zero."""
    start, K = start_rule(lm, cell), cell.vectors
    given = int(start == "first-token")
    n = len(ids) - given
    front = vectors.float()
    middle = [lm.bos_id] if start == "bos" else []
    at_once = PROTOCOLS[cell.protocol].layout == "one-step"
    if at_once:
        table = one_step_logits(lm, front, n)
    else:
        table = logits(lm, front, [*middle, *ids])[-n - 1 : -1]
    bits, margin = bits_and_margins(table, ids[given:])
    head = [lm.bos_id] if lm.bos_id is not None and start != "first-token" else []
    own = logits(lm, None, [*head, *ids])[:-1][-n:]
    lm_bits, lm_margin = bits_and_margins(own, ids[len(ids) - len(own) :])
    if len(lm_bits) < n:  # no token starts a text: the first one costs log2 V
        lm_bits = np.concatenate([[math.log2(lm.vocab_size)], lm_bits])
        lm_margin = np.concatenate([[-1.0], lm_margin])
    if at_once:
        decoded = [int(token) for token in table.argmax(1)]
    else:
        decoded = greedy(lm, front, [*middle, *ids[:given]], n)
    wrong = [i for i, (a, b) in enumerate(zip(decoded, ids[given:], strict=True)) if a != b]
    right, base = margin > 0, lm_margin > 0
    h = int(row["horizon"])  # gains over the stored horizon, so that a flipped tie counts once
    margins = tuple(_margins(cell.recipe, lm.logit_spread))
    retries = _retries(margins, row["margin_asked"])
    columns = {
        "passage": hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest(),
        "tokens": len(ids),
        "predicted": n,
        "start_rule": start,
        "exact": not wrong,
        "horizon": wrong[0] if wrong else n,
        "accuracy": float(right.mean()),
        "margin": float(margin.min()),
        "lm_bits": float(lm_bits.sum()),
        "mem_bits": float(bits.sum()),
        "information_gain": float(lm_bits.sum() - bits.sum()),
        "token_gain": int(right.sum()) - int(base.sum()),
        "lm_right": int(base.sum()),
        "horizon_gain": float(lm_bits[:h].sum() - bits[:h].sum()),
        "horizon_token_gain": int(right[:h].sum()) - int(base[:h].sum()),
    }
    return Slow(
        columns,
        (retries, int(cell.recipe["steps"])),
        _spent(cell, int(row["steps"]) - retries, n, K, 0 if at_once else K - 1, start),
        margins,
        np.stack([lm_bits, bits, margin, lm_margin]),
        _extras(lm, json.loads(row["extra"]), ids, before, given, lm_bits, lm_margin),
        int((np.abs(margin) < tie).sum()),
        int((np.abs(lm_margin) < tie).sum()),
    )


def start_rule(lm: FrozenLM, cell: Cell) -> str:
    """What follows the vectors, from the recipe and the tokenizer."""
    asked = str(cell.recipe["start_rule"])
    if asked != "paper":
        return asked
    adds = lm.tokenizer is not None and lm.tokenizer("a")["input_ids"][:1] == [lm.bos_id]
    return "bos" if adds else "first-token"


def line(
    lm: FrozenLM, ids: tuple[int, ...], a: Tensor, b: Tensor, start: str, points: int
) -> tuple[list[float], list[int]]:
    """Accuracy at points from solution a to b (K, D), and how many positions are near a tie."""
    given = int(start == "first-token")
    n = len(ids) - given
    middle = [lm.bos_id] if start == "bos" else []
    accuracy, near = [], []
    for i in range(points):
        t = i / (points - 1)
        vectors = (1 - t) * a.float() + t * b.float()
        table = logits(lm, vectors, [*middle, *ids])[-n - 1 : -1]
        _, margin = bits_and_margins(table, ids[given:])
        accuracy.append(float((margin > 0).mean()))
        near.append(int((np.abs(margin) < 1e-2).sum()))
    return accuracy, near


@torch.no_grad()
def logits(lm: FrozenLM, vectors: Tensor | None, ids: list[int | None]) -> Floats:
    """(K + N, V) logits of the model's own forward on [vectors, ids], float64."""
    table = torch.tensor([[i for i in ids if i is not None]], device=lm.device, dtype=torch.long)
    if vectors is None:
        out = lm.model(input_ids=table, use_cache=False)
    else:
        front = vectors.to(lm.device, lm.dtype)[None]
        inputs = torch.cat([front, lm.embedding(table)], dim=1)
        out = lm.model(inputs_embeds=inputs, use_cache=False)
    found: Floats = out.logits[0].double().cpu().numpy()
    return found


@torch.no_grad()
def one_step_logits(lm: FrozenLM, vectors: Tensor, n: int) -> Floats:
    """(n, V) logits of the model's own forward on [e, m, ..., m], float64."""
    pair = vectors.to(lm.device, lm.dtype)
    inputs = torch.stack([pair[min(i, 1)] for i in range(n)])[None]
    found: Floats = lm.model(inputs_embeds=inputs, use_cache=False).logits[0].double().cpu().numpy()
    return found


def greedy(lm: FrozenLM, vectors: Tensor, prefix: list[int | None], n: int) -> list[int]:
    """n tokens by arg-max after [vectors, prefix], a whole forward for each."""
    found: list[int] = []
    for _ in range(n):
        found.append(int(logits(lm, vectors, [*prefix, *found])[-1].argmax()))
    return found


def bits_and_margins(table: Floats, ids: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Per position: -log2 p of the true token, and its logit minus the best other one."""
    rows, truth = np.arange(len(ids)), np.asarray(ids)
    top = table.max(1, keepdims=True)
    total = np.log(np.exp(table - top).sum(1)) + top[:, 0]
    true = table[rows, truth]
    others = table.copy()
    others[rows, truth] = -np.inf
    return (total - true) / math.log(2), true - others.max(1)


def _margins(recipe: dict[str, Any], spread: float) -> list[float]:
    """The margin asked, in logits, and what it becomes each time decoding disagrees.

    Recipes count margins in the spread of the model's logits, unless they say logits.
    """
    found = [float(recipe["margin"]) * (1.0 if recipe.get("unit") == "logits" else spread)]
    while len(found) < 24:
        found.append(max(2 * found[-1], RAISE * spread))
    return found


def _retries(margins: tuple[float, ...], asked: float) -> int:
    """How often a passage was sent back, from the margin it ended with (0 for an alien one)."""
    return next((i for i, m in enumerate(margins) if math.isclose(m, asked, rel_tol=SPREAD)), 0)


def _spent(cell: Cell, moves: int, n: int, K: int, before: int, start: str) -> tuple[int, int]:
    """Least and most forward-backward tokens of so many moves.

    A move costs the positions that counted (all n, or with a growing horizon at least the
    look-ahead), and the vectors (`before`) and the start token that stand before them.
    """
    growing = cell.recipe["schedule"] == "growing"
    # a look-ahead that narrows ends at one token
    ahead = 1 if cell.recipe["narrow_after"] else int(cell.recipe["look_ahead"]) * K
    least = min(n, ahead) if growing else n
    beside = before + (start != "vectors")
    return moves * (least + beside), moves * (n + beside)


def _extras(
    lm: FrozenLM,
    stored: dict[str, Any],
    ids: tuple[int, ...],
    before: tuple[int, ...],
    given: int,
    lm_bits: Floats,
    lm_margin: Floats,
) -> dict[str, list[float]]:
    """What protocols measured besides, as lists of numbers."""
    from memvec.lab.protocols.copy import BEFORE, BETWEEN

    found: dict[str, list[float]] = {}
    head = [lm.bos_id] if lm.bos_id is not None else []
    truth = ids[given:]

    def after(prefix: list[int]) -> list[float]:
        table = logits(lm, None, [*head, *prefix, *ids])[-len(truth) - 1 : -1]
        bits, margin = bits_and_margins(table, truth)
        return [float(bits.sum()), float((margin > 0).sum())]

    for n in stored.get("context", {}):
        found[f"context {n}"] = after(list(before[len(before) - int(n) :]))
    if stored.get("copy"):
        words = [lm.tokenize(w) if lm.tokenizer else [] for w in (BEFORE, BETWEEN)]
        found["copy"] = after([*words[0], *ids, *words[1]])
    if "needed_bits" in stored:
        p = 2.0**-lm_bits
        q = p * np.exp(-lm_margin)
        needed = np.log2(q / (1 - p + q)) - np.log2(p)
        found["needed_bits"] = [float(needed[lm_margin <= 0].sum())]
    return found
