"""Exact and usable: vectors as context, compared with the last tokens of the text.

    python benchmarks/usable.py --corpus novels.parquet --passages 32

Passages are crammed by the preset 'usable' (memvec.usable), then each context is measured on the
48 tokens that truly follow, which cramming never saw: KL per token from the model that has read the
text, and the share of the text's gain that is kept. Controls: nothing, the last K, 2 K, 4 K and 8 K
tokens of the text, and vectors that are exact only. `--in-a-row N` crams N passages that follow
each other; their vectors stand one after the other, as `memvec use` has them, beside those of the
last passage alone. Only texts all of whose passages are exact count, and n says how many of how
many. `cost` is forward-backward tokens of a passage over those of exact-only vectors of the same
number from noise; the pass of an encoder that begins counts as one of them. `cost_queries` has the
queries besides: they are sampled after the text by forward passes, which count a half (a backward
pass to the vectors alone costs as much as a forward pass).

`--keep FOLDER` writes down the measures of each text when its batch is done, and a later run with
the same settings takes them from there. So a run can be interrupted, go on with more passages, or
be shared between processes: `--skip 64` leaves out the first 64. Empty the folder after a change of
the code: the file names say what was asked for, not which code answered.

RESULT is for the first --tokens and --vectors: `exact` (share of passages), `kept`, `kl` and
`kl_none` (nats per token), `over_truncation` (KL of the last N K tokens over KL of the vectors,
with N 2 below 48 tokens and 4 from there; above 1 the vectors are better), both costs.

`--quick` is a tiny random-weight model, and its RESULT is for that.
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

from common import arguments, report, run, save_figure, with_ends
from memvec.cli.common import recipe_of
from memvec.cramming.certify import Outcome
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.cramming.starts import start_of, triggered
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
    """Outcomes by the number of the passage."""
    engine = Engine(lm, recipe, vectors=K, batch_size=batch_size)
    return {outcome.passage.document: outcome for outcome in engine.run(passages)}


def in_a_row(outcomes: list[Outcome]) -> torch.Tensor | None:
    """The vectors (n, K, D) of the passages of a text; None if one of them is not exact."""
    if not all(outcome.exact for outcome in outcomes):
        return None
    return torch.stack([outcome.vectors.float() for outcome in outcomes])


def measures(
    lm: FrozenLM, texts: list[Passage], T: int, K: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Of each text: `scores` of every context (None where a passage is not exact), and the
    forward-backward tokens of the usable vectors (`spent`) and the exact-only ones (`from_noise`).
    """
    parts, whole = options.in_a_row, T * options.in_a_row
    passages = [
        Passage(text.ids[part * T : (part + 1) * T], text.document * parts + part)
        for text in texts
        for part in range(parts)
    ]
    view = triggered(lm, options.recipe)
    usable = crammed(lm, passages, options.recipe, K, options.batch_size)
    plain = crammed(lm, passages, EXACT_FROM_NOISE, K, options.batch_size)
    read = parts * (1 + T + K) if start_of(lm, options.recipe) == "encoder" else 0
    measured = []
    for text in texts:
        numbers = range(text.document * parts, (text.document + 1) * parts)  # of its passages
        scores = None
        if (row := in_a_row([usable[number] for number in numbers])) is not None:
            contexts = contexts_of_row(view, row, text.ids[:whole])
            # exact-only vectors as they were crammed: nothing in front
            if (exact_only := in_a_row([plain[number] for number in numbers])) is not None:
                plain_contexts = contexts_of(lm, exact_only.flatten(0, 1), text.ids[:whole], None)
                contexts[EXACT_ONLY] = plain_contexts[VECTORS]
            scores = after_each(lm, contexts, torch.tensor([text.ids[whole:]]))
        measured.append(
            {
                "scores": scores,
                "spent": read + sum(usable[number].spent for number in numbers),
                "from_noise": sum(plain[number].spent for number in numbers),
            }
        )
    return measured


