"""A slow, independent recomputation of every column from the stored vectors, and a comparison.

Three kinds of columns (a test sees that every column is of one of them):

- recomputed from vectors and token ids (`recompute.py`);
- costs that the recipe and the margin bound: the status, the steps, the tokens of so many steps,
  the margin;
- records of what happened, which nothing can recompute: these only the row's seal holds. The gain
  at the least loss is one of them, and no stored vectors may exceed it.

Another order of the same sums flips an arg-max whose margin is about zero, so counts may differ by
as many positions as have a margin below `TIE`; everything else must agree to `BITS` a token.
Also compared: the bits and margins of every position, a cell's columns with its settings and key,
a passage's text with its tokens, what a protocol measured besides, and what it measured of pairs of
restarts; a protocol recomputes its own measurements.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from memvec.errors import MemvecError
from memvec.lab.protocols.lookup import protocol_of
from memvec.lab.protocols.protocol import Compared, Protocol
from memvec.lab.sources import SOURCES, Source
from memvec.lab.study.cells import Cell
from memvec.lab.study.check_pairs import MAX_PAIRS, check_pairs
from memvec.lab.study.export import read_rows
from memvec.lab.study.recompute import SPREAD, Slow, recompute
from memvec.lab.study.store import Store
from memvec.lab.study.stored_model import by_model, cell_of, model_of
from memvec.machine import plain_torch
from memvec.model.lm import FrozenLM
from memvec.model.mixed import BFLOAT16_AUTOCAST
from memvec.passages.passage import ids_hash
from memvec.writing import read_json

TIE = {"float32": 2e-3, "bfloat16": 0.3, "float16": 0.05, BFLOAT16_AUTOCAST: 0.3}  # logits
BITS = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, BFLOAT16_AUTOCAST: 0.1}  # bits a token


@plain_torch()
def check_study(
    folder: str | os.PathLike[str],
    *,
    moved: Mapping[str, str] | None = None,
    sample: int = 0,
    device: str = "auto",
    load: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare stored and recomputed columns: {'rows', 'worst' per column, 'wrong' sentences,
    'unchecked' sentences about what a protocol measured and does not recompute}.

    Rows of cells that the last spec does not have are left out: their model may be gone.
    `moved`: where models of the study are now, by their names. `sample`: so many rows spread over
    the study; 0: all. `load`: further arguments of `load_lm`.
    Raises MemvecError if the study has no rows, and if the model is not the study's.
    """
    wrong: list[str] = []
    worst: dict[str, float] = {}
    with Store(folder) as store:
        strays = store.db.execute(
            "SELECT cell FROM rows WHERE cell NOT IN (SELECT cell FROM cells)"
        ).fetchall()
        if strays:
            wrong.append(f"{len(strays)} rows name a cell that the study does not have.")
        frame = _sampled(store, sample)
        if frame.empty and not strays:
            raise MemvecError(f"the study in {store.folder} has no rows yet: run it first.")
        for of, rows in by_model(store, frame):
            described, _ = cell_of(store, str(rows.iloc[0]["cell"]))
            lm = model_of(described, of.name, moved=moved, device=device, load=load)
            for key, group in rows.groupby("cell", sort=False):
                _, cell = cell_of(store, str(key))
                wrong += _check_cell(store, str(key), cell)
                if cell.key != key:  # nothing can be computed by settings that were changed
                    continue
                for row in group.to_dict("records"):
                    wrong += _check_row(lm, store, cell, row, dtype=described["dtype"], worst=worst)
            wrong += check_pairs(lm, store, of, MAX_PAIRS if sample else 0, worst)
            del lm  # the next model is loaded without it
    unchecked = [sentence for name in frame["protocol"].unique() for sentence in _unchecked(name)]
    return {"rows": len(frame), "worst": worst, "wrong": wrong, "unchecked": unchecked}


def _unchecked(name: str) -> list[str]:
    """A sentence about the columns that a protocol adds and does not compute again."""
    protocol = protocol_of(name)
    if protocol.extras and not _is_recomputed(protocol):
        columns = ", ".join(protocol.extras)
        reason = f"protocol '{name}' has no recompute"
    elif protocol.not_recomputed:
        columns = ", ".join(protocol.not_recomputed)
        reason = f"protocol '{name}' does not repeat all that it measures"
    else:
        return []
    return [f"{reason}: the values of {columns} were not computed again."]


def _is_recomputed(protocol: Protocol) -> bool:
    """True if the protocol computes columns of its own again."""
    return type(protocol).recompute is not Protocol.recompute


