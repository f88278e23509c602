"""How large must a margin be? Changes of margins when vectors are decoded in another way.

    python benchmarks/margins.py --quick

Passages are crammed until the margin of every token is above 0. Then the margin of every position
is computed again in the other ways in which the same vectors may be decoded: in bfloat16 instead of
float32, one passage at a time instead of 32 (`batch`), and one token at a time with the cache
instead of all tokens at once (`cached`). A recipe's margin must be larger than the change of a
margin from one way to another.

The table has a row for each way, over all positions of the exact passages: the median, the 99th
percentile and the largest absolute change of a margin in logits, and the share of positions whose
arg-max would flip if every margin were at least 0, 0.1, 0.25, 0.5 or 1 logits, or the default
recipe's margin (`default_margin`, logits).

RESULT has the largest change in logits of the rows in float32 and of those in bfloat16, the default
recipe's margin in logits, and the largest share of flips of any row at that margin (`flips`) and at
half a logit (`flips_at_half`). `--quick` has 32 passages instead of 64, and 200 steps.
"""

from __future__ import annotations

import torch

from common import arguments, report
from memvec import metrics
from memvec.cli.program import run_program
from memvec.cramming.engine import Engine
from memvec.cramming.recipe import Recipe
from memvec.loading import load_lm
from memvec.model.caching import cached_logits
from memvec.model.lm import FrozenLM
from models import SHAPES, random_model
from texts import passages_of


@torch.no_grad()
def margins(
    lm: FrozenLM, vectors: torch.Tensor, ids: torch.Tensor, batch: int, cached: bool
) -> torch.Tensor:
    """Margins (passages, T), logits, of vectors (passages, K, D) and ids (passages, T).

    `batch` passages are computed at once; `cached` computes one token at a time with the cache.
    """
    parts = []
    for first in range(0, len(ids), batch):
        part_vectors, part_ids = (
            vectors[first : first + batch].to(lm.device),
            ids[first : first + batch].to(lm.device),
        )
        logits = (
            cached_logits(lm.model, lm.caching.argument, part_vectors.to(lm.dtype), part_ids)
            if cached
            else lm.logits(part_vectors, part_ids)
        )
        parts.append(metrics.margins(logits, part_ids).cpu())
    return torch.cat(parts)


def main() -> None:
    """Cram, then compute the margins in every way."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, help="a random-weight model instead of --model")
    parser.add_argument("--passages", type=int, default=64, help="to cram")
    parser.add_argument("--tokens", type=int, default=12, help="of each passage")
    options = parser.parse_args()
    n = 32 if options.quick else options.passages

    def loaded(dtype: str) -> FrozenLM:
        if options.shape:
            return random_model(options.shape, dtype=getattr(torch, dtype))
        return load_lm(options.model, dtype=dtype)

    lm = loaded("float32")
    recipe = Recipe.of("default", margin=0.0, steps=200 if options.quick else 1000)
    engine = Engine(lm, recipe, batch_size=32)
    exact_outcomes = [
        outcome for outcome in engine.run(passages_of(lm, n, options.tokens)) if outcome.exact
    ]
    if not exact_outcomes:
        parser.error(f"no passage of {options.tokens} tokens became exact: fewer --tokens")
    vectors = torch.stack([outcome.vectors for outcome in exact_outcomes])
    ids = torch.tensor([outcome.passage.ids for outcome in exact_outcomes])
    base_margins = margins(lm, vectors, ids, 32, cached=False)
    default_margin = Recipe().in_logits(lm.logit_spread).margin
    rows, largest = [], {}
    for dtype in ("float32", "bfloat16"):
        model_of_dtype = lm if dtype == "float32" else loaded(dtype)
        for batch in (1, 32):
            for cached in (False, True):
                change = (
                    (margins(model_of_dtype, vectors, ids, batch, cached) - base_margins)
                    .abs()
                    .flatten()
                )
                flips = {
                    min_margin: float(
                        (change >= base_margins.flatten().clamp_min(min_margin)).float().mean()
                    )
                    for min_margin in (0.0, 0.1, 0.25, 0.5, 1.0, default_margin)
                }
                rows.append(
                    {
                        "dtype": dtype,
                        "batch": batch,
                        "cached": cached,
                        "passages": len(exact_outcomes),
                        "positions": len(change),
                        "median_change": float(change.median()),
                        "p99_change": float(change.quantile(0.99)),
                        "largest_change": float(change.max()),
                        **{
                            f"flips_at_{min_margin:g}": flips[min_margin]
                            for min_margin in (0.0, 0.1, 0.25, 0.5, 1.0)
                        },
                        "default_margin": default_margin,
                        "flips_at_default": flips[default_margin],
                    }
                )
                largest[dtype] = max(largest.get(dtype, 0.0), float(change.max()))
    report(
        "margins",
        rows,
        options,
        float32=largest["float32"],
        bfloat16=largest["bfloat16"],
        default_margin=default_margin,
        flips=max(row["flips_at_default"] for row in rows),
        flips_at_half=max(row["flips_at_0.5"] for row in rows),
    )


if __name__ == "__main__":
    run_program(main)
