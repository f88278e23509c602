"""How few stored bits hold a text? Vectors in every storage format, with and without corrections.

    python benchmarks/bits.py --quick

Passages that are longer than any vector can hold are crammed for a fixed number of steps. Held
tokens are the leading ones that free-running decoding gives back from the stored vectors; the
corrections among them count as given back. A row of the table is a mean over n passages with its
standard error (`_error`):

- `stored_bits`: bits of a stored vector, scales included;
- `tokens`: held tokens per vector;
- `bits_held`: what the model alone needs for the held tokens (H_LM), corrections excluded, in bits
  per vector; `share_of_bits` is this divided by `stored_bits`;
- `bytes_per_text_byte`: bytes of the file (packed numbers, scales, and corrections as
  variable-length integers) divided by the bytes of the text of the held tokens;
- `at_end`: passages that come back whole, corrections included: where it is not 0, a longer passage
  might have had more held tokens;
- `length`: tokens of a passage; `overlap`: passages that share tokens with another one.

Further rows have the bytes of whole passages without vectors: xz and zstd of all passages joined,
arithmetic coding with the same model (H_LM / 8), and corrections alone (the model decodes after its
BOS, and every token that it misses is listed). Passages for four vectors are four times as long.

RESULT has held tokens per vector (`tokens_float32`, ...) and bytes per text byte (`bytes_float32`,
...) of single vectors without corrections, the combination of vectors and corrections with the
fewest bytes per text byte (`bytes_cheapest`, and its stored bits per vector, its corrections and
its passage length), and bytes per text byte without vectors for passages of that length (`xz`,
`zstd`, `arithmetic`, `corrections_alone`).

`--quick` has 4 passages of 72 tokens, 60 steps and one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from common import arguments, report
from memvec import metrics
from memvec.cli.program import run_program
from memvec.corrections import size
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome, position_scores
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
    """What the vectors of one storage format hold, and their bytes per byte of text.

    Means over the passages, with standard errors.
    """
    tokens, bits, prices = [], [], []
    vector_bytes = STORAGES[storage].size(K, lm.width)
    for outcome in outcomes:
        horizon = outcome.metrics.horizon
        counted = [
            (position, token) for position, token in outcome.corrections if position < horizon
        ]
        surprise = (
            surprisals(lm, outcome.passage.ids[:horizon]).double() if horizon else torch.zeros(1)
        )
        corrected_bits = sum(float(surprise[position]) for position, _ in counted)
        tokens.append(horizon / K)
        bits.append((float(surprise.sum()) - corrected_bits) / K)
        prices.append(
            (vector_bytes + size([counted])) / max(1, text_bytes(lm, outcome.passage.ids[:horizon]))
        )
    row: dict[str, Any] = {"stored_bits": 8.0 * vector_bytes / K}
    row["at_end"] = sum(o.metrics.horizon == len(o.passage.ids) for o in outcomes)
    for name, values in (("tokens", tokens), ("bits_held", bits), ("bytes_per_text_byte", prices)):
        row[name], row[f"{name}_error"] = metrics.mean_and_error(values)
    return row | {"share_of_bits": row["bits_held"] / row["stored_bits"]}


def without_vectors(lm: FrozenLM, passages: list[Passage]) -> dict[str, tuple[float, float]]:
    """Bytes per byte of text of methods without vectors: (mean, standard error).

    The standard error is NaN for xz and zstd, which compress all passages joined.
    """
    lm_bits = [float(surprisals(lm, passage.ids).double().sum()) for passage in passages]
    texts = [lm.text(list(passage.ids)).encode() for passage in passages]
    joined = byte_account(b"".join(texts), 0, sum(lm_bits))
    no_vectors = torch.zeros(len(passages), 1, lm.width)
    margin = position_scores(lm, no_vectors, passages, "vectors").lm_margin
    corrections_alone = []
    for passage, margins, text in zip(passages, margin, texts, strict=True):
        missed = [(i, t) for i, t in enumerate(passage.ids) if not margins[i] > 0]
        corrections_alone.append(size([missed]) / len(text))
    arithmetic = [bits / 8 / len(text) for bits, text in zip(lm_bits, texts, strict=True)]
    text_size = sum(map(len, texts))
    return {
        "xz": (joined["xz"] / text_size, float("nan")),
        "zstd": (joined["zstd"] / text_size, float("nan")),
        "arithmetic": metrics.mean_and_error(arithmetic),
        "corrections-alone": metrics.mean_and_error(corrections_alone),
    }


def measured(
    lm: FrozenLM,
    combinations: list[tuple[str, int, int]],
    texts: dict[int, list[Passage]],
    steps: int,
) -> list[dict[str, Any]]:
    """A row for each combination (storage, K, corrections), and for each method without vectors.

    `texts`: the passages for each K.
    """
    rows: list[dict[str, Any]] = []

    def columns_of_passages(K: int) -> dict[str, Any]:
        overlap = overlapping(texts[K])
        return {"length": len(texts[K][0]), "n": len(texts[K]), "overlap": overlap}

    for storage, K, corrections in combinations:
        recipe = Recipe.of("default", steps=steps, corrections=corrections)
        engine = Engine(lm, recipe, vectors=K, batch_size=min(len(texts[K]), 16), storage=storage)
        outcomes = list(engine.run(texts[K]))
        columns = {
            "storage": storage,
            "vectors": K,
            "corrections": corrections,
        } | columns_of_passages(K)
        rows.append(columns | held(lm, outcomes, storage, K))
    for K, passages in texts.items():
        for name, (price, error) in without_vectors(lm, passages).items():
            row = dict.fromkeys(rows[0], "") | {"storage": name} | columns_of_passages(K)
            row |= {"bytes_per_text_byte": price, "bytes_per_text_byte_error": error}
            rows.append(row)
    return rows


def result_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The RESULT line: the cheapest combination, and methods without vectors for its passages."""
    with_vectors = [row for row in rows if row["vectors"]]
    best = min(with_vectors, key=lambda row: row["bytes_per_text_byte"])
    uncorrected = {
        row["storage"]: row
        for row in with_vectors
        if (row["vectors"], row["corrections"]) == (1, 0)
    }
    methods = {
        row["storage"]: row["bytes_per_text_byte"]
        for row in rows
        if not row["vectors"] and row["length"] == best["length"]
    }
    return {
        "tokens_float32": uncorrected["float32"]["tokens"],
        "tokens_int8": uncorrected["int8"]["tokens"],
        "tokens_int4": uncorrected["int4"]["tokens"],
        "bytes_float32": uncorrected["float32"]["bytes_per_text_byte"],
        "bytes_int4": uncorrected["int4"]["bytes_per_text_byte"],
        "bytes_cheapest": best["bytes_per_text_byte"],
        "cheapest_bits": best["stored_bits"],
        "cheapest_corrections": best["corrections"],
        "cheapest_length": best["length"],
        **{name.replace("-", "_"): bytes_per_byte for name, bytes_per_byte in methods.items()},
    }


def main() -> None:
    """Cram with every storage format, and with corrections for the smallest; compare the bytes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--passages", type=int, default=32, help="of each K")
    parser.add_argument("--tokens", type=int, default=120, help="of a passage, per vector")
    parser.add_argument("--steps", type=int, default=400, help="of each passage")
    options = parser.parse_args()
    n, T, steps = (
        (4, 72, 60) if options.quick else (options.passages, options.tokens, options.steps)
    )
    lm = load_lm(options.model, dtype="float32")
    combinations = [(name, 1, 0) for name in STORAGES]
    combinations += [("int4", 1, N) for N in ((6,) if options.quick else (1, 2, 4, 8, 16))]
    if not options.quick:
        combinations += [(name, 4, 0) for name in STORAGES] + [("int4", 4, N) for N in (4, 16)]
    rows = measured(
        lm, combinations, {K: passages_of(lm, n, K * T) for _, K, _ in combinations}, steps
    )
    report("bits", rows, options, **result_of(rows))


if __name__ == "__main__":
    run_program(main)