def _sampled(store: Store, sample: int) -> pd.DataFrame:
    """Rows of the cells that the last spec has; `sample` of them spread over the study, 0: all."""
    planned = store.db.execute("SELECT cell FROM cells WHERE planned > 0").fetchall()
    frame = read_rows(store)
    # By cells, not by `planned` of a row: that depends on its number, which may be falsified.
    frame = frame[frame["cell"].isin([cell for (cell,) in planned])]
    if sample and sample < len(frame):
        frame = frame.iloc[np.linspace(0, len(frame) - 1, sample).astype(int)]
    return frame


def _check_cell(store: Store, key: str, cell: Cell) -> list[str]:
    """Sentences about a cell whose columns or key differ from its settings."""
    wrong = [] if cell.key == key else [f"cell {key}: its settings are those of cell {cell.key}."]
    names = ("protocol", "model", "source", "length", "vectors", "seed", "storage")
    expected = {name: getattr(cell, name) for name in names}
    kind = SOURCES.get(str(cell.source_settings.get("kind")), Source)
    expected["random_text"] = int(kind.random_text)
    stored = store.db.execute(
        f"SELECT {', '.join(expected)} FROM cells WHERE cell=?", (key,)
    ).fetchone()
    for (name, value), found in zip(expected.items(), stored, strict=True):
        if found != value:
            wrong.append(f"cell {key}: {name} is stored as {found} and its settings say {value}.")
    return wrong


def _check_row(
    lm: FrozenLM,
    store: Store,
    cell: Cell,
    row: dict[str, Any],
    *,
    dtype: str,
    worst: dict[str, float],
) -> list[str]:
    """Sentences about one row; updates the largest difference of each column in `worst`."""
    place = f"cell {row['cell']} ({row['protocol']}, {row['source']}), passage {row['number']}"
    try:
        vectors, positions = store.tensors(row["cell"], row["number"])
        kept = store.passage(row["cell"], row["number"])
    except MemvecError as error:
        return [f"{place}: {error}"]
    ids = kept.ids
    if (hashed := ids_hash(ids)) != row["passage"]:
        return [f"{place}: {_differs('passage', row['passage'], hashed)}"]
    if not all(0 <= i < lm.vocab_size for i in ids):
        return [f"{place}: a token of the passage is not one of {lm.name}."]
    slow = recompute(
        lm,
        cell,
        row,
        vectors=vectors,
        ids=ids,
        before=kept.before,
        tie=TIE[dtype],
        bits_limit=BITS[dtype],
    )
    wrong = [*_compare(row, slow, dtype, worst), *_positions(slow, positions.numpy(), dtype, worst)]
    wrong += _extra(cell.protocol, row["extra"], slow, worst)
    wrong = [f"{place}: {sentence}" for sentence in wrong]
    numbers = slow.passage.lm.numbers
    if vectors.shape != (cell.vectors, numbers) or not torch.isfinite(vectors.float()).all():
        wrong.append(f"{place}: vectors are not {cell.vectors} x {numbers} finite numbers.")
    if not store.sealed(row["cell"], row["number"]):
        wrong.append(f"{place}: the row was changed after it was written.")
    if lm.tokenizer is not None:
        same = kept.text == lm.text(ids).encode("utf-8", "surrogatepass")
        if not same or kept.pieces != [lm.text([i]) for i in ids]:
            wrong.append(f"{place}: the passage's text is not that of its tokens.")
    return wrong


def _compare(row: dict[str, Any], slow: Slow, dtype: str, worst: dict[str, float]) -> list[str]:
    """Sentences about columns that disagree."""
    n, wrong = int(slow.columns["predicted"]), []
    low, high = _horizons(slow, dtype)
    for name, limit in _allowed(slow, dtype).items():
        stored = row[name]
        gap = abs(float(stored) - float(slow.columns[name])) if stored is not None else math.inf
        if math.isfinite(gap):
            worst[name] = max(worst.get(name, 0.0), gap)
        # Whatever ties do, a horizon lies within these and a whole one is exact.
        whole_is_exact = (row["horizon"] == n) == bool(row["exact"])
        possible = name != "horizon" or (low <= stored <= high and whole_is_exact)
        if not gap <= limit or not possible:
            wrong.append(_differs(name, stored, slow.columns[name]))
    for name in ("passage", "start_rule"):
        if row[name] != slow.columns[name]:
            wrong.append(_differs(name, row[name], slow.columns[name]))
    return wrong + _costs(row, slow, dtype)


