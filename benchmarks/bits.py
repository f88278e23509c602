"""How few stored bits hold a text: vectors of every storage, with and without corrections.

    python benchmarks/bits.py --quick

Passages longer than anything that fits are crammed for a fixed number of steps; the leading tokens
that free-running decoding gives back from the stored vectors (with the corrections among them) are
what is held. Bytes are those of the file: packed numbers, scales, corrections as variable-length
integers; text bytes are those of the tokens held. Beside them, for the same passages (`length`
tokens; four vectors have passages of four times the length): xz and zstd of all of them joined,
arithmetic coding with the same model (H_LM / 8), and corrections alone (the model decodes after
its BOS, and every token that it misses is listed). Rows carry the mean over n passages and its
standard error; `overlap` counts the passages that share tokens with another one. RESULT names the
cheapest mix of vectors and corrections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from common import arguments, report, run
from memvec import metrics
from memvec.corrections import size
from memvec.cramming.certify import Outcome, positions
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.lab.compressors import byte_account
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.cutting import surprisals
from memvec.passages.passage import Passage
from memvec.storage import STORAGES
from texts import overlapping, passages_of


def text_bytes(lm: FrozenLM, ids: Sequence[int]) -> int:
    """Bytes of the text of these tokens."""
    return len(lm.text(list(ids)).encode())


def held(lm: FrozenLM, outcomes: list[Outcome], storage: str, K: int) -> dict[str, Any]:
    """What the vectors of one storage hold, and at what price."""
    tokens, bits, price = [], [], []
    vector_bytes = STORAGES[storage].size(K, lm.width)
    for o in outcomes:
        h = o.metrics.horizon
        within = [(position, token) for position, token in o.corrections if position < h]
        surprise = surprisals(lm, o.passage.ids[:h]).double() if h else torch.zeros(1)
        listed = sum(float(surprise[position]) for position, _ in within)
        tokens.append(h / K)
        bits.append((float(surprise.sum()) - listed) / K)
        price.append((vector_bytes + size([within])) / max(1, text_bytes(lm, o.passage.ids[:h])))
    row: dict[str, Any] = {"stored_bits": 8.0 * vector_bytes / K}
    for name, values in (("tokens", tokens), ("bits_held", bits), ("bytes_per_text_byte", price)):
        row[name], row[f"{name}_error"] = metrics.mean_and_error(values)
    return row | {"share_of_bits": row["bits_held"] / row["stored_bits"]}


def beside(lm: FrozenLM, passages: list[Passage]) -> dict[str, tuple[float, float]]:
    """Bytes per text byte (mean, standard error) of what needs no vectors."""
    lm_bits = [float(surprisals(lm, p.ids).double().sum()) for p in passages]
    texts = [lm.text(list(p.ids)).encode() for p in passages]
    joined = byte_account(b"".join(texts), 0, sum(lm_bits))
    nothing = torch.zeros(len(passages), 1, lm.width)
    margin = positions(lm, nothing, passages, "vectors").lm_margin
    alone = []
    for p, row, text in zip(passages, margin, texts, strict=True):
        missed = [(i, t) for i, t in enumerate(p.ids) if not row[i] > 0]
        alone.append(size([missed]) / len(text))
    each = [bits / 8 / len(text) for bits, text in zip(lm_bits, texts, strict=True)]
    whole = sum(map(len, texts))
    return {
        "xz": (joined["xz"] / whole, float("nan")),
        "zstd": (joined["zstd"] / whole, float("nan")),
        "arithmetic": metrics.mean_and_error(each),
        "corrections-alone": metrics.mean_and_error(alone),
    }


def measured(
    lm: FrozenLM, mixes: list[tuple[str, int, int]], texts: dict[int, list[Passage]], steps: int
) -> list[dict[str, Any]]:
    """A row for each mix (storage, K, corrections) on the passages of its K, and of those beside.

    `texts`: the passages for each K.
    """
    rows: list[dict[str, Any]] = []

    def of(K: int) -> dict[str, Any]:
        shared = overlapping(texts[K])
        return {"length": len(texts[K][0]), "n": len(texts[K]), "overlap": shared}

    for storage, K, corrections in mixes:
        recipe = Recipe.of("default", steps=steps, corrections=corrections)
        engine = Engine(lm, recipe, vectors=K, batch_size=min(len(texts[K]), 16), storage=storage)
        outcomes = list(engine.run(texts[K]))
        what = {"storage": storage, "vectors": K, "corrections": corrections} | of(K)
        rows.append(what | held(lm, outcomes, storage, K))
    for K, passages in texts.items():
        for name, (price, error) in beside(lm, passages).items():
            row = dict.fromkeys(rows[0], "") | {"storage": name} | of(K)
            row |= {"bytes_per_text_byte": price, "bytes_per_text_byte_error": error}
            rows.append(row)
    return rows


def result_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The RESULT line: the cheapest mix, and what needs no vectors on the passages of that mix."""
    priced = [row for row in rows if row["vectors"]]
    best = min(priced, key=lambda row: row["bytes_per_text_byte"])
    plain = {
        row["storage"]: row for row in priced if (row["vectors"], row["corrections"]) == (1, 0)
    }
    others = {
        row["storage"]: row["bytes_per_text_byte"]
        for row in rows
        if not row["vectors"] and row["length"] == best["length"]
    }
    return {
        "tokens_float32": plain["float32"]["tokens"],
        "tokens_int8": plain["int8"]["tokens"],
        "tokens_int4": plain["int4"]["tokens"],
        "bytes_float32": plain["float32"]["bytes_per_text_byte"],
        "bytes_int4": plain["int4"]["bytes_per_text_byte"],
        "bytes_cheapest": best["bytes_per_text_byte"],
        "cheapest_bits": best["stored_bits"],
        "cheapest_corrections": best["corrections"],
        "cheapest_length": best["length"],
        **{name.replace("-", "_"): price for name, price in others.items()},
    }


def main() -> None:
    """Cram every storage without corrections, the smallest one with them; compare the bytes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    n, T, steps = (
        (4, 40, 60) if options.quick else (options.passages, options.tokens, options.steps)
    )
    lm = load_lm(options.model, dtype="float32")
    mixes = [(name, 1, 0) for name in STORAGES]
    mixes += [("int4", 1, N) for N in ((6,) if options.quick else (1, 2, 4, 8, 16))]
    if not options.quick:
        mixes += [(name, 4, 0) for name in STORAGES] + [("int4", 4, N) for N in (4, 16)]
    rows = measured(lm, mixes, {K: passages_of(lm, n, K * T) for _, K, _ in mixes}, steps)
    report("bits", rows, options, **result_of(rows))


if __name__ == "__main__":
    run(main)