def kept_or_measured(
    lm: FrozenLM, texts: list[Passage], T: int, K: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """`measures` of each text, by batches of texts; those in the folder `--keep` are read there."""
    if options.keep is None:
        yield from measures(lm, texts, T, K, options)
        return
    files = {text: options.keep / f"{_settings(lm, text, T, K, options)}.json" for text in texts}
    missing = [text for text in texts if not files[text].exists()]
    options.keep.mkdir(parents=True, exist_ok=True)
    for at in range(0, len(missing), options.batch_size):
        batch = missing[at : at + options.batch_size]
        for text, measured in zip(batch, measures(lm, batch, T, K, options), strict=True):
            write_atomically(files[text], json.dumps(measured).encode())
    for text in texts:
        measured = json.loads(files[text].read_text(encoding="utf-8"))
        if measured["scores"] is not None:
            scores = measured["scores"].items()
            measured["scores"] = {name: Figures(*figures) for name, figures in scores}
        yield measured


def _settings(lm: FrozenLM, text: Passage, T: int, K: int, options: argparse.Namespace) -> str:
    """A digest of the model, the recipe, the files that both name, the text and the sizes."""
    encoder = options.encoder.read_bytes() if options.encoder else b""
    deciding = {
        "model": lm.description(),
        "encoder": hashlib.sha256(encoder).hexdigest(),
        "recipe": asdict(options.recipe),
        "files": named_files(options.recipe),
        "text": (text.ids, text.document),
        "size": (T, K, options.in_a_row, CONTINUATION),
    }
    text_of_all = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(text_of_all.encode()).hexdigest()[:32]


def setting(
    lm: FrozenLM, texts: list[Passage], T: int, K: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(a row for each context, the RESULT) for passages of T tokens in K vectors each."""
    parts, whole = options.in_a_row, T * options.in_a_row
    of_texts = list(kept_or_measured(lm, texts, T, K, options))
    measured = [of_text["scores"] for of_text in of_texts if of_text["scores"] is not None]
    spent = sum(of_text["spent"] for of_text in of_texts)
    from_noise = sum(of_text["from_noise"] for of_text in of_texts)
    exact = share_interval(len(measured), len(texts))
    if not measured:
        raise SystemExit(
            f"no text of {whole} tokens is exact in usable vectors, {K} for {T} tokens"
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
    rival = table.contexts.get(f"last {(2 if T < CONTINUATION else 4) * K * parts} tokens")
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
    if rival is not None:
        over = (rival.over_vectors, *rival.over_vectors_interval)
        result |= with_ends("over_truncation", over)
    return rows, result


def columns_of(score: Any) -> dict[str, float]:
    """The measures of a context, each with its 95 % interval over texts; KL in nats per token."""
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

    BOS and the text once for each `BATCH` queries, and through the cache all of each query but its
    last token. What the model says on the way is what the queries teach: nothing is read a second
    time. (A model whose cache cannot be repeated, as Mamba's, reads the text for each query.)
    """
    readings = -(-recipe.query_count // BATCH)
    return readings * (T + 1) + recipe.query_count * (recipe.query_tokens - 1)


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """KL of every context, by length."""
    names = list(dict.fromkeys(row["context"] for row in rows))
    for name in names:
        line = [row for row in rows if row["context"] == name]
        error = [[r["kl"] - r["kl_low"] for r in line], [r["kl_high"] - r["kl"] for r in line]]
        axes[0].errorbar(
            [f"{r['tokens']} in {r['vectors']}" for r in line],
            [r["kl"] for r in line],
            error,
            marker="o",
            label=name,
        )
    axes[0].set_yscale("log")
    axes[0].set_xlabel("tokens in vectors")
    axes[0].set_ylabel("KL to the model with the text, nats per token")
    axes[0].legend()


def main() -> None:
    """Every length and number of vectors."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--corpus", type=Path, help="held-out texts; default: our own prose")
    parser.add_argument("--tokens", type=int, nargs="+", default=(24, 48))
    parser.add_argument("--vectors", type=int, nargs="+", default=(4,))
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first of them")
    parser.add_argument("--keep", type=Path, help="folder with the measures of each text")
    parser.add_argument("--in-a-row", type=int, default=1, help="passages of each text")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--encoder", type=Path, help="file of a usable encoder")
    parser.add_argument("--preset", default="usable", help="a recipe of usable vectors")
    parser.add_argument("--set", nargs="*", default=(), help="fields of the recipe, name=value")
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
    first: dict[str, float] = {}
    for T in options.tokens:
        length = T * options.in_a_row + CONTINUATION
        texts = passages_of(lm, options.passages, length, corpus=options.corpus)
        for K in options.vectors:
            more, result = setting(lm, texts[options.skip :], T, K, options)
            rows += more
            first = first or result
            print(f"{T} tokens in {K} vectors: " + _line(result), flush=True)
    save_figure(options.out / "usable", lambda axes: draw(axes, rows), 1)
    report("usable", rows, options, **first)


def _line(result: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.3f}" for name, value in result.items())


if __name__ == "__main__":
    run(main)
