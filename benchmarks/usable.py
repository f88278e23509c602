"""How well do usable vectors stand for their text? Compared with the last tokens of the text.

    python benchmarks/usable.py --corpus novels.parquet --passages 32

Passages are crammed by the preset 'usable' (memvec.usable), and then each context is measured on
the 48 tokens that follow the passage in its text, which cramming never saw. Measures of a context
are `kl`, the KL in nats per token from the model that has read the text; `kept`, the share kept of
what the text tells; and `over`, its KL divided by the KL of the vectors. Other contexts are
nothing, the last K, 2 K, 4 K and 8 K tokens of the text, and exact-only vectors. docs/concepts.md
defines the terms.

`--in-a-row N` crams N passages that follow each other. Their vectors are read one after another, as
`memvec use` does, and are compared with those of the last passage alone. Only texts all of whose
passages are exact count: n is their number, `of` that of all texts. Intervals (`_low`, `_high`) are
95 % bootstrap intervals over texts.

`cost` is the forward-backward tokens of the usable vectors divided by those of exact-only vectors
of the same number from noise; a pass of the encoder, if it is the start, counts as one of them.
`cost_queries` also has the queries: they are sampled after the text by forward passes, which count
a half (a backward pass to the vectors alone costs as much as a forward pass).

`--keep FOLDER` writes the measures of each text to a file when its batch is done, and a later run
with the same settings reads them. So a run can be interrupted, can be continued with more passages,
and can be divided among processes: `--skip 64` leaves out the first 64. Empty the folder after a
change of the code: the name of a file depends on the settings, and not on the code.

RESULT is for the first length of --tokens and the first K of --vectors: `exact` (share of texts),
`kept`, `kl`, `kl_none` (no context) and `kl_exact_only` (nats per token), `over_truncation` (KL of
the last N K tokens divided by KL of the vectors, with N 2 for passages below 48 tokens and 4 from
48 on; above 1 the vectors are better) with its interval, `cost` and `cost_queries`.

`--quick` has a tiny model with random weights and 4 passages of 6 tokens in 2 vectors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common import arguments, report, save_figure, with_ends
from memvec.cli.common import recipe_of
from memvec.cli.program import run_program
from memvec.cramming.engine import Engine
from memvec.cramming.outcomes import Outcome
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_of, view_for
from memvec.decoding import BATCH
from memvec.errors import MemvecError, check_minimum
from memvec.loading import load_lm
from memvec.model.lm import FrozenLM
from memvec.passages.passage import Passage
from memvec.statistics import share_interval
from memvec.usable.certificate import score_table as tabulated
from memvec.usable.contexts import (
    EXACT_ONLY,
    NONE,
    VECTORS,
    Figures,
    after_each,
    contexts_of,
    contexts_of_row,
)
from memvec.usable.recipe_files import named_files
from memvec.writing import write_atomically
from models import SHAPES, random_model
from texts import passages_of

CONTINUATION = 48  # tokens after each passage
EXACT_FROM_NOISE = Recipe(start="noise", start_rule="bos")


def crammed(
    lm: FrozenLM, passages: list[Passage], recipe: Recipe, K: int, batch_size: int
) -> dict[int, Outcome]:
    """Cram the passages; number of the passage → its outcome."""
    engine = Engine(lm, recipe, vectors=K, batch_size=batch_size)
    return {outcome.passage.document: outcome for outcome in engine.run(passages)}


def in_a_row(outcomes: list[Outcome]) -> torch.Tensor | None:
    """The vectors (passages, K, D) of a text; None if one of its passages is not exact."""
    if not all(outcome.exact for outcome in outcomes):
        return None
    return torch.stack([outcome.vectors.float() for outcome in outcomes])


def measures(
    lm: FrozenLM, texts: list[Passage], T: int, K: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """For each text: the scores of its contexts, and what its vectors cost.

    `scores`: context → measures, or None if a passage is not exact. `spent` and `from_noise` are
    the forward-backward tokens of the usable vectors and of the exact-only ones.
    """
    parts, text_length = options.in_a_row, T * options.in_a_row
    passages = [
        Passage(text.ids[part * T : (part + 1) * T], text.document * parts + part)
        for text in texts
        for part in range(parts)
    ]
    usable_lm = view_for(lm, options.recipe)
    usable = crammed(lm, passages, options.recipe, K, options.batch_size)
    exact_only_outcomes = crammed(lm, passages, EXACT_FROM_NOISE, K, options.batch_size)
    encoder_tokens = parts * (1 + T + K) if start_of(lm, options.recipe) == "encoder" else 0
    measured = []
    for text in texts:
        passage_numbers = range(
            text.document * parts, (text.document + 1) * parts
        )  # of its passages
        scores = None
        if (text_vectors := in_a_row([usable[number] for number in passage_numbers])) is not None:
            contexts = contexts_of_row(usable_lm, text_vectors, text.ids[:text_length])
            # Exact-only vectors are read as they were crammed, with nothing in front.
            if (
                exact_only := in_a_row([exact_only_outcomes[number] for number in passage_numbers])
            ) is not None:
                plain_contexts = contexts_of(
                    lm, exact_only.flatten(0, 1), text.ids[:text_length], None
                )
                contexts[EXACT_ONLY] = plain_contexts[VECTORS]
            scores = after_each(lm, contexts, torch.tensor([text.ids[text_length:]]))
        measured.append(
            {
                "scores": scores,
                "spent": encoder_tokens + sum(usable[number].spent for number in passage_numbers),
                "from_noise": sum(exact_only_outcomes[number].spent for number in passage_numbers),
            }
        )
    return measured


def kept_or_measured(
    lm: FrozenLM, texts: list[Passage], T: int, K: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The `measures` of each text; those that are in the folder of `--keep` are read from there."""
    if options.keep is None:
        yield from measures(lm, texts, T, K, options)
        return
    files = {text: options.keep / f"{_settings(lm, text, T, K, options)}.json" for text in texts}
    missing = [text for text in texts if not files[text].exists()]
    options.keep.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(missing), options.batch_size):
        batch = missing[first : first + options.batch_size]
        for text, measured in zip(batch, measures(lm, batch, T, K, options), strict=True):
            write_atomically(files[text], json.dumps(measured).encode())
    for text in texts:
        measured = json.loads(files[text].read_text(encoding="utf-8"))
        if measured["scores"] is not None:
            scores = measured["scores"].items()
            measured["scores"] = {name: Figures(*figures) for name, figures in scores}
        yield measured


