"""A slow, independent recomputation of every column from the stored vectors.

Nothing of the engine's or the certification's measurement is used: vectors and tokens go through
the model's own forward as `inputs_embeds`, one passage at a time, one whole forward per decoded
token; bits, margins and gains are summed in float64 with numpy.

Another order of the same sums flips an arg-max whose margin is about zero, so counts may differ by
as many positions as have a margin below `TIE`; everything else must agree to `BITS` a token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memvec.decoding import decode_ids, first_error
from memvec.errors import MemvecError
from memvec.study.export import read_rows
from memvec.study.store import Store

if TYPE_CHECKING:
    from memvec.lm import FrozenLM

TIE = {"float32": 2e-3, "bfloat16": 0.3, "float16": 0.05}  # logits
BITS = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # bits a token

Floats = NDArray[np.float64]


def check_study(
    folder: Path, *, model: str | None = None, sample: int = 0, device: str = "auto"
) -> dict[str, Any]:
    """Compare stored and recomputed columns: {'rows', 'worst' per column, 'wrong' sentences}."""
    from memvec.lm import load_lm

    wrong: list[str] = []
    worst: dict[str, float] = {}
    checked = 0
    with Store(folder) as store:
        frame = read_rows(store)
        if sample and sample < len(frame):
            frame = frame.iloc[np.linspace(0, len(frame) - 1, sample).astype(int)]
        for name, rows in frame.groupby("model", sort=False):
            settings = json.loads(
                store.db.execute(
                    "SELECT description FROM cells WHERE cell=?", (rows.iloc[0]["cell"],)
                ).fetchone()[0]
            )
            lm = load_lm(
                model or str(name),
                revision=settings["revision"] if model is None else None,
                device=device,
                dtype=settings["dtype"],
            )
            if lm.fingerprint.weights != settings["weights"]:
                raise MemvecError(f"{lm.name} has other weights than the study's {name}.")
            for row in rows.to_dict("records"):
                found = recompute(lm, store, row)
                checked += 1
                wrong += _compare(row, found, settings["dtype"], worst)
    return {"rows": checked, "worst": worst, "wrong": wrong}


def recompute(lm: FrozenLM, store: Store, row: dict[str, Any]) -> dict[str, Any]:
    """Every measured column of a row, from its vectors and its token ids."""
    vectors, positions = store.tensors(row["cell"], row["number"])
    _, ids, before = store.passage(row["passage"])
    start, V = row["start_rule"], lm.vocab_size
    given = int(start == "first-token")
    n = len(ids) - given
    middle = [lm.bos_id] if start == "bos" else []
    table = _logits(lm, vectors.float(), [*middle, *ids])[-n - 1 : -1]
    bits, margin = _bits_and_margins(table, ids[given:])
    head = [lm.bos_id] if lm.bos_id is not None and start != "first-token" else []
    own = _logits(lm, None, [*head, *ids])[:-1][-n:]
    lm_bits, lm_margin = _bits_and_margins(own, ids[len(ids) - len(own) :])
    if len(lm_bits) < n:  # no token starts a text: the first one costs log2 V
        lm_bits = np.concatenate([[math.log2(V)], lm_bits])
        lm_margin = np.concatenate([[-1.0], lm_margin])
    first = [ids[0]] if given else None
    decoded = decode_ids(
        lm, vectors.float()[None], [len(ids)], start=start, first=first, cached=False
    )[0]
    error = first_error(decoded, ids)
    h = n if error is None else error - given
    right, base = margin > 0, lm_margin > 0
    found: dict[str, Any] = {
        "tokens": len(ids),
        "predicted": n,
        "exact": error is None,
        "horizon": h,
        "accuracy": float(right.mean()),
        "margin": float(margin.min()),
        "lm_bits": float(lm_bits.sum()),
        "mem_bits": float(bits.sum()),
        "information_gain": float(lm_bits.sum() - bits.sum()),
        "token_gain": int(right.sum()) - int(base.sum()),
        "lm_right": int(base.sum()),
        "ties": int((np.abs(margin) < TIE[_dtype(lm)]).sum()),
        "lm_ties": int((np.abs(lm_margin) < TIE[_dtype(lm)]).sum()),
        "positions": float(np.abs(positions.numpy()[:2] - np.stack([lm_bits, bits])).max()),
    }
    h = int(row["horizon"])  # gains over the stored horizon, so that a flipped tie counts once
    found["horizon_gain"] = float(lm_bits[:h].sum() - bits[:h].sum())
    found["horizon_token_gain"] = int(right[:h].sum()) - int(base[:h].sum())
    found["extra"] = _extras(lm, row, ids, before, given, lm_bits, lm_margin)
    return found


def _extras(
    lm: FrozenLM,
    row: dict[str, Any],
    ids: tuple[int, ...],
    before: tuple[int, ...],
    given: int,
    lm_bits: Floats,
    lm_margin: Floats,
) -> dict[str, list[float]]:
    """What protocols measured besides, as lists of numbers."""
    from memvec.capacity.copy import BEFORE, BETWEEN

    stored = json.loads(row["extra"])
    found: dict[str, list[float]] = {}
    head = [lm.bos_id] if lm.bos_id is not None else []
    truth = ids[given:]

    def after(prefix: list[int]) -> list[float]:
        logits = _logits(lm, None, [*head, *prefix, *ids])[-len(truth) - 1 : -1]
        bits, margin = _bits_and_margins(logits, truth)
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


def _compare(
    row: dict[str, Any], found: dict[str, Any], dtype: str, worst: dict[str, float]
) -> list[str]:
    """Sentences about columns that disagree; notes the largest difference of each column."""
    n, ties, lm_ties = found["predicted"], found["ties"], found["lm_ties"]
    loose = BITS[dtype] * n
    allowed: dict[str, float] = {
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
        "horizon": math.inf if ties else 0,  # after a flipped tie everything may follow
        "exact": 1 if ties else 0,
    }
    wrong = []
    for name, limit in allowed.items():
        stored = row[name]
        gap = abs(float(stored) - float(found[name])) if stored is not None else math.inf
        if math.isfinite(gap):
            worst[name] = max(worst.get(name, 0.0), gap)
        if gap > limit:
            wrong.append(_sentence(row, name, stored, found[name]))
    worst["positions"] = max(worst.get("positions", 0.0), found["positions"])
    if found["positions"] > 50 * BITS[dtype]:
        wrong.append(_sentence(row, "positions", "stored bits", found["positions"]))
    kept = _flat(json.loads(row["extra"]))
    if kept.keys() != found["extra"].keys():
        wrong.append(_sentence(row, "extra", sorted(kept), sorted(found["extra"])))
        return wrong
    for name, values in found["extra"].items():
        gaps = [abs(a - b) for a, b in zip(kept[name], values, strict=True)]
        limits = [loose, n * 0.05 + 1]
        key = name.split()[0]
        worst[key] = max(worst.get(key, 0.0), gaps[0])
        if any(gap > limit for gap, limit in zip(gaps, limits, strict=False)):
            wrong.append(_sentence(row, name, kept[name], values))
    return wrong


def _flat(extra: dict[str, Any]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for n, values in extra.get("context", {}).items():
        found[f"context {n}"] = [float(v) for v in values]
    if extra.get("copy"):
        found["copy"] = [float(v) for v in extra["copy"]]
    if "needed_bits" in extra:
        found["needed_bits"] = [float(extra["needed_bits"])]
    return found


def _sentence(row: dict[str, Any], name: str, stored: Any, found: Any) -> str:
    return (
        f"cell {row['cell']} ({row['protocol']}, {row['source']}), passage {row['number']}: "
        f"{name} is stored as {stored} and recomputed as {found}."
    )


@torch.no_grad()
def _logits(lm: FrozenLM, vectors: Tensor | None, ids: list[int | None]) -> Floats:
    """(K + N, V) logits of the model's own forward on [vectors, ids], float64."""
    table = torch.tensor([[i for i in ids if i is not None]], device=lm.device)
    if vectors is None:
        out = lm.model(input_ids=table, use_cache=False)
    else:
        front = vectors.to(lm.device, lm.dtype)[None]
        inputs = torch.cat([front, lm.embedding(table)], dim=1)
        out = lm.model(inputs_embeds=inputs, use_cache=False)
    logits: Floats = out.logits[0].double().cpu().numpy()
    return logits


def _bits_and_margins(logits: Floats, ids: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Per position: -log2 p of the true token, and its logit minus the best other one."""
    rows = np.arange(len(ids))
    truth = np.asarray(ids)
    top = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    true = logits[rows, truth]
    others = logits.copy()
    others[rows, truth] = -np.inf
    return (total - true) / math.log(2), true - others.max(1)


def _dtype(lm: FrozenLM) -> str:
    return str(lm.dtype).removeprefix("torch.")
