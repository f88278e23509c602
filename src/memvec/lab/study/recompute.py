"""A row's columns again, the slow way (memvec.lab.slow), from its vectors and token ids."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memvec.cramming.starts import view_for
from memvec.lab import slow
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.slow import SlowPassage
from memvec.lab.study.cells import Cell
from memvec.model.lm import FrozenLM

Floats = NDArray[np.float64]
MIN_RAISED = 0.05  # smallest margin after a failed certification, in spreads of the logits
SPREAD = 1e-3  # relative tolerance of margins: each machine measures the logits' spread


@dataclass(frozen=True, kw_only=True)
class Slow:
    """The recomputation of one row."""

    columns: dict[str, Any]  # by name of the column
    steps: tuple[int, int]  # range that a row with this recipe and margin can have
    spent: tuple[int, int]  # range for its steps
    margins: tuple[float, ...]  # possible values of `margin_asked`, logits
    positions: Floats  # (4, N): bits without vectors, bits with, margin with, margin without
    passage: SlowPassage  # for the protocol's extra measurements
    ties: int  # positions whose margin with vectors is below the tie
    lm_ties: int  # the same without


def recompute(
    lm: FrozenLM,
    cell: Cell,
    row: dict[str, Any],
    *,
    vectors: Tensor,
    ids: tuple[int, ...],
    before: tuple[int, ...],
    tie: float,
    bits_limit: float,
) -> Slow:
    """Every measured column of a row, from its vectors (K, D) as stored.

    `tie` is a margin of about zero, logits; `bits_limit` how far sums may differ, bits per token.
    """
    start_rule = start_rule_of(lm, cell)
    lm = view_for(lm, cell.to_recipe())
    given = int(start_rule == "first-token")
    n, front = len(ids) - given, vectors.float()
    after = _with_vectors(lm, cell, front, ids, start_rule)
    lm_bits, lm_margin = _alone(lm, ids, start_rule)
    passage = SlowPassage(
        lm,
        ids=ids,
        before=before,
        given=given,
        lm_bits=lm_bits,
        lm_margin=lm_margin,
        bits_tolerance=bits_limit * n,
        options=cell.options,
        vectors=front,
        start_rule=start_rule,
    )
    margins = tuple(_margins(cell.recipe, lm.logit_spread))
    retries = _retries(margins, row["margin_asked"])
    between = len(lm.trigger) if start_rule == "bos" else given
    return Slow(
        columns=_columns(passage, after, int(row["horizon"])),
        steps=(retries, int(cell.recipe["steps"])),
        spent=_spent(
            cell,
            int(row["steps"]) - retries,
            n,
            before=after.further_inputs,
            between=between,
            front=len(lm.front),
        ),
        margins=margins,
        positions=np.stack([lm_bits, after.bits, after.margin, lm_margin]),
        passage=passage,
        ties=int((np.abs(after.margin) < tie).sum()),
        lm_ties=int((np.abs(lm_margin) < tie).sum()),
    )


class _Decoded(NamedTuple):
    """A passage after its vectors, N predicted tokens."""

    bits: Floats  # (N,)
    margin: Floats  # (N,), logits
    decoded: list[int]  # N token ids
    further_inputs: int  # inputs of a forward pass beyond one per predicted token


def _columns(passage: SlowPassage, after: _Decoded, horizon: int) -> dict[str, Any]:
    """The measured columns; gains over the stored `horizon`, so that a flipped tie counts once."""
    ids, n, h = passage.ids, len(after.decoded), horizon
    leading = slow.leading(after.decoded, ids[passage.given :])
    bits, lm_bits = after.bits, passage.lm_bits
    right, base = after.margin > 0, passage.lm_margin > 0
    return {
        "passage": hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest(),
        "tokens": len(ids),
        "predicted": n,
        "start_rule": passage.start_rule,
        "exact": leading == n,
        "horizon": leading,
        "accuracy": float(right.mean()),
        "margin": float(after.margin.min()),
        "lm_bits": float(lm_bits.sum()),
        "mem_bits": float(bits.sum()),
        "information_gain": float(lm_bits.sum() - bits.sum()),
        "token_gain": int(right.sum()) - int(base.sum()),
        "lm_right": int(base.sum()),
        "horizon_gain": float(lm_bits[:h].sum() - bits[:h].sum()),
        "horizon_token_gain": int(right[:h].sum()) - int(base[:h].sum()),
    }


def _with_vectors(
    lm: FrozenLM, cell: Cell, front: Tensor, ids: tuple[int, ...], start_rule: str
) -> _Decoded:
    """Bits, margins and free decoding after the vectors `front` (K, D)."""
    given = int(start_rule == "first-token")
    n = len(ids) - given
    order = protocol_of(cell.protocol).inputs_at_once(n, cell.length, cell.options)
    if order is not None:
        table = slow.one_step_logits(lm, front, order)[-n:]
        bits, margin = slow.bits_and_margins(table, ids[given:])
        decoded = [int(token) for token in table.argmax(1)]
        return _Decoded(bits, margin, decoded, len(order) - n)
    bits, margin = slow.teacher_forced(lm, front, ids, start_rule)
    middle = list(lm.trigger) if start_rule == "bos" else []
    decoded = slow.greedy(lm, front, [*middle, *ids[:given]], n)
    # The start token is counted separately.
    before = -1 if lm.reading.space.startswith("prefix") else len(lm.front) + cell.vectors - 1
    return _Decoded(bits, margin, decoded, before)


def _alone(lm: FrozenLM, ids: tuple[int, ...], start_rule: str) -> tuple[Floats, Floats]:
    """Bits and margins (N,) of the model without vectors."""
    n = len(ids) - int(start_rule == "first-token")
    if start_rule != "first-token" and ids[0] == lm.bos_id:  # the passage's BOS is given
        table = slow.logits(lm, None, list(ids))[:-1]
        lm_bits, lm_margin = slow.bits_and_margins(table, ids[1:])
        return np.concatenate([[0.0], lm_bits]), np.concatenate([[1.0], lm_margin])
    head = [lm.bos_id] if lm.bos_id is not None and start_rule != "first-token" else []
    table = slow.logits(lm, None, [*head, *ids])[:-1][-n:]
    lm_bits, lm_margin = slow.bits_and_margins(table, ids[len(ids) - len(table) :])
    if len(lm_bits) < n:  # without a start token the first one costs log2 V
        lm_bits = np.concatenate([[math.log2(lm.vocab_size)], lm_bits])
        lm_margin = np.concatenate([[-1.0], lm_margin])
    return lm_bits, lm_margin


def start_rule_of(lm: FrozenLM, cell: Cell) -> str:
    """The start rule of a cell, from its recipe and the tokenizer."""
    rule = str(cell.recipe["start_rule"])
    if rule != "paper":
        return rule
    adds = lm.tokenizer is not None and lm.tokenizer("a")["input_ids"][:1] == [lm.bos_id]
    return "bos" if adds else "first-token"


def _margins(recipe: dict[str, Any], spread: float) -> list[float]:
    """The recipe's margin in logits, and its values after each failed certification.

    Recipes give margins in spreads of the model's logits, unless their unit is logits.
    """
    margins = [float(recipe["margin"]) * (1.0 if recipe.get("unit") == "logits" else spread)]
    while len(margins) < 24:
        margins.append(max(2 * margins[-1], MIN_RAISED * spread))
    return margins


def _retries(margins: tuple[float, ...], margin: float) -> int:
    """Number of failed certifications, from the final margin; 0 for an unknown margin."""
    return next((i for i, m in enumerate(margins) if math.isclose(m, margin, rel_tol=SPREAD)), 0)


def _spent(
    cell: Cell, moves: int, n: int, *, before: int, between: int, front: int
) -> tuple[int, int]:
    """(minimum, maximum) of the forward-backward tokens of `moves` optimiser steps.

    A step costs the positions that counted (all n with the schedule 'whole', at least the
    look-ahead with one that never narrows, else at least one), the vectors and the tokens in front
    of them (`before`), the tokens between vectors and passage (`between`), and the tokens of the
    second loss: the vectors and a query. With the second loss, the `front` tokens may have been
    read once for all steps, and the loss of the passage may have been computed only every
    `objective_every` steps.
    """
    schedule = cell.recipe["schedule"]
    steady = schedule == "growing" and not cell.recipe["narrow_after"]
    ahead = int(cell.recipe["look_ahead"]) * cell.vectors if steady else 1
    min_positions = n if schedule == "whole" else min(n, ahead)
    beside = before + between
    if cell.recipe.get("term", "none") != "use":
        return moves * (min_positions + beside), moves * (n + beside)
    query = before + int(cell.recipe["query_tokens"])
    passage_moves = -(-moves // int(cell.recipe.get("objective_every", 1)))
    min_spent = moves * (query - front) + passage_moves * (min_positions + beside - front)
    return min_spent, moves * (query + n + beside)