def _settings(lm: FrozenLM, text: Passage, T: int, K: int, options: argparse.Namespace) -> str:
    """A digest of everything that the measures of a text depend on, except the code."""
    encoder = options.encoder.read_bytes() if options.encoder else b""
    settings = {
        "model": lm.description(),
        "encoder": hashlib.sha256(encoder).hexdigest(),
        "recipe": asdict(options.recipe),
        "files": named_files(options.recipe),
        "text": (text.ids, text.document),
        "size": (T, K, options.in_a_row, CONTINUATION),
    }
    record = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(record.encode()).hexdigest()[:32]


def setting(
    lm: FrozenLM, texts: list[Passage], T: int, K: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(rows, numbers of RESULT) for passages of T tokens in K vectors; a row for each context."""
    parts, text_length = options.in_a_row, T * options.in_a_row
    of_texts = list(kept_or_measured(lm, texts, T, K, options))
    measured = [of_text["scores"] for of_text in of_texts if of_text["scores"] is not None]
    spent = sum(of_text["spent"] for of_text in of_texts)
    from_noise = sum(of_text["from_noise"] for of_text in of_texts)
    exact = share_interval(len(measured), len(texts))
    if not measured:
        raise MemvecError(
            f"no text of {text_length} tokens is exact in usable vectors ({K} for {T} tokens): "
            "lower --tokens or raise --vectors."
        )
    table = tabulated(measured, 1, CONTINUATION)
    rows = [
        {
            "model": lm.name,
            "tokens": T,
            "vectors": K,
            "passages": parts,
            "context": name,
            "n": len(measured),
            "of": len(texts),
            **columns_of(score),
        }
        for name, score in table.contexts.items()
    ]
    last_tokens = table.contexts.get(f"last {(2 if T < CONTINUATION else 4) * K * parts} tokens")
    vectors = table.contexts[VECTORS]
    result = {
        "exact": exact.share,
        "kept": vectors.kept,
        "kl": vectors.kl,
        "kl_none": table.contexts[NONE].kl,
        "kl_exact_only": table.contexts[EXACT_ONLY].kl if EXACT_ONLY in table.contexts else 0.0,
        "cost": spent / from_noise,
        "cost_queries": (spent + len(texts) * parts * query_tokens(T, options.recipe) / 2)
        / from_noise,
    }
    if last_tokens is not None:
        ratio = (last_tokens.over_vectors, *last_tokens.over_vectors_interval)
        result |= with_ends("over_truncation", ratio)
    return rows, result


def columns_of(score: Any) -> dict[str, float]:
    """The measures of a context, each with the ends of its 95 % interval over texts."""
    return {
        "kl": score.kl,
        "kl_low": score.kl_interval[0],
        "kl_high": score.kl_interval[1],
        "kept": score.kept,
        "kept_low": score.kept_interval[0],
        "kept_high": score.kept_interval[1],
        "over": score.over_vectors,
        "over_low": score.over_vectors_interval[0],
        "over_high": score.over_vectors_interval[1],
    }


def query_tokens(T: int, recipe: Recipe) -> int:
    """Tokens that forward passes read to sample the queries of a passage.

    It reads BOS and the text once for each `BATCH` queries, and then, with the cache, all tokens of
    each query but the last. The predictions of these passes are also the targets of the queries, so
    nothing is read a second time. (A model whose cache cannot be copied, such as Mamba, reads the
    text for each query; that is not counted.)
    """
    readings = -(-recipe.query_count // BATCH)
    return readings * (T + 1) + recipe.query_count * (recipe.query_tokens - 1)


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the KL of every context against the length."""
    names = list(dict.fromkeys(row["context"] for row in rows))
    for name in names:
        points = [row for row in rows if row["context"] == name]
        interval = [
            [r["kl"] - r["kl_low"] for r in points],
            [r["kl_high"] - r["kl"] for r in points],
        ]
        axes[0].errorbar(
            [f"{r['tokens']} in {r['vectors']}" for r in points],
            [r["kl"] for r in points],
            interval,
            marker="o",
            label=name,
        )
    axes[0].set_yscale("log")
    axes[0].set_xlabel("tokens in vectors")
    axes[0].set_ylabel("KL to the model with the text, nats per token")
    axes[0].legend()


def main() -> None:
    """Measure every length and number of vectors."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument(
        "--corpus", type=Path, help="parquet file of texts; default: examples/harbour.txt"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=(24, 48), help="lengths of passages"
    )
    parser.add_argument(
        "--vectors", type=int, nargs="+", default=(4,), help="numbers of vectors (K) of a passage"
    )
    parser.add_argument("--passages", type=int, default=32, help="number of texts")
    parser.add_argument(
        "--skip", type=int, default=0, help="number of texts to leave out, from the first on"
    )
    parser.add_argument("--keep", type=Path, help="folder for the measures of each text")
    parser.add_argument("--in-a-row", type=int, default=1, help="passages of each text")
    parser.add_argument("--batch-size", type=int, default=16, help="slots of a batch")
    parser.add_argument("--encoder", type=Path, help="file of a usable encoder")
    parser.add_argument("--preset", default="usable", help="recipe of the usable vectors")
    parser.add_argument("--set", nargs="*", default=[], help="changes to the recipe, name=value")
    options = parser.parse_args()
    check_minimum(1, in_a_row=options.in_a_row, passages=options.passages)
    check_minimum(0, skip=options.skip)
    if options.keep is not None and options.keep.exists() and not options.keep.is_dir():
        raise MemvecError(f"--keep {options.keep} is a file: name a folder.")
    options.recipe = recipe_of(options.preset, options.set)
    if options.quick:
        options.shape, options.tokens, options.vectors = "tiny-llama", (6,), (2,)
        options.passages = 4
        options.recipe = Recipe.of("usable", settle=60, decay=60, query_tokens=8, query_count=4)
    if options.skip >= options.passages:
        raise MemvecError(f"--skip {options.skip} leaves none of the {options.passages} passages.")
    lm = (
        random_model(options.shape)
        if options.shape
        else load_lm(options.model, encoder=options.encoder)
    )
    rows: list[dict[str, Any]] = []
    first_result: dict[str, float] = {}
    for T in options.tokens:
        length = T * options.in_a_row + CONTINUATION
        texts = passages_of(lm, options.passages, length, corpus=options.corpus)
        for K in options.vectors:
            new_rows, result = setting(lm, texts[options.skip :], T, K, options)
            rows += new_rows
            first_result = first_result or result
            print(f"{T} tokens in {K} vectors: " + _line(result), flush=True)
    save_figure(options.out / "usable", lambda axes: draw(axes, rows), 1)
    report("usable", rows, options, **first_result)


def _line(result: dict[str, float]) -> str:
    """The numbers as text, on one line."""
    return " ".join(f"{name}={value:.3f}" for name, value in result.items())


if __name__ == "__main__":
    run_program(main)