def _allowed(slow: Slow, dtype: str) -> dict[str, float | int]:
    """How far each column may differ from its recomputation."""
    ties, lm_ties = slow.ties, slow.lm_ties
    n = int(slow.columns["predicted"])
    loose = BITS[dtype] * n
    low, high = _horizons(slow, dtype)
    return {
        "tokens": 0,
        "predicted": 0,
        "lm_bits": loose,
        "mem_bits": loose,
        "information_gain": 2 * loose,
        "horizon_gain": 2 * loose,
        "margin": TIE[dtype],
        "accuracy": ties / n + 1e-9,
        "token_gain": ties + lm_ties,
        "lm_right": lm_ties,
        "horizon_token_gain": ties + lm_ties,
        "horizon": high - low,
        "exact": int(low < high == n),
    }


def _horizons(slow: Slow, dtype: str) -> tuple[int, int]:
    """The smallest and the largest horizon that ties allow.

    Until its first error, free decoding is teacher forcing: a flipped tie ends it, or the first
    token that no tie explains.
    """
    margins, horizon = slow.positions[2], int(slow.columns["horizon"])
    first, last = (int(np.argmax([*(margins < m), True])) for m in (TIE[dtype], -TIE[dtype]))
    return min(first, horizon), max(last, horizon)


def _costs(row: dict[str, Any], slow: Slow, dtype: str) -> list[str]:
    """Costs and status against what the recipe, the margin and the vectors allow."""
    wrong = []
    for name, (low, high) in (("steps", slow.steps), ("spent", slow.spent)):
        if not low <= row[name] <= high:
            possible = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            wrong.append(_differs(name, row[name], possible))
    if not any(math.isclose(row["margin_asked"], m, rel_tol=SPREAD) for m in slow.margins):
        wrong.append(
            _differs("margin_asked", row["margin_asked"], f"one of {slow.margins[:4]} ...")
        )
    best_gain, stored_gain = row["least_loss_gain"], slow.columns["information_gain"]
    if best_gain is not None and best_gain < stored_gain - 2 * BITS[dtype] * int(
        slow.columns["predicted"]
    ):
        wrong.append(_differs("least_loss_gain", best_gain, f"at least {stored_gain:g}"))
    met = slow.columns["margin"] >= row["margin_asked"] - TIE[dtype]
    if row["status"] not in ("done", "budget", "not-finite") or (
        row["status"] == "done" and not met
    ):
        wrong.append(_differs("status", row["status"], "a passage whose margins are not met"))
    return wrong


def _positions(slow: Slow, positions: Any, dtype: str, worst: dict[str, float]) -> list[str]:
    """Sentences about stored bits and margins of positions that disagree."""
    if positions.shape != slow.positions.shape:
        return [f"{positions.shape[1]} positions are stored of {slow.positions.shape[1]}."]
    wrong = []
    kinds = ((0, BITS[dtype] * 50), (1, BITS[dtype] * 50), (2, TIE[dtype]), (3, TIE[dtype]))
    names = ("bits without vectors", "bits with", "margin with", "margin without")
    for (i, limit), name in zip(kinds, names, strict=True):
        gap = float(np.abs(positions[i] - slow.positions[i]).max())
        worst["positions"] = max(worst.get("positions", 0.0), gap)
        if not gap <= limit:
            wrong.append(f"positions ({name}) differ by {gap:.3g}.")
    return wrong


def _extra(protocol: str, stored: str, slow: Slow, worst: dict[str, float]) -> list[str]:
    """Sentences about extra measurements that disagree with the protocol's recomputation."""
    maker, wrong = protocol_of(protocol), []
    try:
        extra = read_json(stored)
        if not isinstance(extra, dict) or extra.keys() != maker.extras.keys():
            raise ValueError
        compared = list(maker.recompute(slow.passage, extra))
        if not all(isinstance(c, Compared) for c in compared):
            raise TypeError("it gives other values than Compared")
        repeated = [value for name, value in extra.items() if name not in maker.not_recomputed]
        measured = [value for value in repeated if value not in (None, [], {})]
        if measured and not compared and _is_recomputed(maker):
            raise ValueError("it compares nothing")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f", or its recompute fails ({type(error).__name__}: {error})" if str(error) else ""
        shown = f"{stored:.200}"
        return [f"extra is stored as {shown}, which protocol '{protocol}' does not write{why}."]
    for c in compared:
        pairs = zip(c.stored, c.recomputed, strict=False)
        gaps = [abs(float(a) - float(b)) for a, b in pairs]
        key = c.name.split()[0]
        worst[key] = max([worst.get(key, 0.0), *(g for g in gaps[:1] if math.isfinite(g))])
        same = len(c.stored) == len(c.recomputed) <= len(c.allowed)
        if not same or any(not g <= limit for g, limit in zip(gaps, c.allowed, strict=False)):
            wrong.append(_differs(c.name, list(c.stored), list(c.recomputed)))
    return wrong


def _differs(name: str, stored: Any, recomputed: Any) -> str:
    return f"{name} is stored as {stored} and recomputed as {recomputed}."
